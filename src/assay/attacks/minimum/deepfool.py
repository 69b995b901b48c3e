"""DeepFool: steps to the nearest linearised boundary, until it is crossed."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

from assay.attacks.minimum.boundary import BoundaryAttack, crossing
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask
from assay.models.door import Slopes
from assay.threats.problem import Problem


class DeepFoolState(NamedTuple):
    """The next point, the perturbation without the overshoot, and whether the last point succeeded."""

    x: Inputs
    d: Inputs
    over: Mask


@final
@ATTACKS.register("deepfool", norm=("linf", "l2"), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class DeepFool(BoundaryAttack[DeepFoolState]):
    """DeepFool: d <- d + r,  x <- x0 + (1 + h) d,  r the way from x to the nearest linear boundary of any rival.

    It stops where x succeeds: the first crossing, not the smallest perturbation.

    *Sees* the gradients of up to ``rivals`` gaps between logits. *Cost* a forward and ``rivals`` backwards a step;
    few samples need ten.

    Args:
        steps: largest number of steps.
        rivals: how many of the strongest other classes are linearised.
        overshoot: h, by how much the perturbation is longer than the way.

    *Differs from the paper in*: r leads to the nearest point of the plane inside the box; the paper has no box, other
    implementations clip. A targeted threat is met by the margin to the strongest other class.

    References:
        Moosavi-Dezfooli et al. 2016, arXiv:1511.04599, algorithm 2 and sec. 3.3.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    steps: int = 50
    rivals: int = 9
    overshoot: float = 0.02

    def init(self, p: Problem) -> DeepFoolState:
        x = p.start("clean")
        return DeepFoolState(x, x - p.x0, p.full(0.0) > 0)

    def update(self, p: Problem, s: DeepFoolState, e: Slopes, k: int) -> DeepFoolState:
        d = (s.d + crossing(p, s.x, e)).clamp(p.lower - p.x0, p.upper - p.x0)
        x = (p.x0 + (1 + self.overshoot) * d).clamp(p.lower, p.upper)
        return DeepFoolState(x, d, e.success)

    def done(self, s: DeepFoolState) -> Mask:
        return s.over
