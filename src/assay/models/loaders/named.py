"""Networks that a user's own function returns."""

from assay.core.errors import ModelError
from assay.core.named import call_named
from assay.models.loaded import Loaded
from assay.models.loaders.request import Request
from assay.models.model import Model


def load(r: Request) -> Loaded | Model:
    """Call ``module:callable``.

    Raises:
        ModelError: it cannot be imported, raised, or returned no network.
    """
    net = call_named(r.rest, ModelError, "a model")
    if isinstance(net, Model):
        return net
    if not callable(net):
        raise ModelError(
            f"a torch.nn.Module, a callable on tensors, or an assay.Model from {r.source}",
            type(net).__name__,
            "Return the network itself.",
        )
    return Loaded(net)
