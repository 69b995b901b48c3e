"""RayS: a search for the corner of the box toward which the boundary is nearest."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.decision.start import Start
from assay.attacks.decision.walk import Bracket, Opening, Walk, merged, toward
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Labels, Mask, PerSample, choose
from assay.models.door import Decision
from assay.threats.norms import TINY
from assay.threats.problem import Problem


class RaySState(NamedTuple):
    """The best corner and its distance; the block that is tried."""

    corner: Inputs
    radius: PerSample  # at which the goal is known to be met toward the corner
    level: Labels  # 2^level blocks
    block: Labels
    searching: Mask  # the tried corner is better, and is searched for its distance
    on: Bracket  # of radii toward the tried corner
    stride: PerSample  # by how much less the next radius is, at most


@final
@ATTACKS.register("rays", norm=("linf",), access="decision", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class RayS(Walk[RaySState]):
    """Flips the signs of ever smaller blocks of a direction, and keeps what brings the boundary nearer.

    A direction s of signs points to a corner of the box; r(s) = min r for which clip(x0 + r s) meets the goal. One
    query, at the r of the best direction, tells whether s with one block flipped is better; only then r is searched
    by bisection. Level l has 2^l blocks of equal length; the blocks of a level are tried once each.

    *Sees* the predicted label. *Cost* ``steps`` + 1 forwards.

    Args:
        steps: number of queries.
        tolerance: width at which a bisection ends, as a share of the box.
        first: first stride of a search, as a share of the radius.
        start: as for :class:`assay.attacks.HopSkipJump`, each candidate moved to the nearest corner.

    *Differs from the paper in*: a search begins with small strides down from the old r, which double, instead of in the
    middle: most flips bring a little. Where the first corner does not meet the goal, others are drawn. When all
    single values were tried, they are tried again.

    References:
        Chen & Gu 2020, arXiv:2006.12792, algorithms 1 to 3.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    steps: int = 1000
    tolerance: float = 0.001
    first: float = 0.03125
    start: Start | str = "largest"

    def candidate(self, p: Problem, i: int) -> Inputs:
        middle = (p.box.lo + p.box.hi) / 2
        return torch.where(Walk.candidate(self, p, i) > middle, p.box.hi, p.box.lo).to(p.x0.dtype)

    def within(self, p: Problem) -> float:
        return self.tolerance

    def enter(self, p: Problem, o: Opening) -> RaySState:
        radius, none = o.on.met * p.norm.size(o.end - p.x0), torch.zeros_like(p.rows)
        return RaySState(o.end, radius, none, none, none > 0, Bracket(p.full(0.0), radius), self.first * radius)

    def learn(self, p: Problem, w: RaySState, x: Inputs, e: Decision, k: int) -> RaySState:
        # In a search every answer narrows the bracket; a first answer begins one, or the next block is tried.
        asked = self._asked(w)
        answered = Bracket(torch.where(e.success, w.on.missed, asked), torch.where(e.success, asked, w.on.met))
        on = merged(w.searching, answered, Bracket(p.full(0.0), w.radius))
        searching = w.searching | e.success
        found = searching & ((on.met - on.missed) <= self.tolerance * p.box.width)
        better = choose(found, _flipped(p, w), w.corner)
        turn = found | ~searching
        level, block = _next(p, w)
        return RaySState(
            corner=better,
            radius=torch.where(found, on.met, w.radius),
            level=torch.where(turn, level, w.level),
            block=torch.where(turn, block, w.block),
            searching=searching & ~found,
            on=on,
            stride=torch.where(w.searching, 2 * w.stride, self.first * w.radius),
        )

    def _asked(self, w: RaySState) -> PerSample:
        """Return the radius that is asked about: of a search, the middle of the bracket or, at first, a larger one."""
        return torch.where(w.searching, torch.maximum(w.on.middle(), w.on.met - w.stride), w.radius)

    def ask(self, p: Problem, w: RaySState, k: int) -> Inputs:
        radius, corner = self._asked(w), _flipped(p, w)
        return toward(p, corner, radius / p.norm.size(corner - p.x0).clamp_min(TINY))


def _flipped(p: Problem, w: RaySState) -> Inputs:
    """Return the best corner with the signs of one block flipped."""
    n = p.x0[0].numel()
    length = -(-n // 2**w.level)
    inside = torch.arange(n, device=p.x0.device) // length[:, None] == w.block[:, None]
    return torch.where(inside.view(w.corner.shape), p.box.lo + p.box.hi - w.corner, w.corner)


def _next(p: Problem, w: RaySState) -> tuple[Labels, Labels]:
    """Return level and number of the next block."""
    n = p.x0[0].numel()
    length = -(-n // 2**w.level)
    last = (w.block + 1) * length >= n
    deepest = length == 1
    level = torch.where(last & ~deepest, w.level + 1, w.level)
    return level, torch.where(last, 0, w.block + 1)
