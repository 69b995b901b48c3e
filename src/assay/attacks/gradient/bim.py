"""The basic iterative method."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

from assay.attacks.gradient.pgd import climb
from assay.attacks.loop import GradientAttack
from assay.attacks.losses import cross_entropy
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs
from assay.models.door import Gradient, Loss
from assay.threats.problem import Problem


class BIMState(NamedTuple):
    """The next point."""

    x: Inputs


@final
@ATTACKS.register("bim", norm=("linf", "l2", "l1", "l0"), access="gradient", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class BIM(GradientAttack[BIMState]):
    """FGSM in small steps from the clean input: x <- P(x + a * steepest(grad)), a constant.

    For l1 and l0 the step is that of :class:`assay.attacks.PGD`.

    *Sees* the gradient. *Cost* ``steps`` + 1 forwards, ``steps`` backwards.

    Args:
        steps: number of steps.
        rel_step: length of a step as a fraction of eps (l0: mean change of a coordinate, of half the box).
        support: l1 only: share of the coordinates that one step moves.
        loss: what is ascended.

    References:
        Kurakin et al. 2017, arXiv:1607.02533, sec. 2.2.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    steps: int = 10
    rel_step: float = 0.2
    support: float = 0.02
    loss: Loss = cross_entropy

    def init(self, p: Problem) -> BIMState:
        return BIMState(p.start("clean"))

    def update(self, p: Problem, s: BIMState, e: Gradient, k: int) -> BIMState:
        return BIMState(climb(p, s.x, e.grad, self.rel_step, self.support))
