"""Trust region: steps towards the linearised boundary, no longer than the linear model holds."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.minimum.boundary import BoundaryAttack, crossing
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, PerSample, per_sample
from assay.models.door import Slopes
from assay.threats.norms import TINY
from assay.threats.problem import Problem


class TrustRegionState(NamedTuple):
    """The next point, the radius around the last one, and what the linear models promised."""

    x: Inputs
    radius: PerSample
    gap: PerSample  # to the strongest rival at the last point
    gain: PerSample  # that the linear models promised for the next one
    over: Mask


@final
@ATTACKS.register("trust-region", norm=("linf", "l2"), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class TrustRegion(BoundaryAttack[TrustRegionState]):
    """Trust region attack: x <- clip(x + (1 + h) min(r, |f| / |g|_dual) * steepest(g)), until x succeeds.

    f is the gap to the rival whose linearised boundary is nearest, g its gradient. The radius r is multiplied by
    ``change`` where the gap to the strongest rival shrank by more than ``good`` of what the gradients promised, and
    divided by it where by less than ``poor``.

    *Sees* the gradients of up to ``rivals`` gaps between logits. *Cost* a forward and ``rivals`` backwards a step.

    Args:
        steps: largest number of steps.
        first: first r, in widths of the box; None for what suits the norm, likewise ``least`` and ``most``.
        least: smallest r.
        most: largest r.
        change: factor of r.
        good: share of the promise above which r grows.
        poor: share below which it shrinks.
        overshoot: h.
        rivals: how many of the strongest other classes are linearised.

    *Differs from the paper in*: the nearest of ``rivals`` is looked for at each step, not of all at the clean input;
    ``good`` and ``poor`` are lower than 0.9 and 0.5, with which the radius falls to its least and many samples stand;
    the promise is measured along the step inside the box; no Hessian, as in the paper for ReLU networks.

    References:
        Yao et al. 2019, arXiv:1812.06371, algorithm 1.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    steps: int = 200
    first: float | None = None
    least: float | None = None
    most: float | None = None
    change: float = 1.2
    good: float = 0.6
    poor: float = 0.2
    overshoot: float = 0.02
    rivals: int = 1

    def init(self, p: Problem) -> TrustRegionState:
        zero = p.full(0.0)
        return TrustRegionState(p.start("clean"), zero + self._radii(p)[0], zero, zero, zero > 0)

    def update(self, p: Problem, s: TrustRegionState, e: Slopes, k: int) -> TrustRegionState:
        _, least, most = self._radii(p)
        gap = e.values.amax(1)
        radius = self._trusted(s, gap).clamp(least, most) if k else s.radius
        way = crossing(p, s.x, e)
        short = (radius / p.norm.size(way).clamp_min(TINY)).clamp_max(1)
        x = (s.x + per_sample((1 + self.overshoot) * short, way) * way).clamp(p.lower, p.upper)
        promised = e.values + (e.slopes * (x - s.x)[:, None]).flatten(2).sum(2)
        return TrustRegionState(x, radius, gap, promised.amax(1) - gap, e.success)

    def _trusted(self, s: TrustRegionState, gap: PerSample) -> PerSample:
        rise = gap - s.gap
        grown = torch.where(rise > self.good * s.gain, s.radius * self.change, s.radius)
        return torch.where(rise < self.poor * s.gain, s.radius / self.change, grown)

    def _radii(self, p: Problem) -> tuple[float, float, float]:
        """Return the first, the least and the largest radius."""
        own = (self.first, self.least, self.most)
        first, least, most = (u if v is None else v for u, v in zip(_RADII[p.norm.name], own, strict=True))
        return first * p.box.width, least * p.box.width, most * p.box.width

    def done(self, s: TrustRegionState) -> Mask:
        return s.over


_RADII = {"linf": (0.001, 0.0001, 0.01), "l2": (0.001, 0.0005, 0.05)}
"""First, least and largest radius."""
