"""Weights in the safetensors format, which cannot hold code."""

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from assay.core.errors import ModelError
from assay.models.loaded import Loaded
from assay.models.loaders import weights
from assay.models.loaders.request import Request


def load(r: Request) -> Loaded:
    """Build the architecture and fill it with the weights.

    Raises:
        ModelError: a damaged file, no architecture, or weights of another one.
    """
    state = read(r)
    return Loaded(weights.fit(weights.build(r.arch, r.source, state), state, r.source))


def read(r: Request) -> dict[str, Tensor]:
    """Return the tensors in a file.

    Raises:
        ModelError: a damaged file.
    """
    try:
        return load_file(r.path)
    except (SafetensorError, OSError, ValueError) as e:
        raise ModelError("a readable .safetensors file", f"{r.path}: {e}", "Save or copy it anew.") from e
