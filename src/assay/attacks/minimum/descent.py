"""What the minimal-norm attacks by gradient descent share: schedules, Adam as a value, and how they close in."""

import math
from abc import abstractmethod
from typing import ClassVar, Generic, NamedTuple, TypeVar, final

import torch

from assay.attacks.loop import GradientAttack, HasX
from assay.attacks.losses import margin
from assay.attacks.minimum.boundary import nudge
from assay.attacks.minimum.region import along_boundary
from assay.core.types import Inputs, Mask, PerSample, choose, per_sample
from assay.models.door import Door, Gradient
from assay.threats.norms import L2, TINY
from assay.threats.planes import inner, to_plane
from assay.threats.problem import Problem

_L2 = L2()
_STABLE = 1e-8
"""Added to the root of the second moment, as in the papers."""

_REACH, _BEYOND = (0.25, 0.02), 0.005
"""How near is near for l1, first and last, and how far behind the boundary is aimed: shares, as in Brendel-Bethge."""


def cosine(k: int, steps: int, first: float, last: float) -> float:
    """Return where step k of ``steps`` is on half a cosine from ``first`` to ``last``."""
    return last + (first - last) * (1 + math.cos(math.pi * k / steps)) / 2


def unit(p: Problem, grad: Inputs, k: int) -> Inputs:
    """Return the gradient at l2 length 1; where it is zero, a random direction of that length."""
    flat = grad.flatten(1).abs().amax(1) == 0
    if flat.any():
        grad = choose(flat, p.draws.fold(k).normal(grad.shape[1:], grad.dtype), grad)
    return _L2.steepest(grad)


def linear_size(p: Problem, e: Gradient) -> PerSample:
    """Return how far the boundary is from the point asked if the model is linear."""
    return e.loss.abs() / p.norm.dual(e.grad).clamp_min(TINY)


def way_across(p: Problem, x: Inputs, e: Gradient, start: Inputs) -> Inputs:
    """Return the smallest d that leads from ``start`` just beyond the boundary, if the model is as linear as at x."""
    gap = e.loss - nudge(p, x, p.norm) * p.norm.dual(e.grad) + inner(e.grad, start - x)
    return to_plane(p.norm, e.grad, gap.clamp_max(0), p.lower - start, p.upper - start).d


def reach(p: Problem) -> PerSample:
    """Return the size of the largest perturbation that the box allows."""
    return p.norm.size(torch.maximum(p.upper - p.x0, p.x0 - p.lower))


class Adam(NamedTuple):
    """The moments of Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1), decayed by 0.9 and 0.999."""

    mean: Inputs
    square: Inputs

    @classmethod
    def start(cls, like: Inputs) -> "Adam":
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    def seen(self, grad: Inputs) -> "Adam":
        return Adam(0.9 * self.mean + 0.1 * grad, 0.999 * self.square + 0.001 * grad**2)

    def scale(self, k: int) -> Inputs:
        """Return what step k (0, 1, ...) divides each coordinate by."""
        return (self.square / (1 - 0.999 ** (k + 1))).sqrt() + _STABLE

    def step(self, k: int) -> Inputs:
        return self.mean / (1 - 0.9 ** (k + 1)) / self.scale(k)


S = TypeVar("S", bound=HasX)


class Descending(NamedTuple, Generic[S]):
    """The next point, the state of the descent, and the smallest success so far."""

    x: Inputs
    part: S
    best: Inputs
    size: PerSample  # of best; inf before the first success
    ahead: Inputs  # where the boundary, linear as at best, is nearest to the clean input
    share: PerSample  # of the way from best to there that is tried next
    gap: PerSample  # the margin at best
    beyond: PerSample  # l1 only: how far behind the boundary is aimed; twice as far after each failure

    def seen(self, p: Problem, success: Mask) -> "Descending[S]":
        """Return the state after x was asked."""
        size = p.size(self.x)
        better = success & (size < self.size)
        return self._replace(best=choose(better, self.x, self.best), size=torch.where(better, size, self.size))

    def closer(self, p: Problem, e: Gradient) -> "Descending[S]":
        """Return the state after the margin's gradient was asked at x, with x on the way to the nearest boundary."""
        found = self.size.isfinite()
        fresh = ~found | (e.success & (p.size(self.x) == self.size))  # else x was a step too far
        start = choose(found, p.x0, self.x)
        ahead = choose(fresh, (start + way_across(p, self.x, e, start)).clamp(p.lower, p.upper), self.ahead)
        margins = torch.where(fresh, e.loss, self.gap)
        back = (0.9 * margins / (margins - e.loss).clamp_min(TINY)).clamp(0.5, 0.9)  # to where it is 0 in between
        share = torch.where(fresh, 2 * self.share, back * self.share).clamp_max(1)
        x = self.best + per_sample(share, ahead) * (ahead - self.best)
        if p.norm.name == "l0":
            x = p.project(x, (self.size + share * (p.size(ahead) - self.size)).clamp_max(self.size - 1).clamp_min(1))
        x = choose(found & (share < 1), x, ahead)
        return self._replace(x=x.clamp(p.lower, p.upper), ahead=ahead, share=share, gap=margins)

    def sparser(self, p: Problem, e: Gradient, j: int, closing: int) -> "Descending[S]":
        """Return the state after query j of those that close in for l1: one try as for other norms, then regions."""
        found, after = self.size.isfinite(), self.closer(p, e)
        beyond = torch.where(e.success, _BEYOND, 2 * self.beyond)
        step = along_boundary(p, self.x, e, p.norm, cosine(j, closing, *_REACH), beyond).clamp(p.lower, p.upper)
        if j == 0:
            return after._replace(ahead=choose(found, step, after.ahead))
        if j == 1:  # where that try failed, it goes on from the point before
            step, beyond = choose(e.success, step, self.ahead), torch.full_like(beyond, _BEYOND)
        return after._replace(x=choose(found, step, after.x), beyond=beyond)


class Descent(GradientAttack[Descending[S]]):
    """A descent of ``steps`` steps, after which ``closing`` more close in on the clean input along the boundary.

    Closing in: the margin is linearised at the smallest success z; x <- z + s (h - z), h the nearest point to x0 on
    that plane, inside the box, and 0.1 % beyond. s doubles (to at most 1) after a success, else it falls to
    where the margin is zero if linear in between, and a little more, by half at most. Without
    a success so far, h is nearest to the point asked last, and s = 1. For l0, h has the fewest changes, and x as
    many as s says. For l1, h is few large changes, where the gradient at z says little: from the second step on, x is
    the best point that is near the last one (:func:`along_boundary`). Where the model is linear, the first of these
    steps arrives.
    """

    __slots__ = ()
    any_size: ClassVar[bool] = True
    minimal: ClassVar[bool] = True
    closing: int

    @property
    def questions(self) -> int:
        return self.steps + self.closing

    @abstractmethod
    def first(self, p: Problem) -> S:
        """Return the state of the descent before the first query."""

    @abstractmethod
    def descend(self, p: Problem, s: S, e: Gradient, k: int) -> S:
        """Return the state of the descent after query ``k`` < ``steps``."""

    @final
    def init(self, p: Problem) -> Descending[S]:
        part = self.first(p)
        return Descending(part.x, part, p.x0, p.full(torch.inf), p.x0, p.full(0.5), p.full(0.0), p.full(_BEYOND))

    @final
    def query(self, door: Door, x: Inputs, p: Problem, k: int) -> Gradient:
        if self.steps <= k < self.questions:
            return door.gradient(x, p, margin)
        return super().query(door, x, p, k)

    @final
    def update(self, p: Problem, s: Descending[S], e: Gradient, k: int) -> Descending[S]:
        s = s.seen(p, e.success)
        if k >= self.steps:
            return s.sparser(p, e, k - self.steps, self.closing) if p.norm.name == "l1" else s.closer(p, e)
        part = self.descend(p, s.part, e, k)
        ends = self.closing > 0 and k + 1 == self.steps
        x = choose(s.size.isfinite(), s.best, part.x) if ends else part.x
        return s._replace(x=x, part=part)

    def done(self, s: Descending[S]) -> Mask:
        return s.size == 0
