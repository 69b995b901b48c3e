"""The noise of randomized smoothing: how it is drawn, and which radius a share of votes proves under it.

All of it is drawn from 48-bit uniform numbers and added in float64; the sum is rounded once, to the precision of the
input. So the law is the ideal one up to 2**-48 a coordinate (normal numbers reach 8.1 standard deviations), and what
rounding does is a fixed function of the noisy point: it belongs to the classifier that is smoothed, and cannot tell it
where the clean input was.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.core.random import Draws
from assay.core.types import Inputs

Shares: TypeAlias = NDArray[np.float64]
"""Lower bounds (n,) of the share of votes that the leading class gets."""

_SHORT: Final = 1 - 1e-9
"""Radii are used a billionth short: so the closed ball is proven, and rounding in special functions cannot reach."""


class Noise(Protocol):
    """A law of noise, and what it proves in one norm."""

    @property
    def norm(self) -> str: ...

    def apply(self, x: Inputs, draws: Draws) -> Inputs:
        """Return x (b, *f) under noise, row i by the stream i of ``draws``; neither clipped nor quantised."""
        ...

    def radius(self, share: Shares, features: int) -> Shares:
        """Return how far (n,) the leading class is proven to stay ahead, for inputs of so many coordinates.

        ``share`` (n,) above 1/2 bounds its share of votes from below; where it is not above, the radius is 0.
        """
        ...


@final
@dataclass(frozen=True, slots=True)
class Gaussian:
    """Normal noise of standard deviation ``sigma`` on every coordinate, for l2.

    R = sigma * Phi^-1(p): Cohen, Rosenfeld & Kolter 2019, arXiv:1902.02918, theorem 1 with p_B = 1 - p_A.
    """

    sigma: float
    norm: str = "l2"

    def apply(self, x: Inputs, draws: Draws) -> Inputs:
        return (x.double() + self.sigma * standard_normal(draws, x.shape[1:])).to(x.dtype)

    def radius(self, share: Shares, features: int) -> Shares:
        from scipy.special import ndtri

        return _SHORT * self.sigma * np.maximum(_float64(ndtri(share)), 0)


@final
@dataclass(frozen=True, slots=True)
class Uniform:
    """Noise uniform on [-h, h] on every coordinate, h = sqrt(3) sigma, which has standard deviation ``sigma``; for l1.

    R = 2 h (p - 1/2): Yang, Duan, Hu, Salman, Razenshteyn & Li 2020, arXiv:2002.08118, table 1. Proof: the cubes around
    x and x + d share prod(1 - |d_i| / 2h) >= 1 - |d|_1 / 2h of their volume, so no share of votes falls by more than
    |d|_1 / 2h. As p <= 1, R never exceeds h.
    """

    sigma: float
    norm: str = "l1"

    @property
    def half_width(self) -> float:
        return math.sqrt(3) * self.sigma

    def apply(self, x: Inputs, draws: Draws) -> Inputs:
        return (x.double() + self.half_width * (2 * _fine(draws, x.shape[1:]) - 1)).to(x.dtype)

    def radius(self, share: Shares, features: int) -> Shares:
        return _SHORT * 2 * self.half_width * np.maximum(share - 0.5, 0)


@final
@dataclass(frozen=True, slots=True)
class Ablation:
    """Keep ``kept`` coordinates, all sets of them with equal chances, and put ``null`` into the others; for l0.

    R is the largest r with p - D(r) > 1/2, where D(r) = 1 - C(d - r, kept) / C(d, kept) is the chance that one of r
    changed coordinates is kept: Levine & Feizi 2020, arXiv:1911.09272, theorem 1 with p_B = 1 - p_A. Coordinates are
    what assay's l0 counts (of an image: values, not pixels).
    """

    kept: int
    null: float = 0.0
    norm: str = "l0"

    def apply(self, x: Inputs, draws: Draws) -> Inputs:
        flat = x.flatten(1)
        kept = _fine(draws, flat.shape[1:]).topk(self.kept, dim=1, sorted=False).indices
        seen = torch.zeros_like(flat, dtype=torch.bool).scatter(1, kept, value=True)
        return torch.where(seen, flat, self.null).view(x.shape)

    def radius(self, share: Shares, features: int) -> Shares:
        untouched = _SHORT * self.untouched(features)  # falls with the number of changed coordinates
        return _float64(np.searchsorted(-untouched, share - 1.5))

    def untouched(self, features: int) -> Shares:
        """Return the chances C(d - r, kept) / C(d, kept) that none of r = 1, 2, ... changed coordinates is kept."""
        r = np.arange(features - self.kept + 1)
        return _float64(np.cumprod((features - self.kept - r) / (features - r)))


def standard_normal(draws: Draws, shape: Sequence[int]) -> Tensor:
    """Draw from the standard normal distribution, shape (b, *shape), float64 (Box-Muller, both numbers of each pair).

    :meth:`Draws.normal` ends at 5.8 standard deviations: one image of 150,528 values in a thousand would reach
    further, which is more than the share of votes that large radii turn on.
    """
    n = math.prod(shape)
    u, v = _fine(draws, (2, -(-n // 2))).unbind(1)
    length, angle = (-2 * torch.log1p(-u)).sqrt(), 2 * math.pi * v
    return torch.cat([length * angle.cos(), length * angle.sin()], 1)[:, :n].view(-1, *shape)


def _fine(draws: Draws, shape: Sequence[int]) -> Tensor:
    """Draw from [0, 1), shape (b, *shape), float64; multiples of 2**-48, so that ties and cut tails do not matter."""
    high, low = draws.uniform((2, *shape), torch.float64).unbind(1)
    return high + 2.0**-24 * low


def _float64(v: Any) -> Shares:
    return np.asarray(v, dtype=np.float64)
