"""The l2 attack of Carlini and Wagner, and the search for the weight of a penalty that other attacks share."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY
from assay.threats.problem import Problem

_EDGE = 1 - 1e-5
"""The tanh of the starting point stays this far inside, for at the box's ends the change of variables is flat."""

_PATIENCE = 10
"""A round is looked at this many times, and given up where the objective stands still."""


class Weight(NamedTuple):
    """The weight c of the goal against the size, between one that was too small and one that was large enough."""

    c: PerSample
    low: PerSample  # 0: none was too small yet
    high: PerSample  # inf: none was large enough yet
    met: Mask  # the goal, in this round
    age: PerSample  # queries of this round so far
    round: PerSample
    seen: PerSample  # objective at the last look

    @classmethod
    def blank(cls, p: Problem) -> "Weight":
        zero, never = p.full(0.0), p.full(torch.inf)
        return cls(zero, zero, never, zero > 0, zero, zero, never)

    def tell(self, success: Mask, objective: PerSample, steps: int) -> tuple["Weight", Mask]:
        """Note what a query told; return the weight to go on with, and the samples whose round is over.

        A round ends after ``steps`` queries, or where the objective has not fallen since the last look. Then c is
        bisected on a logarithmic scale; until there are bounds on both sides it changes by a factor of ten.
        """
        met, age = self.met | success, self.age + 1
        look = age % max(1, steps // _PATIENCE) == 0
        over = (age >= steps) | (look & (objective > 0.9999 * self.seen))
        low, high = torch.where(over & ~met, self.c, self.low), torch.where(over & met, self.c, self.high)
        middle = torch.where(high.isinf(), 10 * low, torch.where(low == 0, high / 10, (low * high).sqrt()))
        seen = torch.where(over, torch.inf, torch.where(look, objective, self.seen))
        c, age, turn = torch.where(over, middle, self.c), torch.where(over, 0, age), self.round + over
        return Weight(c, low, high, met & ~over, age, turn, seen), over


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


class CarliniWagnerState(NamedTuple):
    """The point, its preimage under the change of variables, the optimiser and the search for c."""

    x: Inputs
    w: Inputs
    adam: Adam
    weight: Weight


@final
@ATTACKS.register("cw", norm=("l2",), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class CarliniWagner(GradientAttack[CarliniWagnerState]):
    """Descent on ||x - x0||^2 + c max(confidence - margin(x), 0), with a search for the smallest c that suffices.

    x = (tanh(w) + 1) / 2 in units of the box, so that every w gives a point inside; Adam on w. Each round
    starts at x0 again with a new c: larger if the last one met the goal nowhere, else smaller.

    *Sees* the gradient. *Cost* at most ``rounds * steps`` + 1 forwards, one backward fewer; rounds that stand still
    end early.

    Args:
        steps: most steps of a round.
        rounds: number of values of c.
        rate: learning rate.
        confidence: margin that is aimed at.
        loss: what is kept above ``confidence``; positive where the goal is met.

    *Differs from the paper in*: the first c is the one that a linear model would need, so that the scale of the logits
    does not matter (the paper starts at a constant); the bisection of c is on a logarithmic scale; the learning
    rate falls to 0 along half a cosine in each round; every sample ends its rounds for itself.

    References:
        Carlini & Wagner 2017, arXiv:1608.04644, sec. V-B and VI-A.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    minimal: ClassVar[bool] = True
    any_size: ClassVar[bool] = True
    steps: int = 200
    rounds: int = 9
    rate: float = 0.1
    confidence: float = 0.0
    loss: Loss = margin

    @property
    def questions(self) -> int:
        return self.rounds * self.steps

    def init(self, p: Problem) -> CarliniWagnerState:
        w = self._start(p)
        return CarliniWagnerState(p.x0, w, Adam.blank(w), Weight.blank(p))

    def update(self, p: Problem, s: CarliniWagnerState, e: Gradient, k: int) -> CarliniWagnerState:
        weight = (
            s.weight if k else s.weight._replace(c=linear_weight(p, e), round=torch.where(e.success, self.rounds, 0.0))
        )
        away, pull = (s.x - p.x0) / p.box.width, short(e, self.confidence) * weight.c
        objective = away.flatten(1).square().sum(1) + pull * (self.confidence - e.loss)
        slope = 2 * away - per_sample(pull, away) * e.grad * p.box.width
        adam, direction = s.adam.step(slope * (1 - s.w.tanh().square()) / 2, weight.age)
        rate = self.rate * (1 + torch.cos(torch.pi * weight.age / self.steps)) / 2
        w = s.w - per_sample(rate, s.w) * direction
        weight, over = weight.tell(e.success, objective, self.steps)
        w, adam = choose(over, self._start(p), w), Adam(*(choose(over, torch.zeros_like(v), v) for v in adam))
        return CarliniWagnerState(self._point(p, w), w, adam, weight)

    def done(self, s: CarliniWagnerState) -> Mask:
        return s.weight.round >= self.rounds

    @staticmethod
    def _start(p: Problem) -> Inputs:
        x = p.start("clean")
        return (((x - p.box.lo) / p.box.width * 2 - 1) * _EDGE).atanh()

    @staticmethod
    def _point(p: Problem, w: Inputs) -> Inputs:
        return (p.box.lo + p.box.width * (w.tanh() + 1) / 2).clamp(p.lower, p.upper)


def short(e: Gradient, confidence: float) -> PerSample:
    """Return 1 where the goal, or the confidence in it, is still to be reached, else 0."""
    return (~e.success | (e.loss < confidence)).to(e.loss.dtype)


def linear_weight(p: Problem, e: Gradient) -> PerSample:
    """Return the c for which the optimum lies on the boundary if the model is linear: 2 |loss| / ||grad||^2."""
    slope = (e.grad * p.box.width).flatten(1).double().square().sum(1)
    c = 2 * e.loss.double().abs() / slope.clamp_min(TINY)
    return torch.where(slope > 0, c.clamp(TINY, 1 / TINY), 1).to(e.loss.dtype)
