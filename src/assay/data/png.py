"""Images to 8-bit PNG files and back."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from assay.core.errors import DataError
from assay.core.levels import at_level


def check_saveable(shape: tuple[int, ...]) -> None:
    """Refuse samples that no PNG file can hold.

    Raises:
        DataError: not an image of one or three channels.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise DataError("images (1, h, w) or (3, h, w)", f"{tuple(shape)}", "Such inputs cannot be saved as PNG.")


def write_png(path: Path, image: Tensor, lo: float = 0.0, hi: float = 1.0) -> None:
    """Write an image (1, h, w) or (3, h, w) with values from ``lo`` to ``hi``, rounded to 8 bits.

    The file appears under its name only when it is whole.

    Raises:
        DataError: not an image of one or three channels.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(encode_png(image, lo, hi))
    part.replace(path)


def encode_png(image: Tensor, lo: float = 0.0, hi: float = 1.0) -> bytes:
    """Return what :func:`write_png` writes."""
    check_saveable(tuple(image.shape))
    place = (image.detach().cpu().double() - lo) / (hi - lo) * 255
    levels = place.round().clamp(0, 255).to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, -1)).save(file, format="PNG")
    return file.getvalue()


def read_png(path: Path, lo: float = 0.0, hi: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Read what :func:`write_png` wrote: (1, h, w) or (3, h, w), values from ``lo`` to ``hi``."""
    with Image.open(path) as image:
        levels = np.array(image)
    planes = levels[None] if levels.ndim == 2 else np.moveaxis(levels, -1, 0)
    return at_level(torch.from_numpy(planes.copy()).to(dtype), lo, hi)
