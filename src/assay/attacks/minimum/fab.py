"""Fast adaptive boundary: back and forth across the linearised decision boundary, always close to the clean input."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.minimum.boundary import BoundaryAttack, Ray, from_clean, nearest_facet
from assay.attacks.outside import blended, walk_length
from assay.attacks.registry import ATTACKS
from assay.core.registry import one_of
from assay.core.types import Inputs, Mask, choose, per_sample
from assay.models.door import Slopes
from assay.threats.norms import TINY
from assay.threats.problem import STARTS, Problem


class FABState(NamedTuple):
    """The next point, and the smallest success so far."""

    x: Inputs
    ray: Ray


@final
@ATTACKS.register("fab", norm=("linf", "l2", "l1"), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class FAB(BoundaryAttack[FABState]):
    """Fast adaptive boundary: x <- (1 - a) (z + h d(z)) + a (x0 + h d(x0)), with d the way to the linear boundary.

    z is x, or, where x succeeds, x0 + b (x - x0). The boundary is linearised at x for each rival; the facet nearest to
    z counts, and d leads to its nearest point inside the box. a = min(|d(z)| / (|d(z)| + |d(x0)|), ``pull``)
    once there was a success, and 0 before. Later walks start at x0 + ``blend`` (u - x0), u a smooth random image.
    The last queries search the way from the clean input to the smallest success.

    *Sees* the gradients of up to ``rivals`` gaps between logits; of one under a targeted threat or in ``Targets``.
    *Cost* ``steps`` + 1 + ``search`` forwards, ``rivals`` * ``steps`` backwards.

    Args:
        steps: number of steps of all walks together.
        walk: steps of a walk, about; with more steps there are more walks.
        rivals: how many of the strongest other classes are linearised.
        pull: largest a.
        overshoot: h.
        back: b.
        search: queries of the last search.
        start: where the first walk starts: ``clean``; ``uniform`` or ``sphere``, near the clean input.
        blend: share of the smooth random image where later ones start.

    *Differs from the paper in*: two rivals, the strongest, where the paper linearises all: at equal passes the extra
    steps find smaller perturbations (``rivals=9`` or ``Targets(FAB())`` look at the others). The gradient at a point
    that succeeds serves for the point pulled back from it, which saves the paper's second forward pass a step. No pull
    (a) before the first success. The nearest facet is found inside the box, not without it. A targeted threat is met by
    the margin to the strongest other class. Later walks start farther away than the paper's restarts, which stay within
    half of the smallest success: on robust networks they end nearer. ``start`` is not bound to the smallest success.

    References:
        Croce & Hein 2020, arXiv:1907.02044, algorithm 1 and eqs. 6 to 10.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    steps: int = 100
    walk: int = 80
    rivals: int = 2
    pull: float = 0.1
    overshoot: float = 1.05
    back: float = 0.9
    search: int = 3
    start: str = "clean"
    blend: float = 0.5

    def __post_init__(self) -> None:
        one_of("start", self.start, STARTS)

    @property
    def questions(self) -> int:
        return self.steps + self.search

    def differentiates(self, k: int) -> bool:
        return k < self.steps

    def init(self, p: Problem) -> FABState:
        reach = p.full(_REACH[p.norm.name] * p.box.width)
        near = p if self.start == "clean" else p.with_radius(reach)
        return FABState(near.start(self.start), Ray.start(p))

    def update(self, p: Problem, s: FABState, e: Slopes, k: int) -> FABState:
        if k > self.steps:
            ray = s.ray.narrowed(e)
            return FABState(ray.point(p), ray)
        ray = s.ray.seen(p, s.x, e)
        if k == self.steps:
            return FABState(ray.point(p), ray)
        number, place = divmod(k + 1, walk_length(self.steps, self.walk))
        return FABState(self._step(p, s.x, e, ray) if place else blended(p.stage(number), self.blend), ray)

    def _step(self, p: Problem, x: Inputs, e: Slopes, ray: Ray) -> Inputs:
        back = choose(e.success, (1 - self.back) * (p.x0 - x), torch.zeros_like(x))
        facet, z = nearest_facet(p, x, e, back), x + back
        far = from_clean(p, z, facet).d
        mine, clean = p.norm.size(facet.d), p.norm.size(far)
        share = (mine / (mine + clean).clamp_min(TINY)).clamp_max(self.pull)
        a = per_sample(torch.where(ray.size.isinf(), 0, share), x)  # a pull before would keep some from ever crossing
        there = (1 - a) * (z + self.overshoot * facet.d) + a * (p.x0 + self.overshoot * far)
        return there.clamp(p.lower, p.upper)

    def done(self, s: FABState) -> Mask:
        return s.ray.size == 0


_REACH = {"linf": 0.15, "l2": 0.5, "l1": 2.5}
"""How far random starts are from the clean input, in widths of the box: half of the published eps."""
