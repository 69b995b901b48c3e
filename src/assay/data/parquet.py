"""Parquet files with a column of encoded images and a column of labels."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from assay.core.errors import DataError
from assay.core.types import Labels
from assay.data import columns
from assay.data.data import Data
from assay.data.images import Images


def parquet(paths: Sequence[Path], name: str, source: str) -> Data:
    """Load images (encoded bytes, or a struct with them as ``bytes``) and labels from files of the same columns.

    Raises:
        DataError: not such files, damaged, without one of the columns, or with other types in them.
    """
    opened = [_opened(p) for p in paths]
    image, label = columns.chosen(opened[0].schema_arrow, str(paths[0]))
    labels = torch.cat([_labels(p, f, (image, label)) for p, f in zip(paths, opened, strict=True)])
    cells = _Cells([*zip(paths, opened, strict=True)], image)
    names = columns.class_names(opened[0].schema_arrow, label)
    return Data(Images(cells, cells.where, len(labels)), labels, name=name, source=source, class_names=names)


def _opened(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, e) from e


def _labels(path: Path, file: Any, names: tuple[str, str]) -> Labels:
    if columns.chosen(file.schema_arrow, str(path)) != names:
        raise DataError(f"columns {' and '.join(names)} in every file", f"others in {path}", "Name one file.")
    try:
        return columns.labels(file.read(columns=[names[1]]), names[1], str(path))
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, e) from e


@final
class _Cells:
    """From a row to the bytes of its image; one row group is in memory at a time."""

    def __init__(self, files: Sequence[tuple[Path, Any]], column: str) -> None:
        self._groups = [(path, file, g) for path, file in files for g in range(file.num_row_groups)]
        counts = [file.metadata.row_group(g).num_rows for _, file, g in self._groups]
        self._starts = [0, *accumulate(counts)]
        self._firsts = {path: self._starts[i] for i, (path, *_) in reversed([*enumerate(self._groups)])}
        self._name, self._group, self._column = column, -1, pa.array([])

    def where(self, row: int) -> str:
        path = self._groups[self._at(row)][0]
        return f"row {row - self._firsts[path]} of {path}"

    def __call__(self, row: int) -> bytes:
        group = self._at(row)
        if group != self._group:
            self._column, self._group = self._load(*self._groups[group]), group
        return columns.encoded(self._column[row - self._starts[group]].as_py(), self.where(row))

    def _at(self, row: int) -> int:
        return bisect_right(self._starts, row) - 1

    def _load(self, path: Path, file: Any, group: int) -> Any:
        try:
            return file.read_row_group(group, columns=[self._name]).column(self._name)
        except (pa.ArrowException, OSError) as e:
            raise _unreadable(path, e) from e


def _unreadable(path: Path, e: Exception) -> DataError:
    return DataError("a readable parquet file", f"{path}: {e}", "The file is damaged or not parquet; make it anew.")
