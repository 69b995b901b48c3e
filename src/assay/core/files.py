"""Files that users name."""

from pathlib import Path

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
