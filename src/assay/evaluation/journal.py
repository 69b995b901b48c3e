"""What keeps a race that is under way: one file, replaced as a whole: a kill at any moment leaves a valid one."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from assay.core.files import replacing

_SECONDS: Final = 5.0
"""Between two saves, at least; and twenty times what a save takes."""


@final
class Journal:
    """A file for the state of one block, or nowhere (``path`` None)."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._next = time.monotonic() + _SECONDS

    def save(self, state: Callable[[], Mapping[str, NDArray[Any]]], *, now: bool = False) -> None:
        """Write the arrays of a state, if the last time is long enough ago."""
        if self.path is None or not (now or time.monotonic() >= self._next):
            return
        begin = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk, say: storing the block will report it
            self.path.parent.mkdir(exist_ok=True)
            with replacing(self.path) as f:
                np.savez(f, **state())  # type: ignore[arg-type]
        end = time.monotonic()
        self._next = end + max(_SECONDS, 20 * (end - begin))

    def load(self) -> dict[str, NDArray[Any]] | None:
        """Return the arrays that were saved last; None where there are none, or none that can be read."""
        if self.path is None or not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError):
            return None


def packed(value: Any) -> NDArray[Any]:
    """Write plain JSON into an array."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def unpacked(array: NDArray[Any]) -> Any:
    """Read what :func:`packed` wrote."""
    return json.loads(array.tobytes())
