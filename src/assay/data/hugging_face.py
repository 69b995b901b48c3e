"""Folders as Hugging Face's datasets library writes and reads them; that library is not needed for it.

``DIR`` or ``DIR:SPLIT``: what ``save_to_disk`` wrote; parquet files, as data sets are downloaded; or a folder of class
folders, also one for each split. Nothing is downloaded, and no script of a data set is run.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

import pyarrow as pa
import torch

from assay.core.errors import DataError
from assay.core.registry import closest
from assay.data import columns
from assay.data.data import Data
from assay.data.images import Images, folder
from assay.data.parquet import parquet

_HELD_OUT: Final = ("test", "validation", "valid", "val", "eval", "dev")
"""Of several splits the first of these is taken: nobody judges a model by what it was trained on."""

_SPLITS: Final = (*_HELD_OUT, "train")


def hugging_face(rest: str) -> Data:
    """Load ``DIR`` or ``DIR:SPLIT``.

    Raises:
        DataError: no such folder, none of these forms, damaged, no such split, or several and none is held out.
    """
    path, wanted = _place(rest)
    if (path / "dataset_dict.json").is_file():
        names = _json(path / "dataset_dict.json", "splits", list)
        return _saved(path / _inside(_split([*map(str, names)], wanted, path), path), path.name)
    if (path / "state.json").is_file():
        _split([str(_json(path / "state.json", "_split", object))], wanted, path)
        return _saved(path, path.name)
    if files := sorted(path.rglob("*.parquet")):
        return _tables(path, files, wanted)
    splits = [s for s in _SPLITS if (path / s).is_dir()]
    return folder(path / _split(splits, wanted, path) if splits or wanted else path)


def _place(rest: str) -> tuple[Path, str | None]:
    """Return the folder and the split."""
    path, _, split = rest.rpartition(":")
    for place, wanted in ((rest, None), (path, split)):
        if place and Path(place).is_dir():
            return Path(place), wanted
    raise DataError(
        "a folder of a data set: hf:DIR or hf:DIR:SPLIT",
        f"no folder {rest!r}",
        "Nothing is downloaded here: datasets.load_dataset(NAME).save_to_disk(DIR), "
        "or `hf download NAME --repo-type dataset --local-dir DIR`.",
    )


def _split(known: Sequence[str], wanted: str | None, path: Path) -> str:
    """Choose a split: the wanted one, the only one, or one that is held out."""
    if wanted is not None and wanted not in known:
        raise DataError(f"a split of {path}", repr(wanted), closest(wanted, [*known]))
    held_out = [s for s in _HELD_OUT if s in known]
    found = [wanted] if wanted is not None else known if len(known) == 1 else held_out
    if not found:
        raise DataError("one split", f"{', '.join(known) or 'none'} in {path}", f"Choose one: hf:{path}:SPLIT.")
    return found[0]


def _tables(path: Path, files: Sequence[Path], wanted: str | None) -> Data:
    """Load the parquet files of a split; ``train-00000-of-00002.parquet`` and ``train/0000.parquet`` are of train."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file, path), []).append(file)
    name = _split([*splits], wanted, path)
    folders = {f.parent for f in splits[name]}
    if len(folders) > 1:
        shown = ", ".join(map(str, sorted(folders)))
        raise DataError("one configuration of a data set", f"split {name} in {shown}", "Name one: hf:FOLDER.")
    return parquet(splits[name], path.name, f"hf:{path}:{name}")


def _split_of(file: Path, root: Path) -> str:
    numbered = re.match(r"(.+?)-\d+-of-\d+", file.stem)
    if numbered:
        return numbered[1]
    return file.parent.name if file.parent != root and file.parent.name in _SPLITS else file.stem


def _saved(path: Path, name: str) -> Data:
    """Load the Arrow streams of one split."""
    entries = _json(path / "state.json", "_data_files", list)
    files = [path / _inside(str(e.get("filename") if isinstance(e, dict) else e), path) for e in entries]
    tables = [_table(f) for f in files]
    if not tables:
        raise DataError("at least one sample", f"no files in {path}", "Save it anew.", code="empty-data")
    image, label = columns.chosen(tables[0].schema, str(files[0]))
    labels = torch.cat([columns.labels(t, label, str(f)) for t, f in zip(tables, files, strict=True)])
    cells = _Cells(pa.concat_tables([t.select([image]) for t in tables]).column(0), str(path))
    samples = Images(cells, cells.where, len(labels))
    names = columns.class_names(tables[0].schema, label)
    return Data(samples, labels, name=name, source=f"hf:{path}", class_names=names)


def _table(file: Path) -> Any:
    try:
        with pa.memory_map(str(file)) as mapped:
            table = pa.ipc.open_stream(mapped).read_all()
        table.select(columns.chosen(table.schema, str(file))).validate(full=True)
    except (pa.ArrowException, OSError) as e:
        raise DataError("a readable Arrow file", f"{file}: {e}", "Save the data set anew.") from e
    return table


def _json(file: Path, key: str, kind: type) -> Any:
    try:
        value = json.loads(file.read_text())[key]
        if not isinstance(value, kind):
            raise TypeError(f"{key} is a {type(value).__name__}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{key} in {file}", f"{type(e).__name__}: {e}", "Save the data set anew.") from e
    return value


def _inside(name: str, path: Path) -> str:
    """Return a name that a file gives, which must not lead out of its folder."""
    if Path(name).name != name:
        raise DataError(f"names of files in {path}", repr(name), "Save the data set anew.")
    return name


@final
class _Cells:
    """From a row to the bytes of its image, in files that are mapped into memory."""

    def __init__(self, column: Any, place: str) -> None:
        self._column, self._place = column, place

    def where(self, row: int) -> str:
        return f"row {row} of {self._place}"

    def __call__(self, row: int) -> bytes:
        return columns.encoded(self._column[row].as_py(), self.where(row))
