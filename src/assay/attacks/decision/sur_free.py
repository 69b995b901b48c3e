"""SurFree: random planes through the clean input and the boundary, searched along a circle."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.decision.arc import Arc
from assay.attacks.decision.probes import directions
from assay.attacks.decision.start import Start
from assay.attacks.decision.walk import Bracket, Opening, Walk, merged
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Labels, Mask, PerSample, choose
from assay.models.door import Decision
from assay.threats.problem import Problem

_FLATTEST = 1e-3
"""Below this largest angle, in radians, a walk begins anew with the first one."""


class SurFreeState(NamedTuple):
    """The point of the boundary, the plane that is tried, and how far its circle has been looked at."""

    base: Inputs
    v: Inputs
    most: PerSample  # largest angle, in radians
    look: Labels  # which of the angles is tried
    searching: Mask
    on: Bracket  # of angles, sign included


@final
@ATTACKS.register("surfree", norm=("l2",), access="decision", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class SurFree(Walk[SurFreeState]):
    """Looks for a better point on a circle in a random plane; no normal is estimated.

    With u the direction of the boundary point at distance d and v a random one orthogonal to it, the points
    x0 + d cos(a) (cos(a) u + sin(a) v) lie d cos(a) from the clean input. The angles +-m, +-m (T - 1) / T, ..., +-m / T
    are tried until one meets the goal; then the angle is searched by bisection. The largest angle m shrinks by a factor
    rho where none does, and grows by it where one does.

    *Sees* the predicted label. *Cost* ``steps`` + 1 forwards.

    Args:
        steps: number of queries.
        angle: first m, in degrees.
        looks: T.
        rho: how fast m shrinks.
        band: share of the frequencies of every axis of an image that v has, the lowest; vectors have all.
        precision: share of the angle at which a bisection ends.
        start: as for :class:`assay.attacks.HopSkipJump`.

    *Differs from the paper in*: v is uniform among low frequencies (there: as strong at each as the image is), and not
    made orthogonal to earlier ones, which random directions nearly are, so that nothing has to be remembered; T is 1
    (there 3), which leaves more queries for other planes; the end of the bisection is relative.

    References:
        Maho, Furon & Le Merrer 2021, arXiv:2011.12807, algorithms 1 and 2, sec. 4.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    steps: int = 1000
    angle: float = 30.0
    looks: int = 1
    rho: float = 0.98
    band: float = 0.35
    precision: float = 0.05
    start: Start | str = "noise"

    def enter(self, p: Problem, o: Opening) -> SurFreeState:
        none = torch.zeros_like(p.rows)
        most = p.full(math.radians(self.angle))
        return SurFreeState(o.point(p), directions(p, self.band), most, none, none > 0, Bracket(most, most))

    def learn(self, p: Problem, w: SurFreeState, x: Inputs, e: Decision, k: int) -> SurFreeState:
        first = e.success & ~w.searching
        on = merged(w.searching, w.on.narrowed(e.success), merged(first, self._around(w), w.on))
        searching = w.searching | first
        found = searching & ((on.met - on.missed).abs() <= self.precision * on.met.abs())
        failed = ~searching & (w.look + 1 >= 2 * self.looks)
        turn = found | failed
        arc = Arc.through(p, w.base, w.v)
        most = torch.where(found, w.most / self.rho, torch.where(failed, w.most * self.rho, w.most))
        most = torch.where(most < _FLATTEST, math.radians(self.angle), most).clamp_max(math.pi / 3)
        return SurFreeState(
            base=choose(found, arc.at(p, on.met), w.base),
            v=choose(turn, directions(p.stage(k + 1), self.band), w.v),
            most=most,
            look=torch.where(turn, 0, w.look + (~searching).long()),
            searching=searching & ~found,
            on=on,
        )

    def ask(self, p: Problem, w: SurFreeState, k: int) -> Inputs:
        angle = torch.where(w.searching, w.on.middle(), self._tried(w))
        return Arc.through(p, w.base, w.v).at(p, angle)

    def _tried(self, w: SurFreeState) -> PerSample:
        """Return the angle that is tried: the largest first, to one side and to the other."""
        share = 1 - (w.look // 2).to(w.most.dtype) / self.looks
        return share * w.most * (1 - 2 * (w.look % 2).to(w.most.dtype))

    def _around(self, w: SurFreeState) -> Bracket:
        """Return where the boundary is once the tried angle has met the goal: before the next larger one tried."""
        angle = self._tried(w)
        larger = angle.abs() + torch.where(w.look < 2, w.most, w.most / self.looks)
        return Bracket(angle.sign() * larger.clamp_max(math.pi / 2), angle)
