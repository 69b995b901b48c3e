"""Decoupled direction and norm: every step ends on a sphere that shrinks after a success, and else grows."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.losses import cross_entropy
from assay.attacks.minimum.descent import Descent, cosine, reach, unit
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, PerSample, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY
from assay.threats.problem import Problem


class DDNState(NamedTuple):
    """The next point, and the radius of the sphere it was put on."""

    x: Inputs
    radius: PerSample


@final
@ATTACKS.register("ddn", norm=("l2",), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class DDN(Descent[DDNState]):
    """Decoupled direction and norm: d <- x - x0 + a g / |g|_2,  x <- clip(x0 + e d / |d|_2).

    e <- e (1 - c) where x succeeds, else e <- e (1 + c); a falls along half a cosine.

    The last steps close in as :class:`Descent` says.

    *Sees* the gradient. *Cost* ``steps`` + ``closing`` + 1 forwards, ``steps`` + ``closing`` backwards.

    Args:
        steps: number of steps.
        step: first a, in widths of the box.
        last_step: last a as a share of the first.
        shrink: c.
        start: first e, in widths of the box.
        closing: further steps that close in; 0 for none, as in the paper.
        loss: what is ascended.

    *Differs from the paper in*: points are not rounded to 256 levels, which costs robust accuracy a few points;
    ``threat.quantize`` asks for points that survive saving. Closing in, which follows the margin to the boundary's
    nearest point where cross-entropy goes past it.

    References:
        Rony et al. 2019, arXiv:1811.09600, algorithm 1.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    steps: int = 1000
    step: float = 1.0
    last_step: float = 0.01
    shrink: float = 0.05
    start: float = 1.0
    closing: int = 5
    loss: Loss = cross_entropy

    def first(self, p: Problem) -> DDNState:
        x = p.start("clean")
        size = p.size(x)
        radius = torch.where(size > 0, size, self.start * p.box.width)
        return DDNState(x, radius)

    def descend(self, p: Problem, s: DDNState, e: Gradient, k: int) -> DDNState:
        radius = s.radius * torch.where(e.success, 1 - self.shrink, 1 + self.shrink)
        radius = torch.minimum(radius, reach(p))
        length = cosine(k, self.steps, self.step, self.step * self.last_step) * p.box.width
        d = s.x - p.x0 + length * unit(p, e.grad, k)
        x = (p.x0 + d * per_sample(radius / p.norm.size(d).clamp_min(TINY), d)).clamp(p.lower, p.upper)
        return DDNState(x, radius)
