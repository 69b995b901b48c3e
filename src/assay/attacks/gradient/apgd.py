"""Auto-PGD: a step size that finds itself."""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import cross_entropy
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, PerSample, choose
from assay.models.door import Gradient, Loss
from assay.threats.problem import Problem


class Pace(NamedTuple):
    """How long the steps are, and what the next review of them needs."""

    step: PerSample
    loss: PerSample  # at the previous query
    best_loss: PerSample
    rises: PerSample  # updates since the last review that raised the loss
    reviewed: PerSample  # best loss at the last review
    shrunk: Mask  # at the last review

    @classmethod
    def of(cls, step: PerSample) -> "Pace":
        zero, low = torch.zeros_like(step), torch.full_like(step, -torch.inf)
        return cls(step, zero, low, zero, low, zero == 0)

    def after(self, loss: PerSample, *, first: bool) -> "Pace":
        """Return the pace after a query; what rises is counted from the second one on."""
        best = torch.maximum(loss, self.best_loss)
        if first:
            return self._replace(loss=loss, best_loss=best, reviewed=best)
        return self._replace(loss=loss, best_loss=best, rises=self.rises + (loss > self.loss))

    def review(self, window: int, rho: float) -> "Pace":
        """Halve the step where too few of the last updates, ``window`` in number, paid."""
        shrunk = (self.rises <= rho * window) | (~self.shrunk & (self.reviewed >= self.best_loss))
        step, none = torch.where(shrunk, self.step / 2, self.step), torch.zeros_like(self.rises)
        return self._replace(step=step, rises=none, reviewed=self.best_loss, shrunk=shrunk)


def reviews(steps: int) -> dict[int, int]:
    """Return the queries after which the step is reviewed, each with the length of the window that ends there."""
    first, least, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    windows = [max(first - j * less, least) for j in range(steps)]
    return {end: w for end, w in zip(accumulate(windows), windows, strict=True) if end <= steps}


class APGDState(NamedTuple):
    """Where each sample's walk is, and what its next review needs."""

    x: Inputs
    previous: Inputs
    best_x: Inputs
    best_grad: Inputs
    pace: Pace
    support: PerSample  # l1: coordinates that a step moves
    nonzeros: PerSample  # l1: coordinates in which the best point differed from x0 at the last review


class Stage(NamedTuple):
    """A part of the queries, walked in a ball of its own."""

    first: int  # query
    steps: int
    factor: float  # of eps


@final
@ATTACKS.register("apgd", norm=("linf", "l2", "l1"), access="gradient", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class APGD(GradientAttack[APGDState]):
    """Projected gradient ascent with momentum, whose step is halved where it stops paying.

    z = P(x + s * steepest(grad)),  x' = P(x + a (z - x) + (1 - a) (x - previous)),  a = 0.75 after the first step.
    At reviews, ever closer together, a sample whose loss rose in less than ``rho`` of the steps, or whose best loss
    stands still at an unchanged step, gets s / 2 and goes back to its best point.
    For l1 the step moves only as many coordinates as two thirds of those in which the best point differs from x0;
    a review that finds this support shrinking resets the step to eps, else divides it by 1.5. With ``wide`` it first
    walks in balls of 3 eps and 2 eps, for 30 % of the steps each, and every time goes on from the projection of the
    best point.

    *Sees* the gradient. *Cost* ``steps`` + 1 forwards, ``steps`` backwards.

    Args:
        steps: number of steps.
        rho: share of rising steps below which the step is halved.
        momentum: a.
        wide: l1 only: begin in larger balls.
        loss: cross-entropy, DLR (``dlr``) or margin; each has its targeted form, see :mod:`assay.attacks.losses`.

    *Differs from the paper in*: the l2 projection onto ball and box together (exact, not scaled and then clipped);
    uniform random start for every norm; the query at which a new ball begins is one of the ``steps``. The published
    code compares the loss after the first update with 0; here, as in the paper, with that of the start.

    References:
        Croce & Hein 2020, arXiv:2003.01690, algorithm 1; for l1 Croce & Hein 2021, arXiv:2103.01208, algorithm 1
        and sec. 3.2.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    steps: int = 100
    rho: float = 0.75
    momentum: float = 0.75
    wide: bool = True
    loss: Loss = cross_entropy

    def stage(self, p: Problem, k: int) -> Stage:
        """Return the stage of query k."""
        if p.norm.name != "l1" or not self.wide or self.steps < _LEAST_WIDE:
            return Stage(0, self.steps, 1)
        second, third = math.ceil(0.3 * self.steps) + 1, 2 * math.ceil(0.3 * self.steps) + 2
        if k >= third:
            return Stage(third, self.steps - third, 1)
        return Stage(second, third - second - 1, 2) if k >= second else Stage(0, second - 1, 3)

    def reviews(self, steps: int, *, sparse: bool) -> dict[int, int]:
        """Return the queries of a stage after which the step is reviewed, each with the window that ends there."""
        window = max(int(0.04 * steps), 1)
        return dict.fromkeys(range(window, steps + 1, window), window) if sparse else reviews(steps)

    def init(self, p: Problem) -> APGDState:
        q, features = self._ball(p, 0), p.x0[0].numel()
        x, length = q.start(), q.radius if p.norm.name == "l1" else 2 * q.radius
        counts = p.full(max(1.0, 0.2 * features)), p.full(float(features))
        return APGDState(x, x, x, torch.zeros_like(x), Pace.of(length), *counts)

    def update(self, p: Problem, s: APGDState, e: Gradient, k: int) -> APGDState:
        stage, q = self.stage(p, k), self._ball(p, k)
        s = _remember(s, e, first=k == stage.first)
        if k + 1 < self.steps and self.stage(p, k + 1) != stage:
            return self._smaller(self._ball(p, k + 1), s)
        return self._walk(q, s, e.grad, k - stage.first, stage.steps)

    def _walk(self, p: Problem, s: APGDState, grad: Inputs, k: int, steps: int) -> APGDState:
        """Take step k of a stage."""
        sparse, x = p.norm.name == "l1", s.x
        if window := self.reviews(steps, sparse=sparse).get(k):
            s, back = self._review_l1(p, s) if sparse else self._review(s, window)
            x, grad = choose(back, s.best_x, x), choose(back, s.best_grad, grad)
        a = self.momentum if k else 1.0
        z = p.ascend(x, grad, s.pace.step, s.support.round().long() if sparse else 1)
        if not sparse:
            z = p.project(x + a * (z - x) + (1 - a) * (x - s.previous))
        return s._replace(x=z, previous=x)

    def _ball(self, p: Problem, k: int) -> Problem:
        """Return the problem in the ball of query k."""
        factor = self.stage(p, k).factor
        return p if factor == 1 else p.with_radius(factor * p.radius)

    def _smaller(self, p: Problem, s: APGDState) -> APGDState:
        """Begin anew in the ball of p, at the projection of the best point."""
        x = p.project(s.best_x)
        nonzeros = _nonzeros(p, x)
        return APGDState(x, x, x, torch.zeros_like(x), Pace.of(p.radius), (nonzeros / 1.5).clamp_min(1), nonzeros)

    def _review(self, s: APGDState, window: int) -> tuple[APGDState, Mask]:
        pace = s.pace.review(window, self.rho)
        return s._replace(pace=pace), pace.shrunk

    def _review_l1(self, p: Problem, s: APGDState) -> tuple[APGDState, Mask]:
        nonzeros = _nonzeros(p, s.best_x)
        sparser = nonzeros < 0.95 * s.nonzeros
        step = torch.where(sparser, p.radius, torch.maximum(s.pace.step / 1.5, p.radius / 10))
        support: Tensor = (nonzeros / 1.5).clamp_min(1)
        return s._replace(pace=s.pace._replace(step=step), support=support, nonzeros=nonzeros), sparser


_LEAST_WIDE = 10
"""Fewer steps are all taken in the ball of eps."""


def _nonzeros(p: Problem, x: Inputs) -> PerSample:
    return (x != p.x0).flatten(1).sum(1).to(x.dtype)


def _remember(s: APGDState, e: Gradient, *, first: bool) -> APGDState:
    up = e.loss > s.pace.best_loss
    best = {"best_x": choose(up, s.x, s.best_x), "best_grad": choose(up, e.grad, s.best_grad)}
    return s._replace(pace=s.pace.after(e.loss, first=first), **best)
