"""Plain targeted gradient ascent: what one writes first, to see how an image becomes another class."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import cross_entropy
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY
from assay.threats.problem import Problem


class AscentState(NamedTuple):
    """The next point."""

    x: Inputs


@final
@ATTACKS.register("targeted-ascent", norm=("linf", "l2", "l1"), access="gradient", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class TargetedAscent(GradientAttack[AscentState]):
    """Walks up the gradient until the model says the target: x <- P(x + step * grad / max|grad|).

    The gradient is rescaled so that its largest coordinate moves by ``step``, and the walk stops at the first point
    that the model calls the target. With an eps it stays in the ball; without one only the box bounds it. Under an
    untargeted threat it walks away from the label instead.

    *Sees* the gradient. *Cost* at most ``steps`` + 1 forwards, ``steps`` backwards.

    Args:
        steps: the most steps.
        step: how far a step moves the coordinate of the largest gradient, as a fraction of the box.
        loss: what is ascended; cross-entropy is the target's log-probability.

    Example:
        >>> import torch
        >>> from assay import Threat
        >>> from assay.attacks import TargetedAscent
        >>> line = lambda x: torch.stack([0.5 - x.mean(1), x.mean(1) - 0.5], 1)
        >>> attack, threat = TargetedAscent(step=0.05), Threat("linf", targeted=True)
        >>> r = attack(line, torch.full((1, 4), 0.42), torch.tensor([1]), threat)
        >>> round(r.size.item(), 4), r.forwards.item()
        (0.1, 4)

    References:
        Szegedy et al. 2014, arXiv:1312.6199, sec. 4.1, for the aim; the walk is the textbook's.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    any_size: ClassVar[bool] = True
    steps: int = 200
    step: float = 0.02
    loss: Loss = cross_entropy

    def init(self, p: Problem) -> AscentState:
        return AscentState(p.x0)

    def update(self, p: Problem, s: AscentState, e: Gradient, k: int) -> AscentState:
        peak = e.grad.flatten(1).abs().amax(1).clamp_min(TINY)
        x = s.x + per_sample(self.step * p.box.width / peak, s.x) * e.grad
        return AscentState(x.clamp(p.lower, p.upper) if p.minimal else p.project(x))
