"""Weights in the safetensors format, which cannot hold code."""

from safetensors import SafetensorError
from safetensors.torch import load_file

from assay.core.errors import ModelError
from assay.models.loaders import weights
from assay.models.loaders.request import Loaded, Request


def load(r: Request) -> Loaded:
    """Build the architecture and fill it with the weights.

    Raises:
        ModelError: a damaged file, no architecture, or weights of another one.
    """
    try:
        state = load_file(r.path)
    except (SafetensorError, OSError, ValueError) as e:
        raise ModelError("a readable .safetensors file", f"{r.path}: {e}", "Save or copy it anew.") from e
    return Loaded(weights.fit(weights.build(r.arch, r.source), state, r.source))
