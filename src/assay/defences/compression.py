"""Defences that throw away detail: an 8-bit file format, and fewer levels for each value."""

import io
from functools import partial
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from assay.core.errors import DataError
from assay.core.levels import at_level
from assay.core.types import Inputs
from assay.defences.defence import Defence, boxed, check_range
from assay.models.bpda import BPDA
from assay.threats.threat import Box


@final
class JPEG(Defence):
    """Each image as it comes back from a JPEG file: g(x) = read(write(x)), at 8 bits, by Pillow.

    *Gradient*: that of the identity (BPDA), for g(x) is close to x.

    *Broken by* BPDA with the identity: Athalye, Carlini & Wagner 2018, arXiv:1802.00420 (on input transformations).
    What the file takes away of a perturbation, a slightly larger one makes up for.

    *Cost*: one file written and read an image and pass, on the CPU.

    Args:
        quality: of the file, from 1 to 95.
        box: (lo, hi), the range of values that 0 to 255 stand for.

    Example:
        >>> import torch
        >>> from assay.defences import JPEG
        >>> x = torch.rand(2, 3, 16, 16)
        >>> JPEG(quality=75)(x).shape
        torch.Size([2, 3, 16, 16])

    Raises:
        UsageError: a quality outside 1 to 95.
        DataError: (in use) inputs that are not images of one or three channels.

    References:
        Dziugaite, Ghahramani & Roy 2016, arXiv:1608.00853; Guo et al. 2018, arXiv:1711.00117, sec. 4.
    """

    def __init__(self, quality: int = 75, box: Box | tuple[float, float] = Box()) -> None:
        super().__init__()
        check_range("a JPEG quality", quality, 1, 95, "For example 75.")
        self.quality, self.box = quality, boxed(box)
        self.step = BPDA(partial(_compressed, quality=quality, box=self.box))

    def forward(self, x: Inputs) -> Inputs:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            remedy = "JPEG keeps grey and colour images only."
            raise DataError("images (b, 1, h, w) or (b, 3, h, w) for JPEG", f"inputs {tuple(x.shape)}", remedy)
        out: Tensor = self.step(x)
        return out


def _compressed(x: Inputs, quality: int, box: Box) -> Inputs:
    levels = ((x - box.lo) / box.width * 255).round().clamp(0, 255).to(torch.uint8).cpu().movedim(1, -1).numpy()
    back = np.stack([_through_file(image, quality) for image in levels])
    return at_level(torch.from_numpy(back).movedim(-1, 1).to(x), box.lo, box.hi)


def _through_file(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Write an image (h, w, c) to memory and read it back."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "JPEG", quality=quality)
    with Image.open(file) as read:
        return np.array(read).reshape(image.shape)


@final
class BitDepth(Defence):
    """Each value rounded to the nearest of 2^bits levels: g(x) = round(x (2^bits - 1)) / (2^bits - 1) on [0, 1].

    *Gradient*: that of the identity (BPDA); its own is zero.

    *Broken by* BPDA with the identity: Athalye, Carlini & Wagner 2018, arXiv:1802.00420 (on input transformations); and
    before, together with other squeezers, by He et al. 2017, arXiv:1706.04701. Few levels on images that are nearly
    black and white (one bit on MNIST) do undo perturbations below half a level, and nothing above.

    Args:
        bits: of each value, from 1 to 16.
        box: (lo, hi), the lowest and the highest level.

    Example:
        >>> import torch
        >>> from assay.defences import BitDepth
        >>> BitDepth(bits=1)(torch.tensor([[0.2, 0.7]])).tolist()
        [[0.0, 1.0]]

    Raises:
        UsageError: bits outside 1 to 16.

    References:
        Xu, Evans & Qi 2018, arXiv:1704.01155, sec. III-A; Guo et al. 2018, arXiv:1711.00117, sec. 4.
    """

    def __init__(self, bits: int, box: Box | tuple[float, float] = Box()) -> None:
        super().__init__()
        check_range("bits", bits, 1, 16, "For example 3.")
        self.bits, self.box = bits, boxed(box)
        self.step = BPDA(partial(_rounded, levels=2**bits - 1, box=self.box))

    def forward(self, x: Inputs) -> Inputs:
        out: Tensor = self.step(x)
        return out


def _rounded(x: Inputs, levels: int, box: Box) -> Inputs:
    return at_level(((x - box.lo) * (levels / box.width)).round(), box.lo, box.hi, levels)
