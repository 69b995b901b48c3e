"""Images to 8-bit PNG files and back."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from assay.core.errors import DataError
from assay.threats import Box


def check_saveable(shape: tuple[int, ...]) -> None:
    """Refuse samples that no PNG file can hold.

    Raises:
        DataError: not an image of one or three channels.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise DataError("images (1, h, w) or (3, h, w)", f"{tuple(shape)}", "Such inputs cannot be saved as PNG.")


def write_png(path: Path, image: Tensor, box: Box | None = None) -> None:
    """Write an image (1, h, w) or (3, h, w) with values in the box ([0, 1]), rounded to 8 bits.

    The file appears under its name only when it is whole.

    Raises:
        DataError: not an image of one or three channels.
    """
    check_saveable(tuple(image.shape))
    box = box or Box()
    place = (image.detach().cpu().double() - box.lo) / box.width * 255
    levels = place.round().clamp(0, 255).to(torch.uint8).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    Image.fromarray(levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, -1)).save(part, format="PNG")
    part.replace(path)


def read_png(path: Path, box: Box | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Read what :func:`write_png` wrote: (1, h, w) or (3, h, w), values in the box ([0, 1])."""
    with Image.open(path) as image:
        levels = np.array(image)
    planes = levels[None] if levels.ndim == 2 else np.moveaxis(levels, -1, 0)
    return (box or Box()).at_level(torch.from_numpy(planes.copy()).to(dtype))
