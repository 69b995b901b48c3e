"""Auto conjugate gradient: the directions of conjugate gradients at the pace of APGD."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.gradient.apgd import Pace, reviews
from assay.attacks.loop import GradientAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.core.registry import one_of
from assay.core.types import Inputs, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY
from assay.threats.problem import STARTS, Problem


class Walk(NamedTuple):
    """A point, and the gradient and direction with which it was reached."""

    x: Inputs
    grad: Inputs  # at the point before
    direction: Inputs


class ACGState(NamedTuple):
    """The next point, how it was reached, the best point with its gradient, and the pace."""

    x: Inputs
    way: Walk
    best: Walk
    best_grad: Inputs
    pace: Pace


@final
@ATTACKS.register("acg", norm=("linf",), access="gradient", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class ACG(GradientAttack[ACGState]):
    """Ascent along conjugate directions, with the reviews of the step size that APGD has.

    x' = P(x + t * sign(s')),  s' = g + b s,  b = -<g, y> / <s, y>,  y = g_previous - g  (Hestenes & Stiefel); the first
    s is the gradient.
    At a review the sample may go back to its best point, and to the s and g that led there.

    *Sees* the gradient. *Cost* ``steps`` + 1 forwards, ``steps`` backwards.

    Args:
        steps: number of steps.
        rho: share of rising steps below which the step is halved.
        start: ``uniform`` in the ball, on its ``sphere``, or ``clean``.
        loss: what is ascended; the paper's is the margin, and cross-entropy suits these directions less.

    References:
        Yamamura et al. 2022, arXiv:2206.09628, algorithm 1.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    steps: int = 100
    rho: float = 0.75
    start: str = "uniform"
    loss: Loss = margin

    def __post_init__(self) -> None:
        one_of("start", self.start, STARTS)

    def init(self, p: Problem) -> ACGState:
        x = p.start(self.start)
        way = Walk(x, torch.zeros_like(x), torch.zeros_like(x))
        return ACGState(x, way, way, way.grad, Pace.of(2 * p.radius))

    def update(self, p: Problem, s: ACGState, e: Gradient, k: int) -> ACGState:
        up, way, grad = e.loss > s.pace.best_loss, s.way, e.grad
        best = Walk(*(choose(up, a, b) for a, b in zip(way, s.best, strict=True)))
        best_grad, pace = choose(up, grad, s.best_grad), s.pace.after(e.loss, first=k == 0)
        if window := reviews(self.steps).get(k):
            pace = pace.review(window, self.rho)
            way = Walk(*(choose(pace.shrunk, a, b) for a, b in zip(best, way, strict=True)))
            grad = choose(pace.shrunk, best_grad, grad)
        direction = grad + per_sample(_beta(grad, way), grad) * way.direction
        x = p.ascend(way.x, direction, pace.step)
        return ACGState(x, Walk(x, grad, direction), best, best_grad, pace)


_ROUNDING = 100
"""Units in the last place by which sums of products may be off."""


def _beta(grad: Inputs, way: Walk) -> PerSample:
    """Return how much of the last direction is kept (b,); nothing where the gradient changed by rounding only."""
    g, s, y = (v.flatten(1) for v in (grad, way.direction, way.grad - grad))
    above, below = -(g * y).sum(1), (s * y).sum(1)
    rounding = _ROUNDING * torch.finfo(s.dtype).eps * (s.abs() * (g.abs() + way.grad.flatten(1).abs())).sum(1)
    known = below.abs() > rounding.clamp_min(TINY)
    return torch.where(known, above / torch.where(known, below, 1), 0)
