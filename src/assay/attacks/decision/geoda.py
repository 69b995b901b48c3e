"""GeoDA: the nearest point of the plane that the boundary looks like."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.decision.probes import L2_NORM, Tally, directions
from assay.attacks.decision.start import Start
from assay.attacks.decision.walk import Bracket, Opening, Walk, merged
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Labels, PerSample, choose, per_sample
from assay.models.door import Decision
from assay.threats.planes import inner, to_plane
from assay.threats.problem import Problem

PROBE, REACH, CLOSE = 0, 1, 2
"""What the next answer is for: the normal, how far its plane has to be moved, and that more exactly."""

_FARTHER, _FARTHEST = 1.5, 8.0
"""By what the distance to the plane grows while the goal is missed, and where that is given up."""


class GeoDAState(NamedTuple):
    """The best point of the boundary; the phase that a sample is in, and what it has learned in it."""

    base: Inputs
    turn: Labels  # 0, 1, ...
    phase: Labels
    tally: Tally
    on: Bracket  # of distances of the plane, as shares of what the normal says


@final
@ATTACKS.register("geoda", norm=("linf", "l2", "l1"), access="decision", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class GeoDA(Walk[GeoDAState]):
    """Takes the boundary for a plane, whose normal w random probes tell, and goes to the plane's nearest point.

    w = sum_i phi_i u_i over directions u_i, phi_i = 1 where x_t + delta u_i meets the goal, else -1. The plane through
    the boundary point x_t with normal w has, in the box, one point nearest to the clean input in each norm. The plane
    is moved along w until this point meets the goal and, by bisection, just does: it is x_{t+1} if it is nearer.
    Turns get ever more probes, in proportion to lambda^(-2 t / 3).

    *Sees* the predicted label. *Cost* ``steps`` + 1 forwards.

    Args:
        steps: number of queries.
        turn: queries of a turn, on average.
        decay: lambda, by which a turn is assumed to bring the point nearer.
        probe: delta as a share of the l2 distance to the clean input.
        band: share of the frequencies of every axis of an image that the directions have; vectors have all.
        start: as for :class:`assay.attacks.HopSkipJump`.

    *Differs from the paper in*: the nearest point of the plane inside the box, found exactly, instead of steps of a
    fixed direction that are clipped; delta follows the distance; a point that is not nearer is not taken.

    References:
        Rahmati et al. 2020, arXiv:2003.06468, algorithms 1 and 2, sec. 4.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    steps: int = 1000
    turn: int = 250
    decay: float = 0.6
    probe: float = 0.05
    band: float = 0.35
    start: Start | str = "noise"

    def within(self, p: Problem) -> float:
        return self.probe / math.sqrt(p.x0[0].numel())

    def enter(self, p: Problem, o: Opening) -> GeoDAState:
        none = torch.zeros_like(p.rows)
        return GeoDAState(o.point(p), none, none + PROBE, Tally.empty(p), Bracket(p.full(0.0), p.full(1.0)))

    def learn(self, p: Problem, w: GeoDAState, x: Inputs, e: Decision, k: int) -> GeoDAState:
        new = w
        for phase, learned in ((PROBE, self._probed), (REACH, self._reached), (CLOSE, self._closed)):
            here = w.phase == phase
            if here.any():
                new = merged(here, learned(p, w, x, e), new)
        return new

    def counts(self) -> list[int]:
        """Return the number of probes of each turn."""
        turns = max(1, round(self.steps / self.turn))
        growth = [self.decay ** (-2 * t / 3) for t in range(turns)]
        spent = 30 + 15 * turns  # on the opening, and on what follows the probes
        return [max(10, int((self.steps - spent) * g / sum(growth))) for g in growth]

    def _probed(self, p: Problem, w: GeoDAState, x: Inputs, e: Decision) -> GeoDAState:
        tally = w.tally.seen((x - w.base) / per_sample(self._delta(p, w), x), e.success)
        counts = torch.tensor(self.counts(), device=x.device)
        wanted = counts[w.turn.clamp_max(len(counts) - 1)]
        start = Bracket(p.full(0.0), p.full(1.0))
        return w._replace(tally=tally, on=start, phase=torch.where(tally.asked >= wanted, REACH, PROBE))

    def _reached(self, p: Problem, w: GeoDAState, x: Inputs, e: Decision) -> GeoDAState:
        farther = Bracket(w.on.met, _FARTHER * w.on.met)
        lost = ~e.success & (farther.met > _FARTHEST)
        new = w._replace(on=merged(e.success, w.on, farther), phase=torch.where(e.success, CLOSE, REACH))
        return merged(lost, self._turned(p, w, w.base), new)

    def _closed(self, p: Problem, w: GeoDAState, x: Inputs, e: Decision) -> GeoDAState:
        on = w.on.narrowed(e.success)
        end = self._nearest(p, w, on.met)
        nearer = choose(p.size(end) < p.size(w.base), end, w.base)
        return merged(on.closed(self.within(p)), self._turned(p, w, nearer), w._replace(on=on))

    def _turned(self, p: Problem, w: GeoDAState, base: Inputs) -> GeoDAState:
        """Return the state at the start of the next turn."""
        return GeoDAState(base, w.turn + 1, w.phase * 0 + PROBE, Tally.empty(p), w.on)

    def ask(self, p: Problem, w: GeoDAState, k: int) -> Inputs:
        x = w.base
        if (w.phase == PROBE).any():
            u = directions(p.stage(k), self.band)
            x = w.base + per_sample(self._delta(p, w), u) * u
        if (w.phase != PROBE).any():
            share = torch.where(w.phase == CLOSE, w.on.middle(), w.on.met)
            x = choose(w.phase == PROBE, x, self._nearest(p, w, share))
        return x

    def _nearest(self, p: Problem, w: GeoDAState, share: PerSample) -> Inputs:
        """Return the point nearest to the clean input of the plane at this share of the boundary's distance."""
        normal = w.tally.normal()
        gap = -share * inner(normal, w.base - p.x0).abs()
        return (p.x0 + to_plane(p.norm, normal, gap, p.lower - p.x0, p.upper - p.x0).d).clamp(p.lower, p.upper)

    def _delta(self, p: Problem, w: GeoDAState) -> PerSample:
        return (self.probe * L2_NORM.size(w.base - p.x0)).clamp_min(1e-7 * p.box.width)
