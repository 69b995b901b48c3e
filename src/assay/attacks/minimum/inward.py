"""Inward walks: to the boundary from outside, from many sides."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.losses import margin
from assay.attacks.minimum.descent import Descent, cosine, linear_size, unit, way_across
from assay.attacks.minimum.refining import End, Ends, Round, Turn, turns
from assay.attacks.minimum.region import along_boundary
from assay.attacks.outside import blended
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.problem import Problem


class InwardState(NamedTuple):
    """Where the walk is, and the smallest successes so far."""

    x: Inputs
    place: Tensor  # (b,) int64: steps of this walk so far
    radius: PerSample  # of the ball that the walk is in; inf before the first success of the one from the clean input
    best: Inputs
    least: PerSample  # size of best; inf where nothing succeeded
    end: End  # of this walk so far, or the one that is refined
    ends: Ends  # as many as will be refined
    normal: Inputs  # l2 and l1: mean of the gradients since the end that is refined, the last ones counting most
    turn: Tensor  # (b,) int64; l0: the end that is refined


@final
@ATTACKS.register("inward", norm=("linf", "l2", "l1", "l0"), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class Inward(Descent[InwardState]):
    """Walks to the boundary again and again, mostly from outside: from blends with smooth noise, later around the best.

    A walk ascends the margin, x <- P_r(x + a * direction(grad)), in a ball that shrinks where the goal is met, r <-
    min(r, size(x)) (1 - g), and grows where it is not, r <- r (1 + g); a and g fall along half a cosine. The direction
    is the sign for linf, else the gradient divided by its l2 length. The first walk starts at the clean input; in l0 it
    begins with the changes that meet the goal if the model is linear, then further such ones, until it is met. The next
    ones start at x0 + ``blend`` (u - x0), u a smooth random image, which most networks call something else: on networks
    with hardened or masked surroundings of the clean input, its gradient leads to poor corners of the boundary, and
    walks from outside find better ones. From the middle of the budget on (l1 and l0: from a third) they start around
    the best point so far, in l0 around the best few in turn: halfway to it, blended a little less. A walk ends early
    where its ball could not become smaller than the best point even if all its other steps met the goal.

    The last steps refine what walks ended at: for l2 and l1 along the boundary (:class:`BrendelBethge`), for l0 by
    undoing changes, the least first, each once, which needs no gradient. In l1 and l0 the best ends of several walks
    are refined, each in its turn, for their sizes do not tell which of them leads to the smallest point; in l1 the best
    of these once more. For linf, and where steps are too few for that, the last tenth goes on from the best point as a
    walk with small a and g. Then it closes in (:class:`Descent`).

    *Sees* the gradient. *Cost* ``steps`` + ``closing`` + 1 forwards, one less backwards, and in l0 a fifth of ``steps``
    less.

    Args:
        steps: number of steps of all walks together.
        walk: steps of one walk; None for 20 in linf and l2, 15 in l1, 4 in l0.
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
    walk: int | None = None
    blend: float = 0.5
    shrink: float | None = None
    closing: int = 8
    loss: Loss = margin

    def first(self, p: Problem) -> InwardState:
        number = torch.zeros(len(p), dtype=torch.int64, device=p.x0.device)
        never, end, ends = p.full(torch.inf), End.none(p), Ends.none(p, self._kept(p))
        return InwardState(p.start("clean"), number, never, p.x0, never, end, ends, p.x0, number)

    def _kept(self, p: Problem) -> int:
        """Return the number of ends that are kept."""
        if p.norm.name == "l0":
            return max(_AROUND, min(_KEPT, _ROOM // p.x0[0].numel()))
        return max((turn.end + 1 for turn in self._turns(p)), default=0)

    def _turns(self, p: Problem) -> tuple[Turn, ...]:
        return turns(_ROUNDS[p.norm.name], self.steps)

    def _refining(self, p: Problem) -> int:
        """Return the number of steps that refine ends: the last ones."""
        return int(_UNDOING * self.steps) if p.norm.name == "l0" else len(self._turns(p))

    def blind(self, p: Problem, k: int) -> bool:
        return p.norm.name == "l0" and k >= self.steps - self._refining(p)

    def descend(self, p: Problem, s: InwardState, e: Gradient, k: int) -> InwardState:
        size = p.size(s.x)
        better = e.success & (size < s.least)
        end = s.end.tried(p, s.x, e.success) if self.blind(p, k) else s.end.seen(p, s.x, e)
        s = s._replace(best=choose(better, s.x, s.best), least=torch.where(better, size, s.least), end=end)
        refining = self._refining(p)
        last = self.steps - refining if refining else round(_WALKS * self.steps)
        if k < last - 1:
            return self._walk(p, s, e, size, k)
        if k == last - 1:
            s = s._replace(ends=s.ends.joined(torch.arange(len(p), device=size.device), s.end), end=End.none(p))
            if refining and p.norm.name == "l0":
                return self._undo(p, s._replace(end=s.ends.at(0, s.best)))
            radius = torch.where(s.least.isfinite(), s.least, s.radius)
            x = s.ends.at(0, s.best).x if refining else s.best
            return s._replace(x=choose(s.least.isfinite(), x, s.x), radius=radius)
        if self.blind(p, k):
            return self._undo(p, s)
        stride, shrink = (cosine(k - last, self.steps - last, a, b) for a, b in _LAST)
        x, radius = self._next(p, s, e, size, stride, shrink, k)
        s = s._replace(radius=radius)
        if refining:
            s = self._refine(p, s, e, *self._turns(p)[k - last : k - last + 2])
            x = choose(s.least.isfinite(), s.x, x)
        return s._replace(x=x)

    def _refine(
        self, p: Problem, s: InwardState, e: Gradient, turn: Turn, following: Turn | None = None
    ) -> InwardState:
        """Return the state after a step along the boundary, or at the start of the next turn."""
        if turn.last and following:
            ends = s.ends.refined(turn.end, s.end)
            return s._replace(x=ends.at(following.end, s.best).x, ends=ends, end=End.none(p))
        done = turn.place / max(turn.length - 1, 1)
        memory = _MEMORY[p.norm.name] * (1 - done) if turn.place else 0
        normal = memory * s.normal + (1 - memory) * e.grad
        ahead = along_boundary(
            p, s.x, replace(e, grad=normal), p.norm, cosine(turn.place, max(turn.length - 1, 1), 0.25, 0)
        )
        return s._replace(x=ahead.clamp(p.lower, p.upper), normal=normal)

    def _undo(self, p: Problem, s: InwardState) -> InwardState:
        """Return the state with the next change undone: of the next end, where this one cannot become the best."""
        over = (s.end.left == 0) | (s.end.size - s.end.left >= s.least)
        turn = (s.turn + over).clamp_max(s.ends.size.shape[1] - 1)
        x, end = s.end.replaced(over, s.ends.at(turn, s.best)).undone(p)
        return s._replace(x=choose(end.size.isfinite(), x, s.x), end=end, turn=turn)

    def _walk(self, p: Problem, s: InwardState, e: Gradient, size: PerSample, k: int) -> InwardState:
        """Return the state after a step of a walk, or at the start of the next one."""
        length = max(_WALK[p.norm.name] if self.walk is None else self.walk, 1)
        first = _SHRINK[p.norm.name] if self.shrink is None else self.shrink
        near = k > _NEAR[p.norm.name] * self.steps
        stride, shrink, rest = p.x0.new_tensor(_schedule(length, first, _HOPES[near]))[:, s.place]
        x, radius = self._next(p, s, e, size, stride, shrink, k)
        over, place = (s.place == length - 1) | (radius * rest > s.least), s.place + 1
        if p.norm.name == "l0" and k < _OUTWARD:
            lost = s.radius.isinf() & ~e.success  # on the walk from the clean input
            x, over, place = choose(lost, _outward(p, s.x, e), x), over & ~lost, torch.where(lost, 0, place)
        rows = over.nonzero()[:, 0]
        if len(rows):
            ends = s.ends.joined(rows, s.end.take(rows))
            s = s._replace(ends=ends, end=s.end.replaced(over, End.none(p)))
            around = s.ends.at(k // length % _AROUND, s.best).x if p.norm.name == "l0" else s.best
            start, reach = self._start(p.take(rows).stage(k), around[rows], s.least[rows], near=near)
            x, radius = x.index_copy(0, rows, start), radius.index_copy(0, rows, reach)
        return s._replace(x=x, radius=radius, place=torch.where(over, 0, place))

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

    def _start(self, p: Problem, around: Inputs, least: PerSample, *, near: bool) -> tuple[Inputs, PerSample]:
        """Return where a walk starts, and the radius of its ball."""
        x = blended(p, (0.8 if near else 1) * self.blend)
        if near:
            x = choose(least.isfinite(), x + 0.5 * (around - p.x0), x).clamp(p.lower, p.upper)
        return x, torch.minimum(p.size(x), _REACH[p.norm.name] * least)


_ROUNDS: dict[str, tuple[Round, ...]] = {
    "linf": (),
    "l2": (Round(0.1, 20, 1),),
    "l1": (Round(0.18, 14), Round(0.115, 26)),
}
"""How ends are refined; several where the sizes of two rough ends do not tell which leads to the smaller point."""

_OUTWARD = 12
"""In l0: steps at most of the way from the clean input to a first success, where a short walk does not get."""

_KEPT, _UNDOING = 24, 0.2
"""In l0: number of ends that are kept at most, and the share of the steps that undoes their changes."""

_AROUND = 4
"""In l0: the best ends around which walks start in turn; so many are kept in any case."""

_ROOM = 500_000
"""In l0: values of all ends of a sample that are kept: fewer ends of large images."""

_MEMORY = {"l2": 0.0, "l1": 0.8}
"""First weight of the gradients before, which falls to 0: the smallest points in l1 lie where faces of the boundary
meet, and the gradient of one face alone leads away from there."""

_WALKS = 0.9
"""Share of the steps that walks get where no end is refined."""

_WALK = {"linf": 20, "l2": 20, "l1": 15, "l0": 4}
"""Steps of a walk: the fewer, the more is done by refining."""

_NEAR = {"linf": 0.5, "l2": 0.5, "l1": 0.35, "l0": 0.35}
"""Share of the steps after which walks start around the best point."""

_HOPES = (1.0, 2.0)
"""How much smaller a walk may still get, in shrinks of all its other steps: one from far out, and one around the best
point, which is there to refine it."""

_LAST = ((0.3, 0.006), (0.02, 0.001))
"""First and last stride, and first and last shrink, of the last walk."""

_REACH = {"linf": 6.0, "l2": 6.0, "l1": torch.inf, "l0": 1.3}
"""Largest radius that a walk starts with, in sizes of the best point: what it has steps to shrink from."""

_SHRINK = {"linf": 0.1, "l2": 0.4, "l1": 0.5, "l0": 0.28}
"""First g of a walk: sparse walks are short, and radii that are counts fall in whole steps."""

_STRIDE = {"linf": 0.33, "l2": 0.7, "l1": 0.3, "l0": 0.6}
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


def _outward(p: Problem, x: Inputs, e: Gradient) -> Inputs:
    """Return x with as many further changes as the goal needs if the model is linear, each as large as it may be."""
    d = way_across(p, x, e, x)
    return torch.where(d == 0, x, torch.where(d > 0, p.upper, p.lower))


def _scale(p: Problem, radius: PerSample) -> PerSample:
    """Return what strides are measured in."""
    return radius.sqrt() * p.box.width if p.norm.name == "l0" else radius
