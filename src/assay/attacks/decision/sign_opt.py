"""Sign-OPT: descent of the boundary's distance over directions, by the signs of its slopes."""

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
from assay.threats.problem import Problem

PROBE, TRY, CLOSE = 0, 1, 2
"""What the next answer is for: the slope, whether a step is an improvement, how far the boundary then is."""

_LONGEST, _SHORTEST = 2.0, 1e-4
"""Steps between which an improvement is looked for."""


class SignOPTState(NamedTuple):
    """The best direction and the boundary's distance along it; the phase that a sample is in."""

    theta: Inputs
    reach: PerSample
    phase: Labels
    tally: Tally
    step: PerSample
    on: Bracket  # of distances along the tried direction


@final
@ATTACKS.register("sign-opt", norm=("l2",), access="decision", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class SignOPT(Walk[SignOPTState]):
    """Descends g(theta), the distance of the boundary along a direction of length 1, by signs of its slopes.

    One query at distance g(theta) along theta + probe * u tells whether g is smaller there: the sum over ``probes``
    random directions u with these signs is the direction of descent. theta moves along it by a step that is halved
    until one query at the old distance says that the new one is smaller, and then bisection tells how small.

    *Sees* the predicted label. *Cost* ``steps`` + 1 forwards.

    Args:
        steps: number of queries.
        probes: number of directions u.
        probe: their length.
        step: first length of a step; a step that is an improvement is tried doubled in the next turn.
        band: share of the frequencies of every axis of an image that the u have, the lowest; vectors have all.
        start: as for :class:`assay.attacks.HopSkipJump`.

    *Differs from the paper in*: the step is settled by single queries at the old distance, where the paper searches the
    distance of each; one start instead of the best of a hundred; 50 directions instead of 200, of low frequencies where
    there are images; signs are taken from their mean.

    References:
        Cheng et al. 2020, arXiv:1909.10773, algorithms 1 and 2.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    steps: int = 2000
    probes: int = 50
    probe: float = 0.01
    step: float = 0.5
    band: float = 0.5
    start: Start | str = "noise"

    def within(self, p: Problem) -> float:
        return self.probe / math.sqrt(p.x0[0].numel())

    def enter(self, p: Problem, o: Opening) -> SignOPTState:
        d, none = o.point(p) - p.x0, torch.zeros_like(p.rows)
        reach = L2_NORM.size(d)
        return SignOPTState(
            L2_NORM.steepest(d), reach, none + PROBE, Tally.empty(p), p.full(self.step), Bracket(p.full(0.0), reach)
        )

    def learn(self, p: Problem, w: SignOPTState, x: Inputs, e: Decision, k: int) -> SignOPTState:
        new = w
        if (w.phase == PROBE).any():
            tally = w.tally.seen(directions(p.stage(k), self.band), e.success)
            full = torch.where(tally.asked >= self.probes, TRY, PROBE)
            new = merged(w.phase == PROBE, w._replace(tally=tally, phase=full), new)
        if (w.phase == TRY).any():
            new = merged(w.phase == TRY, self._tried(p, w, e), new)
        if (w.phase == CLOSE).any():
            new = merged(w.phase == CLOSE, self._closed(p, w, e), new)
        return new

    def _tried(self, p: Problem, w: SignOPTState, e: Decision) -> SignOPTState:
        lost = ~e.success & (w.step < 2 * _SHORTEST)
        new = w._replace(
            step=torch.where(e.success, w.step, torch.where(lost, self.step, w.step / 2)),
            phase=torch.where(e.success, CLOSE, torch.where(lost, PROBE, TRY)),
            on=Bracket(p.full(0.0), w.reach),
        )
        return new._replace(tally=merged(lost, Tally.empty(p), w.tally))

    def _closed(self, p: Problem, w: SignOPTState, e: Decision) -> SignOPTState:
        on = w.on.narrowed(e.success)
        over = on.closed(self.within(p))
        turned = SignOPTState(
            L2_NORM.steepest(self._aim(w)),
            on.met,
            w.phase * 0 + PROBE,
            Tally.empty(p),
            (2 * w.step).clamp_max(_LONGEST),
            on,
        )
        return merged(over, turned, w._replace(on=on))

    def ask(self, p: Problem, w: SignOPTState, k: int) -> Inputs:
        aim, reach = self._aim(w), torch.where(w.phase == CLOSE, w.on.middle(), w.reach)
        if (w.phase == PROBE).any():
            aim = choose(w.phase == PROBE, w.theta + self.probe * directions(p.stage(k), self.band), aim)
        return (p.x0 + per_sample(reach, aim) * L2_NORM.steepest(aim)).clamp(p.lower, p.upper)

    def _aim(self, w: SignOPTState) -> Inputs:
        """Return the direction that is tried, of any length."""
        return w.theta + per_sample(w.step, w.theta) * w.tally.normal()
