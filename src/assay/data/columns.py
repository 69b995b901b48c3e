"""Tables with a column of encoded images and a column of labels: which columns these are, and what is in them."""

import json
from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa

from assay.core.errors import DataError
from assay.core.types import Labels
from assay.data.arrays import as_labels

INPUTS: Final = ("image", "img")
LABELS: Final = ("label", "labels", "fine_label")
"""Columns are looked for under these names, the first that is there."""


def chosen(schema: Any, where: str) -> tuple[str, str]:
    """Return the names of the column of images and of the column of labels.

    Where no column has a usual name, it is the only one that Hugging Face's metadata call an image, or a class.

    Raises:
        DataError: there is none, or it has another type.
    """
    found = {"image": _column(schema, INPUTS, "Image"), "label": _column(schema, LABELS, "ClassLabel")}
    if missing := [k for k, v in found.items() if v is None]:
        raise DataError(
            "columns image and label",
            f"{', '.join(schema.names) or 'no columns'} in {where}",
            f"Rename the columns: {' and '.join(missing)} missing.",
        )
    names = str(found["image"]), str(found["label"])
    _check_types(schema, names, where)
    return names


def labels(table: Any, name: str, where: str) -> Labels:
    """Return the labels (n,) in a column of a table.

    Raises:
        DataError: a row without a label.
    """
    column = table.column(name)
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError("a label in every row", f"null in row {row} of {where}", "Drop the rows without a label.")
    return as_labels(column.to_numpy(), f"{name} of {where}")


def encoded(cell: Any, where: str) -> bytes:
    """Return the bytes of the image in a cell: the cell itself, or its field ``bytes``.

    Raises:
        DataError: there are none.
    """
    cell = cell["bytes"] if isinstance(cell, dict) else cell
    if not isinstance(cell, bytes):
        raise DataError("an encoded image", f"nothing in {where}", "Embed the images in the file.")
    return cell


def class_names(schema: Any, label: str) -> list[str] | None:
    """Return the names that Hugging Face's datasets library writes into the metadata of a table."""
    names = _features(schema).get(label, {}).get("names")
    return [str(n) for n in names] if isinstance(names, list) else None


def _column(schema: Any, names: tuple[str, ...], kind: str) -> str | None:
    usual = [n for n in names if n in schema.names]
    called = [n for n, f in _features(schema).items() if n in schema.names and f.get("_type") == kind]
    return usual[0] if usual else called[0] if len(called) == 1 else None


def _features(schema: Any) -> Mapping[str, Mapping[str, Any]]:
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {str(k): v for k, v in features.items() if isinstance(v, dict)}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def _check_types(schema: Any, names: tuple[str, str], where: str) -> None:
    image, label = (schema.field(n).type for n in names)
    if pa.types.is_struct(image):
        image = image.field("bytes").type if image.get_field_index("bytes") >= 0 else image
    if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
        raise DataError(
            f"encoded images (bytes, or a struct with a field bytes) in column {names[0]}",
            f"{image} in {where}",
            "Write the bytes of PNG or JPEG files; arrays of pixels belong into .npz.",
        )
    if not pa.types.is_integer(label):
        raise DataError(f"class numbers in column {names[1]}", f"{label} in {where}", "Write integers 0, 1, ....")
