"""The store of a run: a folder that a kill at any moment leaves valid.

Every file is written under a temporary name, flushed to disk and renamed. A batch is stored as two files of one name:
first the adversarial inputs, then the rows of the table; the rows decide. A batch without rows did not happen.
"""

import contextlib
import errno
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assay.core.errors import RunError
from assay.core.files import replacing
from assay.core.urls import Mirror, path_of, url_of
from assay.runs.schema import LATE, SAMPLES, VERSION

_TALLY = b"assay.tally"


@final
class Run:
    """A run folder, open for reading, or for adding batches."""

    def __init__(self, path: Path, manifest: dict[str, Any], mirror: Mirror | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self._mirror = mirror
        self._lock: io.IOBase | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Run":
        """Open an existing run for reading. One at a URL is copied here first.

        Raises:
            RunError: no run there, or one of a later version.
        """
        folder, mirror = _place(path)
        if mirror is not None:
            copy = cls(folder, {}, mirror)
            with contextlib.suppress(RunError), contextlib.closing(copy):  # where it is written here, it is current
                copy._acquire()
                mirror.fetch()
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError("a run folder with a manifest.json", str(folder), "Check the path.") from None
        except (OSError, ValueError) as e:
            raise RunError(f"a readable manifest in {folder}", str(e), "Restore it, or start a new run.") from e
        if not isinstance(manifest, dict) or manifest.get("schema") != VERSION:
            found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
            raise RunError(f"a run of schema {VERSION}", f"schema {found}", "Use the version of assay that wrote it.")
        return cls(folder, manifest)

    @classmethod
    def start(cls, path: str | os.PathLike[str], manifest: Mapping[str, Any], *, resume: bool = True) -> "Run":
        """Create a run, or go on with one of the same identity.

        ``manifest["identity"]`` is what decides the numbers: two runs are the same when it is equal. A run at a URL is
        written to a folder here, and each file of it is then brought there; one that is there goes on.

        Raises:
            RunError: the folder holds another run (the message says what differs), something else, a run that is being
                written at this moment, or ``resume`` is off and there is a run; or it cannot be written.
        """
        folder, mirror = _place(path)
        run = cls(folder, {**manifest, "schema": VERSION}, mirror)
        if mirror is None:
            run._make()
        run._acquire()
        try:
            if mirror is not None:
                mirror.fetch()
                run._make()
            run._admit(resume=resume)
            with _told(folder):
                run._sweep()
            run.save()
        except BaseException:
            run.close()
            raise
        return run

    def _make(self) -> None:
        with _told(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            _refuse_strangers(self.path)
            (self.path / "samples").mkdir(exist_ok=True)
            (self.path / "adversarials").mkdir(exist_ok=True)

    def _admit(self, *, resume: bool) -> None:
        if not (self.path / "manifest.json").exists():
            return
        there = Run.read(self.path)
        if not resume:
            raise RunError("a folder without a run (--no-resume)", str(self.path), "Remove it or choose another --out.")
        found = list(differences(there.manifest.get("identity", {}), self.manifest.get("identity", {})))
        if found:
            raise RunError(
                f"the settings of the run in {self.path}",
                "; ".join(found),
                "Choose another --out, or repeat the run's own settings to go on with it.",
            )
        self.manifest["created"] = there.manifest.get("created", self.manifest.get("created"))

    def _sweep(self) -> None:
        """Remove what a kill left half done: temporary files, and adversarial inputs without rows."""
        done = {p.stem for p in self._parts()}
        for left in [*self.path.rglob(".tmp-*"), *(self.path / "adversarials").glob("*.npz")]:
            if left.stem not in done:
                left.unlink(missing_ok=True)

    def _acquire(self) -> None:
        """Hold the folder as long as the run is open, so that two processes cannot write one run."""
        try:
            import fcntl
        except ImportError:
            return
        with _told(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise RunError(
                f"{self.path} to be free", "another process that writes this run", "Wait for it, or use another --out."
            ) from None
        self._lock = lock

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def save(self, **changes: Any) -> None:
        """Update the manifest and write it."""
        self.manifest.update(changes)
        text = json.dumps(self.manifest, indent=1, ensure_ascii=False, allow_nan=False)
        with _told(self.path):
            _write(self.path / "manifest.json", text.encode())
        self.publish()

    def publish(self) -> None:
        """Bring what is new to the URL of a run that has one.

        Raises:
            RunError: it cannot be written.
        """
        if self._mirror is not None:
            self._mirror.send()

    def add(
        self,
        rows: Mapping[str, Sequence[Any]],
        adversarials: Mapping[str, np.ndarray] | bytes,
        tally: Mapping[str, Any],
    ) -> None:
        """Store a batch: its rows by column, its verified adversarial inputs, and what it cost (plain JSON).

        The inputs may come as :func:`packed_arrays` packs them, which takes longer than all the rest.
        """
        table = pa.table(dict(rows), schema=SAMPLES).replace_schema_metadata({_TALLY: json.dumps(tally)})
        name = f"{rows['index'][0]:08d}-{rows['index'][-1]:08d}"
        with _told(self.path):
            if not isinstance(adversarials, bytes):
                adversarials = packed_arrays(adversarials) if len(adversarials.get("index", ())) else b""
            if adversarials:
                self._store(self.path / "adversarials" / f"{name}.npz", adversarials)
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink)
            self._store(self.path / "samples" / f"{name}.parquet", sink.getvalue().to_pybytes())

    def _store(self, path: Path, content: bytes) -> None:
        _write(path, content)
        if self._mirror is not None:
            self._mirror.send_one(path)

    def _parts(self) -> list[Path]:
        return sorted(p for p in (self.path / "samples").glob("*.parquet") if not p.name.startswith("."))

    def done(self) -> set[int]:
        """Return the indices of the samples that are stored."""
        return set(self.samples().column("index").to_pylist())

    def samples(self) -> pa.Table:
        """Return the table of all samples so far, in the order of their indices.

        Raises:
            RunError: a part cannot be read, or a sample is in two of them.
        """
        try:
            parts = [pq.read_table(p).replace_schema_metadata() for p in self._parts()]
            table = pa.concat_tables([SAMPLES.empty_table(), *parts]).sort_by("index")
        except (OSError, pa.ArrowException) as e:
            raise RunError(f"readable tables in {self.path}", str(e), "Remove the broken file and go on.") from e
        if len(table.column("index").unique()) != len(table):
            raise RunError("each sample once", f"a sample in two files of {self.path}", "Start the run anew.")
        return table

    def tallies(self) -> Iterator[dict[str, Any]]:
        """Yield what each stored batch cost."""
        for part in self._parts():
            yield json.loads((pq.read_schema(part).metadata or {}).get(_TALLY, b"{}"))

    def late(self) -> set[int]:
        """Return the indices of the samples that were stored because time was over, before their race was."""
        found: set[int] = set()
        for part, tally in zip(self._parts(), self.tallies(), strict=True):
            if tally.get("bounded") == LATE:
                found |= {*pq.read_table(part, columns=["index"])["index"].to_pylist()}
        return found

    def adversarials(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the adversarial inputs of each stored batch, by array."""
        for part in self._parts():
            file = self.path / "adversarials" / f"{part.stem}.npz"
            if file.exists():
                with file.open("rb") as f, np.load(f, allow_pickle=False) as arrays:  # numpy leaves a bad one open
                    yield dict(arrays)


def _place(path: str | os.PathLike[str]) -> tuple[Path, Mirror | None]:
    """Return the folder of a run here, and what keeps it and its copy at a URL alike."""
    if (url := url_of(path)) is None:
        return Path(path_of(os.fspath(path))), None
    mirror = Mirror(url, RunError)
    return mirror.folder, mirror


def packed_arrays(arrays: Mapping[str, np.ndarray], tell: Callable[[], None] = lambda: None) -> bytes:
    """Return arrays as the content of a compressed ``.npz`` file; tell every 16 MiB that there is some progress.

    At the lowest level: adversarial inputs are mostly noise, of which the usual level saves 4 % more in twice the time
    (``benchmarks/scale.py driver``).
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            # Opened by its name it has no date: the same arrays are the same bytes.
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(_Telling(entry, tell), np.asanyarray(array), allow_pickle=False)
    return file.getvalue()


@final
class _Telling:
    """A file that is written in pieces, and tells of each."""

    def __init__(self, file: IO[bytes], tell: Callable[[], None]) -> None:
        self.file, self.tell = file, tell

    def write(self, content: bytes) -> int:
        self.tell()
        return self.file.write(content)


def _refuse_strangers(folder: Path) -> None:
    """Leave alone a folder that is neither empty nor a run."""
    if (folder / "manifest.json").exists():
        return
    strays = sorted(p.name for p in folder.iterdir() if p.name not in {"samples", "adversarials", ".lock"})
    strays += sorted(p.name for p in (folder / "samples").glob("*.parquet"))
    if strays:
        raise RunError(
            f"an empty folder, or that of a run, in {folder}", f"{', '.join(strays[:3])}", "Choose another --out."
        )


def differences(old: Any, new: Any, where: str = "") -> Iterable[str]:
    """Say in words where two plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield f"{where} was {_short(old)} and is {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


_TROUBLE = {
    errno.ENOSPC: ("free space", "the disk is full", "Free some space and repeat the command: it goes on from there."),
    errno.EDQUOT: ("free space", "the quota is used up", "Free some space and repeat the command."),
    errno.EROFS: ("a folder that can be written", "a read-only file system", "Choose another --out."),
    errno.EACCES: ("a folder that can be written", "no permission", "Choose another --out."),
    errno.EPERM: ("a folder that can be written", "no permission", "Choose another --out."),
}


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn what the system says about files into a sentence for people."""
    try:
        yield
    except OSError as e:
        expected, found, remedy = _TROUBLE.get(
            e.errno or 0, ("a folder that can be written", str(e), "Choose another --out.")
        )
        raise RunError(f"{expected} in {folder}", found, f"{remedy} What was stored before is intact.") from e
