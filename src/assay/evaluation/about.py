"""What a manifest says of the model, the data and the machine, whatever was run on them."""

import platform
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.data import Data
from assay.models import Model


def about(model: Model, data: Data, mark: str, classes: int, device: Any) -> dict[str, Any]:
    """Return the parts ``model``, ``data`` and ``machine`` of a manifest, as plain JSON.

    Args:
        model: as it is asked.
        data: as the model takes them.
        mark: the fingerprint of the model, from before it was asked anything.
        classes: how many the model tells apart.
        device: where it is asked; None for where the model's parameters are.
    """
    module = model.module
    return {
        "model": {
            "name": model.name,
            "fingerprint": mark,
            "classes": classes,
            "parameters": sum(p.numel() for p in module.parameters()) if module is not None else None,
            **_plain({"box": [model.domain.lo, model.domain.hi], "mean": model.mean, "std": model.std}),
            "samples": model.samples,
            "probabilities": model.probabilities,
        },
        "data": {
            "name": data.name,
            "source": data.source,
            "fingerprint": data.fingerprint(),
            "n": len(data),
            "shape": list(data.shape),
            "class_names": list(names) if (names := data.class_names or model.class_names) else None,
        },
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "platform": f"{platform.system()} {platform.machine()}",
            "device": str(device or "as the model"),
            "threads": torch.get_num_threads(),
        },
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, Tensor | np.ndarray) else v for k, v in values.items()}
