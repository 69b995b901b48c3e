"""The l2 attack of Carlini and Wagner, and the search for the weight of a penalty that other attacks share."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import margin
from assay.attacks.minimum.descent import linear_size
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY
from assay.threats.problem import Problem

_EDGE = 1 - 1e-5
"""The tanh of the starting point stays this far inside, for at the box's ends the change of variables is flat."""


class Weight(NamedTuple):
    """The weight c of the goal against the size, and where the search for the smallest that suffices stands."""

    c: PerSample
    factor: PerSample  # by which c changes next
    enough: PerSample  # 1: c sufficed in the last round, -1: it did not, 0: there was none
    met: Mask  # the goal, in the later half of this round
    age: PerSample  # queries of this round so far
    round: PerSample

    @classmethod
    def first(cls, p: Problem, c: PerSample, *, settled: Mask) -> "Weight":
        """Return the weights to begin with; a sample that is ``settled`` needs no round."""
        zero = p.full(0.0)
        return cls(c, p.full(10.0), zero, zero > 0, zero, torch.where(settled, torch.inf, 0.0).to(c.dtype))

    def tell(self, success: Mask, steps: int) -> tuple["Weight", Mask]:
        """Note what a query told; return the weight to go on with, and the samples whose round is over.

        A round is ``steps`` queries, and c was enough if the goal is met in the later half of them. Then c falls by
        a factor, else it rises by it; where that turned, the factor is the square root of the last one.
        """
        age = self.age + 1
        met, over = self.met | (success & (2 * age > steps)), age >= steps
        enough = met.to(self.c.dtype) * 2 - 1
        factor = torch.where(over & (enough * self.enough < 0), self.factor.sqrt(), self.factor)
        c = torch.where(over, self.c * factor**-enough, self.c).clamp(TINY, 1 / TINY)
        enough, age = torch.where(over, enough, self.enough), torch.where(over, 0, age)
        return Weight(c, factor, enough, met & ~over, age, self.round + over), over


class Adam(NamedTuple):
    """Means of gradients and of their squares."""

    first: Inputs
    second: Inputs

    @classmethod
    def blank(cls, x: Inputs) -> "Adam":
        return cls(torch.zeros_like(x), torch.zeros_like(x))

    def step(self, grad: Inputs, age: PerSample) -> tuple["Adam", Inputs]:
        """Return the new means, and the direction of descent; ``age`` (b,) counts the steps before this one."""
        first, second = 0.9 * self.first + 0.1 * grad, 0.999 * self.second + 0.001 * grad.square()
        t = per_sample(age + 1, grad)
        direction: Tensor = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        return Adam(first, second), direction

    def blank_where(self, mask: Mask) -> "Adam":
        """Return the means, forgotten for the samples of ``mask``."""
        return Adam(*(choose(mask, torch.zeros_like(v), v) for v in self))


class CarliniWagnerState(NamedTuple):
    """The point, its preimage under the change of variables, the best one, the optimiser and the search for c."""

    x: Inputs
    w: Inputs
    best: Inputs  # the preimage of the smallest success
    size: PerSample  # of it
    guess: PerSample  # of it, before the first success
    adam: Adam
    weight: Weight


@final
@ATTACKS.register("cw", norm=("l2",), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class CarliniWagner(GradientAttack[CarliniWagnerState]):
    """Descent on ||x - x0||^2 + c max(confidence - margin(x), 0), with a search for the smallest c that suffices.

    x = (tanh(w) + 1) / 2 in units of the box, so that every w gives a point inside; Adam on w. Each round has a
    new c: larger if the goal was not met in the last one, else smaller.

    *Sees* the gradient. *Cost* ``rounds * steps`` + 1 forwards, one backward fewer.

    Args:
        steps: steps of a round.
        rounds: number of values of c.
        rate: learning rate at first, in proportion to the smallest size so far (before the first success, to what a
            linear model would need, twice as much in every round); it falls to 0 along half a squared cosine over all
            rounds.
        confidence: margin that is aimed at.
        loss: what is kept above ``confidence``; positive where the goal is met.

    *Differs from the paper in*: the first c is what a linear model would need, so that the scale of the logits does
    not matter (the paper starts at a constant); a round starts at the smallest success so far, not at x0, and so can
    be short; c rises and falls by factors that shrink to 1, so that a wrong answer can be made good (the paper
    bisects); the learning rate falls; no round ends early.

    References:
        Carlini & Wagner 2017, arXiv:1608.04644, sec. V-B and VI-A.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    minimal: ClassVar[bool] = True
    any_size: ClassVar[bool] = True
    steps: int = 20
    rounds: int = 25
    rate: float = 0.3
    confidence: float = 0.0
    loss: Loss = margin

    @property
    def questions(self) -> int:
        return self.rounds * self.steps

    def init(self, p: Problem) -> CarliniWagnerState:
        x = p.start("clean")
        w, never = (((x - p.box.lo) / p.box.width * 2 - 1) * _EDGE).atanh(), p.full(torch.inf)
        return CarliniWagnerState(x, w, w, never, p.full(0.0), Adam.blank(w), Weight.first(p, never, settled=never < 0))

    def update(self, p: Problem, s: CarliniWagnerState, e: Gradient, k: int) -> CarliniWagnerState:
        weight = (
            s.weight if k else Weight.first(p, linear_weight(p, e), settled=e.success & (s.x == p.x0).flatten(1).all(1))
        )
        guess = s.guess if k else linear_size(p, e)  # without it the first steps go far beyond boundaries nearby
        away, size = (s.x - p.x0) / p.box.width, p.size(s.x)
        slope = 2 * away - per_sample(short(e, self.confidence) * weight.c, away) * e.grad * p.box.width
        adam, direction = s.adam.step(slope * (1 - s.w.tanh().square()) / 2, weight.age)
        w = s.w - per_sample(self._rate(p, torch.where(s.size.isinf(), guess, s.size), weight), s.w) * direction
        better = e.success & (size < s.size)
        best, size = choose(better, s.w, s.best), torch.where(better, size, s.size)
        weight, over = weight.tell(e.success, self.steps)
        guess = torch.where(over, 2 * guess, guess)
        w, adam = choose(over & size.isfinite(), best, w), adam.blank_where(over)
        x = (p.box.lo + p.box.width * (w.tanh() + 1) / 2).clamp(p.lower, p.upper)
        return CarliniWagnerState(x, w, best, size, guess, adam, weight)

    def _rate(self, p: Problem, size: PerSample, weight: Weight) -> PerSample:
        progress = (weight.round + weight.age / self.steps) / self.rounds
        fit = (10 * size / p.box.width / math.sqrt(p.x0[0].numel())).clamp_max(1)
        fade = (0.5 + 0.5 * torch.cos(torch.pi * progress)).square()
        rate: PerSample = self.rate * fit * fade
        return rate

    def done(self, s: CarliniWagnerState) -> Mask:
        return s.weight.round >= self.rounds


def short(e: Gradient, confidence: float) -> PerSample:
    """Return 1 where the goal, or the confidence in it, is still to be reached, else 0."""
    return (~e.success | (e.loss < confidence)).to(e.loss.dtype)


def linear_weight(p: Problem, e: Gradient) -> PerSample:
    """Return the c for which the optimum lies on the boundary if the model is linear: 2 |loss| / ||grad||^2."""
    slope = (e.grad * p.box.width).flatten(1).double().square().sum(1)
    c = 2 * e.loss.double().abs() / slope.clamp_min(TINY)
    return torch.where(slope > 0, c.clamp(TINY, 1 / TINY), 1).to(e.loss.dtype)
