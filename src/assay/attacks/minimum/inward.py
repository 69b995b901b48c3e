"""Inward walks: to the boundary from outside, from many sides."""

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.losses import margin
from assay.attacks.minimum.descent import Descent, cosine, linear_size, unit
from assay.attacks.minimum.region import along_boundary
from assay.attacks.outside import blended
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.problem import Problem


class InwardState(NamedTuple):
    """Where the walk is, and the smallest success of all walks so far."""

    x: Inputs
    place: Tensor  # (b,) int64: steps of this walk so far
    radius: PerSample  # of the ball that the walk is in; inf before the first success of the one from the clean input
    best: Inputs
    least: PerSample  # size of best; inf where nothing succeeded


@final
@ATTACKS.register("inward", norm=("linf", "l2", "l1", "l0"), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class Inward(Descent[InwardState]):
    """Walks to the boundary again and again, mostly from outside: from blends with smooth noise, later around the best.

    A walk ascends the margin, x <- P_r(x + a * direction(grad)), in a ball that shrinks where the goal is met, r <-
    min(r, size(x)) (1 - g), and grows where it is not, r <- r (1 + g); a and g fall along half a cosine. The direction
    is the sign for linf, else the gradient divided by its l2 length. The first walk starts at the clean input. The next
    ones start at x0 + ``blend`` (u - x0), u a smooth random image, which most networks call something else: on networks
    with hardened or masked surroundings of the clean input, its gradient leads to poor corners of the boundary, and
    walks from outside find better ones. From the middle of the budget on they start around the best point so far:
    halfway to it, blended a little less. A walk ends early where its ball could not become smaller than the best point
    even if all its other steps met the goal. The last tenth goes on from the best point: for l2 and l1 along the
    boundary (:class:`BrendelBethge`) if it is 20 steps or more, else as a walk with small a and g; then it closes in
    (:class:`Descent`).

    *Sees* the gradient. *Cost* ``steps`` + ``closing`` + 1 forwards, one less backwards.

    Args:
        steps: number of steps of all walks together.
        walk: steps of one walk (l0: half of them).
        blend: share of the smooth noise in the start of a walk.
        shrink: g at the start of a walk; None for 0.1 in linf, 0.4 in l2, 0.5 in l1, 0.28 in l0.
        closing: further steps that close in on the clean input.
        loss: what is ascended.

    Example:
        >>> import torch
        >>> from assay import Threat
        >>> from assay.attacks import Inward
        >>> line = lambda x: torch.stack([0.5 - x.mean(1), x.mean(1) - 0.5], 1)
        >>> r = Inward(steps=60)(line, torch.full((1, 4), 0.6), torch.tensor([1]), Threat("l2"))
        >>> round(r.size.item(), 3)
        0.2

    *Differs from* the attacks that it is made of: the shrinking ball is DDN's and FMN's (for one walk, from the clean
    input), the start outside is that of decision-based attacks and of Brendel & Bethge, who take one.

    References:
        Rony et al. 2019, arXiv:1811.09600, algorithm 1; Pintor et al. 2021, arXiv:2102.12827, algorithm 1;
        Brendel et al. 2019, arXiv:1907.01003, sec. 2. The combination is ours; benchmarks/minimal_norm.py measures it.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    steps: int = 490
    walk: int = 20
    blend: float = 0.5
    shrink: float | None = None
    closing: int = 8
    loss: Loss = margin

    def first(self, p: Problem) -> InwardState:
        place = torch.zeros(len(p), dtype=torch.int64, device=p.x0.device)
        return InwardState(p.start("clean"), place, p.full(torch.inf), p.x0, p.full(torch.inf))

    def descend(self, p: Problem, s: InwardState, e: Gradient, k: int) -> InwardState:
        size = p.size(s.x)
        better = e.success & (size < s.least)
        s = s._replace(best=choose(better, s.x, s.best), least=torch.where(better, size, s.least))
        last = round(_WALKS * self.steps)
        if k == last - 1:
            found = s.least.isfinite()
            return s._replace(x=choose(found, s.best, s.x), radius=torch.where(found, s.least, s.radius))
        if k < last:
            return self._walk(p, s, e, size, k)
        stride, shrink = (cosine(k - last, self.steps - last, a, b) for a, b in _LAST)
        x, radius = self._next(p, s, e, size, stride, shrink, k)
        if p.norm.name in _SMOOTH and self.steps - last >= _LONG:
            ahead = along_boundary(p, s.x, e, p.norm, cosine(k - last, self.steps - last, 0.25, 0))
            x = choose(s.least.isfinite(), ahead.clamp(p.lower, p.upper), x)
        return s._replace(x=x, radius=radius)

    def _walk(self, p: Problem, s: InwardState, e: Gradient, size: PerSample, k: int) -> InwardState:
        """Return the state after a step of a walk, or at the start of the next one."""
        length = max(self.walk // 2 if p.norm.name == "l0" else self.walk, 1)
        first = _SHRINK[p.norm.name] if self.shrink is None else self.shrink
        near = 2 * k > self.steps
        stride, shrink, rest = p.x0.new_tensor(_schedule(length, first, _HOPES[near]))[:, s.place]
        x, radius = self._next(p, s, e, size, stride, shrink, k)
        over = (s.place == length - 1) | (radius * rest > s.least)
        rows = over.nonzero()[:, 0]
        if len(rows):
            start, reach = self._start(p.take(rows).stage(k), s.best[rows], s.least[rows], near=near)
            x, radius = x.index_copy(0, rows, start), radius.index_copy(0, rows, reach)
        return s._replace(x=x, radius=radius, place=torch.where(over, 0, s.place + 1))

    def _next(
        self,
        p: Problem,
        s: InwardState,
        e: Gradient,
        size: PerSample,
        stride: float | PerSample,
        shrink: float | PerSample,
        k: int,
    ) -> tuple[Inputs, PerSample]:
        """Return the next point, and the radius of the ball that it is in."""
        radius = _radius(p, s, e, size, shrink)
        move = _STRIDE[p.norm.name] * stride * _scale(p, torch.minimum(radius, s.least))
        direction = e.grad.sign() if p.norm.name == "linf" else unit(p, e.grad, k)
        x = p.project(s.x + per_sample(move, s.x) * direction, radius)
        return x, torch.where(e.success | s.radius.isfinite(), radius, torch.inf)

    def _start(self, p: Problem, best: Inputs, least: PerSample, *, near: bool) -> tuple[Inputs, PerSample]:
        """Return where a walk starts, and the radius of its ball."""
        x = blended(p, (0.8 if near else 1) * self.blend)
        if near:
            x = choose(least.isfinite(), x + 0.5 * (best - p.x0), x).clamp(p.lower, p.upper)
        return x, torch.minimum(p.size(x), _REACH[p.norm.name] * least)


_WALKS = 0.9
"""Share of the steps that walks get."""

_HOPES = (1.0, 2.0)
"""How much smaller a walk may still get, in shrinks of all its other steps: one from far out, and one around the best
point, which is there to refine it."""

_LAST = ((0.3, 0.006), (0.02, 0.001))
"""First and last stride, and first and last shrink, of the last walk."""

_SMOOTH = ("l2", "l1")
"""Norms in which following the boundary ends better than a last walk, where there is time for it."""

_LONG = 20
"""Fewest steps that this takes."""

_REACH = {"linf": 6.0, "l2": 6.0, "l1": torch.inf, "l0": 1.3}
"""Largest radius that a walk starts with, in sizes of the best point: what it has steps to shrink from."""

_SHRINK = {"linf": 0.1, "l2": 0.4, "l1": 0.5, "l0": 0.28}
"""First g of a walk: sparse walks are short, and radii that are counts fall in whole steps."""

_STRIDE = {"linf": 0.33, "l2": 0.7, "l1": 0.3, "l0": 1.0}
"""First stride of a walk, as a share of the radius (l0: of the box, for each coordinate)."""


@cache
def _schedule(length: int, first: float, hope: float) -> list[list[float]]:
    """Return for each place in a walk a, g, and to what share of its radius the places after it may bring it."""
    strides = [cosine(j, length, 1, 0.02) for j in range(length)]
    shrinks = [cosine(j, length, first, 0.005) for j in range(length)]
    smallest = [math.prod(1 - g for g in shrinks[j + 1 :]) ** hope for j in range(length)]
    return [strides, shrinks, smallest]


def _radius(p: Problem, s: InwardState, e: Gradient, size: PerSample, shrink: float | PerSample) -> PerSample:
    """Return the radius of the next point: smaller after a success, else larger or, before any, up to the boundary."""
    ahead = size + linear_size(p, e)
    outer = torch.where(s.radius.isinf(), ahead, s.radius) * (1 + shrink)
    inner = torch.minimum(s.radius, size) * (1 - shrink)
    if p.norm.name == "l0":
        inner, outer = torch.minimum(inner.floor(), size - 1).clamp_min(1), outer.ceil()
    most = p.norm.diameter(p.box.width, p.x0[0].numel())
    return torch.where(e.success, inner, outer).clamp_max(most)


def _scale(p: Problem, radius: PerSample) -> PerSample:
    """Return what strides are measured in."""
    return radius.sqrt() * p.box.width if p.norm.name == "l0" else radius
