"""Keras 3 models on any backend as networks from tensors to logits."""

import importlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import torch
from torch import Tensor, nn

from assay.core.errors import ModelError
from assay.core.optional import need
from assay.core.types import Inputs, Logits
from assay.models.bridges.function import digest
from assay.models.bridges.layout import Layout, Shape, written
from assay.models.loaded import Loaded, Net

Call: TypeAlias = Callable[[Any], Any]
"""From a tensor of the backend to another one."""

HARDENED: Final = "adversarial_of"
"""The attribute by which a model that only trains another one names it."""

_ACTIVATED: Final = tuple(f"keras.src.layers.{part}." for part in ("activations", "convolutional", "core"))
"""Modules of the layers that end in their ``activation``."""

_HEADS: Final = {"softmax": "softmax", "softmax_v2": "softmax", "sigmoid": "sigmoid"}


def bridge(model: Any) -> Loaded:
    """Make a network of a live Keras model: on the torch backend with its parameters, on others through their bridge.

    A softmax or sigmoid at its end is left out, so that the network returns logits; a model with one output becomes one
    of two classes with the logits (0, z). The user's model stays as it is, and shares its weights. It is called with
    ``training=False``.

    Raises:
        ModelError: it is not built, or has other than one input of floats and one output.
    """
    keras = need("keras", "keras")
    model = getattr(model, HARDENED, model)
    if not isinstance(model, keras.layers.Layer):
        raise ModelError("a Keras model", f"{type(model).__name__}", "Pass the model itself.")
    shape, rows = _declared(model)
    layout = Layout(shape, _channels_last(model))
    call, head = peeled(model)
    one = head.width == 1
    net: Net = _network(model, call, layout)
    return Loaded(
        TwoClasses(net) if one else net,
        rows,
        rows is not None,
        notes=(*_notes(model, head), *layout.notes),
        name=model.name,
    )


@final
@dataclass(frozen=True, slots=True)
class Head:
    """What a model ends in: the activation that was left out, empty for none, and the number of outputs if known."""

    activation: str = ""
    width: int | None = None


@final
class OnTorch(nn.Module):
    """A Keras model on the torch backend, from (b, *f) to outputs (b, c), on the device of the inputs.

    ``weights`` are the model's own parameters. Its layers are no submodules: their random state is none of the network,
    and torch's train() and eval() mean nothing to them.
    """

    def __init__(self, model: Any, call: Call, layout: Layout) -> None:
        super().__init__()
        self.weights = nn.ParameterList([v.value for v in model.weights])
        self.layout = layout
        self._hidden = model, call  # in a tuple, neither torch nor a fingerprint looks into them

    @property
    def digest(self) -> str:
        """SHA-256 of the layers as they are now."""
        return digest(structure(self._hidden[0]))

    def extra_repr(self) -> str:
        return f"{self.digest}, {self.layout}"  # a fingerprint reads it here

    def forward(self, x: Inputs) -> Logits:
        keras = need("keras", "keras")
        with keras.device(str(x.device)):
            z: Tensor = self._hidden[1](self.layout(x))
        return z


@final
class TwoClasses(nn.Module):
    """The logits (0, z) of a network with one output z (b, 1): that of the second class against the first."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Inputs) -> Logits:
        z: Tensor = self.net(x)
        return torch.cat([torch.zeros_like(z), z], 1)


def peeled(model: Any) -> tuple[Call, Head]:
    """Return a function that computes a model up to a softmax or sigmoid at its end, and what was left out.

    Layers and weights are the model's own; no layer is changed.
    """
    keras = need("keras", "keras")
    last = _last(model)
    if last is None:
        return _bare(model)
    operation, before = last
    inner, head = peeled(operation)
    if not head.activation:
        return _asked(model), head
    body = keras.Model(model.inputs[0], before)
    return lambda x: inner(body(x, training=False)), head


def structure(model: Any) -> list[Any]:
    """Return what a model does, without its weights: kinds and settings of its layers, and which one feeds which.

    Names are left out: Keras counts the models of the process in them. (Keras's own description of a model would import
    TensorFlow.)
    """
    parts: list[Any] = []
    for layer in model._flatten_layers():
        parts += [f"{type(layer).__module__}.{type(layer).__qualname__} {layer.compute_dtype}", *_settings(layer)]
        if not type(layer).__module__.startswith("keras."):
            parts.append(vars(type(layer)).get("call"))
        parts += _edges(getattr(layer, "_functional", None) or layer)
    return parts


def _settings(layer: Any) -> Iterator[str]:
    for name, v in sorted(vars(layer).items()):
        if name.startswith("_") or name in _PASSING:
            continue
        if isinstance(v, bool | int | float | str | tuple):
            yield f"{name}={v}"
        elif isinstance(v, types.FunctionType):
            yield f"{name}={v.__module__}.{v.__qualname__}"


_PASSING: Final = frozenset(
    {
        *("auto_scale_loss", "build", "built", "compiled", "jit_compile", "name", "quantize", "run_eagerly", "seed"),
        *("steps_per_execution", "stop_training", "supports_jit", "training"),
    }
)
"""Attributes that say nothing of what a layer computes."""


def _edges(graph: Any) -> Iterator[str]:
    """Yield the nodes of a graph of operations, these by their number; nothing for what is no graph."""
    operations = getattr(graph, "_operations", ())
    numbers = {id(operation): i for i, operation in enumerate(operations)}
    for _, nodes in sorted(getattr(graph, "_nodes_by_depth", {}).items()):
        for node in nodes:
            before = [numbers.get(id(t._keras_history.operation), -1) for t in node.input_tensors]
            yield f"{numbers.get(id(node.operation), -1)} {type(node.operation).__name__} {before}"


def _last(model: Any) -> tuple[Any, Any] | None:
    """Return the last operation of a graph of layers and the symbolic tensor that goes into it; None for no graph."""
    keras = need("keras", "keras")
    calls = keras.Sequential.call, keras.src.models.functional.Functional.call
    if getattr(type(model), "call", None) not in calls or len(model.outputs) != 1:
        return None
    operation, node, _ = model.outputs[0]._keras_history
    before = operation._inbound_nodes[node].input_tensors
    return (operation, before[0]) if len(before) == 1 else None


def _bare(layer: Any) -> tuple[Call, Head]:
    """Leave out the softmax or sigmoid of a layer, or of an operation, that is no graph of others."""
    keras = need("keras", "keras")
    width, module = _width(layer), type(layer).__module__
    if type(layer).__name__ in ("Softmax", "Sigmoid") and module.startswith("keras."):
        return (lambda x: x), Head(type(layer).__name__.lower(), width)
    if not module.startswith(_ACTIVATED):  # what an attribute of that name is used for is not known
        return _asked(layer), Head()
    activation = vars(layer).get("activation")
    name = _HEADS.get(getattr(activation, "__name__", ""), "")
    if not name:
        linear = activation is None or activation is keras.activations.linear
        return _asked(layer), Head("", width if linear and hasattr(layer, "units") else None)
    # A twin that shares everything but its activation: copying would copy the weights.
    twin = object.__new__(type(layer))
    vars(twin).update(vars(layer))
    vars(twin)["activation"] = keras.activations.linear
    return twin, Head(name, width)


def _width(layer: Any) -> int | None:
    """Return the number of outputs where the last axis is known."""
    output = getattr(layer, "output", None) if getattr(layer, "_inbound_nodes", None) else None
    width: int | None = getattr(output, "shape", (None,))[-1]
    return width


def _asked(layer: Any) -> Call:
    inferring = {"training": False} if getattr(layer, "_call_has_training_arg", False) else {}
    return lambda x: layer(x, **inferring)


def _declared(model: Any) -> tuple[Shape | None, int | None]:
    """Return the shape of one sample, None where it is not known, and the number of rows where it is fixed.

    Raises:
        ModelError: not built, several inputs or outputs, or inputs that are no floats.
    """
    if not model.built:
        raise ModelError("a Keras model that is built", f"{model.name} without weights", "Call it once, or build it.")
    inputs, outputs = (getattr(model, name, None) or [] for name in ("inputs", "outputs"))
    if len(inputs) > 1 or len(outputs) > 1 or any("float" not in str(v.dtype) for v in inputs):
        shown = ", ".join(f"{v.dtype} {written(tuple(v.shape))}" for v in inputs)
        raise ModelError(
            "a Keras model of one input of floats and one output",
            f"inputs {shown} and {len(outputs)} outputs",
            "Make a model of these: keras.Model(inputs, logits).",
        )
    shape = tuple(inputs[0].shape) if inputs else (model.get_build_config() or {}).get("input_shape")
    if not isinstance(shape, tuple | list) or not all(n is None or isinstance(n, int) for n in shape):
        return None, None
    return tuple(shape[1:]), shape[0] if inputs else None


def _channels_last(model: Any) -> bool:
    """Tell the data format of the first layer that has one, else that of Keras."""
    keras = need("keras", "keras")
    said = [f for layer in model._flatten_layers() if (f := getattr(layer, "data_format", None))]
    return bool((said[0] if said else keras.config.image_data_format()) == "channels_last")


def _network(model: Any, call: Call, layout: Layout) -> nn.Module:
    """Make a network on the backend that Keras runs on.

    Raises:
        ModelError: a backend without a bridge.
    """
    keras = need("keras", "keras")
    backend = keras.backend.backend()
    if backend == "torch":
        return OnTorch(model, call, layout)
    if backend not in ("tensorflow", "jax"):
        raise ModelError("Keras on torch, tensorflow or jax", f"on {backend}", "Set KERAS_BACKEND=torch.")

    def fingerprint() -> str:
        return digest([*structure(model), *(v.numpy() for v in model.weights)])

    module = importlib.import_module(f"assay.models.bridges.{backend}")
    if backend == "tensorflow":
        net: nn.Module = module.network(call, layout, fingerprint)
        return net

    def stateless(held: Any, x: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(model.weights, held, strict=True))):
            return call(x)

    return module.network(stateless, lambda: [v.value for v in model.weights], layout, fingerprint)  # type: ignore[no-any-return]


def _notes(model: Any, head: Head) -> tuple[str, ...]:
    said = []
    if head.activation:
        said.append(f"The {head.activation} at the end of the Keras model is left out: the network returns logits.")
    if head.activation == "sigmoid" and head.width != 1:
        said.append("Its outputs are answers of their own; here the largest one counts as the one answer.")
    if head.width == 1:
        said.append("The model has one output z, the score of class 1; it becomes two logits, (0, z).")
    layers = list(model._flatten_layers())
    if any(type(layer).__name__ == "Rescaling" for layer in layers):
        said.append("The model rescales its inputs itself (a layer Rescaling): the box is what it expects before that.")
    narrow = sorted({d for layer in layers if (d := layer.compute_dtype) in ("float16", "bfloat16")})
    if narrow:
        said.append(f"Layers compute in {', '.join(narrow)}: gradients are rough, and small ones vanish.")
    return tuple(said)
