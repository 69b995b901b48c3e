"""What a ``Learner`` reads: images, tensors and its validation set, as its network sees them but for Normalize."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from assay.core.errors import DataError
from assay.core.levels import at_level
from assay.core.optional import need
from assay.core.types import Inputs, Labels
from assay.data.arrays import from_arrays
from assay.data.data import Data
from assay.integrations.batch import Look
from assay.models.bridges.fastai import class_names, normalisation, presized

vision: Any = need("fastai.vision.all", "fastai")

_EIGHT_BIT: Final = 1e-3
"""How far from whole grey levels the values of 8-bit images may be after normalising and back."""


def look_of(learn: Any) -> Look:
    """Return how the Learner's network sees pixels from 0 to 1."""
    mean, std = normalisation(learn.dls)
    return Look(mean=mean, std=std)


def validation_set(learn: Any, limit: int | None, dl: Any) -> Data:
    """Return the samples of a data loader, by default the validation set: pixels from 0 to 1, and labels."""
    dls, look = learn.dls, look_of(learn)
    xs: list[Inputs] = []
    ys: list[Labels] = []
    for x, y in _spread(dls.valid if dl is None else dl, limit):
        xs.append(look.pixels(x).cpu())
        ys.append(y.as_subclass(Tensor).cpu())
    if not xs:
        raise DataError("a validation set with samples", "none", "Give dl=learn.dls.train, say.", code="empty-data")
    source = f"fastai:{Path(getattr(dls, 'path', '.')).name}"
    x, y = _eight_bit(torch.cat(xs)), torch.cat(ys)
    return from_arrays(x, y, name="validation set", source=source, class_names=class_names(dls))


def _spread(loader: Any, limit: int | None) -> Any:
    """Return a loader in order, of so many samples evenly spread over the set."""
    n = len(loader.dataset)
    k = n if limit is None else min(n, limit)
    rows = [i * n // k for i in range(k)]
    if hasattr(loader, "new"):
        return loader.new(shuffle=False, drop_last=False, get_idxs=lambda: rows)
    return DataLoader(Subset(loader.dataset, rows), loader.batch_size, collate_fn=loader.collate_fn)


def final_pixels(dls: Any, item: Any) -> Tensor | None:
    """Return the pixels (c, h, w) of an image that batches would be resized to, as it is; None for others."""
    seen = presized(dls)
    if seen is None or not isinstance(item, str | Path | Image.Image):
        return None
    image = item if isinstance(item, Image.Image) else Image.open(item)
    if (image.height, image.width) != seen or image.mode not in ("L", "RGB"):
        return None
    levels = torch.from_numpy(np.array(image))
    return levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1)


def shown(learn: Any, img: Any) -> Inputs:
    """Return an image as the network sees it but for Normalize: (1, c, h, w), pixels from 0 to 1."""
    if (pixels := final_pixels(learn.dls, img)) is not None:
        return batch_of(pixels)
    given = img.copy() if isinstance(img, Image.Image) else img  # fastai changes the class of what it is given
    loader = learn.dls.test_dl([given], num_workers=0)
    return _whole_levels(look_of(learn).pixels(loader.one_batch()[0]))


def batch_of(img: Tensor) -> Inputs:
    """Return a tensor of one image as (1, c, h, w), pixels from 0 to 1."""
    x = img.detach().as_subclass(Tensor)
    if x.dtype == torch.uint8:
        x = at_level(x.float(), 0, 1)
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or len(x) != 1 or not x.is_floating_point() or not 0 <= float(x.min()) <= float(x.max()) <= 1:
        found = f"{img.dtype} of shape {tuple(img.shape)}, from {float(img.min()):g} to {float(img.max()):g}"
        raise DataError("a tensor (c, h, w) of pixels, floats from 0 to 1 or 8-bit", found,
                        "Undo the normalisation first: dls.decode.")  # fmt: skip
    return x.float()


def as_given(x: Inputs, img: Tensor) -> Tensor:
    """Return pixels (1, c, h, w) in the shape, the type and the place of the tensor that was given."""
    x = (x * 255).round() if img.dtype == torch.uint8 else x
    return x.view(img.shape).to(img.device, img.dtype)


def image_of(x: Tensor, like: Any) -> Image.Image:
    """Return pixels (c, h, w), whole grey levels, as an image; of the class of the one that was given."""
    levels = (x * 255).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    array: np.ndarray[Any, Any] = levels[..., 0] if levels.shape[2] == 1 else levels
    image: Image.Image = type(like).create(array) if isinstance(like, vision.PILBase) else Image.fromarray(array)
    return image


def _whole_levels(x: Inputs) -> Inputs:
    """Return pixels without the rounding of normalising and back, where they are those of 8-bit images."""
    k = (x * 255).round()
    return at_level(k, 0, 1) if float((x * 255 - k).abs().max()) < _EIGHT_BIT else x


def _eight_bit(x: Inputs) -> Tensor:
    """Return pixels of 8-bit images in 8 bits."""
    k = (x * 255).round()
    return k.to(torch.uint8) if float((x * 255 - k).abs().max()) < _EIGHT_BIT else x
