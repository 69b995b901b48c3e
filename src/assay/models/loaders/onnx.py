"""ONNX files, converted to networks with gradients that are compared with ONNX Runtime before they are used.

A file runs no code here: its operators are from a closed list, and its names are replaced before a converter sees
them (:mod:`assay.models.loaders.onnx_graph`). The converters are onnx2torch, whose networks ``torch.export`` can
follow, and onnx2pytorch for what it cannot convert.
"""

import copy
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from assay.core.errors import MissingExtraError, ModelError
from assay.core.optional import need
from assay.core.random import Draws
from assay.models.bridges.layout import Layout
from assay.models.bridges.onnxruntime import Runtime, digest, fit_of, network, sized
from assay.models.loaded import Loaded
from assay.models.loaders.request import Request
from assay.models.model import PAD

__all__ = ["TOLERANCE", "Converted", "Runtime", "blamed", "load"]

TOLERANCE: Final = 1e-4
"""The most that logits may differ from those of ONNX Runtime, relative to the largest of them (at least 1)."""

_BATCHES: Final = (PAD, 3)
"""Numbers of rows with which a network without a fixed batch is compared."""

_SCALES: Final = (1.0, 255.0)
"""Networks are compared on inputs from [0, 1] and from [0, 255], and on standard normal ones: the box is not in the
file, and a wrong conversion is wrong everywhere."""


def load(r: Request) -> Loaded:
    """Convert a network of one input and one output; where its batch axis is really fixed, so are the rows.

    Raises:
        MissingExtraError: the packages of the extra ``onnx`` are not installed.
        ModelError: a damaged file, an operator that cannot be converted, other inputs than one float32 tensor, or
            a conversion whose outputs differ from those of ONNX Runtime.
    """
    converters = _converters()
    from assay.models.loaders import onnx_graph as graphs

    model = graphs.read(r.path)
    reference, mark = Runtime.open(r.path), digest(r.path)
    fixed = reference.rows
    failures: list[str] = []
    for rows in (None,) if fixed is None else (None, fixed):
        source = _source(model, r.path, free=rows is None and fixed == 1 and reference.batched)
        for name, convert in converters.items():
            try:
                net = Converted(convert(source), mark)
            except Exception as e:  # converters raise anything
                failures.append(f"{name}: {_said(e)}, at the operator {blamed(source, convert)}")
                continue
            try:
                gap = _gap(net, reference, _BATCHES if rows is None else (rows,))
            except Exception as e:  # and so do the networks that they make
                failures.append(f"{name}: {_said(e)}, when the network was asked")
                continue
            if gap <= TOLERANCE:
                return _loaded(net, rows, reference, name, gap)
            failures.append(f"{name}: the outputs differ from those of ONNX Runtime by {gap:.2g} of their size")
    raise ModelError(
        f"a network that can be converted to within {TOLERANCE:g} of what ONNX Runtime computes",
        f"{r.path}: {'; '.join(dict.fromkeys(failures))}",
        f"Go on by scores, without gradients: ort:{r.path}. Or export it anew (opset 17 or 20), or save it with "
        "torch.export as .pt2.",
    )


def _source(model: Any, path: Path, *, free: bool) -> Any:
    """Return the graph as converters take it; ``free`` opens a batch axis of one row."""
    from assay.models.loaders import onnx_graph as graphs

    try:
        source = graphs.neutral(model)
        return graphs.freed(source) if free else source
    except Exception as e:  # a graph of hostile bytes may raise anything
        raise ModelError("a readable .onnx file", f"{path}: {_said(e)}", "Export or copy it anew.") from e


def _loaded(net: "Converted", rows: int | None, reference: Runtime, name: str, gap: float) -> Loaded:
    net.layout, fit = Layout(reference.shape), fit_of(reference.shape)
    note = (
        f"Converted from ONNX by {name}; on random inputs its outputs differ from those of ONNX Runtime by at most "
        f"{gap:.1e} of the largest one."
    )
    judge = network(reference, net.digest)
    return Loaded(net, rows, rows is not None, fit=fit, reference=judge, notes=(note, *sized(fit)))


def blamed(model: Any, convert: Callable[[Any], nn.Module]) -> str:
    """Return the first operator of a graph up to which it cannot be converted; the last one, if none is found.

    Bisection: the part of a graph before a node can be converted, or else that before no later node can.
    """
    nodes = model.graph.node
    low, high = 0, len(nodes)
    while high - low > 1:
        middle = (low + high) // 2
        part = copy.deepcopy(model)
        del part.graph.node[middle:]
        del part.graph.output[1:]
        part.graph.output[0].name = part.graph.node[-1].output[0]
        part.graph.output[0].type.tensor_type.ClearField("shape")
        try:
            convert(part)
            low = middle
        except Exception:
            high = middle
    return str(nodes[high - 1].op_type) if len(nodes) else "none"


def _said(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"


@final
class Converted(nn.Module):
    """A converted network; ``digest`` is the SHA-256 of its file, ``layout`` what it takes a sample as."""

    def __init__(self, net: nn.Module, digest: str) -> None:
        super().__init__()
        self.net, self.digest = net.eval(), digest
        self.layout = Layout()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.layout(x))
        return out


def _gap(net: nn.Module, reference: Runtime, batches: tuple[int, ...]) -> float:
    """Return the largest difference between a network and ONNX Runtime, relative to the largest output (at least 1)."""
    gaps = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converters' own use of torch
        for rows in batches:
            draws = Draws.of(0, torch.arange(rows))
            inputs = [draws.uniform(reference.shape) * s for s in _SCALES] + [draws.normal(reference.shape)]
            for x in inputs:
                wanted, found = torch.from_numpy(reference(x.numpy())), net(x)
                if wanted.shape != found.shape:
                    raise ValueError(f"outputs of shape {tuple(found.shape)} for {tuple(wanted.shape)}")
                gaps.append((wanted - found).abs().max() / wanted.abs().max().clamp_min(1))
    return float(torch.stack(gaps).max())  # NaN if any is


def _converters() -> dict[str, Callable[[Any], nn.Module]]:
    """Import the converters, onnx2torch first.

    Raises:
        MissingExtraError: they, or what they need, are not there.
    """
    try:
        with _torchvision(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import onnx2pytorch
            import onnx2torch
    except ImportError as e:
        raise _missing(e) from e
    from assay.models.loaders import onnx_graph as graphs

    def first(model: Any) -> nn.Module:
        return graphs.plain(onnx2torch.convert(graphs.lowered(model)))

    def second(model: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net: nn.Module = onnx2pytorch.ConvertModel(model, experimental=True)
        return net

    return {"onnx2torch": first, "onnx2pytorch": second}


def _missing(e: ImportError) -> MissingExtraError:
    return MissingExtraError("the packages for .onnx files", str(e), "pip install 'assay[onnx]'")


@contextmanager
def _torchvision() -> Iterator[None]:
    """Let the converters import torchvision where it cannot be imported.

    They need it for the operators of detectors only, which are not on our list. So stand-ins are put in its place,
    until the import is done.
    """
    if {"onnx2torch", "onnx2pytorch"} <= sys.modules.keys():
        yield
        return
    try:
        need("torchvision", "onnx")
    except MissingExtraError:  # or it does not fit torch
        stands = {n: _StandIn(n) for n in ("torchvision", "torchvision.ops", "torchvision.io")}
        sys.modules.update(stands)
        try:
            yield
        finally:
            for n in stands:
                del sys.modules[n]
    else:
        yield


@final
class _StandIn(types.ModuleType):
    """A module from which any name can be imported, and nothing called."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
