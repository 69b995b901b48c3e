"""The runs in a folder: found, read and checked. Nothing outside the folder is read, and nothing in it is believed."""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assay.core.errors import AssayError, RunError
from assay.reports.summary import Manifest, Summary, dig, read, summarize, whole
from assay.reports.table import sentence
from assay.runs import Run
from assay.runs.attacked import HEAD, INPUTS, Attacked
from assay.runs.source import Source
from assay.threats import Threat

_DEPTH: Final = 4
_MOST: Final = 2000
"""Runs that are listed."""

_LARGEST_TEXT, _LARGEST_TABLE, _LARGEST_ARRAYS = 32 * 2**20, 2**30, 2**30
"""Bytes that a manifest, the table and one file of inputs may have when they are unpacked."""

Kind: TypeAlias = Literal["run", "attack"]
Mark: TypeAlias = tuple[Path, int, int, int]
Arrays: TypeAlias = Mapping[str, np.ndarray]


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """A run in the list; one that cannot be read has an ``error``, and nothing else to say."""

    name: str
    path: Path
    kind: Kind
    summary: Summary | None = None
    created: str = ""
    error: str = ""


@final
@dataclass(frozen=True, slots=True)
class Kept:
    """A run that was opened: its manifest, its table, and what they say."""

    name: str
    path: Path
    kind: Kind
    manifest: Manifest
    samples: pa.Table
    summary: Summary
    verdict: str

    @property
    def box(self) -> tuple[float, float]:
        """The input domain that the manifest states, else that of images."""
        stated = dig(self.manifest, "model", "box") or dig(self.manifest, "identity", "threat", "box")
        try:
            low, high = float(stated[0]), float(stated[1])
        except (TypeError, ValueError, IndexError, KeyError):
            return 0.0, 1.0
        return (low, high) if np.isfinite(low) and np.isfinite(high) and low < high else (0.0, 1.0)

    @property
    def source(self) -> Source:
        """The run, to be read by what knows no pages."""
        told = dict(self.manifest)
        return Run(self.path, told) if self.kind == "run" else Attacked(self.path, told, self.samples)

    def row(self, index: int) -> dict[str, Any] | None:
        """Return what the table says of a sample."""
        found = np.flatnonzero(self.samples["index"].to_numpy() == index)
        return dict(self.samples.slice(int(found[0]), 1).to_pylist()[0]) if len(found) else None

    def arrays(self, indices: Sequence[int]) -> dict[int, Arrays]:
        """Return the adversarial inputs of samples, by index, with what is stored beside them, as far as there are any.

        Raises:
            RunError: they cannot be read.
        """
        found: dict[int, Arrays] = {}
        for file in _files(self.path, self.kind):
            if len(found) == len(indices):
                break
            try:
                found |= _of(file, indices)
            except Exception as e:  # what is in the file was written by others
                raise RunError("readable adversarial inputs", f"{file.name}: {e}", "Start the run anew.") from e
        return found


@final
class Catalogue:
    """The runs below a folder, found anew whenever they are asked for; what was read is kept until it changes."""

    def __init__(self, folder: Path) -> None:
        self.root = folder.resolve()
        self._entries: dict[Mark, Entry] = {}
        self._opened: dict[Mark, Kept] = {}

    def entries(self) -> dict[str, Entry]:
        """Return all runs by name: the way to them from the folder."""
        found: dict[str, Entry] = {}
        for path, kind in _found(self.root):
            if len(found) == _MOST:
                break
            name = path.relative_to(self.root).as_posix() if path != self.root else self.root.name
            name = name.encode("utf-8", "replace").decode()  # file systems allow what is no character
            key = _mark(path, kind)
            if key not in self._entries:
                self._entries[key] = _entry(self.root, name, path, kind)
            found[name] = self._entries[key]
        return found

    def open(self, name: str) -> Kept:
        """Open a run of the list by its name.

        Raises:
            RunError: there is none of that name, or it is damaged.
        """
        entry = self.entries().get(name)
        if entry is None:
            raise RunError("the name of a run in this folder", repr(name[:80]), "Choose one from the list.")
        key = _mark(entry.path, entry.kind)
        if key not in self._opened:
            if len(self._opened) > 8:
                self._opened.clear()
            self._opened[key] = _opened(self.root, entry)
        return self._opened[key]


def _found(root: Path) -> Iterator[tuple[Path, Kind]]:
    """Yield the folders of runs, a few levels deep; links that lead outside, or back, are not followed."""
    waiting, seen = [(root, 0)], {root}
    while waiting:
        folder, level = waiting.pop(0)
        kind = _kind(folder)
        if kind is not None:
            yield folder, kind
        elif level < _DEPTH:
            for path in _folders(folder):
                if path.resolve() not in seen and _inside(root, path):
                    seen.add(path.resolve())
                    waiting.append((path, level + 1))


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir())
    except OSError:
        return []


def _kind(folder: Path) -> Kind | None:
    try:
        if (folder / "manifest.json").is_file():
            return "run"
        return "attack" if (folder / HEAD).is_file() else None
    except OSError:
        return None


def _inside(root: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(root)


def _head(path: Path, kind: Kind) -> Path:
    return path / ("manifest.json" if kind == "run" else HEAD)


def _mark(path: Path, kind: Kind) -> Mark:
    """Return what changes when a run does: its manifest, or the number of its parts."""
    try:
        stat = _head(path, kind).stat()
        parts = (path / "samples").stat().st_mtime_ns if kind == "run" else 0
    except OSError:
        return path, 0, 0, 0
    return path, stat.st_mtime_ns, stat.st_size, parts


def _files(path: Path, kind: Kind) -> list[Path]:
    """Return the files with the inputs of a run."""
    return [path / INPUTS] if kind == "attack" else sorted((path / "adversarials").glob("[!.]*.npz"))


def _of(file: Path, indices: Sequence[int]) -> dict[int, Arrays]:
    """Return the rows of some samples out of a file of arrays."""
    if not file.exists():
        return {}
    with zipfile.ZipFile(file) as packed:
        size = sum(part.file_size for part in packed.infolist())
    if size > _LARGEST_ARRAYS:
        raise RunError("inputs of a sane size", f"{size} bytes", "Remove the file.")
    with np.load(file, allow_pickle=False) as arrays:
        index = arrays["index"]
        at = np.flatnonzero(np.isin(index, np.asarray(indices)))
        if not len(at):
            return {}
        rows = {name: arrays[name][at] for name in arrays.files if arrays[name].ndim}
    return {int(index[k]): {name: v[i] for name, v in rows.items()} for i, k in enumerate(at)}


# ------------------------------------------------------------------------------------------------------------- reading


def _entry(root: Path, name: str, path: Path, kind: Kind) -> Entry:
    entry = Entry(name, path, kind)
    try:
        manifest = _checked(root, entry)
        summary = summarize(manifest)
        if kind == "attack" or not summary.n:
            summary = _opened(root, entry).summary
        created = manifest.get("updated") or manifest.get("created") or _moment(_head(path, kind))
        return replace(entry, summary=summary, created=str(created))
    except Exception as e:  # a file written by others may break anything; its run is listed with what broke
        return replace(entry, error=str(e) if isinstance(e, AssayError) else f"{type(e).__name__}: {e}")


def _moment(file: Path) -> str:
    return datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds")


def _checked(root: Path, entry: Entry) -> dict[str, Any]:
    """Return the manifest of a run, after checking that all its files are in the folder, and of a sane size."""
    head = _head(entry.path, entry.kind)
    tables = sorted((entry.path / "samples").glob("[!.]*.parquet"))
    for file in (head, *tables, *_files(entry.path, entry.kind)):
        if not _inside(root, file):
            raise RunError(f"files inside {root.name}", f"{file.name}, which leads outside", "Copy the run here.")
    if head.stat().st_size > _LARGEST_TEXT:
        raise RunError("a manifest of a sane size", f"{head.stat().st_size} bytes", "Restore it.")
    size = sum(sum(g.total_byte_size for g in _groups(file)) for file in tables)
    if size > _LARGEST_TABLE:
        raise RunError("a table of a sane size", f"{size} bytes", "Start the run anew.")
    if entry.kind == "run":
        return Run.read(entry.path).manifest
    told = json.loads(head.read_text(encoding="utf-8"))
    if not isinstance(told, dict):
        raise RunError(f"an {HEAD} that is an object", type(told).__name__, "Repeat the attack.")
    return told


def _groups(file: Path) -> Iterator[Any]:
    held = pq.read_metadata(file)
    return (held.row_group(i) for i in range(held.num_row_groups))


def _opened(root: Path, entry: Entry) -> Kept:
    """Read a run with its table.

    Raises:
        RunError: it is damaged.
    """
    try:
        told = _checked(root, entry)
        return _run(entry) if entry.kind == "run" else _attack(entry, told)
    except AssayError:
        raise
    except Exception as e:  # see _entry
        raise RunError(f"a readable run in {entry.name}", f"{type(e).__name__}: {e}", "Start it anew.") from e


def _run(entry: Entry) -> Kept:
    manifest, samples = read(Run.read(entry.path))
    summary = summarize(manifest)
    return Kept(entry.name, entry.path, "run", manifest, samples, summary, sentence(summary, samples))


def _attack(entry: Entry, told: dict[str, Any]) -> Kept:
    """Read what ``assay attack --out`` wrote as if it were a run."""
    name = str(told["attack"])
    found = Attacked.of(entry.path, told if "identity" in told else told | _earlier(told, name))
    manifest, samples = read(found)
    summary = summarize(manifest)
    broken, tried = int(sum(samples["fooled"].to_pylist())), whole(told.get("attacked")) or 0
    rate = f" ({broken / tried:.1%})" if tried else ""
    verdict = f"{name} within {summary.threat} broke {broken} of {tried} samples{rate}."
    return Kept(entry.name, entry.path, "attack", manifest, samples, summary, verdict)


def _earlier(told: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what files of earlier versions, which told neither model nor data, say of the threat."""
    aimed = whole(told.get("target")) is not None
    threat = Threat.parse(str(told["threat"])).to_json() | {"targeted": aimed}
    return {"identity": {"threat": threat, "effort": name}}
