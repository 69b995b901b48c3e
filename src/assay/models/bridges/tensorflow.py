"""TensorFlow functions, modules and served signatures as networks; gradients by a vector-Jacobian product."""

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from assay.core.errors import ModelError, ModelOutputError
from assay.core.optional import need
from assay.models.bridges.function import NOTE, Outside, digest
from assay.models.bridges.layout import Layout, written
from assay.models.loaded import Loaded

SERVING: Final = "serving_default"


def bridge(model: Any) -> Loaded:
    """Make a network of a live ``tf.function``, a ``tf.Module`` that can be called, or a loaded SavedModel.

    What it takes is read from its signature, where it has one. It is asked in inference mode where it is a SavedModel;
    a ``tf.Module`` is called with the samples alone.

    Raises:
        ModelError: it cannot be called, or takes other than one tensor of floats.
    """
    if getattr(model, "signatures", None):
        fn, key = served(model.signatures)
        spec, call = declared(fn)
        notes = (f"The signature {key} of the model is asked.",)
        return loaded(keeping(model, call), spec, lambda: digest(_graph(fn)), notes)
    if not callable(model):
        raise ModelError(
            "a tf.function, a tf.Module with __call__, or a SavedModel with a signature",
            type(model).__name__,
            "Pass the function from inputs (b, *shape) to logits (b, c).",
        )
    spec, call = declared(model)
    return loaded(call, spec, lambda: digest(_identity(model)), name=getattr(model, "__name__", type(model).__name__))


def keeping(module: Any, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keep a module as long as a signature of it: the signature alone does not keep its variables."""

    def kept(x: Any) -> Any:
        assert module is not None
        return call(x)

    return kept


def loaded(
    call: Callable[[Any], Any], spec: Any, fingerprint: Callable[[], str], notes: tuple[str, ...] = (), name: str = ""
) -> Loaded:
    """Make a network of a function on tensors of a ``tf.TensorSpec``, or None; a fixed batch axis fixes the rows."""
    shape = None if spec is None or spec.shape.rank is None else tuple(spec.shape)
    layout = Layout(None if shape is None else shape[1:], channels_last=shape is not None)
    rows = None if shape is None else shape[0]
    dtype = torch.float32 if spec is None else getattr(torch, spec.dtype.name)
    net = network(call, layout, fingerprint, dtype, rows)
    return Loaded(net, rows, rows is not None, notes=(*notes, *layout.notes, NOTE.format("TensorFlow")), name=name)


def network(
    fn: Callable[[Any], Any],
    layout: Layout,
    fingerprint: Callable[[], str],
    dtype: torch.dtype = torch.float32,
    rows: int | None = None,
) -> Outside:
    """Compile a function from tf tensors (b, *shape) to (b, c) and its gradient, once for all b.

    Tensors go over as they lie in memory (DLPack). The gradient computes the outputs anew: that costs one forward pass,
    and lets a graph be differentiated any number of times without keeping anything.
    """
    tf = tensorflow()

    def outputs(x: Any) -> Any:
        z = single(fn(x))
        return tf.cast(z, tf.float32) if z.dtype in (tf.float16, tf.bfloat16) else z

    def pullback(x: Any, g: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            z = outputs(x)
        slope = tape.gradient(z, x, output_gradients=g)
        return None if slope is None else tf.convert_to_tensor(slope)

    @functools.cache
    def compiled(shape: tuple[int, ...]) -> tuple[Any, Any]:
        x = tf.TensorSpec((rows, *shape), str(dtype).rpartition(".")[2])
        forward = tf.function(outputs, autograph=False).get_concrete_function(x)
        g = tf.TensorSpec(None, forward.output_dtypes)
        return forward, tf.function(pullback, autograph=False).get_concrete_function(x, g)

    def there(t: Tensor) -> Any:
        return tf.experimental.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(t))  # type: ignore[attr-defined]

    def back(a: Any) -> Tensor:
        return torch.utils.dlpack.from_dlpack(tf.experimental.dlpack.to_dlpack(a)).cpu()

    def values(x: Tensor) -> Tensor:
        forward, _ = compiled(tuple(x.shape[1:]))
        return back(forward(there(x))).clone()  # it may be memory of others: of the input, of a constant

    def slopes(x: Tensor, g: Tensor) -> Tensor | None:
        _, pull = compiled(tuple(x.shape[1:]))
        slope = pull(there(x), there(g))
        return None if slope is None else back(slope)

    return Outside(values, slopes, layout, fingerprint, dtype)


def tensorflow() -> ModuleType:
    """Import TensorFlow; where nothing is settled yet, it gets as many threads as torch.

    Raises:
        MissingExtraError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    tf = need("tensorflow", "tensorflow")
    threads: Any = tf.config.threading
    with contextlib.suppress(RuntimeError):  # it is at work already: then its user has settled it
        if not threads.get_intra_op_parallelism_threads():
            threads.set_intra_op_parallelism_threads(torch.get_num_threads())
    return tf


def served(signatures: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the signature that is served by default, or the only one, and its name.

    Raises:
        ModelError: there are several, none of them the default; or none.
    """
    key = SERVING if SERVING in signatures else next(iter(signatures), "")
    if not key or (key != SERVING and len(signatures) > 1):
        raise ModelError(
            f"a SavedModel with a signature {SERVING}, or with one signature",
            f"signatures {', '.join(signatures) or 'none'}",
            "Export it with one: model.export(folder), or tf.saved_model.save(module, folder, signatures=function).",
        )
    return signatures[key], key


def single(out: Any) -> Any:
    """Return the one tensor that a function gave.

    Raises:
        ModelOutputError: it gave none, or several (``bad-logits``).
    """
    values = list(out.values()) if isinstance(out, Mapping) else list(out) if isinstance(out, list | tuple) else [out]
    if len(values) != 1 or not hasattr(values[0], "dtype"):
        names = ", ".join(map(str, out)) if isinstance(out, Mapping) else type(out).__name__
        raise ModelOutputError(
            "one tensor of logits (b, c)",
            f"{len(values)} outputs ({names})",
            "Wrap the model in a function that returns the logits only.",
            code="bad-logits",
        )
    return values[0]


def declared(fn: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return the ``tf.TensorSpec`` of a function's input, None for none, and the function of that input alone.

    Raises:
        ModelError: other than one tensor of floats.
    """
    call = fn if hasattr(fn, "python_function") or hasattr(fn, "structured_input_signature") else fn.__call__
    args, named = getattr(call, "input_signature", None) or (), {}
    if hasattr(call, "structured_input_signature"):
        args, named = call.structured_input_signature
    specs = [*args, *named.values()]
    if not specs:
        return None, fn
    if len(specs) != 1 or not getattr(getattr(specs[0], "dtype", None), "is_floating", False):
        raise ModelError(
            "a function of one tensor of floats (b, *shape)",
            f"inputs {', '.join(map(_shown, specs))}",
            "Wrap it in a function of floats: whole numbers have no gradient, and rounding hides attacks.",
        )
    return specs[0], (lambda x: fn(**{next(iter(named)): x})) if named else fn


def _shown(spec: Any) -> str:
    rank = getattr(getattr(spec, "shape", None), "rank", None)
    return str(spec) if rank is None else f"{spec.dtype.name} {written(tuple(spec.shape))}"


def _graph(fn: Any) -> list[Any]:
    """Return what tells a concrete function from others: its graph, and the values that it captured."""
    variables = [v.numpy() for v in fn.variables]
    return [fn.graph.as_graph_def().SerializeToString(deterministic=True), *variables]


def _identity(model: Any) -> list[Any]:
    if hasattr(model, "graph") and hasattr(model, "variables"):
        return _graph(model)
    own = None if hasattr(model, "python_function") else type(model).__call__
    return [model, own]
