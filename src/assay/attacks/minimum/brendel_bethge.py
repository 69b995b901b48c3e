"""The Brendel-Bethge attack: walks along the boundary, one trust region after the other."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias, final

import torch
from torch.nn import functional as F

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import margin
from assay.attacks.minimum.descent import cosine, toward_zero
from assay.attacks.minimum.undoing import Changes
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import NORMS, TINY, Norm
from assay.threats.planes import inner, to_plane
from assay.threats.problem import Problem

_PULLS, _PUSHES, _SQUEEZES = 6, 12, 8
"""Most trials that settle how strong a pull the trust region allows, how long a push reaches the plane, and how small a
perturbation in linf may be."""

_FULL, _CLOSE = 0.85, 1e-3
"""Shares of the radius: a step so long is long enough, and a point so near the plane is on it."""

_FLAT, _GROW, _SHRINK, _MOST = 0.2, 1.1, 1.2, 3.0
"""A boundary that is within this share of the radius is as flat as its gradient said; then the radius grows by the next
number, else it falls by the one after that, and is at most so many times what the schedule says."""


class BrendelBethgeState(NamedTuple):
    """The point asked about, the ray that is searched for a start, and the smallest success of this walk."""

    x: Inputs
    ray: Inputs  # from the clean input to an outside image
    near: PerSample  # largest share of the ray that failed
    far: PerSample  # smallest share of the ray that met the goal, or inf
    best: Inputs
    size: PerSample  # of best, or inf
    trust: PerSample  # by how much the radius is larger than the schedule says
    changes: Changes  # l0 only


@final
@ATTACKS.register("brendel-bethge", norm=("linf", "l2", "l1", "l0"), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class BrendelBethge(GradientAttack[BrendelBethgeState]):
    """From an adversarial point to the boundary, and along it to the point that is nearest to the clean input.

    x' = argmin ||z - x0|| over the box, where <g, z - x> = -f(x) (the boundary as the gradient g of the margin f
    shows it) and ||z - x||_2 <= r. Where there is no such z, x' goes as far to the plane as r allows.
    A walk starts at the nearest point of the boundary on rays from the clean input to smooth random images.

    *Sees* the gradient. *Cost* ``steps`` + 1 forwards, ``steps`` backwards but for ``starts`` a walk.

    Args:
        steps: number of queries.
        walk: number of queries of a walk, about; with more steps there are more walks.
        starts: number of queries for a start, at most a quarter of the walk; they need no gradient.
        blend: first share of the outside image in the start.
        reach: first r as a share of the l2 distance to the clean input; it falls to 0 along half a cosine. As long as
            steps end near the boundary, r grows beyond that, up to three times.
        beyond: share of the boundary's distance by which the point aimed at lies behind it.
        sparse: l0 only: share of the walk that makes the l1 norm small, which makes many coordinates zero.
        undo: l0 only: number of queries at the end of a walk, at most a quarter of it, that undo one change each.
        loss: f, positive where the goal is met.

    *Differs from the paper in*: the start, which needs no data (the paper takes an image of another class); where no
    ray meets the goal, ever longer steps of gradient signs look for a start. r follows the size of the perturbation and
    how well the last plane told where the boundary is. For l2, z is the best point between the points of the plane that
    are nearest to x and to x0, the optimum where the box leaves it alone. Several walks. The l0 walk begins as one for
    l1, and in the end undoes changes one by one, the least first, while the others go to the edge of the box.

    References:
        Brendel et al. 2019, arXiv:1907.01003, sec. 2 and appendix.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    minimal: ClassVar[bool] = True
    any_size: ClassVar[bool] = True
    steps: int = 500
    walk: int = 60
    starts: int = 10
    blend: float = 0.4
    reach: float = 0.25
    beyond: float = 0.005
    sparse: float = 0.6
    undo: int = 10
    loss: Loss = margin

    def differentiates(self, k: int) -> bool:
        j, length = self._place(k)
        return self._first(length) <= j and k < self.steps

    def _place(self, k: int) -> tuple[int, int]:
        """Return the place of query k in its walk, and the walk's length."""
        length = math.ceil(self.steps / max(1, round(self.steps / self.walk)))
        return k % length, min(length, self.steps - k // length * length)

    def _first(self, length: int) -> int:
        """Return the place in a walk of the start's last query, the first with a gradient."""
        return min(self.starts, length // 4)

    def init(self, p: Problem) -> BrendelBethgeState:
        return _fresh(p, p.start("clean"))

    def update(self, p: Problem, s: BrendelBethgeState, e: Gradient, k: int) -> BrendelBethgeState:
        size = _length(p.norm).size(s.x - p.x0)
        better = e.success & (size < s.size)
        s = s._replace(best=choose(better, s.x, s.best), size=torch.where(better, size, s.size))
        if p.norm.name == "l0":
            s = s._replace(changes=s.changes.seen(p, s.x, e))
        j, length = self._place(k)
        if j + 1 == length:
            return self._look(p, _fresh(p, p.x0), p.full(0.0) > 0, k)
        first = self._first(length)
        if j + 1 < first:
            return self._look(p, s, e.success, k)
        if j < first:
            return s._replace(x=choose(s.size.isfinite(), s.best, p.x0))
        return self._walk(p, s, e, j - first, length - first)

    def _walk(self, p: Problem, s: BrendelBethgeState, e: Gradient, j: int, length: int) -> BrendelBethgeState:
        """Return the state after query j of the ``length`` after the start."""
        if p.norm.name == "l0":
            length -= min(self.undo, length // 4)
        if j >= length:
            x, changes = s.changes.undone(p)
            return s._replace(x=x, changes=changes)
        norm = NORMS["l1"] if p.norm.name == "l0" and j < self.sparse * length else p.norm
        reach = cosine(j, length, self.reach, 0)
        trust = _trusted(p, s, e, reach) if j else s.trust
        step = along_boundary(p, s.x, e, norm, reach * trust, self.beyond)
        x = choose(s.size.isfinite(), step, self._search(p, s.x, e, j))
        return s._replace(x=x.clamp(p.lower, p.upper), trust=trust)

    def done(self, s: BrendelBethgeState) -> Mask:
        return s.size == 0

    def _look(self, p: Problem, s: BrendelBethgeState, success: Mask, k: int) -> BrendelBethgeState:
        """Bisect on a ray that met the goal; else try another one, where it would be better than the best."""
        norm = _length(p.norm)
        share = norm.size(s.x - p.x0) / norm.size(s.ray).clamp_min(TINY)
        near, far = torch.where(success, s.near, share), torch.where(success, share, s.far)
        over = far.isinf() | (far - near < 0.1 * far)
        ray = outside(p.stage(k)) - p.x0
        blend = min(1.0, self.blend * (1 + self._place(k)[0] / 4))
        hope = torch.where(s.size.isfinite(), 0.95 * s.size / norm.size(ray).clamp_min(TINY), blend).clamp_max(1)
        ray, share = choose(over, ray, s.ray), torch.where(over, hope, (near + far) / 2)
        x = (p.x0 + per_sample(share, ray) * ray).clamp(p.lower, p.upper)
        near, far = torch.where(over, 0, near), torch.where(over, torch.inf, far)
        return BrendelBethgeState(x, ray, near, far, s.best, s.size, s.trust, s.changes)

    def _search(self, p: Problem, x: Inputs, e: Gradient, j: int) -> Inputs:
        noise = p.draws.fold(j).uniform(x.shape[1:], x.dtype) * p.box.width + p.box.lo - x
        blind = (e.grad == 0).flatten(1).all(1)
        length = min(0.5, 0.02 * 1.3**j) * p.box.width
        return x + choose(blind, noise * min(1.0, 0.1 * (j + 1)), length * e.grad.sign())


def _trusted(p: Problem, s: BrendelBethgeState, e: Gradient, reach: float) -> PerSample:
    """Return by how much the next radius is larger: more where the last step ended near the boundary, as predicted."""
    l2 = NORMS["l2"]
    away = e.loss.abs() / l2.dual(e.grad).clamp_min(TINY)
    flat = away < _FLAT * reach * s.trust * l2.size(s.x - p.x0)
    return torch.where(flat, _GROW * s.trust, s.trust / _SHRINK).clamp(1, _MOST)


def along_boundary(
    p: Problem, x: Inputs, e: Gradient, norm: Norm, reach: float | PerSample, beyond: float = 0.001
) -> Inputs:
    """Return what is smallest in ``norm`` near x on the boundary, as the gradient of the margin at x shows it.

    Near is what is no further in l2 than ``reach`` times the distance to the clean input.
    """
    steep = NORMS["l2"].dual(e.grad).clamp_min(TINY)
    normal = e.grad / per_sample(steep, e.grad)
    d, width = (x - p.x0) / p.box.width, p.box.width
    gap = -e.loss / (steep * width)
    # The boundary as seen from the clean input: what is aimed at lies a little behind.
    aim = gap + beyond * (inner(normal, d) + gap).abs()
    span = NORMS["l2"].size(d) + (norm.name == "l0")  # one value may have to cross the box
    lo, hi = (p.lower - p.x0) / width, (p.upper - p.x0) / width
    return p.x0 + width * Region(d, normal, aim, reach * span, lo, hi).smallest(norm)


def outside(p: Problem) -> Inputs:
    """Draw smooth random images (of other inputs: noise) that use the whole box."""
    shape, dtype = p.x0.shape[1:], p.x0.dtype
    if len(shape) == 3:
        coarse = p.draws.normal((shape[0], -(-shape[1] // 4), -(-shape[2] // 4)), dtype)
        noise = F.interpolate(coarse, size=tuple(shape[1:]), mode="bicubic")
    else:
        noise = p.draws.normal(shape, dtype)
    return p.box.lo + p.box.width * torch.sigmoid(3 * noise)


def _fresh(p: Problem, x: Inputs) -> BrendelBethgeState:
    """Return the state of a walk that knows nothing yet."""
    never = p.full(torch.inf)
    return BrendelBethgeState(x, torch.zeros_like(x), p.full(0.0), never, x, never, p.full(1.0), Changes.none(p))


def _length(norm: Norm) -> Norm:
    """Return by what rays are compared: along a ray, a count of coordinates says nothing."""
    return NORMS["l2"] if norm.name == "l0" else norm


class Region(NamedTuple):
    """Where the next perturbation may lie: on a plane, not far from d, and inside the box."""

    d: Inputs
    normal: Inputs  # of length 1
    aim: PerSample  # distance of the plane from d
    radius: PerSample
    lo: Inputs
    hi: Inputs

    def smallest(self, norm: Norm) -> Inputs:
        """Return the smallest perturbation of the region, or, where it is empty, the nearest to the plane."""
        goal = to_plane(norm, self.normal, -self.aim - inner(self.normal, self.d), self.lo, self.hi).d
        fits = self._away(goal) <= self.radius
        if fits.all():
            return goal
        flat = to_plane(NORMS["l2"], self.normal, -self.aim, self.lo - self.d, self.hi - self.d).d
        shrink = (self.radius / NORMS["l2"].size(flat).clamp_min(TINY)).clamp_max(1)
        near = (self.d + per_sample(shrink, flat) * flat).clamp(self.lo, self.hi)
        settled = fits | (shrink < 1)
        if norm.name == "linf":
            far = self._squeezed(near, goal)
        else:
            far = self._between(near, goal) if norm.name == "l2" else self._pulled(norm, near, settled)
        return choose(fits, goal, choose(settled, near, far))

    def _between(self, near: Inputs, goal: Inputs) -> Inputs:
        """Return the point from ``near`` to ``goal`` that is as far from d as the radius allows."""
        way, step = goal - near, near - self.d
        a, b, c = inner(way, way), inner(way, step), inner(step, step) - self.radius.square()
        share = ((b.square() - a * c).clamp_min(0).sqrt() - b) / a.clamp_min(TINY)
        return (near + per_sample(share.clamp(0, 1), way) * way).clamp(self.lo, self.hi)

    def _squeezed(self, near: Inputs, goal: Inputs) -> Inputs:
        """Return the smallest perturbation in linf that the radius allows: bisection over its size."""
        size, best = NORMS["linf"].size, near
        low, high = size(goal), size(near)
        for _ in range(_SQUEEZES):
            top = per_sample((low + high) / 2, near)
            lo, hi = torch.maximum(self.lo, -top), torch.minimum(self.hi, top)
            z = self.d.clamp(lo, hi)
            move = to_plane(NORMS["l2"], self.normal, inner(self.normal, z - self.d) - self.aim, lo - z, hi - z)
            z = z + move.d
            fits = move.arrives & (self._away(z) <= self.radius)
            best = choose(fits, z, best)
            low, high = torch.where(fits, low, (low + high) / 2), torch.where(fits, (low + high) / 2, high)
        return best

    def _pulled(self, norm: Norm, best: Inputs, settled: Mask) -> Inputs:
        """Return the perturbation that the strongest possible pull leads to: bisection, with good guesses."""
        pull = PULLS[norm.name]
        weak, strong = torch.zeros_like(self.aim), torch.full_like(self.aim, torch.inf)
        strength, push = self.radius / NORMS["l0"].size(self.d).clamp_min(1).sqrt(), self.aim
        for _ in range(_PULLS):
            z, push, arrives = self._pushed(pull, strength, push, settled)
            away = self._away(z)
            fits = arrives & (away <= self.radius)
            best = choose(fits & ~settled, z, best)
            weak, strong = torch.where(fits, strength, weak), torch.where(fits, strong, strength)
            settled = settled | (fits & (away > _FULL * self.radius))
            if settled.all():
                break
            ratio = ((1 + _FULL) / 2 * self.radius / away.clamp_min(TINY)).clamp(0.1, 10)
            new = torch.where(arrives, strength * ratio, torch.inf)
            middle = torch.where(strong.isinf(), 2 * weak, (weak + strong) / 2)
            new = torch.where((new > weak) & (new < strong), new, middle)
            push, strength = self.aim + (push - self.aim) * new / strength, new
        return best

    def _pushed(
        self, pull: "Pull", strength: PerSample, push: PerSample, settled: Mask
    ) -> tuple[Inputs, PerSample, Mask]:
        """Return the pulled perturbation on the plane, the push that leads there, and whether it does.

        Newton's method for d + push * normal, kept inside a bracket.
        """
        low, high = torch.full_like(push, -torch.inf), torch.full_like(push, torch.inf)
        kept, t = self.d + per_sample(push, self.d) * self.normal, per_sample(strength, self.d)
        for _ in range(_PUSHES):
            raw = pull(self.d + per_sample(push, self.d) * self.normal, t, kept)
            z = raw.clamp(self.lo, self.hi)
            free = torch.where((raw == z) & (z != 0), self.normal, 0)
            missing, slope = self.aim - inner(self.normal, z - self.d), inner(free, free)
            arrives = missing.abs() <= _CLOSE * self.radius
            if (arrives | settled).all():
                break
            low, high = torch.where(missing > 0, push, low), torch.where(missing > 0, high, push)
            new = push + missing / slope.clamp_min(TINY)
            beyond = push + missing.sign() * (2 * push.abs() + 0.01)
            middle = torch.where(low.isinf() | high.isinf(), beyond, (low + high) / 2)
            new = torch.where((new > low) & (new < high) & (slope > 1e-9), new, middle)
            push = torch.where(arrives | settled, push, new)
        return z, push, arrives

    def _away(self, z: Inputs) -> PerSample:
        return NORMS["l2"].size(z - self.d)


Pull: TypeAlias = Callable[[Inputs, Inputs, Inputs], Inputs]
"""From a point v, a strength and a point that v was guessed to be, to a point with more zeros."""


def _pull_l1(v: Inputs, strength: Inputs, _: Inputs) -> Inputs:
    return toward_zero(v, strength)


def _pull_l0(v: Inputs, strength: Inputs, kept: Inputs) -> Inputs:
    # Which coordinates stay is settled by the guess, for else there are pushes where z jumps over the plane.
    return torch.where(kept.abs() > strength, v, 0)


PULLS: dict[str, Pull] = {"l1": _pull_l1, "l0": _pull_l0}
