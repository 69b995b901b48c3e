"""Keras files, ``.keras`` and ``.h5``: vetted, then read by Keras in its safe mode.

Both are descriptions of layers with weights beside them. A description can name code: a Lambda layer holds it, others
wrap foreign modules, or read files and addresses. So only layers that Keras has itself are let through, but for those;
and weights must lie in the file itself.
"""

import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from assay.core.errors import ModelError
from assay.core.optional import need
from assay.models.loaded import Loaded
from assay.models.loaders.request import Request

_REFUSED: Final = frozenset(
    {
        "FlaxLayer",
        "HashedCrossing",
        "Hashing",
        "IndexLookup",
        "IntegerLookup",
        "JaxLayer",
        "Lambda",
        "StringLookup",
        "TFSMLayer",
        "TextVectorization",
        "TorchModuleWrapper",
        "__lambda__",
    }
)
"""Layers of Keras that hold code, wrap modules of others, or read files."""

_OWN: Final = re.compile(
    r"keras(\.src)?(\.(activations|constraints|dtype_policies|initializers|layers|models|ops|regularizers)(\..+)?)?"
)
"""Modules of Keras that hold layers and what layers are made of."""

_MOST: Final = 64 * 2**20
"""Bytes of a description, unpacked; real ones have thousands."""


def load(r: Request) -> Loaded:
    """Load a network; where Keras is not in use yet, on its torch backend, as a network with parameters.

    Raises:
        ModelError: the file is damaged, holds weights only, names code, or was made by layers that are not Keras's.
        MissingExtraError: Keras is not installed.
    """
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = need("keras", "keras")
    if not r.trust_pickle:
        vet(r.path)
    from assay.models.bridges.keras import bridge

    try:
        model = keras.saving.load_model(r.path, compile=False, safe_mode=not r.trust_pickle)
    except Exception as e:  # a parser given hostile bytes may raise anything
        raise ModelError(
            f"a model that Keras {keras.__version__} can load",
            f"{r.path}: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}",
            "Save it anew with model.save('model.keras'); models with code of their own need py:module:callable.",
        ) from e
    return replace(bridge(model), name="")  # the file's; Keras counts models in theirs


def vet(path: Path) -> None:
    """Refuse a file that names code, or weights in other files.

    Raises:
        ModelError: see above, or it is no Keras file.
    """
    try:
        described = _described(path)
    except ModelError:
        raise
    except Exception as e:  # zip, HDF5 and JSON readers given hostile bytes
        raise ModelError(
            "a .keras or .h5 file that Keras wrote",
            f"{path}: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}",
            "Save it anew with model.save('model.keras').",
        ) from e
    for found in _objects({n: v for n, v in described.items() if n != "compile_config"}):
        _check(found, path)


def _described(path: Path) -> dict[str, Any]:
    """Return the description of the layers, after a look at where the weights lie."""
    h5py = need("h5py", "keras")
    if not zipfile.is_zipfile(path):
        with h5py.File(path, "r") as file:
            _inside(file, path)
            text = file.attrs.get("model_config")
    else:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("config.json").file_size > _MOST:
                raise ValueError("a description of that size")
            text = archive.read("config.json")
            with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
                _inside(file, path)
    if text is None:
        raise ModelError(
            "a whole model",
            f"weights only in {path}",
            "Save it with model.save('model.keras'), not save_weights.",
        )
    described: dict[str, Any] = json.loads(text)
    return described


def _inside(group: Any, path: Path) -> None:
    """Refuse links to other files, and data that lies in them."""
    for name in group:
        link = group.get(name, getlink=True)
        item = None if hasattr(link, "filename") or hasattr(link, "path") else group[name]
        if item is None or getattr(item, "external", None) or getattr(item, "is_virtual", False):
            raise ModelError(
                "weights in the file itself", f"{path}: {name} lies elsewhere", "Save the model anew with Keras."
            )
        if hasattr(item, "keys"):
            _inside(item, path)


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all descriptions of objects inside one."""
    if isinstance(value, Mapping):
        if isinstance(value.get("class_name"), str):
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for v in value:
            yield from _objects(v)


def _check(found: Mapping[str, Any], path: Path) -> None:
    """Refuse an object that is no layer, initializer or the like of Keras itself, or of the user's own."""
    name, module = found["class_name"].rpartition(">")[2], str(found.get("module") or "keras")
    known = _OWN.fullmatch(module) or (module == "builtins" and name in ("function", "slice"))
    if (known and name not in _REFUSED) or _registered(found):
        return
    raise ModelError(
        "layers of Keras itself, without code of their own",
        f"{path} holds {name}" + ("" if known else f" of {module}"),
        "Rebuild it from the layers of Keras, or build it in Python and use py:module:callable. Only if you trust the "
        "file: --trust-pickle.",
    )


def _registered(found: Mapping[str, Any]) -> bool:
    """Tell whether it is a class that the user has registered with Keras in this process."""
    keras = need("keras", "keras")
    name = found.get("registered_name") or found["class_name"]
    return isinstance(name, str) and keras.saving.get_registered_object(name) is not None
