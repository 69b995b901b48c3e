"""Defences that draw random numbers in every pass."""

from typing import ClassVar, final

import torch
from torch import Tensor

from assay.core.registry import UsageError
from assay.core.types import Inputs, PerSample
from assay.defences.defence import Defence, along, boxed, check_range, check_spatial, held
from assay.threats.threat import Box


@final
class GaussianNoise(Defence):
    """Noise on every value, drawn anew in every pass: g(x) = clip(x + sigma n), n normal.

    *Gradient*: its own, for each draw; attacks see the mean over draws (EOT).

    *Broken by* gradients averaged over the noise: Athalye, Engstrom, Ilyas & Kwok 2018, arXiv:1707.07397; Salman
    et al. 2019, arXiv:1906.04584. What many draws agree on can be *proven*, on a network trained with
    noise: that is :class:`assay.Smoothed`, and its figure is a lower bound where this one is an upper.

    Args:
        sigma: the standard deviation, in units of the box.
        box: (lo, hi), to which the values are clipped.

    Example:
        >>> import torch
        >>> from assay.defences import GaussianNoise
        >>> noisy = GaussianNoise(sigma=0.1)
        >>> x = torch.full((1, 100), 0.5)
        >>> bool((noisy(x) != noisy(x)).any())
        True

    Raises:
        UsageError: a negative sigma.

    References:
        Liu et al. 2018, arXiv:1712.00673 (in front of every layer, and in training); Cohen, Rosenfeld & Kolter 2019,
        arXiv:1902.02918 (what is proven).
    """

    random: ClassVar[bool] = True

    def __init__(self, sigma: float, box: Box | tuple[float, float] = Box()) -> None:
        super().__init__()
        if not sigma >= 0:
            raise UsageError("sigma >= 0 in units of the box", f"{sigma:g}", "For example 0.1.")
        self.sigma, self.box = sigma, boxed(box)

    def forward(self, x: Inputs) -> Inputs:
        return (x + self.sigma * torch.randn_like(x)).clamp(self.box.lo, self.box.hi)


@final
class RandomResizePad(Defence):
    """Each image at a random size and a random place of a frame, drawn anew in every pass.

    The size is a share of the image's own, uniform from ``low`` to ``high`` and rounded to whole pixels; the place is
    uniform too, in whole pixels; around it is the low end of the box. The frame is as large as the largest size, and no
    smaller than the image: with ``high`` up to 1 shapes stay as they are. Interpolation is linear.

    *Gradient*: its own, for each draw; attacks see the mean over draws (EOT).

    *Broken by* EOT over 30 draws: Athalye, Carlini & Wagner 2018, arXiv:1802.00420, on this very defence.

    Args:
        low, high: the least and the greatest share of the image's size along each axis after the channels.
        box: (lo, hi); ``lo`` fills the frame.

    Example:
        >>> import torch
        >>> from assay.defences import RandomResizePad
        >>> RandomResizePad(0.8, 1.0)(torch.rand(2, 3, 20, 20)).shape
        torch.Size([2, 3, 20, 20])
        >>> RandomResizePad(1.0, 331 / 299)(torch.rand(2, 3, 299, 299)).shape
        torch.Size([2, 3, 331, 331])

    *Differs from the paper in*: interpolation (theirs takes the nearest pixel); every sample has a draw of its own.

    Raises:
        UsageError: not 0 < low <= high <= 4.
        DataError: (in use) inputs without an axis after the channels.

    References:
        Xie et al. 2018, arXiv:1711.01991, sec. 3.2.
    """

    random: ClassVar[bool] = True

    def __init__(self, low: float = 0.8, high: float = 1.0, box: Box | tuple[float, float] = Box()) -> None:
        super().__init__()
        check_range("the greatest share", high, low, 4, "For example low=0.8, high=1.")
        if not low > 0:
            raise UsageError("a least share > 0", f"{low:g}", "For example low=0.8, high=1.")
        self.low, self.high, self.box = low, high, boxed(box)

    def forward(self, x: Inputs) -> Inputs:
        check_spatial(x, "RandomResizePad")
        share = self.low + (self.high - self.low) * torch.rand(len(x), device=x.device)
        y = x - self.box.lo
        for axis in range(2, x.ndim):
            n = x.shape[axis]
            frame, size = max(n, round(self.high * n)), (share * n).round().clamp_min(1)
            start = ((frame - size + 1) * torch.rand_like(size)).floor()
            y = along(y, axis, _placed(n, frame, size, start).to(x.dtype))
        return held(self.box.lo + y, self.box.lo, self.box.hi)


def _placed(n: int, frame: int, size: PerSample, start: PerSample) -> Tensor:
    """Return matrices (b, frame, n) that resize a row of n values to ``size`` and put it at ``start``; zero elsewhere.

    Value j of the resized row lies at (j + 1/2) n / size - 1/2 of the row, between two of its values.
    """
    j = torch.arange(frame, device=size.device) - start[:, None]
    source = ((j + 0.5) * n / size[:, None] - 0.5).clamp(0, n - 1)
    weights = (1 - (source[:, :, None] - torch.arange(n, device=size.device)).abs()).clamp_min(0)
    return weights * ((j >= 0) & (j < size[:, None]))[:, :, None]
