"""Files that users name, and files that are replaced as a whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from assay.core.errors import AssayError


def check_readable(path: Path, error: type[AssayError], what: str, remedy: str, *, code: str | None = None) -> None:
    """Refuse a file that cannot be opened, or that is empty.

    Args:
        path: the file.
        error: what to raise.
        what: what the file should be, as messages call it.
        remedy: what to do about an empty one.
        code: of the error about an empty one.

    Raises:
        error: the file cannot be read, or has 0 bytes.
    """
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as e:
        raise error("a file that can be read", f"{path}: {e.strerror}", "Check its permissions.") from e
    if empty:
        raise error(what, f"{path} has 0 bytes", remedy, code=code)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write, which takes the place of ``path`` at the end: a kill at any moment leaves a valid one.

    Raises:
        OSError: it cannot be written; then nothing is left of it, and ``path`` is as it was.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
