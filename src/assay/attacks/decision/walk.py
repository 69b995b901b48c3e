"""What the attacks that see labels only share: a start, the way from there to the boundary, and a walk of their own."""

from abc import abstractmethod
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, final

import torch
from torch import Tensor

from assay.attacks.decision.start import Start, start_of
from assay.attacks.loop import DecisionAttack
from assay.core.types import Inputs, Mask, PerSample, choose, per_sample
from assay.models.door import Decision
from assay.threats.problem import Problem

TRIES = 200
"""Candidates for a start that are asked about; where none meets the goal, the attack gives up."""

S = TypeVar("S", bound=tuple[Any, ...])
W = TypeVar("W", bound=tuple[Any, ...])


def merged(mask: Mask, a: S, b: S) -> S:
    """Take the rows of state ``a`` where ``mask``, else those of ``b``; parts of a state may be states."""
    parts = (choose(mask, v, w) if isinstance(v, Tensor) else merged(mask, v, w) for v, w in zip(a, b, strict=True))
    return type(a)(*parts)


class Bracket(NamedTuple):
    """Two places on a path, one at which the goal is missed and one at which it is met; the boundary is in between."""

    missed: PerSample
    met: PerSample

    def middle(self) -> PerSample:
        return (self.missed + self.met) / 2

    def narrowed(self, success: Mask) -> "Bracket":
        """Return the half in which the boundary is, after the middle was asked."""
        middle = self.middle()
        return Bracket(torch.where(success, self.missed, middle), torch.where(success, middle, self.met))

    def closed(self, within: float) -> Mask:
        """Tell where the two places are closer than this share of the larger one."""
        return (self.met - self.missed).abs() <= within * torch.maximum(self.met, self.missed)


def toward(p: Problem, end: Inputs, share: PerSample) -> Inputs:
    """Return the point of the way from the clean input (share 0) to ``end`` (1) whose size is that share of its size.

    l2, l1: on the straight line. linf: ``end`` clipped to a cube around the clean input. l0: the share of the changed
    coordinates that change most.
    """
    d, s = end - p.x0, per_sample(share, end)
    if p.norm.name == "linf":
        most = s * per_sample(p.norm.size(d), d)
        return (p.x0 + d.clamp(-most, most)).clamp(p.lower, p.upper)
    if p.norm.name == "l0":
        rank = d.flatten(1).abs().argsort(dim=1, descending=True, stable=True).argsort(dim=1).view(d.shape)
        return torch.where(rank < s * per_sample(p.norm.size(d), d), end, p.x0)
    return (p.x0 + s * d).clamp(p.lower, p.upper)


class Opening(NamedTuple):
    """The first point that meets the goal, and where between it and the clean input the boundary is."""

    end: Inputs
    found: Mask
    on: Bracket
    over: Mask  # the clean input meets the goal, or no candidate does

    def point(self, p: Problem) -> Inputs:
        """Return the nearest point of the way that is known to meet the goal."""
        return toward(p, self.end, self.on.met)

    def seen(self, x: Inputs, e: Decision, k: int) -> "Opening":
        """Return the opening after query k: of the clean input, of candidate k - 1, or of a point of the way."""
        first = e.success & ~self.found
        return Opening(
            end=choose(first, x, self.end),
            found=self.found | first,
            on=merged(self.found, self.on.narrowed(e.success), self.on),
            over=(self.over | e.success) if k == 0 else self.over | (~self.found & ~first & (k >= TRIES)),
        )


class WalkState(NamedTuple, Generic[W]):
    """The next point; the opening; and, for the samples that have ``begun`` it, the walk."""

    x: Inputs
    opening: Opening
    begun: Mask
    walk: W


class Walk(DecisionAttack[WalkState[W]], Generic[W]):
    """A minimal-norm attack that goes on from a point of the boundary. Every sample is at a stage of its own.

    Query 0 asks about the clean input, the next ones about candidates for a start until one meets the goal, then about
    points between it and the clean input until the boundary is known to ``within`` of the distance.
    """

    __slots__ = ()
    minimal: ClassVar[bool] = True
    any_size: ClassVar[bool] = True
    start: Start | str

    @abstractmethod
    def enter(self, p: Problem, o: Opening) -> W:
        """Return the walk's state where the opening ends."""

    @abstractmethod
    def learn(self, p: Problem, w: W, x: Inputs, e: Decision, k: int) -> W:
        """Return the walk's state after the answer ``e`` to query ``k``, of the points ``x``."""

    @abstractmethod
    def ask(self, p: Problem, w: W, k: int) -> Inputs:
        """Return the points of query ``k``."""

    def within(self, p: Problem) -> float:
        """Return how well the opening has to know the boundary, as a share of the distance."""
        return 0.001

    def candidate(self, p: Problem, i: int) -> Inputs:
        """Return candidate ``i`` for a start."""
        return p.warm if i == 0 and p.warm is not None else start_of(self.start)(p, i)

    def over(self, w: W) -> Mask | None:
        """Tell which walks have come to an end; None stands for none."""
        return None

    @final
    def init(self, p: Problem) -> WalkState[W]:
        no = torch.zeros_like(p.rows, dtype=torch.bool)
        o = Opening(p.x0, no, Bracket(p.full(0.0), p.full(1.0)), no)
        return WalkState(p.x0, o, no, self.enter(p, o))

    @final
    def update(self, p: Problem, s: WalkState[W], e: Decision, k: int) -> WalkState[W]:
        x = p.snap(s.x)
        o, begun, w = s.opening, s.begun, s.walk
        if begun.any():
            w = merged(begun, self.learn(p, w, x, e, k), w)
        if begun.all():
            return WalkState(self._inside(p, self.ask(p, w, k + 1)), o, begun, w)
        o = merged(begun, o, o.seen(x, e, k))
        ready = o.found & ~begun & ~o.over & o.on.closed(self.within(p))
        if ready.any():
            begun, w = begun | ready, merged(ready, self.enter(p, o), w)
        x = toward(p, o.end, o.on.middle())
        if not o.found.all():
            x = choose(o.found, x, self.candidate(p, k))
        return WalkState(self._inside(p, choose(begun, self.ask(p, w, k + 1), x)), o, begun, w)

    @final
    def done(self, s: WalkState[W]) -> Mask:
        over = self.over(s.walk)
        return s.opening.over if over is None else s.opening.over | (s.begun & over)

    def _inside(self, p: Problem, x: Inputs) -> Inputs:
        return x.clamp(p.lower, p.upper)
