"""SparseFool: few coordinates that cross the boundary as DeepFool finds it."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

from assay.attacks.minimum.boundary import BoundaryAttack, crossing, winning
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, choose
from assay.models.door import Slopes
from assay.threats.norms import L2
from assay.threats.planes import inner, to_plane
from assay.threats.problem import Problem

_L2 = L2()


class SparseFoolState(NamedTuple):
    """The next point, the sparse point that DeepFool set out from, and whether the two are the same."""

    x: Inputs
    anchor: Inputs
    sparse: Mask
    over: Mask


@final
@ATTACKS.register("sparsefool", norm=("l1", "l0"), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class SparseFool(BoundaryAttack[SparseFoolState]):
    """SparseFool: DeepFool (l2) from the sparse point u until it succeeds at z, then a sparse move of u; and again.

    u <- the sparsest point of the box, seen from u, on the plane through u + c (z - u) with normal w. w is the gradient
    at z of the gap to the class that z is taken for.

    *Sees* the gradients of up to ``rivals`` gaps between logits. *Cost* a forward and ``rivals`` backwards a query.

    Args:
        steps: largest number of queries.
        rivals: how many of the strongest other classes are linearised.
        reach: c; more makes an end sooner, with more coordinates.
        overshoot: that of DeepFool.

    *Differs from the paper in*: for l0 the coordinates that gain most in the box move first, not the steepest;
    ``reach`` is 1, not 3; three rivals; points of DeepFool are clipped to the box.

    References:
        Modas et al. 2019, arXiv:1811.02248, algorithms 1 and 2.
    """

    norms: ClassVar[tuple[str, ...]] = ("l1", "l0")
    steps: int = 100
    rivals: int = 3
    reach: float = 1.0
    overshoot: float = 0.02

    def init(self, p: Problem) -> SparseFoolState:
        x, no = p.start("clean"), p.full(0.0) > 0
        return SparseFoolState(x, x, ~no, no)

    def update(self, p: Problem, s: SparseFoolState, e: Slopes, k: int) -> SparseFoolState:
        walked = (s.x + (1 + self.overshoot) * crossing(p, s.x, e, _L2)).clamp(p.lower, p.upper)
        w, u = winning(e), s.anchor
        gap = -self.reach * inner(w, s.x - u).abs()
        sparser = (u + to_plane(p.norm, w, gap, p.lower - u, p.upper - u).d).clamp(p.lower, p.upper)
        anchor = choose(e.success, sparser, u)
        return SparseFoolState(choose(e.success, sparser, walked), anchor, e.success, e.success & s.sparse)

    def done(self, s: SparseFoolState) -> Mask:
        return s.over
