"""What a study leaves in a folder: its numbers as JSON, its arrays beside them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.core.errors import RunError
from assay.core.files import replacing


def keep(folder: Path, name: str, told: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write ``NAME.json`` and ``NAME.npz`` into a folder, each as a whole.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{name}.json") as f:
            f.write((json.dumps(told, indent=1) + "\n").encode())
        with replacing(folder / f"{name}.npz") as f:
            np.savez_compressed(f, **arrays)  # type: ignore[arg-type]
    except OSError as e:
        raise RunError(f"a folder to write to at {folder}", str(e), "Choose another --out.") from e
