"""A network as a list of steps, from what ``torch.export`` records; what has no rule is refused by name.

A step works on the tensors of one sample, whose leading axis has length 1 as traced; batches go through
``torch.func.vmap``. So a batch size that is written into the network does no harm.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, fx

from assay.certification.exported import exported_program
from assay.certification.rules import Affine, Rule
from assay.core.errors import ModelError
from assay.models import Model

Shape: TypeAlias = tuple[int, ...]

IDENTITIES = ("clone", "contiguous", "alias", "detach", "to", "_to_copy", "lift_fresh_copy", "type_as")
"""Operators that return their first argument."""


@final
@dataclass(frozen=True, slots=True)
class Step:
    """One step: a tensor (*shape) a sample out of those of the steps ``inputs``; the input itself has no rule."""

    name: str
    inputs: tuple[int, ...]
    shape: Shape
    rule: Affine | Rule | None


@final
@dataclass(frozen=True, slots=True)
class Graph:
    """A network from its input (step 0) to its logits (the last step), in one dtype."""

    steps: tuple[Step, ...]
    dtype: torch.dtype
    softmax: bool = False  # a softmax at the end was left out: it does not change which class is largest

    @property
    def out(self) -> int:
        return len(self.steps) - 1

    @property
    def classes(self) -> int:
        return self.steps[-1].shape[-1]

    def values(self, x: Tensor) -> list[Tensor]:
        """Return the value (n, *shape) of every step at x (n, *f)."""
        found = [x.to(self.dtype).reshape(-1, *self.steps[0].shape)]
        for step in self.steps[1:]:
            assert step.rule is not None
            found.append(step.rule.value(*(found[i] for i in step.inputs)))
        return found

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (n, c) of x (n, *f)."""
        return self.values(x)[-1].flatten(1)


@final
class Var:
    """A tensor that depends on the input: the result of a step."""

    __slots__ = ("index", "shape")

    def __init__(self, index: int, shape: Shape) -> None:
        self.index, self.shape = index, shape


@final
@dataclass(frozen=True, slots=True)
class Absent:
    """A second result of an operator that has no bound, as the places of the largest entries; it must not be used."""

    what: str


@final
@dataclass(slots=True)
class Builder:
    """Collects steps while a recorded program is read."""

    dtype: torch.dtype
    device: torch.device
    steps: list[Step] = field(default_factory=list)

    def input(self, shape: Shape) -> Var:
        return self._add("input", (), shape, None)

    def apply(self, name: str, rule: Affine | Rule, *inputs: Var) -> Var:
        """Append a step and return its result; its shape is found by running it on zeros.

        Raises:
            ModelError: the result has no axis: a number out of the whole batch.
        """
        with torch.no_grad():
            example = rule.value(*(torch.zeros(1, *v.shape, dtype=self.dtype, device=self.device) for v in inputs))
        if example.ndim == 1:
            raise ModelError("steps that keep the batch axis", f"one number from {name}", "Give the axes.")
        return self._add(name, tuple(v.index for v in inputs), tuple(example.shape[1:]), rule)

    def affine(self, name: str, call: Callable[..., Tensor], *inputs: Var, **how: Any) -> Var:
        """Append an affine step; ``how`` are the further fields of :class:`Affine`.

        Raises:
            ModelError: a weight or a constant is infinite or not a number.
        """
        rule = Affine(call, tuple(v.shape for v in inputs), self.dtype, self.device, **how)
        if not rule.offset.isfinite().all():
            raise ModelError("finite weights and constants", f"others in {name}", "Mask with large finite numbers.")
        return self.apply(name, rule, *inputs)

    def _add(self, name: str, inputs: tuple[int, ...], shape: Shape, rule: Affine | Rule | None) -> Var:
        self.steps.append(Step(name, inputs, shape, rule))
        return Var(len(self.steps) - 1, shape)


@final
class Program:
    """A model as recorded; :meth:`graph` gives its steps in a dtype on a device."""

    def __init__(self, exported: Any, shape: Shape) -> None:
        self.exported, self.shape = exported, shape
        self._graphs: dict[tuple[torch.dtype, torch.device], Graph] = {}

    def graph(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Graph:
        key = (dtype, torch.device(device))
        if key not in self._graphs:
            self._graphs[key] = _read(self.exported, self.shape, *key)
        return self._graphs[key]


def record(model: Model, shape: Shape) -> Program:
    """Record what a model computes on one sample of ``shape``.

    Raises:
        ModelError: the model is random, rejects, cannot be exported, or has an operator without a rule.
    """
    if model.samples > 1 or model.rejects:
        raise ModelError(
            "a model that is one fixed function of its input",
            "one that is random or rejects",
            "Use randomized smoothing (assay.Smoothed) for random models.",
        )
    exported = exported_program(model, shape)
    signature = exported.graph_signature
    if changed := [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]:
        raise ModelError("a network that changes nothing", f"it writes to {', '.join(changed)}", "Keep no state.")
    program = Program(exported, shape)
    program.graph(torch.float64)  # refuses what has no rule, at once
    return program


def _read(exported: Any, shape: Shape, dtype: torch.dtype, device: torch.device) -> Graph:
    from assay.certification.operators import lower

    build, state = Builder(dtype, device), _constants(exported, device)
    found: dict[fx.Node, Any] = {}
    last, softmax = _logits(exported)
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            found[node] = state[node.name] if node.name in state else build.input((1, *shape))
        elif node.users and node.op != "output":  # assertions have no users
            args = fx.node.map_arg(node.args, found.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, found.__getitem__)
            with torch.no_grad():
                found[node] = lower(build, node.target, args, **kwargs)
            _check_dtype(node, found[node])
        if node is last:
            break
    result = found[last]
    if not isinstance(result, Var):
        raise ModelError("logits that depend on the input", "constant ones", "Check the network.")
    if result.shape[0] != 1 or len(result.shape) != 2:
        raise ModelError("logits (1, c) for one sample", f"{result.shape}", "Return one row of logits a sample.")
    return Graph(tuple(build.steps[: result.index + 1]), dtype, softmax)


def _check_dtype(node: fx.Node, result: Any) -> None:
    if isinstance(result, Var) and node.meta["val"].dtype not in _DTYPES:
        raise ModelError(
            "a network that computes in float32 or float64",
            f"{node.target} gives {node.meta['val'].dtype}",
            "What rounds that much has no bound.",
            code="no-bound-for-operator",
        )


_DTYPES = (torch.float32, torch.float64)


def _logits(exported: Any) -> tuple[fx.Node, bool]:
    """Return the node of the logits, and whether a softmax after it was left out, which does not change the order."""
    answer = exported.graph_signature.user_outputs[0]
    (node,) = (n for n in exported.graph.nodes if n.name == answer)
    while (name := _aten(node)) in IDENTITIES and node.meta["val"].dtype in _DTYPES:
        node = node.args[0]
    last = len(node.meta["val"].shape) - 1
    if name in ("softmax", "_softmax", "log_softmax", "_log_softmax") and node.args[1] in (-1, last):
        return node.args[0], True
    return node, False


def _aten(node: fx.Node) -> str:
    name = str(node.target)
    return name.split(".")[1] if name.startswith("aten.") else name


def _constants(exported: Any, device: torch.device) -> dict[str, Tensor]:
    signature = exported.graph_signature
    places = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    held = {**exported.state_dict, **exported.constants}
    return {name: held[place].detach().to(device) for name, place in places.items()}
