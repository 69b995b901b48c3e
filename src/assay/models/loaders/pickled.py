"""State dicts that ``torch.save`` wrote: pickles, read as weights only unless they are trusted."""

import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from assay.core.errors import ModelError
from assay.models.loaded import Loaded
from assay.models.loaders import torchscript, weights
from assay.models.loaders.request import Request


def load(r: Request) -> Loaded:
    """Load weights into the architecture; from a trusted file also a whole pickled network, or a TorchScript program.

    Raises:
        ModelError: a damaged file, one that would run code, no architecture, or weights of another one.
    """
    if torchscript.is_script(r.path):
        return torchscript.load(r)
    found = read(r)
    for net in (found, *(found.get(n) for n in weights.CONTAINERS if isinstance(found, Mapping))):
        if isinstance(net, nn.Module):
            return Loaded(net)
    if not isinstance(found, Mapping):
        raise ModelError("a state dict, or a network", f"{type(found).__name__} in {r.path}", "Save net.state_dict().")
    return Loaded(weights.fit(weights.build(r.arch, r.source, found), found, r.source))


def read(r: Request) -> Any:
    """Return what ``torch.save`` wrote.

    Raises:
        ModelError: a damaged file, or one that would run code and is not trusted.
    """
    safe = not r.trust_pickle
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on protocols and old formats, which load or fail anyway
            mapped = safe and zipfile.is_zipfile(r.path)
            return torch.load(r.path, map_location="cpu", weights_only=safe, mmap=mapped)
    except Exception as e:  # a parser given hostile bytes, or code of a trusted file, may raise anything
        raise (refusal(e, str(r.path)) if safe else None) or _unreadable(e, r) from e


def refusal(e: Exception, where: str, uses: str = "") -> ModelError | None:
    """Return the error for a pickle that ``weights_only`` refused for what it calls, None for others."""
    called = re.search(r"GLOBAL (\S+)", str(e))
    uses = uses or (called[1] if called else "")
    if "Weights only load failed" not in str(e) or not uses:
        return None
    return ModelError(
        "weights only: tensors and plain values",
        f"{where} is a pickle that uses {uses}; unpickling it would run code from the file",
        "Save net.state_dict(), best as .safetensors. Only if you trust the file: --trust-pickle.",
    )


def _unreadable(e: Exception, r: Request) -> ModelError:
    # Torch stops at the first instruction that weights do not have, before it sees what is called.
    other = refusal(e, str(r.path), "more than torch.save needs for weights") if _is_pickle(r.path) else None
    return other or ModelError(
        "a readable file of weights",
        f"{r.path}: {f'{type(e).__name__}: {e}'.splitlines()[0]}",
        "Save or copy it anew: it is damaged, or not from torch.save, or needs code that is not here.",
    )


def _is_pickle(path: Path) -> bool:
    """Return whether a file is a complete pickle; its instructions are listed, not run."""
    try:
        with path.open("rb") as file:
            return sum(1 for _ in pickletools.genops(file)) > 0
    except Exception:  # the list of instructions of a damaged file may end in any way
        return False
