"""Images to 8-bit PNG files and back."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from assay.core.errors import DataError


def write_png(path: Path, image: Tensor) -> None:
    """Write an image (1, h, w) or (3, h, w) with values in [0, 1], rounded to 8 bits.

    Raises:
        DataError: not an image of one or three channels.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise DataError("images (1, h, w) or (3, h, w)", f"{tuple(image.shape)}", "Such inputs cannot be saved as PNG.")
    levels = (image.detach().cpu().double() * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, -1)).save(path)


def read_png(path: Path) -> Tensor:
    """Read what :func:`write_png` wrote: (1, h, w) or (3, h, w), values in [0, 1]."""
    with Image.open(path) as image:
        levels = np.array(image)
    planes = levels[None] if levels.ndim == 2 else np.moveaxis(levels, -1, 0)
    return torch.from_numpy(planes.copy()).float() / 255
