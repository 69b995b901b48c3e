"""JAX functions as networks; gradients by a vector-Jacobian product."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from assay.core.errors import ModelError
from assay.core.optional import need
from assay.models.bridges.function import NOTE, Outside, digest
from assay.models.bridges.layout import Layout
from assay.models.loaded import Loaded


def bridge(model: Any) -> Loaded:
    """Make a network of a jitted function from arrays (b, *f) to logits (b, c).

    Raises:
        ModelError: it is no function.
    """
    if not callable(model):
        raise ModelError(
            "a JAX function from arrays (b, *f) to logits (b, c)", type(model).__name__, "Pass jax.jit(f)."
        )
    return Loaded(from_jax(model), notes=(NOTE.format("JAX"),), name=getattr(model, "__name__", "jax"))


def from_jax(fn: Callable[[Any], Any], shape: tuple[int | None, ...] | None = None) -> Outside:
    """Make a network of a function on JAX arrays, jitted or not: ``assay.Model(from_jax(f, (28, 28, 1)))``.

    Args:
        fn: from float32 arrays (b, *shape) to logits (b, c), pure.
        shape: of one sample as fn takes it, channels last for images; None for samples as they are, (c, h, w).

    Example:
        >>> net = from_jax(lambda x: x @ jax.numpy.eye(2))  # doctest: +SKIP
        >>> assay.evaluate(assay.Model(net), data, "l2:0.5")  # doctest: +SKIP
    """
    layout = Layout(shape, channels_last=shape is not None)
    return network(lambda _, x: fn(x), lambda: (), layout, lambda: digest([fn]))


def network(
    fn: Callable[[Any, Any], Any], held: Callable[[], Any], layout: Layout, fingerprint: Callable[[], str]
) -> Outside:
    """Compile a function of what it holds and of arrays (b, *shape), and its gradient by the latter.

    Batches are filled up to powers of two, for each new size is compiled anew. Arrays go over as they lie in memory
    (DLPack). The gradient computes the outputs anew.
    """
    jax = need("jax", "jax")
    forward = jax.jit(fn)
    pullback = jax.jit(lambda held, x, g: jax.vjp(lambda v: fn(held, v), x)[1](g)[0])

    def there(t: Tensor) -> Any:
        return jax.dlpack.from_dlpack(_filled(t))

    def back(a: Any, rows: int) -> Tensor:
        return torch.utils.dlpack.from_dlpack(a.block_until_ready())[:rows]

    def outputs(x: Tensor) -> Tensor:
        return back(forward(held(), there(x)), len(x)).float().clone()  # its memory may be that of a constant

    def slopes(x: Tensor, g: Tensor) -> Tensor:
        return back(pullback(held(), there(x), there(g)), len(x))

    return Outside(outputs, slopes, layout, fingerprint)


def _filled(t: Tensor) -> Tensor:
    """Fill a batch up with zeros to a power of two rows."""
    missing = (1 << max(len(t) - 1, 0).bit_length()) - len(t)
    return torch.cat([t, t.new_zeros(missing, *t.shape[1:])]) if missing else t
