"""Models behind an HTTP interface: ``http://host/path#option=value&...``, with the options of :class:`Endpoint`."""

from urllib.parse import parse_qsl

from assay.core.optional import need
from assay.core.registry import build
from assay.models.endpoint import Endpoint, Remote
from assay.models.loaded import Loaded
from assay.models.loaders.request import Request


def load(r: Request) -> Loaded:
    """Return a network that asks the endpoint; nothing is sent yet.

    Raises:
        MissingExtraError: urllib3 is not installed.
        UsageError, ModelError: an option that there is not, or a wrong value.
    """
    need("urllib3", "http")
    url, _, options = r.source.partition("#")
    endpoint = build(Endpoint, {"url": url} | dict(parse_qsl(options, keep_blank_values=True)), "the endpoint")
    note = (
        f"The model is asked over HTTP, about each input once; answers and a log of the queries are in "
        f"{endpoint.folder}. Remove that folder when the model behind {url} has changed."
    )
    return Loaded(Remote(endpoint), probabilities=endpoint.probabilities, notes=(note,), name=url)
