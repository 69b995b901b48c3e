"""Primal-dual gradient descent: the weight between distance and misclassification is learnt along the way."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.losses import margin
from assay.attacks.minimum.descent import Adam, Descent
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, PerSample, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.problem import Problem


class Dual(NamedTuple):
    """The logit of the constraint's weight, and running means of both weights, whose sum is 1."""

    logit: PerSample
    distance: PerSample
    constraint: PerSample

    @classmethod
    def start(cls, p: Problem, ratio: float) -> "Dual":
        logit = p.full(-math.log(ratio))
        return cls(logit, (-logit).sigmoid(), logit.sigmoid())

    def after(self, e: Gradient, rate: float, keep: float = 0.9, least: float = 1e-6) -> "Dual":
        """Give the constraint more weight where it is broken, else less."""
        most = -math.log(least)
        logit = (self.logit - rate * e.loss.sign()).clamp(-most, most)
        means = ((self.distance, -logit), (self.constraint, logit))
        return Dual(logit, *(keep * mean + (1 - keep) * z.sigmoid() for mean, z in means))


class PrimalDualState(NamedTuple):
    """The next point, the moments of its gradient, and the weights."""

    x: Inputs
    adam: Adam
    dual: Dual

    @classmethod
    def start(cls, p: Problem, ratio: float) -> "PrimalDualState":
        return cls(p.start("clean"), Adam.start(p.x0), Dual.start(p, ratio))


def broken(e: Gradient, width: float) -> Inputs:
    """Return the gradient of softplus(-margin) for inputs in units of the box."""
    return -per_sample(torch.sigmoid(-e.loss), e.grad) * e.grad * width


def linear(k: int, steps: int, first: float, last: float) -> float:
    """Return where step k is on the line from ``first`` to ``last``, which is reached at the last step."""
    return first + (last - first) * k / max(1, steps - 1)


@final
@ATTACKS.register("pdgd", norm=("l2",), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class PDGD(Descent[PrimalDualState]):
    """Primal-dual gradient descent: min over x, max over w of w0 |x - x0|_2 + w1 softplus(-margin), w0 + w1 = 1.

    x takes steps of Adam, whose rate falls geometrically; log(w1 / w0) moves by a rate that falls linearly, up where
    the goal is missed and down where it is met. The descent uses running means of the weights.

    The last steps close in as :class:`Descent` says.

    *Sees* the gradient. *Cost* ``steps`` + ``closing`` + 1 forwards, ``steps`` + ``closing`` backwards.

    Args:
        steps: number of steps.
        step: first rate of Adam, in widths of the box.
        last_step: last rate as a share of the first.
        ratio: first w0 / w1.
        dual_step: first rate of log(w1 / w0).
        last_dual_step: last one, as a share of the first.
        closing: further steps that close in; 0 for none, as in the paper.
        loss: the goal must be met where it is positive.

    *Differs from the paper in*: starts at the clean input; closing in, for steps of a given length do not
    end on the boundary.

    References:
        Matyasko & Chau 2021, arXiv:2106.01538, algorithm 1.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    steps: int = 500
    step: float = 0.1
    last_step: float = 0.01
    ratio: float = 0.01
    dual_step: float = 0.1
    last_dual_step: float = 0.1
    closing: int = 10
    loss: Loss = margin

    def first(self, p: Problem) -> PrimalDualState:
        return PrimalDualState.start(p, self.ratio)

    def descend(self, p: Problem, s: PrimalDualState, e: Gradient, k: int) -> PrimalDualState:
        away = p.norm.steepest(s.x - p.x0)  # the gradient of the l2 norm
        adam = s.adam.seen(
            per_sample(s.dual.distance, away) * away + per_sample(s.dual.constraint, away) * broken(e, p.box.width)
        )
        rate = self.step * self.last_step ** (k / self.steps)
        x = (s.x - rate * p.box.width * adam.step(k)).clamp(p.lower, p.upper)
        dual = s.dual.after(e, linear(k, self.steps, self.dual_step, self.dual_step * self.last_dual_step))
        return PrimalDualState(x, adam, dual)
