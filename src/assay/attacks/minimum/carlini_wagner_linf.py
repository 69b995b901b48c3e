"""The linf attack of Carlini and Wagner: a penalty on what sticks out of a shrinking ball."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import margin
from assay.attacks.minimum.carlini_wagner import Adam, short
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY
from assay.threats.problem import Problem

_SHARES = (0.5, 0.9995)
"""Between these lies tau, as a share of the size of the smallest success."""

_FIRST = (1e-3, 0.1)
"""Between these lies the learning rate until there is a success, in widths of the box."""

_MOST = 1e15
"""Weights stay below this, so that squares of weighted gradients stay finite."""


class CarliniWagnerLinfState(NamedTuple):
    """The point, the smallest success, the optimiser, and the ball and the weight of this round."""

    x: Inputs
    best: Inputs
    size: PerSample  # of the smallest success
    adam: Adam
    c: PerSample
    tau: PerSample
    share: PerSample  # of the smallest success's size that tau is
    rate: PerSample  # learning rate
    age: PerSample  # queries of this round so far


@final
@ATTACKS.register("cw-linf", norm=("linf",), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class CarliniWagnerLinf(GradientAttack[CarliniWagnerLinfState]):
    """Descent on sum_i max(|d_i| - tau, 0) + c max(confidence - margin, 0), in units of the box, with ever smaller tau.

    Adam on d, clipped to the box. A round ends at a success no larger than tau, or after ``patience`` queries; the next
    one begins at the smallest success, clipped to the new tau, a share of its size. A round that failed doubles c and
    takes the share's root; one that succeeded halves c and squares the share. Until there is a success, tau is
    the width of the box.

    *Sees* the gradient. *Cost* ``steps`` + 1 forwards, ``steps`` backwards.

    Args:
        steps: number of queries, of all rounds.
        patience: largest number of queries of a round.
        shrink: share at first.
        rate: learning rate as a share of the change of tau that is aimed at.
        confidence: margin that is aimed at.
        loss: what is kept above ``confidence``; positive where the goal is met.

    *Differs from the paper in*: steps are clipped to the box, not made in the space of tanh; the first c and, until
    there is a success, the learning rate are such that scales do not matter; the share is no constant.

    References:
        Carlini & Wagner 2017, arXiv:1608.04644, sec. VI-C.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    minimal: ClassVar[bool] = True
    any_size: ClassVar[bool] = True
    steps: int = 500
    patience: int = 10
    shrink: float = 0.9
    rate: float = 0.1
    confidence: float = 0.0
    loss: Loss = margin

    def init(self, p: Problem) -> CarliniWagnerLinfState:
        x, never, zero = p.start("clean"), p.full(torch.inf), p.full(0.0)
        return CarliniWagnerLinfState(x, x, never, Adam.blank(x), zero, never, zero + self.shrink, zero, zero)

    def update(self, p: Problem, s: CarliniWagnerLinfState, e: Gradient, k: int) -> CarliniWagnerLinfState:
        s, over = self._told(s if k else _first(p, s, e), p.size(s.x), e)
        d, tau = (s.x - p.x0) / p.box.width, per_sample(s.tau, s.x)
        outside = torch.where(d.abs() * p.box.width > tau, d.sign(), 0)
        push = per_sample(short(e, self.confidence) * s.c, d) * e.grad * p.box.width
        adam, direction = s.adam.step(outside - push, s.age)
        begun = p.x0 + torch.minimum(torch.maximum(s.best - p.x0, -tau), tau)
        x = choose(over, begun, s.x - per_sample(s.rate, d) * direction).clamp(p.lower, p.upper)
        return s._replace(x=x, adam=adam.blank_where(over), age=torch.where(over, 0, s.age + 1))

    def _told(self, s: CarliniWagnerLinfState, size: PerSample, e: Gradient) -> tuple[CarliniWagnerLinfState, Mask]:
        """Note what a query told; return the state, with the next round's ball where a round is over, and where."""
        better = e.success & (size < s.size)
        best, least = choose(better, s.x, s.best), torch.where(better, size, s.size)
        won = better & (size <= s.tau)
        late = ~won & (s.age + 1 >= self.patience)
        over = won | (late & least.isfinite())
        share = torch.where(won, s.share.square(), torch.where(over, s.share.sqrt(), s.share)).clamp(*_SHARES)
        c = torch.where(won, s.c / 2, torch.where(late, s.c * 2, s.c)).clamp(TINY, _MOST)
        tau = torch.where(over, least * share, s.tau)
        rate = torch.where(over, self.rate * least * (1 - share), s.rate)
        return s._replace(best=best, size=least, share=share, c=c, tau=tau, rate=rate), over

    def done(self, s: CarliniWagnerLinfState) -> Mask:
        return s.size == 0


def _first(p: Problem, s: CarliniWagnerLinfState, e: Gradient) -> CarliniWagnerLinfState:
    """Return the state with c for which a mean coordinate is as strong as the penalty, and steps to the boundary."""
    slope = (e.grad * p.box.width).flatten(1).abs()
    c = torch.where(slope.amax(1) > 0, 1 / slope.mean(1).clamp_min(TINY), 1).clamp_max(_MOST)
    away = (e.loss.abs() / slope.sum(1).clamp_min(TINY)).clamp(*_FIRST) * p.box.width
    return s._replace(c=c, rate=away)
