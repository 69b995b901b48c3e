"""The state of a training on disk: tensors and plain JSON in one safetensors file, replaced as a whole."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from assay.core.errors import RunError
from assay.core.files import replacing

Parts = Mapping[str, Mapping[str, Tensor]]


def write(path: Path, parts: Parts, about: Mapping[str, Any]) -> None:
    """Write tensors in named parts, and what is known about them, to ``path``; a kill leaves the old file or the new.

    Raises:
        RunError: it cannot be written.
    """
    flat = {f"{part}/{name}": v.detach().cpu().contiguous() for part, t in parts.items() for name, v in t.items()}
    content = save({n: v.clone() for n, v in flat.items()}, {"assay": json.dumps(about)})
    try:
        with replacing(path) as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise RunError(f"a place that can be written for {path.name}", str(e), "Choose another --out.") from e


def read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the parts of a checkpoint and what is known about them. Nothing is unpickled.

    Raises:
        RunError: no checkpoint, or a broken one.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as f:
            about = json.loads(f.metadata()["assay"])
            for key in f.keys():  # noqa: SIM118 (no mapping)
                part, _, name = key.partition("/")
                parts.setdefault(part, {})[name] = f.get_tensor(key)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise RunError(f"a checkpoint in {path}", str(e), "Remove it to start anew.") from e
    return parts, about
