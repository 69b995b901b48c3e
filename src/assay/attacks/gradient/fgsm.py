"""The fast gradient sign method."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import cross_entropy
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs
from assay.models.door import Gradient, Loss
from assay.threats.norms import largest
from assay.threats.problem import Problem


class FGSMState(NamedTuple):
    """The next point."""

    x: Inputs


@final
@ATTACKS.register("fgsm", norm=("linf", "l2", "l1", "l0"), access="gradient", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class FGSM(GradientAttack[FGSMState]):
    """One step of the whole eps from the clean input: x = P(x0 + eps * steepest(grad)).

    For linf, steepest is the sign; for l2 the normalised gradient (FGM); for l1 its eps / (width of the box) largest
    coordinates, rounded up; for l0 the eps coordinates of the largest gain go to the end of the box.

    *Sees* the gradient. *Cost* 2 forwards, 1 backward.

    Args:
        loss: what is ascended.

    Example:
        >>> import torch
        >>> from assay import Threat
        >>> from assay.attacks import FGSM
        >>> line = lambda x: torch.stack([0.5 - x.mean(1), x.mean(1) - 0.5], 1)
        >>> FGSM()(line, torch.full((1, 4), 0.6), torch.tensor([1]), Threat("linf", 0.2)).x
        tensor([[0.4000, 0.4000, 0.4000, 0.4000]])

    References:
        Goodfellow et al. 2015, arXiv:1412.6572, sec. 4.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    steps: ClassVar[int] = 1  # type: ignore[misc]  # no parameter here
    loss: Loss = cross_entropy

    def init(self, p: Problem) -> FGSMState:
        return FGSMState(p.start("clean"))

    def update(self, p: Problem, s: FGSMState, e: Gradient, k: int) -> FGSMState:
        if p.norm.name == "l0":
            return FGSMState(_corners(p, e.grad))
        needed = (p.radius / p.box.width).ceil().long()  # l1: fewer coordinates cannot hold eps inside the box
        return FGSMState(p.ascend(s.x, e.grad, p.radius, needed))


def _corners(p: Problem, grad: Inputs) -> Inputs:
    """Return the maximiser of the linearised loss over the l0 ball and the box."""
    move = torch.where(grad > 0, p.upper, p.lower) - p.x0
    return p.x0 + move * largest(grad * move, p.radius)
