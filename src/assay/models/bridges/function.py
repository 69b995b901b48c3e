"""Networks that something else than torch computes: other frameworks with their gradients, plain Python without."""

import hashlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from assay.core.errors import ModelError, ModelOutputError
from assay.core.types import Inputs, Logits
from assay.models.bridges.layout import Layout
from assay.models.pieces import Inner, pieces

Forward: TypeAlias = Callable[[Tensor], Tensor]
"""From what the network takes (b, *shape) to (b, c), on the CPU; what it returns is nobody else's."""

Pullback: TypeAlias = Callable[[Tensor, Tensor], Tensor | None]
"""From inputs (b, *shape) and g (b, c) to d <g, outputs> / d inputs; None where there is no gradient."""


@final
class Outside(nn.Module):
    """A network that another framework computes on the CPU, from tensors (b, *f) on any device to (b, c).

    Args:
        forward: the outputs.
        pullback: their gradient, which computes the outputs anew; None for a network without gradients.
        layout: what it takes a sample as.
        digest: returns the SHA-256 of all that the outputs depend on, in hex.
        dtype: of inputs and outputs of the framework.

    Gradients are first derivatives only: ``create_graph`` raises a :class:`ModelError`.
    """

    def __init__(
        self,
        forward: Forward,
        pullback: Pullback | None,
        layout: Layout,
        digest: Callable[[], str],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.layout, self.dtype = layout, dtype
        self._hidden = forward, pullback, digest  # in a tuple, a fingerprint does not look into them

    @property
    def digest(self) -> str:
        """SHA-256 of the model as it is now: it may be trained between two evaluations."""
        return self._hidden[2]()

    def extra_repr(self) -> str:
        return f"{self.digest}, {self.layout}"  # a fingerprint reads it here

    def forward(self, x: Inputs) -> Logits:
        seen = self.layout(x).to("cpu", self.dtype)
        forward, pullback, _ = self._hidden
        if pullback is None:
            with torch.no_grad():
                z = forward(seen.detach().contiguous())
        else:
            z = _Bridge.apply(seen, forward, pullback)  # type: ignore[no-untyped-call]
        return z.to(x.device)


@final
class _Bridge(torch.autograd.Function):
    """The seam to torch's automatic differentiation."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, forward: Forward, pullback: Pullback) -> Tensor:
        x = x.detach().contiguous()
        ctx.save_for_backward(x)
        ctx.pullback = pullback  # type: ignore[attr-defined]
        return forward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise ModelError(
                "a network that torch can differentiate twice",
                "one that another framework computes, which gives first derivatives only",
                "Load it as a torch network: a .keras file on the torch backend, .onnx or .pt2.",
                code="first-derivatives-only",
            )
        return ctx.pullback(*ctx.saved_tensors, g.detach().contiguous()), None, None


NOTE: Final = (
    "{} computes this model, through a bridge: attacks have its first derivatives; proofs and curvature need it as a "
    "torch network."
)


def from_function(
    fn: Callable[[NDArray[np.float32]], Any], classes: int, shape: tuple[int | None, ...] | None = None
) -> nn.Module:
    """Make a network without gradients of a plain Python function: a black box, for attacks that see scores only.

    Args:
        fn: from a float32 array (b, *f), which is its own to change, to scores (b, classes): logits, or probabilities
            with ``assay.Model(..., probabilities=True)``. Or to labels (b,) of an integer type, which become scores 1
            and 0.
        classes: how many there are.
        shape: of one sample as fn takes it, channels last for images; None for samples as they are.

    Raises:
        ModelError: no function, or fewer than two classes.

    Example:
        >>> net = from_function(lambda x: np.stack([x.sum(1), -x.sum(1)], 1), 2)
        >>> net(torch.ones(1, 3))
        tensor([[ 3., -3.]])
    """
    if not callable(fn) or classes < 2:
        raise ModelError("a function and a number of classes >= 2", f"{fn!r}, {classes}", "See assay.Model's notes.")

    def forward(x: Tensor) -> Tensor:
        return scores(fn(x.numpy().copy()), len(x), classes)

    return Outside(forward, None, Layout(shape, channels_last=shape is not None), lambda: digest([fn]))


def scores(out: Any, rows: int, classes: int) -> Tensor:
    """Return what a function gave for some rows as a tensor (rows, classes).

    Raises:
        ModelOutputError: it is neither scores nor labels (``bad-logits``).
    """
    z = torch.as_tensor(np.asarray(out))
    if z.shape == (rows,) and not z.is_floating_point() and z.min() >= 0 and z.max() < classes:
        return nn.functional.one_hot(z.long(), classes).float()
    if z.shape != (rows, classes):
        raise ModelOutputError(
            f"scores ({rows}, {classes}), or labels ({rows},) from 0 to {classes - 1}",
            f"{z.dtype} of shape {tuple(z.shape)}",
            "Return one score for each sample and class.",
            code="bad-logits",
        )
    return z.clone() if z.is_floating_point() else z.float()


def digest(values: Iterable[Any]) -> str:
    """Return the SHA-256, in hex, of texts, arrays, functions (their code and what they hold) and trees of these."""
    sha = hashlib.sha256()
    seen: set[int] = set()
    for v in values:
        for piece in pieces(v, _parts, _PLAIN, seen):
            sha.update(piece)
    return sha.hexdigest()


_PLAIN: Final = (str, int, float, bytes, types.NoneType)


def _parts(value: Any) -> Iterator[bytes | Inner]:
    """Yield the text of a plain value; the type of another one, and what it is made of."""
    if isinstance(value, _PLAIN):
        yield repr(value).encode()
    else:
        yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
        yield from map(Inner, _inside(value))


def _inside(value: Any) -> Iterable[Any]:
    """Return what a value is made of."""
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, type | types.ModuleType):
        return [value.__name__]
    if hasattr(value, "__array__"):
        a = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        return [str(a.dtype), str(a.shape), np.ascontiguousarray(a).tobytes()]
    if isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or ()]
        return [*_code(value.__code__), *(value.__defaults__ or ()), *cells, getattr(value, "__wrapped__", None)]
    return _held(value)


def _held(value: Any) -> Iterable[Any]:
    """Return what an object wraps; or its weights; or its attributes, but for numbers, which may count calls."""
    wrapped = [getattr(value, name, None) for name in _WRAPPED]
    if any(part is not None for part in wrapped):
        return wrapped
    for name in ("weights", "variables"):
        if isinstance(held := getattr(value, name, None), list | tuple):
            return held
    return [part for item in getattr(value, "__dict__", {}).items() if type(item[1]) is not int for part in item]


_WRAPPED: Final = ("__wrapped__", "python_function", "__func__", "__self__", "func", "args", "keywords")


def _code(code: types.CodeType) -> Iterator[Any]:
    """Yield what code does; not where it stands."""
    yield from (code.co_code, *code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        elif not isinstance(constant, frozenset):  # whose order differs between two runs
            yield str(constant)
