"""Fast minimum-norm: ascent inside a ball whose radius follows the decision boundary."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.losses import margin
from assay.attacks.minimum.descent import Descent, cosine, linear_size, reach, unit
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY
from assay.threats.problem import Problem


class FMNState(NamedTuple):
    """The next point, the radius around it, and the smallest success so far."""

    x: Inputs
    radius: PerSample
    best: PerSample


@final
@ATTACKS.register("fmn", norm=("linf", "l2", "l1", "l0"), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class FMN(Descent[FMNState]):
    """Fast minimum-norm attack: x <- P(x + a g / |g|_2), P onto the box and the ball of radius e around x0.

    Where x succeeds, e <- min(e (1 - c), smallest success); where an earlier point did, e <- e (1 + c); before that,
    e <- (1 + c) max(e, |x - x0| + |margin| / |g|_dual), a little beyond where a linear model would fall, and x is put
    on the sphere. For l0 the radius is a count, moves by at least one, and starts at 1. a and c fall along half a
    cosine. In linf the step is x + a e sign(g); in l0 its length is a sqrt(e), and c is twice as large. The
    last steps close in as :class:`Descent` says.

    *Sees* the gradient. *Cost* ``steps`` + ``closing`` + 1 forwards, ``steps`` + ``closing`` backwards.

    Args:
        steps: number of steps.
        step: first a, in widths of the box; in linf, in radii.
        last_step: last a as a share of the first.
        shrink: first c.
        last_shrink: last c.
        closing: further steps that close in; 0 for none, as in the paper.
        loss: what is ascended; its size over its slope must tell how far the boundary is.

    *Differs from the paper in*: until the first success, (1 + c), without which a linear model is never crossed, a
    radius that never falls and the sphere, without which points rest in local maxima well inside the ball; the step in
    linf (the l2-normalised one hardly moves coordinates with small gradients) and in l0 (the length that the paper
    tunes suits one count: many coordinates need a longer step than few to get to the ends of the box), and the larger
    c there; one projection onto ball and box together, not one after the other; a random direction where the gradient
    is zero; a radius no larger than the box allows; closing in. Two published implementations get the l2 ball wrong:
    one stretches every perturbation to the sphere, one never shrinks any.

    References:
        Pintor et al. 2021, arXiv:2102.12827, algorithm 1.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    steps: int = 1000
    step: float = 1.0
    last_step: float = 0.01
    shrink: float = 0.05
    last_shrink: float = 0.001
    closing: int = 5
    loss: Loss = margin

    def first(self, p: Problem) -> FMNState:
        x = p.start("clean")
        radius = p.size(x).clamp_min(1) if p.norm.name == "l0" else p.full(torch.inf)
        return FMNState(x, radius, p.full(torch.inf))

    def descend(self, p: Problem, s: FMNState, e: Gradient, k: int) -> FMNState:
        best = torch.where(e.success, torch.minimum(s.best, p.size(s.x)), s.best)
        c = cosine(k, self.steps, self.shrink, self.last_shrink)
        follow = self._count if p.norm.name == "l0" else self._radius
        radius = torch.minimum(follow(p, s._replace(best=best), e, c), reach(p))
        length = self.step * cosine(k, self.steps, 1.0, self.last_step)
        x = p.project(s.x + length * _stride(p, radius, unit(p, e.grad, k)), radius)
        x = choose(best.isinf(), _outwards(p, x, radius), x)
        return FMNState(x, radius, best)

    def _radius(self, p: Problem, s: FMNState, e: Gradient, c: float) -> PerSample:
        linear = p.size(s.x) + linear_size(p, e)
        least = torch.where(s.radius.isinf(), linear, torch.maximum(linear, s.radius))
        grown = (1 + c) * torch.where(s.best.isinf(), least, s.radius)
        return torch.where(e.success, torch.minimum(s.radius * (1 - c), s.best), grown)

    def _count(self, p: Problem, s: FMNState, e: Gradient, c: float) -> PerSample:
        c = 2 * c
        fewer = torch.minimum(s.radius - 1, (s.radius * (1 - c)).floor()).minimum(s.best)
        more = torch.maximum(s.radius + 1, (s.radius * (1 + c)).floor())
        return torch.where(e.success, fewer, more).clamp_min(1)


def _stride(p: Problem, radius: PerSample, direction: Inputs) -> Inputs:
    """Return the step for a = 1 in a direction of l2 length 1."""
    if p.norm.name == "linf":
        return per_sample(radius, direction) * direction.sign()
    if p.norm.name == "l0":
        return per_sample(p.box.width * radius.sqrt(), direction) * direction  # enough for all that are kept
    return p.box.width * direction


def _outwards(p: Problem, x: Inputs, radius: PerSample) -> Inputs:
    """Return x, inside box and ball, with its perturbation stretched to the radius, as far as the box lets it."""
    if p.norm.name == "l0":
        return x
    d = x - p.x0
    stretch = (radius / p.norm.size(d).clamp_min(TINY)).clamp_min(1)
    return (p.x0 + d * per_sample(stretch, d)).clamp(p.lower, p.upper)
