"""Parquet files with a column of encoded images and a column of labels."""

import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as pq

from assay.core.errors import DataError
from assay.core.types import Labels
from assay.data.arrays import as_labels
from assay.data.data import Data
from assay.data.images import Images


def parquet(path: Path) -> Data:
    """Load ``image`` (encoded bytes, or a struct with them as ``bytes``) and ``label`` from a parquet file.

    Raises:
        DataError: not such a file, damaged, without one of the columns, or with other types in them.
    """
    try:
        file = pq.ParquetFile(path)
        labels = _labels(path, file)
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, e) from e
    cells = _Cells(path, file)
    samples = Images(cells, cells.where, len(labels))
    return Data(samples, labels, name=path.stem, source=str(path), class_names=_class_names(file.schema_arrow))


def _labels(path: Path, file: Any) -> Labels:
    schema = file.schema_arrow
    if missing := {"image", "label"} - {*schema.names}:
        raise DataError(
            "columns image and label",
            f"{', '.join(schema.names) or 'no columns'} in {path}",
            f"Rename the columns: {' and '.join(sorted(missing))} missing.",
        )
    image, label = schema.field("image").type, schema.field("label").type
    if pa.types.is_struct(image):
        image = image.field("bytes").type if image.get_field_index("bytes") >= 0 else image
    if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
        raise DataError(
            "encoded images (bytes, or a struct with a field bytes) in column image",
            f"{image} in {path}",
            "Write the bytes of PNG or JPEG files; arrays of pixels belong into .npz.",
        )
    if not pa.types.is_integer(label):
        raise DataError("class numbers in column label", f"{label} in {path}", "Write integers 0, 1, ....")
    column = file.read(columns=["label"]).column("label")
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError("a label in every row", f"null in row {row} of {path}", "Drop the rows without a label.")
    return as_labels(column.to_numpy(), f"label of {path}")


def _class_names(schema: Any) -> list[str] | None:
    """Return the names that Hugging Face's datasets library writes into the file's metadata."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features["label"]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


@final
class _Cells:
    """From a row to the bytes of its image; one row group is in memory at a time."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        counts = (file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))
        self._starts = [0, *accumulate(counts)]
        self._group, self._column = -1, pa.array([])

    def where(self, row: int) -> str:
        return f"row {row} of {self._path}"

    def __call__(self, row: int) -> bytes:
        group = bisect_right(self._starts, row) - 1
        if group != self._group:
            self._column, self._group = self._load(group), group
        cell = self._column[row - self._starts[group]].as_py()
        cell = cell["bytes"] if isinstance(cell, dict) else cell
        if not isinstance(cell, bytes):
            raise DataError("an encoded image", f"nothing in {self.where(row)}", "Embed the images in the file.")
        return cell

    def _load(self, group: int) -> Any:
        try:
            return self._file.read_row_group(group, columns=["image"]).column("image")
        except (pa.ArrowException, OSError) as e:
            raise _unreadable(self._path, e) from e


def _unreadable(path: Path, e: Exception) -> DataError:
    return DataError("a readable parquet file", f"{path}: {e}", "The file is damaged or not parquet; make it anew.")
