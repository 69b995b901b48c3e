"""The networks that ship with the package."""

from importlib import resources

from safetensors.torch import load as read
from torch import nn

from assay.core.errors import ModelError
from assay.core.registry import closest
from assay.models.demo import nets
from assay.models.loaded import Loaded
from assay.models.loaders import weights
from assay.models.loaders.request import Request

NETS = dict.fromkeys(("mnist-plain", "mnist-robust", "mnist-certified"), nets.mnist_cnn)


def load(r: Request) -> Loaded:
    """Load a network that ships, with its weights.

    Raises:
        ModelError: no such name, or an incomplete installation.
    """
    net = untrained(r.rest)
    try:
        state = read((resources.files("assay.models.demo") / f"{r.rest}.safetensors").read_bytes())
    except OSError as e:
        raise ModelError(f"{r.rest}.safetensors in the installed package", f"{e}", "Reinstall the package.") from e
    return Loaded(weights.fit(net, state, r.source))


def untrained(name: str) -> nn.Module:
    """Build the architecture of a demo model.

    Raises:
        ModelError: no such name.
    """
    if name not in NETS:
        raise ModelError("the name of a demo model", repr(name), closest(name, [*NETS]))
    return NETS[name]()
