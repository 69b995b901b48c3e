"""Projected gradient descent, with the options that published evaluations add to it."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import cross_entropy
from assay.attacks.registry import ATTACKS
from assay.core.registry import one_of
from assay.core.types import Inputs, PerSample, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY
from assay.threats.problem import STARTS, Problem


class PGDState(NamedTuple):
    """The next point, and the last one for the momentum."""

    x: Inputs
    previous: Inputs


@final
@ATTACKS.register("pgd", norm=("linf", "l2", "l1", "l0"), access="gradient", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class PGD(GradientAttack[PGDState]):
    """Projected gradient descent: x <- P(x + a * steepest(grad)), P onto ball and box together.

    *Sees* the gradient. *Cost* ``steps`` + 1 forwards, ``steps`` backwards.

    Args:
        steps: number of steps.
        rel_step: length of the first step as a fraction of eps (l0: mean change of a coordinate, of half the box).
        decay: ``none``, or ``cosine``: lengths fall to 0 along half a cosine.
        momentum: share of the new step; the rest repeats the last move (1: none; APGD uses 0.75).
        start: ``uniform`` in the ball, on its ``sphere``, or ``clean``.
        support: l1 only: share of the coordinates that one step moves.
        loss: what is ascended.

    Example:
        >>> import torch
        >>> from assay import Threat
        >>> from assay.attacks import PGD
        >>> line = lambda x: torch.stack([0.5 - x.mean(1), x.mean(1) - 0.5], 1)
        >>> r = PGD(steps=10)(line, torch.full((1, 4), 0.6), torch.tensor([1]), Threat("linf", 0.2))
        >>> bool(r.success)
        True

    *Differs from the paper in*: the l1 step, which moves the largest coordinates that the box leaves free
    (Tramer & Boneh 2019, arXiv:1904.13000, sec. 3.2); the l0 ball counts coordinates, not pixels; best point instead
    of the last.

    References:
        Madry et al. 2018, arXiv:1706.06083, eq. 2 and sec. 2.1; for l0 Croce & Hein 2019, arXiv:1909.05040, sec. 4.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    steps: int = 40
    rel_step: float = 0.1
    decay: str = "none"
    momentum: float = 1.0
    start: str = "uniform"
    support: float = 0.02
    loss: Loss = cross_entropy

    def __post_init__(self) -> None:
        one_of("decay", self.decay, ("none", "cosine"))
        one_of("start", self.start, STARTS)

    def init(self, p: Problem) -> PGDState:
        x = p.start(self.start)
        return PGDState(x, x)

    def update(self, p: Problem, s: PGDState, e: Gradient, k: int) -> PGDState:
        fade = (1 + math.cos(math.pi * k / self.steps)) / 2 if self.decay == "cosine" else 1.0
        x = climb(p, s.x, e.grad, self.rel_step * fade, self.support)
        if self.momentum < 1 and k:
            x = p.project(s.x + self.momentum * (x - s.x) + (1 - self.momentum) * (s.x - s.previous))
        return PGDState(x, s.x)


def climb(p: Problem, x: Inputs, grad: Inputs, rel_step: float | PerSample, support: float) -> Inputs:
    """Take one projected step of ``rel_step`` eps; in l1, of a share ``support`` of the coordinates or more.

    For l0, whose ball says nothing about lengths, the gradient is scaled so that the mean change of a coordinate is
    ``rel_step`` / 2 widths of the box; the projection then keeps the largest changes.
    """
    if p.norm.name == "l0":
        scale = rel_step / 2 * p.box.width / grad.flatten(1).abs().mean(1).clamp_min(TINY)
        return p.project(x + per_sample(scale, x) * grad)
    needed = (rel_step * p.radius / p.box.width).ceil().long()  # fewer coordinates cannot hold the step inside the box
    count = needed.clamp_min(max(1, round(support * p.x0[0].numel())))
    return p.ascend(x, free(p, x, grad), rel_step * p.radius, count)


def free(p: Problem, x: Inputs, grad: Inputs) -> Inputs:
    """Return the gradient without the coordinates that would leave the box; for box-shaped balls it makes no odds."""
    if p.norm.is_box:
        return grad
    return torch.where((grad > 0) & (x >= p.upper) | (grad < 0) & (x <= p.lower), 0, grad)
