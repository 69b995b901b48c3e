"""TorchScript programs, loaded only if they are trusted.

They hold no Python, but a program of their own, which runs while they are loaded (``__setstate__``) and whenever they
are asked. It may use any operator of torch, and some of those read and write files (``aten::save``,
``aten::from_file``). A program of ``torch.export`` is a graph that can be checked instead (``exported.py``).
"""

import hashlib
import warnings
import zipfile
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from assay.core.errors import ModelError
from assay.models.loaded import Loaded
from assay.models.loaders.request import Request

_NOTE = (
    "This is a TorchScript program. PyTorch has deprecated TorchScript: torch.export is what replaces it, and .pt2 "
    "files need no trust."
)


def is_script(path: Path) -> bool:
    """Return whether a file is a TorchScript archive, of any name."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(n.partition("/")[2] == "constants.pkl" for n in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def load(r: Request) -> Loaded:
    """Load a program of one tensor, scripted or traced.

    Raises:
        ModelError: it is not trusted, damaged, or needs operators that are not here.
    """
    if not r.trust_pickle:
        raise ModelError(
            "a program that is checked before it runs",
            f"a TorchScript archive, {r.path}, whose program may read and write files when it is loaded",
            "Save the network with torch.export.save as .pt2, or its state_dict(). "
            "Only if you trust where the file is from: --trust-pickle.",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it is said in the note
            net = torch.jit.load(str(r.path), map_location="cpu")  # type: ignore[no-untyped-call]
        mark = hashlib.sha256(r.path.read_bytes()).hexdigest()
    except Exception as e:  # a parser given hostile bytes may raise anything
        raise ModelError(
            "a TorchScript program that this version of torch can load",
            f"{r.path}: {type(e).__name__}: {_last_line(e)}",
            "Save or copy it anew; operators of other packages are there once the package is imported.",
        ) from e
    return Loaded(Scripted(net, mark), notes=(_NOTE,))


@final
class Scripted(nn.Module):
    """A TorchScript program; ``digest`` is the SHA-256 of its file, and part of its fingerprint."""

    def __init__(self, net: Any, digest: str) -> None:
        super().__init__()
        self.digest = digest
        # A frozen program (torch.jit.freeze) has neither parameters nor a mode, which submodules must have.
        self.net = net if hasattr(net, "training") else None
        self._program = (net,)

    def forward(self, x: Tensor) -> Tensor:
        try:
            out: Tensor = self._program[0](x)
        except RuntimeError as e:
            if "memory" in str(e):
                raise  # smaller batches may do
            raise ModelError(
                "inputs as the TorchScript program takes them",
                f"{x.dtype} of shape {tuple(x.shape)}, and the program said: {_last_line(e)}",
                "A traced program may be fixed to the shape, the type or the number of rows that it was traced with: "
                "trace it with float32 inputs of this shape, or use torch.export.",
                code="bad-shape",
            ) from e
        return out


def _last_line(e: Exception) -> str:
    return next((line for line in reversed(str(e).splitlines()) if line.strip()), "")
