"""Networks that ONNX Runtime runs: without gradients, and what any conversion of them is judged by."""

import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from assay.core.errors import ModelError
from assay.core.optional import need
from assay.data.fit import Fit
from assay.models.bridges.function import Outside
from assay.models.bridges.layout import Layout
from assay.models.loaded import Loaded

_EXTERNAL: Final = re.compile(rb"\x0a\x08location\x12([\x01-\x7f])")
"""In an ONNX file, what stands before the length and the name of a file with weights (onnx.proto, external_data)."""


def bridge(session: Any) -> Loaded:
    """Make a network without gradients of a live ``onnxruntime.InferenceSession``.

    Raises:
        ModelError: it has other than one float32 input, all of whose axes but the batch are known, and one output.
    """
    path, content = (getattr(session, name, None) for name in ("_model_path", "_model_bytes"))
    if path:
        mark = digest(Path(os.fsdecode(path)))
    elif isinstance(content, bytes):
        mark = hashlib.sha256(content).hexdigest()
    else:
        raise ModelError("a session of onnxruntime that was made of a file or of bytes", f"{session!r}", _MAKE)
    runtime = Runtime.of(session, os.fsdecode(path or "onnxruntime.InferenceSession"))
    name = Path(os.fsdecode(path)).stem if path else ""
    return scored(runtime, mark, name)


_SIDES: Final = (8, 4096)
"""Pixels of the sides of what counts as an image; other inputs of three axes are something else."""

_ROWS: Final = (3, *(2**k for k in range(9)))
"""Numbers of rows that are tried; nobody exports with the first one, so that a file that takes it takes any."""

_MAKE: Final = "Give onnxruntime.InferenceSession(path)."

SCORES: Final = (
    "The network runs in ONNX Runtime, which gives no gradients: it is attacked through its scores only, in many more "
    "passes. A .onnx file without ort: before it is converted, and attacked with gradients."
)


def scored(runtime: "Runtime", mark: str, name: str) -> Loaded:
    """Return what a model of ONNX Runtime is: a network without gradients."""
    fit = fit_of(runtime.shape)
    return Loaded(network(runtime, mark), fit=fit, notes=(SCORES, *sized(fit)), name=name)


def fit_of(shape: tuple[int, ...]) -> Fit | None:
    """Return how images get the size that a file declares, (c, h, w) or (h, w, c); None where it takes no images.

    The shorter side is scaled and the centre is taken: the file does not say how. Grey images become coloured where
    that is wanted, but not the other way.
    """
    if len(shape) != 3 or not {1, 3} & {shape[0], shape[2]}:
        return None
    height, width = shape[1:] if shape[0] in (1, 3) else shape[:2]
    if not _SIDES[0] <= min(height, width) <= max(height, width) <= _SIDES[1]:
        return None
    coloured = 3 in (shape[0], shape[2])
    return Fit(height, width, max(height, width), "bilinear", channels=3 if coloured else 0)


def sized(fit: Fit | None) -> tuple[str, ...]:
    """Return the sentence about a fit."""
    if fit is None:
        return ()
    return (
        f"The file takes images of {fit.height} x {fit.width}. Images of another size are scaled by their shorter "
        "side, bilinearly, and the centre is taken; the file does not say how its network was trained.",
    )


def network(runtime: "Runtime", mark: str) -> nn.Module:
    """Return the network, as tensors (b, *shape) to outputs without gradient; ``mark`` is the SHA-256 of its file."""
    return Outside(runtime.answer, None, Layout(runtime.shape), lambda: mark)


def digest(path: Path) -> str:
    """Return the SHA-256, in hex, of an ONNX file and of the files beside it that hold its weights.

    Raises:
        ModelError: one of them cannot be read.
    """
    try:
        content = path.read_bytes()
        sha = hashlib.sha256(content)
        names = {content[m.end() : m.end() + m[1][0]] for m in _EXTERNAL.finditer(content)}
        for part in (path.parent / os.fsdecode(n) for n in sorted(names) if b"\0" not in n):
            if part.is_file():
                with part.open("rb") as file:
                    sha.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as e:
        raise ModelError("a file that can be read", f"{e.filename}: {e.strerror}", "Check its permissions.") from e
    return sha.hexdigest()


@final
@dataclass(frozen=True, slots=True)
class Runtime:
    """An ONNX file as ONNX Runtime runs it.

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
        """Open a file, for the CPU in one thread.

        Raises:
            MissingExtraError: ONNX Runtime is not installed.
            ModelError: it cannot run the file, or the file has other than one float32 input and one output.
        """
        onnxruntime = need("onnxruntime", "onnx")
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
        return cls.of(session, str(path))

    @classmethod
    def of(cls, session: Any, where: str) -> "Runtime":
        """Take a session; ``where`` is how messages call it.

        Raises:
            ModelError: it has other than one float32 input and one output.
        """
        return cls(session, *_signature(session, where))._tried()

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the outputs (b, *out) for inputs (b, *shape), whatever number of rows the file takes."""
        block = self.rows or len(x)
        short = -len(x) % block
        filled = np.concatenate([x, np.repeat(x[-1:], short, 0)]) if short else x
        parts = [self._run(filled[i : i + block]) for i in range(0, len(filled), block)]
        return np.concatenate(parts)[: len(x)]

    def answer(self, x: Tensor) -> Tensor:
        """Return the outputs (b, *out) for a tensor (b, *shape) on the CPU, without gradient."""
        return torch.from_numpy(self(x.detach().numpy()))

    def _tried(self) -> "Runtime":
        """Return what runs, where the file claims to take any number of rows: exporters leave some fixed inside."""
        for rows in _ROWS if self.rows is None else ():
            try:
                self._run(np.zeros((rows, *self.shape), np.float32))
            except Exception:  # of ONNX Runtime
                continue
            return self if rows == _ROWS[0] else replace(self, rows=rows)
        return self

    def _run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        name = self.session.get_inputs()[0].name
        out: NDArray[np.float32] = self.session.run(None, {name: x if self.batched else x[0]})[0]
        return out if self.batched else out[None]


def _signature(session: Any, where: str) -> tuple[tuple[int, ...], int | None, bool]:
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
            f"inputs {shown or 'none'} and {len(outputs)} outputs in {where}",
            "Export a module whose forward takes the samples only and returns the logits only.",
        )
    rows = shape[0] if batched else 1
    return tuple(sample), rows if isinstance(rows, int) else None, batched
