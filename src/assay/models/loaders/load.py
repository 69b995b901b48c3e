"""The one table of the forms that models come in."""

import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from assay.core.errors import ModelError
from assay.core.files import check_readable
from assay.core.urls import fetched, path_of, url_of
from assay.models.loaded import Loaded
from assay.models.loaders.request import Arch, Request
from assay.models.model import Model
from assay.threats.threat import Box

# The seam for further forms. A scheme ends in a colon, a suffix starts with a dot; the value is the module
# beside this one whose ``load(request)`` returns a Loaded or a Model. It is imported only when it is needed.
FORMS: dict[str, str] = {
    ".ckpt": "pickled",
    ".h5": "keras_file",
    ".joblib": "estimator",
    ".keras": "keras_file",
    ".onnx": "onnx",
    ".pkl": "learner",
    ".pt": "pickled",
    ".pt2": "exported",
    ".pth": "pickled",
    ".safetensors": "tensors",
    ".th": "pickled",
    ".torchscript": "torchscript",
    ".ts": "torchscript",
    "/": "saved_model",
    "demo:": "demo",
    "hf:": "hugging_face",
    "http:": "http",
    "https:": "http",
    "ort:": "onnx_runtime",
    "py:": "named",
    "timm:": "timm_models",
    "torchvision:": "torchvision_models",
}

_FORMS_TEXT = (
    "a model file (.onnx, .pt2, .keras, .torchscript, or weights in .safetensors, .pth, .pt, .th, .ckpt), "
    "a SavedModel folder, ort:FILE.onnx, timm:NAME, hf:DIR_OR_NAME, torchvision:NAME, http://..., py:module:callable, "
    "or demo:NAME"
)


def load_model(
    source: str | os.PathLike[str],
    *,
    arch: Arch | None = None,
    box: Box | tuple[float, float] = (0, 1),
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    trust_pickle: bool = False,
) -> Model:
    """Load a model in any form that is understood.

    Args:
        source: a file: ``.onnx``; ``.pt2`` (a program of ``torch.export``); ``.torchscript``, ``.ts``, or ``.pt`` of
            TorchScript; weights as ``.safetensors``, or as a state dict in ``.pth``, ``.pt``, ``.th`` or ``.ckpt``,
            with ``arch``; ``.keras``, ``.h5``, a SavedModel folder; ``.joblib``, ``.pkl``. Or a name:
            ``ort:FILE.onnx`` (ONNX Runtime, without gradients), ``timm:NAME``, ``torchvision:NAME``,
            ``hf:DIR_OR_NAME``, ``py:module:callable`` that returns a network or a :class:`Model`, ``demo:NAME``.
            Names of libraries may end in ``+download``, which fetches their weights, or in ``@FILE``, which has them.
            Files and folders may be at a URL of an object store, such as ``s3://bucket/net.pt2``.
        arch: builds the network that weights belong to: ``module:callable``, ``timm:NAME``, ``torchvision:NAME``,
            ``hf:DIR``, ``demo:NAME``, or the callable.
        box: the input domain before normalisation.
        mean: per channel, applied inside the model; instead of what the file says.
        std: per channel, applied inside the model; instead of what the file says.
        trust_pickle: unpickle the file, and load programs unchecked; both can run code from the file.

    Raises:
        ModelError: the file is not there, damaged, not understood, would run code, or does not fit ``arch``.
        MissingExtraError: the form needs packages that are not installed.

    Example:
        >>> import torch
        >>> load_model("demo:mnist-plain")(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    source = path_of(os.fspath(source))
    if (url := url_of(source)) is not None:
        source = str(fetched(url, ModelError, "a model"))
    form, rest = _form(source)
    loaded = importlib.import_module(f"assay.models.loaders.{FORMS[form]}").load(
        Request(source, rest, arch, trust_pickle)
    )
    if isinstance(loaded, Model):
        return _settled(loaded, source, box, mean, std)
    assert isinstance(loaded, Loaded)
    said = {n: v for n, v in (("mean", mean), ("std", std)) if v is not None}
    name = loaded.name or (rest.rpartition(":")[2] if form[-1] == ":" else Path(rest).stem)
    return Model(box=box, **{f.name: getattr(loaded, f.name) for f in fields(loaded)} | said | {"name": name})


def _form(source: str) -> tuple[str, str]:
    """Return the key of the table for a source, and the text after the scheme or the path."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source)
    key = scheme[0] if scheme else Path(source).suffix.lower()
    if scheme and key in FORMS:
        return key, source[scheme.end() :]
    path = Path(source)
    if not path.exists():
        raise ModelError(f"a model: {_FORMS_TEXT}", f"no file {source!r}", "Check the path.")
    if path.is_dir():
        return "/", source
    if key not in FORMS:
        raise ModelError(_FORMS_TEXT, f"the file {source!r}", "Save the model in one of these forms.")
    check_readable(path, ModelError, "a model file", "Save or copy it anew.")
    return key, source


def _settled(
    model: Model,
    source: str,
    box: Box | tuple[float, float],
    mean: Sequence[float] | float | None,
    std: Sequence[float] | float | None,
) -> Model:
    """Return a model that the user's function made, after checking that nothing else was said about it."""
    said = box if isinstance(box, Box) else Box(*box)
    if mean is not None or std is not None or said not in (Box(), model.domain):
        raise ModelError(
            f"box, mean and std given once: {source} returns a Model that has its own",
            f"box={said}, mean={mean}, std={std} beside it",
            "Leave out --box, --mean and --std.",
        )
    return model
