"""Funnel: gradient ascent that comes from outside, in a ball that narrows to eps."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

from assay.attacks.gradient.pgd import climb
from assay.attacks.loop import GradientAttack
from assay.attacks.losses import margin
from assay.attacks.outside import blended
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, PerSample, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY
from assay.threats.problem import Problem


class FunnelState(NamedTuple):
    """The next point, the last one for the momentum, and how wide the funnel is at its mouth, in radii."""

    x: Inputs
    previous: Inputs
    mouth: PerSample


@final
@ATTACKS.register("funnel", norm=("linf", "l2", "l1"), access="gradient", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class Funnel(GradientAttack[FunnelState]):
    """Starts far outside the ball, where the goal is met, and ascends while the ball around the point narrows to eps.

    The start is x0 + b (u - x0), u a smooth random image and b drawn anew for each sample from ``blend``. The radius
    falls geometrically from the size of the start to eps, which it reaches after the share ``narrow`` of the steps; the
    rest is projected gradient ascent inside the ball, with steps that fall to 0 along half a cosine.
    On networks with a hardened or masked surrounding of the clean input this finds what no start inside the ball does,
    in a few steps. With a warm start (:meth:`Problem.starting`), the start is moved halfway toward it.

    *Sees* the gradient. *Cost* ``steps`` + 1 forwards, ``steps`` backwards.

    Args:
        steps: number of steps.
        blend: least and largest share of the smooth image in the start.
        narrow: share of the steps in which the ball narrows.
        rel_step: length of the first step as a fraction of eps.
        momentum: share of the new step; the rest repeats the last move.
        support: l1 only: share of the coordinates that one step moves.
        loss: what is ascended.

    Example:
        >>> import torch
        >>> from assay import Threat
        >>> from assay.attacks import Funnel
        >>> line = lambda x: torch.stack([0.5 - x.mean(1), x.mean(1) - 0.5], 1)
        >>> r = Funnel()(line, torch.full((1, 4), 0.6), torch.tensor([1]), Threat("linf", 0.2))
        >>> bool(r.success)
        True

    References:
        Ours. Its parts are known: balls that shrink to eps from Croce & Hein 2021, arXiv:2103.01208, sec. 3.2; starts
        outside from Brendel et al. 2019, arXiv:1907.01003. benchmarks/verdict.py measures it.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    steps: int = 20
    blend: tuple[float, float] = (0.4, 0.65)
    narrow: float = 0.5
    rel_step: float = 2.0
    momentum: float = 0.75
    support: float = 0.02
    loss: Loss = margin

    def init(self, p: Problem) -> FunnelState:
        least, most = self.blend
        b = least + (most - least) * p.stage(_BLEND).draws.uniform((), p.x0.dtype)
        x = blended(p, per_sample(b, p.x0))
        if p.warm is not None:
            x = (x + 0.5 * (p.warm - p.x0)).clamp(p.box.lo, p.box.hi)
        mouth = (p.size(x) / p.radius.clamp_min(TINY)).clamp_min(1)
        return FunnelState(x, x, mouth)

    def update(self, p: Problem, s: FunnelState, e: Gradient, k: int) -> FunnelState:
        q = self._ball(p, s, k + 1)
        fade = (1 + math.cos(math.pi * k / self.steps)) / 2
        stride = self.rel_step * fade * p.radius / q.radius  # steps are measured in eps, not in balls
        x = climb(q, s.x, e.grad, stride, self.support)
        if k:
            x = q.project(s.x + self.momentum * (x - s.x) + (1 - self.momentum) * (s.x - s.previous))
        return FunnelState(x, s.x, s.mouth)

    def _ball(self, p: Problem, s: FunnelState, k: int) -> Problem:
        """Return the problem in the ball of query k."""
        open_ = 1 - k / (self.narrow * self.steps)
        return p if open_ <= 0 else p.with_radius(p.radius * s.mouth**open_)


_BLEND = 3
"""Names the random numbers of the blend, beside those of the image."""
