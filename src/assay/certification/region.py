"""Where the inputs of a claim lie: a norm ball around each sample, cut with the box."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from assay.core.types import per_sample

_HALVINGS = 30


@final
@dataclass(frozen=True, slots=True)
class Region:
    """All z with ``low <= z <= high`` and ``||z - x|| <= radius``, for n samples at once.

    Args:
        x: centres (n, *f).
        low, high: per coordinate (n, *f), inside the box; ``low <= x <= high`` unless the region is a plain box.
        norm: ``linf``, ``l2``, ``l1`` or ``l0``; ``linf`` is wholly described by ``low`` and ``high``.
        radius: (n,), in the norm.
    """

    x: Tensor
    low: Tensor
    high: Tensor
    norm: str
    radius: Tensor

    @classmethod
    def ball(cls, x: Tensor, radius: Tensor, norm: str, lo: float, hi: float) -> "Region":
        """Return the ball of ``radius`` (n,) around x (n, *f), cut with the box [lo, hi].

        Rounded outward (but for l0): an attack computes ``x + d`` in float32, and its point must lie inside.
        """
        x, radius = x.double(), radius.double()
        if norm == "l0":
            return cls(x, torch.full_like(x, lo), torch.full_like(x, hi), norm, radius)
        radius = radius * (1 + 2.0**-22)
        wide = per_sample(radius + 2.0**-24 * max(abs(lo), abs(hi)), x)
        return cls(x, (x - wide).clamp(lo, hi), (x + wide).clamp(lo, hi), norm, radius)

    @classmethod
    def between(cls, low: Tensor, high: Tensor) -> "Region":
        """Return the box between ``low`` and ``high`` (n, *f)."""
        radius = (high - low).flatten(1).amax(1)
        return cls((low + high) / 2, low, high, "linf", radius)

    def __len__(self) -> int:
        return len(self.x)

    def to(self, dtype: torch.dtype) -> "Region":
        x, low, high, radius = (t.to(dtype) for t in (self.x, self.low, self.high, self.radius))
        return Region(x, low, high, self.norm, radius)

    def take(self, rows: Tensor | slice) -> "Region":
        return Region(self.x[rows], self.low[rows], self.high[rows], self.norm, self.radius[rows])

    def least(self, slope: Tensor) -> Tensor:
        """Return a lower bound (n, s) of the min over the region of <slope, z>, slope (n, s, *f); exact but for l2.

        For l2 with the box, every multiplier of the ball's constraint gives a lower bound; the best of a bisection is
        taken, together with the ball alone and the box alone.
        """
        a = slope.flatten(2)
        at, low, high = (t.flatten(1)[:, None] for t in (self.x, self.low, self.high))
        if self.norm == "linf":
            middle, half = (low + high) / 2, (high - low) / 2
            return _dot(a, middle) - _dot(a.abs(), half)
        room = torch.where(a > 0, at - low, high - at)
        if self.norm == "l2":
            gain = _most_l2(a.abs(), room, self.radius[:, None])
        elif self.norm == "l1":
            gain = _most_l1(a.abs(), room, self.radius[:, None])
        else:
            each = (a.abs() * room).sort(-1, descending=True).values
            counted = torch.arange(each.shape[-1], device=a.device) < self.radius[:, None, None]
            gain = (each * counted).sum(-1)
        return _dot(a, at) - gain


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return <a, b> (n, s) of a (n, s, d) and b (n, 1, d)."""
    return (a @ b.transpose(1, 2)).squeeze(2)


def _most_l1(a: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """Return the max of <a, d>, 0 <= d <= room, sum(d) <= radius: the steepest coordinates are filled first."""
    order = a.argsort(-1, descending=True)
    steep, wide = a.gather(-1, order), room.gather(-1, order)
    before = wide.cumsum(-1) - wide
    return (steep * torch.minimum(wide, (radius[..., None] - before).clamp_min(0))).sum(-1)


def _most_l2(a: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """Return an upper bound of the max of <a, d>, 0 <= d <= room, ||d|| <= radius.

    By duality it is at most ``sum(a d - t (d^2 - radius^2 / D) / 2)`` at ``d = min(a / t, room)``, for every t > 0.
    """
    ball = a.square().sum(-1).sqrt() * radius
    best = torch.minimum(ball, (a * room).sum(-1))
    with torch.no_grad():
        high = a.square().sum(-1).sqrt() / radius.clamp_min(1e-30)
        low = high * 1e-6
        for _ in range(_HALVINGS):
            t = (low * high).sqrt()
            long = torch.minimum(a / t[..., None].clamp_min(1e-30), room).square().sum(-1).sqrt() > radius
            low, high = torch.where(long, t, low), torch.where(long, high, t)
    t = high.clamp_min(1e-30)
    d = torch.minimum(a / t[..., None], room)
    return torch.minimum(best, (a * d).sum(-1) + t * (radius.square() - d.square().sum(-1)) / 2)
