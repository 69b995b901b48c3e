"""The boundary attack: a random walk along the decision boundary."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.decision.probes import L2_NORM, directions
from assay.attacks.decision.start import Start
from assay.attacks.decision.walk import Opening, Walk
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, PerSample, choose, per_sample
from assay.models.door import Decision
from assay.threats.planes import inner
from assay.threats.problem import Problem


class BoundaryState(NamedTuple):
    """Where the walk is, and the lengths of its steps as shares of the distance."""

    base: Inputs
    across: PerSample
    inward: PerSample


@final
@ATTACKS.register("boundary", norm=("l2",), access="decision", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary(Walk[BoundaryState]):
    """Takes a random step on the sphere around the clean input, then one inward, and stays where the goal is missed.

    A normal draw, orthogonal to the way to the clean input and of length ``across`` times the distance d, is added and
    the sum scaled back to distance d; then d shrinks by the share ``inward``. Every ``check``-th query asks about the
    step on the sphere alone: it should meet the goal every other time, for the boundary looks flat from near. A step
    that does so more often, or as a whole more often than one time in four, gets longer, else shorter.

    *Sees* the predicted label. *Cost* ``steps`` + 1 forwards.

    Args:
        steps: number of queries.
        across: first length of the step on the sphere.
        inward: first length of the step inward.
        check: how often the step on the sphere is asked about alone.
        rate: how fast the lengths adapt.
        band: share of the frequencies of every axis of an image that a draw has, the lowest; vectors have all.
        start: as for :class:`assay.attacks.HopSkipJump`.

    *Differs from the paper in*: both lengths adapt a little at every query that judges them, instead of after
    windows of queries. Draws are of low frequencies where there are images.

    References:
        Brendel, Rauber & Bethge 2018, arXiv:1712.04248, algorithm 1, sec. 2.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    steps: int = 5000
    across: float = 0.3
    inward: float = 0.02
    check: int = 5
    rate: float = 0.1
    band: float = 0.5
    start: Start | str = "noise"

    def enter(self, p: Problem, o: Opening) -> BoundaryState:
        return BoundaryState(o.point(p), p.full(self.across), p.full(self.inward))

    def learn(self, p: Problem, w: BoundaryState, x: Inputs, e: Decision, k: int) -> BoundaryState:
        if self._checks(k):
            across = w.across * _factor(e.success, self.check * self.rate, 0.5)
            return w._replace(across=across.clamp(1e-5, 1.0))
        inward = w.inward * _factor(e.success, self.rate, 0.25)
        return w._replace(base=choose(e.success, x, w.base), inward=inward.clamp(1e-6, 0.5))

    def ask(self, p: Problem, w: BoundaryState, k: int) -> Inputs:
        d = w.base - p.x0
        distance, u = L2_NORM.size(d), L2_NORM.steepest(d)
        noise = directions(p.stage(k), self.band)
        step = L2_NORM.steepest(noise - per_sample(inner(noise, u), u) * u)
        around = L2_NORM.steepest(u + per_sample(w.across, step) * step)
        share = torch.ones_like(distance) if self._checks(k) else 1 - w.inward
        return (p.x0 + per_sample(share * distance, around) * around).clamp(p.lower, p.upper)

    def _checks(self, k: int) -> bool:
        """Tell whether query k is about the step on the sphere alone."""
        return k % self.check == 0


def _factor(success: Mask, rate: float, wanted: float) -> PerSample:
    """Return by what a length grows: its mean logarithm is zero where this share of the answers are successes."""
    return torch.where(success, math.exp(rate * (1 - wanted)), math.exp(-rate * wanted))
