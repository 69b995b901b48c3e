"""ONNX files, converted to networks with gradients that are compared with ONNX Runtime before they are used.

A file runs no code here: its operators are from a closed list, and its names are replaced before a converter sees
them (:mod:`assay.models.loaders.onnx_graph`). The converters are onnx2torch, whose networks ``torch.export`` can
follow, and onnx2pytorch for what it cannot convert.
"""

import hashlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from assay.core.errors import MissingExtraError, ModelError
from assay.core.random import Draws
from assay.models.loaders.request import Loaded, Request
from assay.models.model import PAD

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
    reference = Runtime.open(r.path)
    digest = hashlib.sha256(r.path.read_bytes()).hexdigest()
    fixed = reference.rows
    failures: list[str] = []
    for rows in (None,) if fixed is None else (None, fixed):
        free = rows is None and fixed == 1 and reference.batched
        for name, convert in converters.items():
            try:
                source = graphs.neutral(model)
                net = Converted(convert(graphs.freed(source) if free else source), digest)
                gap = _gap(net, reference, _BATCHES if rows is None else (rows,))
            except Exception as e:  # converters, and what they make, raise anything
                failures.append(f"{name}: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}")
                continue
            if gap <= TOLERANCE:
                return Loaded(net, rows, rows is not None)
            failures.append(f"{name}: the outputs differ from those of ONNX Runtime by {gap:.2g} of their size")
    raise ModelError(
        f"a network that can be converted to within {TOLERANCE:g} of what ONNX Runtime computes",
        f"{r.path}: {'; '.join(dict.fromkeys(failures))}",
        "Export it anew (opset 17 or 20), or save it with torch.export as .pt2.",
    )


@final
class Converted(nn.Module):
    """A converted network; ``digest`` is the SHA-256 of its file, and part of its fingerprint."""

    def __init__(self, net: nn.Module, digest: str) -> None:
        super().__init__()
        self.net, self.digest = net.eval(), digest

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@final
@dataclass(frozen=True, slots=True)
class Runtime:
    """An ONNX file as ONNX Runtime runs it, on the CPU in one thread: what any conversion is judged by.

    Attributes:
        session: the ``onnxruntime.InferenceSession``.
        shape: of one sample, without the batch axis.
        rows: how many rows a call takes; None for any number.
        batched: False where the file has no batch axis at all, and is called once a sample.
    """

    session: Any
    shape: tuple[int, ...]
    rows: int | None = None
    batched: bool = True

    @classmethod
    def open(cls, path: Path | str) -> "Runtime":
        """Open a file.

        Raises:
            MissingExtraError: ONNX Runtime is not installed.
            ModelError: it cannot run the file, or the file has other than one float32 input and one output.
        """
        try:
            import onnxruntime
        except ImportError as e:
            raise _missing(e) from e
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what is wrong is raised
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as e:
            raise ModelError(
                "a readable .onnx file that ONNX Runtime can run",
                f"{path}: {(str(e).splitlines() or [''])[0]}",
                "Export or copy it anew.",
            ) from e
        return cls(session, *_signature(session, path))

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the outputs (b, *out) for inputs (b, *shape), whatever number of rows the file takes."""
        block = self.rows or len(x)
        short = -len(x) % block
        filled = np.concatenate([x, np.repeat(x[-1:], short, 0)]) if short else x
        parts = [self._run(filled[i : i + block]) for i in range(0, len(filled), block)]
        return np.concatenate(parts)[: len(x)]

    def _run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        name = self.session.get_inputs()[0].name
        out: NDArray[np.float32] = self.session.run(None, {name: x if self.batched else x[0]})[0]
        return out if self.batched else out[None]


def _signature(session: Any, path: Path | str) -> tuple[tuple[int, ...], int | None, bool]:
    """Return the shape of a sample, the rows of a call, and whether there is a batch axis."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = inputs[0].shape if inputs else []
    batched = len(shape) > 1
    sample = shape[1:] if batched else shape
    good = len(inputs) == len(outputs) == 1 and inputs[0].type == "tensor(float)" and len(shape) > 0
    if not good or not all(isinstance(v, int) for v in sample):
        shown = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
        raise ModelError(
            "a network of one float32 input (b, *shape), all known but b, and one output",
            f"inputs {shown or 'none'} and {len(outputs)} outputs in {path}",
            "Export a module whose forward takes the samples only and returns the logits only.",
        )
    rows = shape[0] if batched else 1
    return tuple(sample), rows if isinstance(rows, int) else None, batched


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

    They need it for the operators of detectors only, which are not on our list. And where torch has no CUDA while
    torchvision was built with it, importing it fails. So stand-ins are put in its place, until the import is done.
    """
    if {"onnx2torch", "onnx2pytorch"} <= sys.modules.keys():
        yield
        return
    try:
        import torchvision  # noqa: F401
    except Exception:  # ImportError where it is missing, RuntimeError where it does not fit torch
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
