"""CGBA: along a semicircle in the plane of the boundary's normal."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.decision.arc import Arc
from assay.attacks.decision.probes import L2_NORM, Tally, directions
from assay.attacks.decision.start import Start
from assay.attacks.decision.walk import Bracket, Opening, Walk, merged
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Labels, Mask, PerSample, choose, per_sample
from assay.models.door import Decision
from assay.threats.problem import Problem


class CGBAState(NamedTuple):
    """The point of the boundary; the probes of it, or where on the semicircle it is looked for."""

    base: Inputs
    turn: Labels  # 1, 2, ...
    closing: Mask
    tally: Tally
    on: Bracket  # of angles


@final
@ATTACKS.register("cgba", norm=("l2",), access="decision", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class CGBA(Walk[CGBAState]):
    """Estimates the boundary's normal, and searches a semicircle in its plane for the boundary.

    With u the direction of the boundary point x_t at distance d and v the part of the normal that is orthogonal to u,
    the points x0 + d cos(a) (cos(a) u + sin(a) v), 0 <= a <= pi / 2, go from x_t into the region where the goal is met
    and then to the clean input. Bisection of a finds where they leave it: x_{t+1}, d cos(a) from the clean input. On a
    plane boundary, with the true normal, that is the nearest point.
    The normal comes from ``probes`` sqrt(t) probes x_t + delta u_i, as in HopSkipJump.

    *Sees* the predicted label. *Cost* ``steps`` + 1 forwards.

    Args:
        steps: number of queries.
        probes: of the first turn.
        probe: delta as a share of the distance to the clean input.
        band: share of the frequencies of every axis of an image that the probes have; vectors have all.
        start: as for :class:`assay.attacks.HopSkipJump`.

    *Differs from the paper in*: delta follows the distance; the semicircle also for targeted attacks (the paper's
    CGBA-H restricts the path there).

    References:
        Reza et al. 2023, arXiv:2308.03163, algorithm 1, sec. 3.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    steps: int = 1000
    probes: int = 30
    probe: float = 0.05
    band: float = 0.5
    start: Start | str = "noise"

    def within(self, p: Problem) -> float:
        return self.probe / math.sqrt(p.x0[0].numel())

    def enter(self, p: Problem, o: Opening) -> CGBAState:
        first = torch.ones_like(p.rows)
        return CGBAState(o.point(p), first, first == 0, Tally.empty(p), _whole(p))

    def learn(self, p: Problem, w: CGBAState, x: Inputs, e: Decision, k: int) -> CGBAState:
        new = w
        if not w.closing.all():
            new = merged(w.closing, w, self._probed(p, w, x, e))
        if w.closing.any():
            new = merged(w.closing, self._closed(p, w, e), new)
        return new

    def _probed(self, p: Problem, w: CGBAState, x: Inputs, e: Decision) -> CGBAState:
        tally = w.tally.seen((x - w.base) / per_sample(self._delta(p, w), x), e.success)
        wanted = (self.probes * w.turn.to(x.dtype).sqrt()).floor()
        return w._replace(tally=tally, closing=tally.asked >= wanted)

    def _closed(self, p: Problem, w: CGBAState, e: Decision) -> CGBAState:
        on = w.on.narrowed(e.success)
        over = (on.missed - on.met) <= self.within(p)
        base = choose(on.met > 0, self._arc(p, w).at(p, on.met), w.base)
        turned = CGBAState(base, w.turn + 1, ~over, Tally.empty(p), _whole(p))
        return merged(over, turned, w._replace(on=on))

    def ask(self, p: Problem, w: CGBAState, k: int) -> Inputs:
        x = w.base
        if not w.closing.all():
            u = directions(p.stage(k), self.band)
            x = w.base + per_sample(self._delta(p, w), u) * u
        if w.closing.any():
            x = choose(w.closing, self._arc(p, w).at(p, w.on.middle()), x)
        return x

    def _arc(self, p: Problem, w: CGBAState) -> Arc:
        return Arc.through(p, w.base, w.tally.normal())

    def _delta(self, p: Problem, w: CGBAState) -> PerSample:
        return (self.probe * L2_NORM.size(w.base - p.x0)).clamp_min(1e-7 * p.box.width)


def _whole(p: Problem) -> Bracket:
    """Return the bracket of the whole semicircle: the goal is met at its start, and missed at its end."""
    return Bracket(missed=p.full(math.pi / 2), met=p.full(0.0))
