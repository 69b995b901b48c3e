"""The elastic-net attack: sparse perturbations by proximal steps."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import margin
from assay.attacks.minimum.carlini_wagner import Weight, short
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY, toward_zero
from assay.threats.problem import Problem


class EADState(NamedTuple):
    """The point asked about, the last proximal point, the smallest success, and the search for c."""

    x: Inputs
    point: Inputs
    best: Inputs
    size: PerSample
    weight: Weight


@final
@ATTACKS.register("ead", norm=("l1",), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class EAD(GradientAttack[EADState]):
    """Descent on c max(confidence - margin(x), 0) + ||x - x0||^2 + beta ||x - x0||_1, in units of the box (FISTA).

    z' = S(y - a * gradient of the smooth part),  y' = z' + t / (t + 3) (z' - z), at step t of a round.
    S moves every coordinate by a * beta back to x0, and stops there; then it clips to the box.
    Rounds search for the smallest c that suffices.

    *Sees* the gradient. *Cost* ``rounds * steps`` + 1 forwards, one backward fewer.

    Args:
        steps: steps of a round.
        rounds: number of values of c.
        beta: weight of the l1 norm against the squared l2 norm.
        rate: a * beta at first, in units of the box, but at most three times the smallest size so far over the root of
            the number of coordinates; it falls to 0 along half a cosine over all rounds.
        confidence: margin that is aimed at.
        loss: what is kept above ``confidence``; positive where the goal is met.

    *Differs from the paper in*: S uses a * beta, as proximal gradients ask for (published: beta alone, which at its
    a = 0.01 is a hundred times this one); points y are judged, so that a step costs one forward; the smallest in the
    norm of the threat is kept, which is the l1 decision rule; the search for c as in :class:`CarliniWagner`.

    References:
        Chen et al. 2018, arXiv:1709.04114, eqs. 4, 5 and algorithm 1.
    """

    norms: ClassVar[tuple[str, ...]] = ("l1",)
    minimal: ClassVar[bool] = True
    any_size: ClassVar[bool] = True
    steps: int = 20
    rounds: int = 25
    beta: float = 10.0
    rate: float = 0.1
    confidence: float = 0.0
    loss: Loss = margin

    @property
    def questions(self) -> int:
        return self.rounds * self.steps

    def init(self, p: Problem) -> EADState:
        x, never = p.start("clean"), p.full(torch.inf)
        return EADState(x, x, x, never, Weight.first(p, never, settled=never < 0))

    def update(self, p: Problem, s: EADState, e: Gradient, k: int) -> EADState:
        weight, age = s.weight if k else self._first(p, s, e), s.weight.age
        away, size = (s.x - p.x0) / p.box.width, p.size(s.x)
        slope = 2 * away - per_sample(short(e, self.confidence) * weight.c, away) * e.grad * p.box.width
        rate = per_sample(self._rate(weight, 3 * s.size / p.box.width / math.sqrt(away[0].numel())), away)
        point = p.x0 + p.box.width * toward_zero(away - rate / self.beta * slope, rate)
        point = point.clamp(p.lower, p.upper)
        x = (point + per_sample(age / (age + 3), away) * (point - s.point)).clamp(p.lower, p.upper)
        better = e.success & (size < s.size)
        best, size = choose(better, s.x, s.best), torch.where(better, size, s.size)
        weight, over = weight.tell(e.success, self.steps)
        back = over & size.isfinite()
        return EADState(choose(back, best, x), choose(back, best, point), best, size, weight)

    def _first(self, p: Problem, s: EADState, e: Gradient) -> Weight:
        """Return the c at which a linear model makes the steepest coordinate worth its l1 norm."""
        steepest = (e.grad * p.box.width).flatten(1).abs().amax(1)
        c = torch.where(steepest > 0, self.beta / steepest.clamp_min(TINY), 1)
        return Weight.first(p, c, settled=e.success & (s.x == p.x0).flatten(1).all(1))

    def _rate(self, weight: Weight, most: PerSample) -> PerSample:
        progress = (weight.round + weight.age / self.steps) / self.rounds
        return most.clamp_max(self.rate) * (1 + torch.cos(torch.pi * progress)) / 2

    def done(self, s: EADState) -> Mask:
        return s.weight.round >= self.rounds
