"""What reports and comparisons read: a run, or whatever else can be read as one."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from assay.core.urls import url_of
from assay.runs.attacked import HEAD, Attacked
from assay.runs.store import Run


class Source(Protocol):
    """A manifest, the table of samples, and the adversarial inputs, as :class:`assay.runs.Run` has them."""

    @property
    def path(self) -> Path: ...

    @property
    def manifest(self) -> dict[str, Any]: ...

    def samples(self) -> pa.Table: ...

    def tallies(self) -> Iterator[dict[str, Any]]: ...

    def adversarials(self) -> Iterator[dict[str, np.ndarray]]: ...


def opened(path: str | os.PathLike[str]) -> Source:
    """Open a run, or the folder of an attack, for reading.

    Raises:
        RunError: neither of the two, or one that cannot be read.
    """
    folder = Path(path)
    attacked = url_of(path) is None and (folder / HEAD).is_file() and not (folder / "manifest.json").is_file()
    return Attacked.read(folder) if attacked else Run.read(path)
