"""The fast gradient sign method, one random step away from the clean input."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import cross_entropy
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.problem import Problem


class RFGSMState(NamedTuple):
    """The next point."""

    x: Inputs


@final
@ATTACKS.register("r-fgsm", norm=("linf", "l2"), access="gradient", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class RFGSM(GradientAttack[RFGSMState]):
    """A random step, then FGSM with what is left of eps.

    x' = P(x0 + a * r),  x = P(x' + (eps - a) * steepest(grad at x')); r is a vector of random signs (linf) or a random
    direction (l2). The random step leaves the sharp bends that some networks have right at the clean input.

    *Sees* the gradient. *Cost* 2 forwards, 1 backward.

    Args:
        random_step: a as a fraction of eps.
        loss: what is ascended.

    References:
        Tramer et al. 2018, arXiv:1705.07204, sec. 3.4.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    steps: ClassVar[int] = 1  # type: ignore[misc]  # no parameter here
    random_step: float = 0.5
    loss: Loss = cross_entropy

    def init(self, p: Problem) -> RFGSMState:
        if p.warm is not None:
            return RFGSMState(p.warm)
        direction = p.norm.steepest(p.draws.normal(p.x0.shape[1:], p.x0.dtype))
        return RFGSMState(p.project(p.x0 + per_sample(self.random_step * p.radius, direction) * direction))

    def update(self, p: Problem, s: RFGSMState, e: Gradient, k: int) -> RFGSMState:
        return RFGSMState(p.ascend(s.x, e.grad, (1 - self.random_step) * p.radius))
