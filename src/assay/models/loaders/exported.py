"""Programs of ``torch.export``, vetted before they are loaded (:mod:`assay.models.loaders.vetting`)."""

import inspect
from typing import Any

import torch

from assay.core.errors import ModelError
from assay.models.loaded import Loaded
from assay.models.loaders.request import Request
from assay.models.loaders.vetting import vet
from assay.models.model import PAD


def load(r: Request) -> Loaded:
    """Load a program of one tensor; where its batch axis is fixed, so is the number of rows.

    Raises:
        ModelError: a damaged file, one that would run code, or a program of another kind of input.
    """
    if not r.trust_pickle:
        vet(r.path)
    try:
        program = torch.export.load(r.path)
        # Guards are Python source in the file; without them the shape checks of the program remain.
        guarded = "check_guards" in inspect.signature(program.module).parameters
        net = program.module(check_guards=False) if guarded else program.module()
    except Exception as e:  # a parser given hostile bytes may raise anything
        raise ModelError(
            "a program that this version of torch can load",
            f"{r.path}: {type(e).__name__}: {e}",
            f"Export it anew with torch {torch.__version__}.",
        ) from e
    rows, fixed = _rows(program, r)
    return Loaded(net, rows, fixed)


def _rows(program: "torch.export.ExportedProgram", r: Request) -> tuple[int | None, bool]:
    """Return how many rows the program takes at most, and whether it takes exactly as many."""
    size = _batch_axis(program, r)
    if isinstance(size, int):
        return size, True
    bounds = program.range_constraints.get(size.node.expr)
    most: Any = None if bounds is None else bounds.upper
    if not getattr(most, "is_Integer", False):  # none, or infinity
        return None, False
    # Batches are filled up to whole blocks, which must not exceed what the program takes.
    return (int(most), True) if most < PAD else (int(most) // PAD * PAD, False)


def _batch_axis(program: "torch.export.ExportedProgram", r: Request) -> Any:
    """Return the length of axis 0 of the program's input: a number, or a symbol."""
    names = program.graph_signature.user_inputs
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    if len(values) != 1 or not isinstance(values[0], torch.Tensor) or values[0].ndim < 2:
        shown = ", ".join(str(tuple(v.shape)) if isinstance(v, torch.Tensor) else str(v) for v in values)
        raise ModelError(
            "a program that takes one tensor (b, *shape)",
            f"{len(names)} inputs ({shown}) in {r.path}",
            "Export a module whose forward takes the samples only.",
        )
    return values[0].shape[0]
