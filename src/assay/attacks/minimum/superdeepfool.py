"""SuperDeepFool: DeepFool, then projection onto the normal of the boundary, in turn."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.minimum.boundary import BoundaryAttack, Ray, crossing, winning
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, choose, per_sample
from assay.models.door import Slopes
from assay.threats.norms import TINY
from assay.threats.planes import inner
from assay.threats.problem import Problem


class SuperDeepFoolState(NamedTuple):
    """The next point and how it came about, the perturbation without overshoot, and the last search."""

    x: Inputs
    d: Inputs
    anchor: Inputs  # the sum of the projections
    projected: Mask
    settled: Mask  # the search along the ray is on
    ray: Ray


@final
@ATTACKS.register("superdeepfool", norm=("l2",), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class SuperDeepFool(BoundaryAttack[SuperDeepFoolState]):
    """SuperDeepFool: DeepFool from x until it succeeds at z, then x <- x + <z - x0, w> w / |w|^2, and again.

    w is the gradient at z of the gap to the class that z is taken for. It ends where such an x succeeds; then the way
    from the clean input to x, whose direction is by then a mean of normals, is searched for the boundary.

    *Sees* the gradients of up to ``rivals`` gaps between logits. *Cost* a forward and ``rivals`` backwards a query.

    Args:
        steps: largest number of queries, those of the search included.
        rivals: how many of the strongest other classes are linearised.
        overshoot: that of DeepFool.
        precision: the search ends where it knows the boundary to this share of the perturbation.

    *Differs from the paper in*: the projections add up, where each of the paper's starts again at x0: boundaries of
    ReLU networks have corners, between whose normals that goes to and fro. Three rivals, points clipped to the box,
    and a last search that interpolates; a targeted threat is met by the margin to the strongest other class.

    References:
        Abdollahpoorrostam et al. 2023, arXiv:2303.12481, algorithm 2 with (m, n) = (inf, 1).
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    steps: int = 100
    rivals: int = 3
    overshoot: float = 0.02
    precision: float = 0.001

    def init(self, p: Problem) -> SuperDeepFoolState:
        x, no = p.start("clean"), p.full(0.0) > 0
        return SuperDeepFoolState(x, x - p.x0, torch.zeros_like(x), no, no, Ray.start(p))

    def update(self, p: Problem, s: SuperDeepFoolState, e: Slopes, k: int) -> SuperDeepFoolState:
        ray = s.ray.narrowed(e, s.settled).seen(p, s.x, e, ~s.settled)
        ends = ~s.settled & e.success & s.projected
        ray, settled = ray.ending(p, s.x, e, ends), s.settled | ends
        walked = (s.d + crossing(p, s.x, e)).clamp(p.lower - p.x0, p.upper - p.x0)
        w = winning(e)
        along = per_sample(inner(s.x - p.x0, w) / inner(w, w).clamp_min(TINY), w) * w
        anchor = choose(e.success, s.anchor + along, s.anchor)
        d = choose(e.success, anchor, walked)
        far = per_sample(torch.where(e.success, 1.0, 1 + self.overshoot), d).to(d.dtype) * d
        x = choose(settled, ray.point(p), (p.x0 + far).clamp(p.lower, p.upper))
        return SuperDeepFoolState(x, d, anchor, e.success, settled, ray)

    def done(self, s: SuperDeepFoolState) -> Mask:
        return (s.ray.size == 0) | (s.settled & (s.ray.high - s.ray.low < self.precision))
