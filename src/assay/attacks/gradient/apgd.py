"""Auto-PGD: a step size that finds itself."""

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


class APGDState(NamedTuple):
    """Where each sample's walk is, and what its next review needs."""

    x: Inputs
    previous: Inputs
    step: PerSample
    best_x: Inputs
    best_grad: Inputs
    best_loss: PerSample
    loss: PerSample  # at the previous query
    rises: PerSample  # updates since the last review that raised the loss
    reviewed: PerSample  # best loss at the last review
    shrunk: Mask  # at the last review
    support: PerSample  # l1: coordinates that a step moves
    nonzeros: PerSample  # l1: coordinates in which the best point differed from x0 at the last review


@final
@ATTACKS.register("apgd", norm=("linf", "l2", "l1"), access="gradient", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class APGD(GradientAttack[APGDState]):
    """Projected gradient ascent with momentum, whose step is halved where it stops paying.

    z = P(x + s * steepest(grad)),  x' = P(x + a (z - x) + (1 - a) (x - previous)),  a = 0.75 after the first step.
    At reviews, ever closer together, a sample whose loss rose in less than ``rho`` of the steps, or whose best loss
    stands still at an unchanged step, gets s / 2 and goes back to its best point.
    For l1 the step moves only as many coordinates as two thirds of those in which the best point differs from x0;
    a review that finds this support shrinking resets the step to eps, else divides it by 1.5.

    *Sees* the gradient. *Cost* ``steps`` + 1 forwards, ``steps`` backwards.

    Args:
        steps: number of steps.
        rho: share of rising steps below which the step is halved.
        momentum: a.
        loss: cross-entropy, DLR (``dlr``) or margin; each has its targeted form, see :mod:`assay.attacks.losses`.

    *Differs from the paper in*: the l2 projection onto ball and box together (exact, not scaled and then clipped);
    uniform random start for every norm; in l1 one radius (no multi-radius schedule yet). The published code compares
    the loss after the first update with 0; here, as in the paper, with that of the start.

    References:
        Croce & Hein 2020, arXiv:2003.01690, algorithm 1; for l1 Croce & Hein 2021, arXiv:2103.01208, algorithm 1.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    steps: int = 100
    rho: float = 0.75
    momentum: float = 0.75
    loss: Loss = cross_entropy

    def reviews(self, *, sparse: bool) -> dict[int, int]:
        """Return the queries after which the step is reviewed, each with the length of the window that ends there."""
        if sparse:
            window = max(int(0.04 * self.steps), 1)
            return dict.fromkeys(range(window, self.steps + 1, window), window)
        first, least, less = (max(int(share * self.steps), 1) for share in (0.22, 0.06, 0.03))
        windows = [max(first - j * less, least) for j in range(self.steps)]
        return {end: w for end, w in zip(accumulate(windows), windows, strict=True) if end <= self.steps}

    def init(self, p: Problem) -> APGDState:
        x, zero, low = p.start(), p.full(0.0), p.full(-torch.inf)
        sparse, features = p.norm.name == "l1", p.x0[0].numel()
        step, support = (p.radius, 0.2 * features) if sparse else (2 * p.radius, features)
        counts = p.full(max(1.0, support)), p.full(float(features))
        return APGDState(x, x, step, x, torch.zeros_like(x), low, zero, zero, low, zero == 0, *counts)

    def update(self, p: Problem, s: APGDState, e: Gradient, k: int) -> APGDState:
        rises = s.rises + (e.loss > s.loss) if k else s.rises
        s = _remember(s, e)._replace(rises=rises, loss=e.loss)
        s = s._replace(reviewed=s.best_loss) if k == 0 else s
        sparse = p.norm.name == "l1"
        x, grad = s.x, e.grad
        if window := self.reviews(sparse=sparse).get(k):
            s, back = self._review_l1(p, s) if sparse else self._review(s, window)
            x, grad = choose(back, s.best_x, x), choose(back, s.best_grad, grad)
        a = self.momentum if k else 1.0
        z = p.ascend(x, grad, s.step, s.support.round().long() if sparse else 1)
        if not sparse:
            z = p.project(x + a * (z - x) + (1 - a) * (x - s.previous))
        return s._replace(x=z, previous=x)

    def _review(self, s: APGDState, window: int) -> tuple[APGDState, Mask]:
        shrunk = (s.rises <= self.rho * window) | (~s.shrunk & (s.reviewed >= s.best_loss))
        step = torch.where(shrunk, s.step / 2, s.step)
        return s._replace(step=step, rises=torch.zeros_like(s.rises), reviewed=s.best_loss, shrunk=shrunk), shrunk

    def _review_l1(self, p: Problem, s: APGDState) -> tuple[APGDState, Mask]:
        nonzeros = (s.best_x != p.x0).flatten(1).sum(1).to(s.step.dtype)
        sparser = nonzeros < 0.95 * s.nonzeros
        step = torch.where(sparser, p.radius, torch.maximum(s.step / 1.5, p.radius / 10))
        support: Tensor = (nonzeros / 1.5).clamp_min(1)
        return s._replace(step=step, support=support, nonzeros=nonzeros, shrunk=sparser), sparser


def _remember(s: APGDState, e: Gradient) -> APGDState:
    up = e.loss > s.best_loss
    return s._replace(
        best_x=choose(up, s.x, s.best_x),
        best_grad=choose(up, e.grad, s.best_grad),
        best_loss=torch.where(up, e.loss, s.best_loss),
    )
