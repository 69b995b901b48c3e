"""Norms as values, each with the operations that attacks are built from.

Perturbations ``d`` and gradients ``g`` have shape (b, *f), radii (b,). ``lo <= 0 <= hi`` (b, *f) bound a perturbation
coordinate by coordinate: they are the box seen from the clean sample. Nothing is done in place, so neither the memory
format nor aliasing can change a result.
"""

import math
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from assay.core.random import Draws
from assay.core.types import Inputs, PerSample, per_sample

TINY = 1e-30
"""Keeps a division by the norm of a vanished gradient finite; below every normal gradient in float32."""


@runtime_checkable
class Norm(Protocol):
    """The geometry of a threat model."""

    @property
    def name(self) -> str: ...

    @property
    def is_box(self) -> bool:
        """The ball is a box itself, so that its intersection with the input box is one clamp."""
        ...

    def size(self, d: Inputs) -> PerSample:
        """Return ||d|| of each sample."""
        ...

    def dual(self, g: Inputs) -> PerSample:
        """Return max of <g, d> over the unit ball, the dual norm."""
        ...

    def steepest(self, g: Inputs, support: int | Tensor = 1) -> Inputs:
        """Return d in the unit ball that maximises <g, d>; zero where g is zero.

        For the sparse norms (l1, l0) the mass is spread evenly over the ``support`` largest coordinates of g
        (an int, or (b,) one a sample); 1 gives the exact maximiser for l1.
        """
        ...

    def project(self, d: Inputs, radius: PerSample, lo: Inputs, hi: Inputs) -> Inputs:
        """Return the point of ``{||p|| <= radius, lo <= p <= hi}`` that is nearest to d in l2."""
        ...

    def sample(self, like: Inputs, radius: PerSample, draws: Draws) -> Inputs:
        """Draw one point a sample uniformly from the ball of that radius (l0: support and values uniform)."""
        ...

    def diameter(self, width: float, features: int) -> float:
        """Return the largest size that a perturbation inside a box of this width can have."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Linf:
    """The largest change of any coordinate."""

    name: str = "linf"
    is_box: bool = True

    def size(self, d: Inputs) -> PerSample:
        return d.flatten(1).abs().amax(1)

    def dual(self, g: Inputs) -> PerSample:
        return g.flatten(1).abs().sum(1)

    def steepest(self, g: Inputs, support: int | Tensor = 1) -> Inputs:
        return g.sign()

    def project(self, d: Inputs, radius: PerSample, lo: Inputs, hi: Inputs) -> Inputs:
        r = per_sample(radius, d)
        return d.clamp(torch.maximum(lo, -r), torch.minimum(hi, r))

    def sample(self, like: Inputs, radius: PerSample, draws: Draws) -> Inputs:
        return (2 * draws.uniform(like.shape[1:], like.dtype) - 1) * per_sample(radius, like)

    def diameter(self, width: float, features: int) -> float:
        return width


@final
@dataclass(frozen=True, slots=True)
class L2:
    """The Euclidean length of the change."""

    name: str = "l2"
    is_box: bool = False

    def size(self, d: Inputs) -> PerSample:
        size: Tensor = torch.linalg.vector_norm(d.flatten(1), dim=1)
        return size

    def dual(self, g: Inputs) -> PerSample:
        # In float64, for squares of float32 gradients underflow below 1e-19.
        size: Tensor = torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64)
        return size.to(g.dtype)

    def steepest(self, g: Inputs, support: int | Tensor = 1) -> Inputs:
        # The largest coordinate is divided out first: squares of float32 gradients underflow below 1e-19.
        g = g / per_sample(g.flatten(1).abs().amax(1).clamp_min(TINY), g)
        return g / per_sample(self.size(g).clamp_min(TINY), g)

    def project(self, d: Inputs, radius: PerSample, lo: Inputs, hi: Inputs) -> Inputs:
        """Scale d by the one factor for which the clipped result lies on the sphere.

        With v the squared factor, sum(min(v u^2, c^2)) is concave and increasing, u = |d| and c the bound that d runs
        into: Newton's method from below is feasible at every step and ends exactly after finitely many.
        """
        caps = torch.where(d > 0, hi, lo)
        u, c, r = d.flatten(1).square(), caps.flatten(1).square(), radius.square()
        v = (r / u.sum(1).clamp_min(TINY)).clamp_max(1)
        for _ in range(_NEWTON_STEPS):
            clipped = v[:, None] * u > c
            fixed, free = torch.where(clipped, c, 0).sum(1), torch.where(clipped, 0, u).sum(1)
            new = torch.where(free > 0, (r - fixed) / free.clamp_min(TINY), 1).clamp(v, torch.ones_like(v))
            if torch.equal(new, v):
                break
            v = new
        return (d * per_sample(v.sqrt(), d)).clamp(lo, hi)

    def sample(self, like: Inputs, radius: PerSample, draws: Draws) -> Inputs:
        direction = self.steepest(draws.normal(like.shape[1:], like.dtype))
        length = radius * draws.fold(1).uniform((), like.dtype) ** (1 / like[0].numel())
        return direction * per_sample(length, like)

    def diameter(self, width: float, features: int) -> float:
        return width * math.sqrt(features)


_NEWTON_STEPS = 30


@final
@dataclass(frozen=True, slots=True)
class L1:
    """The sum of all changes."""

    name: str = "l1"
    is_box: bool = False

    def size(self, d: Inputs) -> PerSample:
        return d.flatten(1).abs().sum(1)

    def dual(self, g: Inputs) -> PerSample:
        return g.flatten(1).abs().amax(1)

    def steepest(self, g: Inputs, support: int | Tensor = 1) -> Inputs:
        top = largest(g.abs(), support) * g.sign()
        return top / per_sample(self.size(top).clamp_min(1), g)

    def project(self, d: Inputs, radius: PerSample, lo: Inputs, hi: Inputs) -> Inputs:
        """Shrink every coordinate by one threshold t and clip: p = clip(sign(d) max(|d| - t, 0)).

        The size of p falls piecewise linearly in t, with a corner where a coordinate leaves its bound (|d| - c) and one
        where it reaches zero (|d|); t lies on the piece that crosses the radius (Croce & Hein 2021, arXiv:2103.01208,
        prop. 2.1, solved here by one sort of both kinds of corner).
        """
        u, caps = d.flatten(1).abs().double(), torch.where(d > 0, hi, -lo).flatten(1).double()
        corners, order = torch.cat([(u - caps).clamp_min(0), u], 1).sort(1)
        bends = torch.ones_like(u)
        slope = torch.cat([-bends, bends], 1).gather(1, order).cumsum(1)
        drop = (slope[:, :-1] * corners.diff(dim=1)).cumsum(1)
        start = torch.minimum(u, caps).sum(1, keepdim=True)
        height = torch.cat([start, start + drop], 1).clamp_min(0)  # the last one is 0 but for rounding
        piece = ((height >= radius[:, None]).sum(1, keepdim=True) - 1).clamp_min(0)
        excess = height.gather(1, piece) - radius[:, None]
        steep = (-slope.gather(1, piece)).clamp_min(1)
        t = torch.where(start <= radius[:, None], 0, corners.gather(1, piece) + excess / steep)
        left = (u - t).clamp_min(0).to(d.dtype).view(d.shape)
        return (d.sign() * left).clamp(lo, hi)

    def sample(self, like: Inputs, radius: PerSample, draws: Draws) -> Inputs:
        # Spacings of d + 1 exponentials are uniform on the simplex; the last one is what stays inside the ball.
        e = -torch.log1p(-draws.uniform((like[0].numel() + 1,), like.dtype))
        shares = (e / e.sum(1, keepdim=True))[:, :-1].view(like.shape)
        return shares * draws.fold(1).signs(like.shape[1:], like.dtype) * per_sample(radius, like)

    def diameter(self, width: float, features: int) -> float:
        return width * features


@final
@dataclass(frozen=True, slots=True)
class L0:
    """The number of coordinates that change at all (of an image: values, not pixels)."""

    name: str = "l0"
    is_box: bool = False

    def size(self, d: Inputs) -> PerSample:
        return (d.flatten(1) != 0).sum(1).to(d.dtype)

    def dual(self, g: Inputs) -> PerSample:
        """Return the gain of changing one coordinate by 1: the largest |g|."""
        return g.flatten(1).abs().amax(1)

    def steepest(self, g: Inputs, support: int | Tensor = 1) -> Inputs:
        return largest(g.abs(), support) * g.sign()

    def project(self, d: Inputs, radius: PerSample, lo: Inputs, hi: Inputs) -> Inputs:
        """Clip, and keep the coordinates whose loss would cost the most distance."""
        inside = d.clamp(lo, hi)
        gain = inside * (2 * d - inside)  # d^2 - (d - inside)^2
        return inside * largest(gain, radius.round())

    def sample(self, like: Inputs, radius: PerSample, draws: Draws) -> Inputs:
        values = 2 * draws.uniform(like.shape[1:], like.dtype) - 1
        return values * largest(draws.fold(1).uniform(like.shape[1:], like.dtype), radius.round())

    def diameter(self, width: float, features: int) -> float:
        return features


def largest(score: Inputs, count: int | Tensor) -> Inputs:
    """Return a 0/1 mask of the ``count`` largest coordinates of each sample; ties go to the first."""
    flat = score.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    if isinstance(count, int):
        count = torch.full((len(flat),), count, device=flat.device)
    kept = (torch.arange(flat.shape[1], device=flat.device) < count[:, None]).to(score.dtype)
    return torch.zeros_like(flat).scatter(1, order, kept).view(score.shape)


def toward_zero(d: Inputs, by: Inputs) -> Inputs:
    """Move every coordinate towards zero by the given length, and no further: the proximal operator of l1."""
    return d.sign() * (d.abs() - by).clamp_min(0)


NORMS: dict[str, Norm] = {n.name: n for n in (Linf(), L2(), L1(), L0())}
