"""An image of one's own: decoded with care, fitted to the model, predicted, and walked from."""

import base64
import binascii
from typing import Any, Final

import torch
from torch import Tensor

from assay.core.errors import AssayError, DataError
from assay.core.levels import at_level
from assay.core.optional import need
from assay.data.fit import Fit
from assay.data.images import Images
from assay.models import Model
from assay.reports.summary import dig
from assay.serve import walking
from assay.serve.catalogue import Kept
from assay.serve.elements import Element, core, h, link, pictured, shown, trouble
from assay.serve.home import Query
from assay.serve.live import predicted
from assay.serve.sample import confidences
from assay.serve.shelf import Shelf, Subject

LARGEST: Final = 8 * 2**20
"""Bytes that an image may have."""

_SWAP: Final = "swap light and dark, for ink on paper where the model knows light on dark"

_MAGIC: Final = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}


def page(shelf: Shelf, query: Query) -> Element:
    """Return the page to upload an image for the model of a ``run``.

    Raises:
        RunError, ModelError: the run, or its model, is not there.
        DataError: the model takes no images.
    """
    run = shelf.catalogue.open(query.get("run", ""))
    model = shelf.sources.model(run)
    fit = fit_of(run, model)
    colours = "grey" if fit.channels == 1 else "coloured"
    return h(
        "Div",
        h("H1", f"What does {model.name} make of an image of yours?"),
        h(
            "P",
            f"PNG or JPEG. It is scaled and cropped to {fit.width} by {fit.height} pixels, {colours}, as the model "
            "takes it. It stays on this machine, and is stored nowhere.",
            className="lead",
        ),
        core(
            "Upload",
            id="upload",
            children=h("Div", "Drop an image here, or choose one."),
            accept="image/png,image/jpeg",
            max_size=LARGEST,
            className="upload",
        ),
        core("Checklist", id="invert", options=[{"label": _SWAP, "value": "x"}], value=[]),
        core("Store", id="upload-run", data=run.name),
        h("Div", id="uploaded"),
        h("P", link("Back to the run", "run", name=run.name)),
    )


def fit_of(run: Kept, model: Model) -> Fit:
    """Return how images get the size that a model takes: as the model says, else that of the run's data.

    Raises:
        DataError: neither says, or the model takes no images.
    """
    shape = dig(run.manifest, "data", "shape")
    plain = isinstance(shape, list) and len(shape) == 3 and all(isinstance(v, int) and 1 <= v <= 4096 for v in shape)
    if not plain or shape[0] not in (1, 3):
        raise DataError("a model of images (1 or 3, h, w)", f"data of shape {shape}", "Only images can be uploaded.")
    channels, height, width = shape
    if model.fit is not None and (model.fit.height, model.fit.width) == (height, width):
        return model.fit if model.fit.channels else Fit(height, width, model.fit.shorter, model.fit.filter, channels)
    return Fit(height, width, min(height, width) if height == width else 0, channels=channels)


def decoded(content: str, fit: Fit, box: tuple[float, float]) -> Tensor:
    """Return an uploaded image as a sample (c, h, w) inside the box.

    Args:
        content: as a browser sends it, ``data:image/png;base64,...``.
        fit: to which size.
        box: the values of black and white.

    Raises:
        DataError: no PNG or JPEG, a damaged one, or one that is too large.
    """
    try:
        raw = base64.b64decode(content.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as e:
        raise DataError("an image", f"no base64: {e}", "Upload the file again.") from e
    if len(raw) > LARGEST:
        raise DataError(f"an image of at most {LARGEST} bytes", f"{len(raw)}", "Scale it down.")
    if not any(raw.startswith(magic) for magic in _MAGIC):
        raise DataError(f"an image in {' or '.join(_MAGIC.values())}", f"{raw[:8]!r}", "Convert it.")
    image = Images(lambda _: raw, lambda _: "the image", 1, fit).stored(torch.tensor([0]))[0]
    return at_level(image.float(), *box)


def register(app: Any, shelf: Shelf) -> None:
    """Make uploading work."""
    dash = need("dash", "serve")

    @app.callback(
        dash.Output("uploaded", "children"),
        dash.Input("upload", "contents"),
        dash.Input("invert", "value"),
        dash.State("upload-run", "data"),
        prevent_initial_call=True,
    )
    def received(content: Any, swap: Any, name: Any) -> Any:
        if not isinstance(content, str):
            raise dash.exceptions.PreventUpdate
        try:
            return _seen(shelf, shelf.catalogue.open(str(name)), content, swap=bool(swap))
        except AssayError as e:
            return trouble(str(e))


def _seen(shelf: Shelf, run: Kept, content: str, *, swap: bool) -> Element:
    """Return the image as the model sees it, what it says, and a walk from there."""
    model = shelf.sources.model(run)
    box = (model.domain.lo, model.domain.hi)
    x = decoded(content, fit_of(run, model), box)
    x = box[0] + box[1] - x if swap else x
    subject, where = Subject(run, model, x, 0), {"run": run.name, "upload": shelf.uploads.add(x)}
    sure = predicted(model, x, shelf.sources)
    said = int(sure.argmax())
    return h(
        "Div",
        h("H2", f"It says {subject.label(said)}"),
        h(
            "Div",
            pictured(shown(x.numpy(), *box, alt="The image as the model sees it"), "as the model sees it"),
            confidences(run, model, sure),
            className="answer",
        ),
        walking.section(subject, where, sure, None),
    )
