"""URLs of object stores: what they name is brought here, and what is made here is brought there.

Any URL that fsspec understands: ``s3://``, ``gs://``, ``az://``, ``memory://`` and others; each needs its own package.
``file://`` is a path like any other.
"""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, final

from assay.core.errors import AssayError, MissingExtraError

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/{1,3})")

_OWN: Final = frozenset({"demo", "hf", "http", "https", "ort", "py", "ray", "timm", "torchvision"})
"""Schemes that mean something of assay's own."""


def url_of(source: str | os.PathLike[str]) -> str | None:
    """Return a source as a URL, or None where it is a path or something else.

    A ``Path`` that was made of a URL has lost one of its slashes; it gets it back.

    Example:
        >>> url_of("s3://bucket/run"), url_of(Path("s3://bucket/run")), url_of("runs/a"), url_of("file:///data/x.npz")
        ('s3://bucket/run', 's3://bucket/run', None, None)
    """
    text = os.fspath(source)
    found = _SCHEME.match(text)
    if found is None or found[1].lower() in _OWN | {"file"}:
        return None
    import fsspec

    known = found[1] in fsspec.available_protocols()
    return f"{found[1]}://{text[found.end() :]}" if known else None


def path_of(source: str) -> str:
    """Return the path that a ``file://`` URL names; everything else as it is."""
    return source[len("file://") :] if source.startswith("file:///") else source


def fetched(url: str, error: type[AssayError], what: str) -> Path:
    """Return a local copy of the file or folder at a URL.

    Copies are kept in the user's cache folder under what the store says of the content (an ETag, or date and size):
    what has changed there is fetched again, what has not is not.

    Raises:
        error: nothing is there, or it cannot be read.
        MissingExtraError: the package for such URLs is not installed.
    """
    store, root = _opened(url)
    with _told(url, error, what):
        files = _files(store, root)
        if not files:
            raise error(f"{what} that is there", f"nothing at {url}", "Check the address.")
        stamp = hashlib.sha256(repr([url, *((name, store.ukey(path)) for name, path in files)]).encode()).hexdigest()
        home = cache_folder() / "urls" / stamp[:24] / (root.rstrip("/").rpartition("/")[2] or "all")
        if not home.exists():
            _bring(store, files, home, error)
    return home


def _bring(store: Any, files: list[tuple[str, str]], home: Path, error: type[AssayError]) -> None:
    """Copy files to a folder (or one file, whose name is empty) that appears as a whole."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as passing:
        for name, path in files:
            target = Path(passing, "it", name)
            if not target.resolve().is_relative_to(Path(passing).resolve()):
                raise error("names inside the folder", f"{path!r}", "Somebody wants to write elsewhere; do not use it.")
            target.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(path, str(target))
        with contextlib.suppress(OSError):  # another process was faster: what it brought is the same
            Path(passing, "it").rename(home)


def _files(store: Any, root: str) -> list[tuple[str, str]]:
    """Return names, relative to the root, and paths of all files there; a file's own name is empty."""
    if store.isfile(root):
        return [("", root)]
    paths: list[str] = sorted(store.find(root))
    base = root.rstrip("/") + "/"
    return [(path.removeprefix(base), path) for path in paths if path.startswith(base)]


def _opened(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        store, root = fsspec.core.url_to_fs(url)
    except ImportError as e:
        scheme = url.partition(":")[0]
        raise MissingExtraError(f"the package for {scheme}:// URLs", str(e), f"pip install 'assay[{scheme}]'") from e
    return store, root


@contextlib.contextmanager
def _told(url: str, error: type[AssayError], what: str) -> Iterator[None]:
    """Turn what a store says into a sentence for people."""
    try:
        yield
    except AssayError:
        raise
    except Exception as e:  # stores raise errors of their own libraries
        said = (str(e).splitlines() or [""])[0]
        raise error(f"{what} at {url}", f"{type(e).__name__}: {said}", "Check address, credentials and network.") from e


def cache_folder() -> Path:
    """Return the user's cache folder of assay."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "assay"


@final
class Mirror:
    """The folder of a run here, and its copy at a URL, which is the one that counts.

    Args:
        url: of the copy.
        error: what to raise where it cannot be read or written.

    Raises:
        MissingExtraError: the package for such URLs is not installed.
    """

    def __init__(self, url: str, error: type[AssayError]) -> None:
        self.url, self.error = url.rstrip("/"), error
        self._store, root = _opened(self.url)
        self._root = root.rstrip("/")
        mark = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder = cache_folder() / "runs" / mark / self.url.rpartition("/")[2]
        self._sent: dict[str, int] = {}  # when a file was changed that has been sent, in nanoseconds

    def fetch(self) -> None:
        """Make the folder what is at the URL.

        Raises:
            AssayError: as chosen; it cannot be read, or holds something else than a run.
        """
        with _told(self.url, self.error, "a run that can be read"):
            there = {name: path for name, path in _files(self._store, self._root) if not _private(name)}
            if there and MANIFEST not in there:
                found = ", ".join(sorted(there)[:3])
                raise self.error(f"nothing, or a run, at {self.url}", found, "Choose another --out.")
            for name, path in self._here():
                if name not in there or name == MANIFEST or path.stat().st_size != self._store.size(there[name]):
                    path.unlink()
            for name, source in there.items():
                if not (target := self.folder / name).exists():
                    if not target.resolve().is_relative_to(self.folder.resolve()):
                        raise self.error("names inside the run", repr(name), "Do not use it: it is made to do harm.")
                    _bring(self._store, [("", source)], target, self.error)
        self._sent = {name: path.stat().st_mtime_ns for name, path in self._here()}

    def send(self) -> None:
        """Bring what has changed to the URL, the manifest last: what it speaks of is there when it is.

        Stores publish an object as a whole, so nobody sees half of a file.

        Raises:
            AssayError: as chosen; it cannot be written.
        """
        with _told(self.url, self.error, "a place that can be written"):
            for name, path in sorted(self._here(), key=lambda item: _order(item[0])):
                self._put(name, path)

    def send_one(self, path: Path) -> None:
        """Bring one file to the URL.

        Raises:
            AssayError: as chosen; it cannot be written.
        """
        with _told(self.url, self.error, "a place that can be written"):
            self._put(path.relative_to(self.folder).as_posix(), path)

    def _put(self, name: str, path: Path) -> None:
        changed = path.stat().st_mtime_ns
        if self._sent.get(name) != changed:
            target = f"{self._root}/{name}"
            self._store.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._store.put_file(str(path), target)
            self._sent[name] = changed

    def _here(self) -> list[tuple[str, Path]]:
        found = ((p.relative_to(self.folder).as_posix(), p) for p in self.folder.rglob("*") if p.is_file())
        return [(name, path) for name, path in found if not _private(name)]


MANIFEST: Final = "manifest.json"


def _order(name: str) -> tuple[int, str]:
    """Put adversarial inputs before the rows that speak of them, and the manifest last."""
    last = name == MANIFEST, name.startswith("samples/")
    return (2 if last[0] else int(last[1])), name


def _private(name: str) -> bool:
    """Tell files that are for this machine only: locks, temporary files, races that are under way."""
    return any(part.startswith(".") for part in name.split("/")) or name.startswith("race/")
