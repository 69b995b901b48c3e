"""What ``torch.export`` records of a model; what it cannot record as it stands, ``torch.fx`` traces first."""

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from assay.core.errors import ModelError
from assay.models import Model


def exported_program(model: Model, shape: tuple[int, ...]) -> Any:
    """Return what a model computes on one sample of ``shape``, as a ``torch.export.ExportedProgram`` of ATen operators.

    Parts that TorchScript compiled cannot be recorded, but traced as wholes.

    Raises:
        ModelError: neither can record it.
    """
    first = None if model.module is None else next(model.module.parameters(), None)
    example = torch.zeros(1, *shape, device=None if first is None else first.device)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = _recorded(model, example)
            return exported.run_decompositions({}) if any(map(_mutates, exported.graph.nodes)) else exported
    except Exception as e:  # torch.export raises errors of many kinds
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(
            "a network whose steps torch.export can record",
            f"{type(e).__name__}: {reason}",
            "Proofs need a network without branches on its values; write it with tensor operations only.",
            code="not-exportable",
        ) from e


def _recorded(model: Model, example: Tensor) -> Any:
    try:
        return torch.export.export(_Asked(model).eval(), (example,))
    except Exception:
        if model.module is None or (net := _traced(model.module, example)) is None:
            raise
        return torch.export.export(_Asked(replace(model, net=net)).eval(), (example,))


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


class _Asked(nn.Module):
    """What is recorded: the model with its normalisation, on one sample."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.net = replace(model, probabilities=False), model.net

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


# ---------------------------------------------------------------------------------------------------- tracing first


def _traced(net: nn.Module, example: Tensor) -> nn.Module | None:
    """Return a network as ``torch.fx`` traces it; None where it cannot, or where that computes something else."""
    points = example, torch.ones_like(example), torch.linspace(0, 1, example.numel()).to(example).view_as(example)
    try:
        root = _Whole(copy.deepcopy(net)).eval()  # whatever a network keeps while it is traced
        traced = fx.GraphModule(root, _Tracer().trace(root))
        for node in traced.graph.find_nodes(op="call_module"):
            if isinstance(part := traced.get_submodule(str(node.target)), torch.jit.ScriptModule):
                traced.set_submodule(str(node.target), _Compiled(part))
        # A network that asks whether its input is a tensor goes another way while it is traced.
        alike = all(torch.allclose(traced(x), net(x), rtol=1e-4, atol=1e-5) for x in points)
    except Exception:  # code of others, in a place where it does not expect to be
        return None
    return traced if alike else None


class _Whole(nn.Module):
    """A network as a part, so that all of it may stay one part."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found


class _Tracer(fx.Tracer):
    """Parts that TorchScript compiled stay as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, torch.jit.ScriptModule) or super().is_leaf_module(m, module_qualified_name)


class _Compiled(nn.Module):
    """A part that TorchScript compiled, called without the wrapper around its forward, which cannot be recorded."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.call = part._c.forward

    def forward(self, *x: Tensor) -> Tensor:
        found: Tensor = self.call(*x)
        return found
