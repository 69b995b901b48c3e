"""Exported fastai Learners, and other pickled models: programs in all but name, loaded only where they are trusted."""

import pickle
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

from torch import nn

from assay.core.errors import ModelError
from assay.core.optional import need
from assay.models.bridges import bridged
from assay.models.loaded import Loaded
from assay.models.loaders.request import Request

_MOST = 64 * 2**20
"""Bytes of a pickle that are looked at to say what it would run."""

_SHOWN = 6


def load(r: Request) -> Loaded:
    """Load what ``learn.export()`` wrote, or another pickled model that a bridge takes, from a trusted file.

    Raises:
        ModelError: the file is not trusted (the message says what it would run), damaged, or holds no model.
        MissingExtraError: its framework is not installed.
    """
    if not r.trust_pickle:
        raise ModelError(
            "a model file that holds no program",
            f"{r.path}, a pickle: {_described(r.path)}",
            "Only if you trust the file: --trust-pickle. Else export the network: torch.export, ONNX or .safetensors.",
        )
    try:
        found = _learner(r.path) if zipfile.is_zipfile(r.path) else _unpickled(r.path)
    except ModelError:
        raise
    except Exception as e:  # the code of a trusted file may raise anything
        raise ModelError(
            "a Learner that learn.export() wrote, or another pickled model",
            f"{r.path}: {f'{type(e).__name__}: {e}'.splitlines()[0]}",
            "Import what it was made of, or export it anew with the versions that are installed.",
        ) from e
    loaded = bridged(found) or (Loaded(found) if isinstance(found, nn.Module) else None)
    if loaded is None:
        raise ModelError(
            "a fastai Learner, or another model", f"{type(found).__name__} in {r.path}", "Pickle it whole."
        )
    return loaded


def _learner(path: Path) -> Any:
    fastai = need("fastai.learner", "fastai")
    need("fastai.vision.all", "fastai")  # what exported Learners of images refer to
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a pickle has been said, and agreed to
        return fastai.load_learner(path)


def _unpickled(path: Path) -> Any:
    with path.open("rb") as file:
        return pickle.load(file)


def _described(path: Path) -> str:
    """Say what a pickle would import and call; nothing of it is run."""
    names = _names(path)
    if not names:
        return "what it would run cannot be told; unpickling it can run anything"
    packages = sorted({n.partition(".")[0] for n in names})
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return f"unpickling it would run code of {', '.join(packages[:12])}, and whatever it says with it ({shown})"


def _names(path: Path) -> list[str]:
    """Return the functions and classes that a pickle names, most suspicious first: those of no known framework."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return _called(file)
        with zipfile.ZipFile(path) as archive:
            inside = [n for n in archive.namelist() if n.endswith("data.pkl")]
            with archive.open(inside[0]) as member:
                return _called(member)
    except Exception:  # a parser given hostile bytes may raise anything
        return []


def _called(file: IO[bytes]) -> list[str]:
    found: dict[str, None] = {}
    recent: list[str] = []
    for op, arg, _ in pickletools.genops(file.read(_MOST)):
        if op.name in ("GLOBAL", "INST"):
            found[str(arg).replace(" ", ".")] = None
        elif op.name == "STACK_GLOBAL" and len(recent) > 1:
            found[".".join(recent[-2:])] = None
        elif isinstance(arg, str):
            recent = [*recent[-1:], arg]
    known = ("fastai", "fastcore", "fasttransform", "torch", "collections", "numpy", "sklearn", "pathlib")
    return sorted(found, key=lambda n: (n.partition(".")[0] in known, n))
