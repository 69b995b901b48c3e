"""Sigma-zero: gradient descent on a smooth count of changed values, with an adaptive threshold."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.losses import margin
from assay.attacks.minimum.descent import Adam, Descending, Descent, cosine
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, PerSample, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY
from assay.threats.problem import Problem


class SigmaZeroState(NamedTuple):
    """The next point, the moments of the gradient, and the threshold."""

    x: Inputs
    adam: Adam
    threshold: PerSample


@final
@ATTACKS.register("sigma-zero", norm=("l0",), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class SigmaZero(Descent[SigmaZeroState]):
    """Sigma-zero: descends max(0, -margin) + mean(d^2 / (d^2 + sigma)), d = (x - x0) / width.

    The gradient is divided by its largest coordinate; d <- clip(d - a Adam(g)); values with |d| < t become zero;
    t <- t + r a where x succeeds, else t - r a. a falls along half a cosine.

    The last steps close in as :class:`Descent` says.

    *Sees* the gradient. *Cost* ``steps`` + ``closing`` + 1 forwards, ``steps`` + ``closing`` backwards.

    Args:
        steps: number of steps.
        step: first a, in widths of the box.
        last_step: last a as a share of the first.
        sigma: how sharp the smooth count is.
        threshold: first t, in widths of the box.
        rate: r.
        closing: further steps that close in; 0 for none, as in the paper.
        loss: its positive part is what success needs, so it must change sign at the boundary.

    *Differs from the paper in*: targeted threats too; a first t of 0.4, not 0.3; closing in.

    References:
        Cina et al. 2025, arXiv:2402.01879, algorithm 1.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    steps: int = 1000
    step: float = 1.0
    last_step: float = 0.1
    sigma: float = 1e-3
    threshold: float = 0.4
    rate: float = 0.01
    closing: int = 3
    loss: Loss = margin

    def first(self, p: Problem) -> SigmaZeroState:
        return SigmaZeroState(p.start("clean"), Adam.start(p.x0), p.full(self.threshold))

    def descend(self, p: Problem, s: SigmaZeroState, e: Gradient, k: int) -> SigmaZeroState:
        a = cosine(max(k - 1, 0), self.steps, self.step, self.step * self.last_step)
        d = (s.x - p.x0) / p.box.width
        count = 2 * self.sigma * d / (d**2 + self.sigma) ** 2 / d[0].numel()
        grad = count - torch.where(per_sample(e.loss < 0, d), e.grad * p.box.width, 0)
        adam = s.adam.seen(grad / per_sample(grad.flatten(1).abs().amax(1).clamp_min(TINY), d))
        x = (s.x - a * p.box.width * adam.step(k)).clamp(p.lower, p.upper)
        a = cosine(k, self.steps, self.step, self.step * self.last_step)
        t = (s.threshold + torch.where(e.success, self.rate * a, -self.rate * a)).clamp(0, 1)
        x = torch.where((x - p.x0).abs() < per_sample(t * p.box.width, x), p.x0, x)
        return SigmaZeroState(x, adam, t)

    def done(self, s: Descending[SigmaZeroState]) -> Mask:
        return s.size <= 1
