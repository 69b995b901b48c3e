"""The Brendel-Bethge attack: walks along the boundary, one trust region after the other."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import margin
from assay.attacks.minimum.descent import cosine
from assay.attacks.minimum.refining import End
from assay.attacks.minimum.region import along_boundary
from assay.attacks.outside import smooth_noise, walk_length
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import NORMS, TINY, Norm
from assay.threats.problem import Problem

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
    end: End  # l0 only: the sparsest success of this walk


@final
@ATTACKS.register("brendel-bethge", norm=("linf", "l2", "l1", "l0"), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class BrendelBethge(GradientAttack[BrendelBethgeState]):
    """From an adversarial point to the boundary, and along it to the point that is nearest to the clean input.

    x' = argmin ||z - x0|| over the box, where <g, z - x> = -f(x) (the boundary as the gradient g of the margin f
    shows it) and ||z - x||_2 <= r. Where there is no such z, x' goes as far to the plane as r allows.
    A walk starts at the nearest point of the boundary on rays from the clean input to smooth random images.

    *Sees* the gradient. *Cost* ``steps`` + 1 forwards, ``steps`` backwards but for ``starts`` a walk and, in l0,
    ``undo``.

    Args:
        steps: number of queries.
        walk: number of queries of a walk, about; with more steps there are more walks.
        starts: number of queries for a start, at most a quarter of the walk; they need no gradient.
        blend: first share of the outside image in the start.
        reach: first r as a share of the l2 distance to the clean input; it falls to 0 along half a cosine. As long as
            steps end near the boundary, r grows beyond that, up to three times.
        beyond: share of the boundary's distance by which the point aimed at lies behind it.
        sparse: l0 only: share of the walk that makes the l1 norm small, which makes many coordinates zero.
        undo: l0 only: number of queries at the end of a walk, at most a quarter of it, that undo one change each; they
            need no gradient.
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
        length = walk_length(self.steps, self.walk)
        return k % length, min(length, self.steps - k // length * length)

    def _first(self, length: int) -> int:
        """Return the place in a walk of the start's last query, the first with a gradient."""
        return min(self.starts, length // 4)

    def _undoing(self, length: int) -> int:
        """Return how many of the ``length`` queries after the start undo changes in l0."""
        return min(self.undo, length // 4)

    def blind(self, p: Problem, k: int) -> bool:
        j, length = self._place(k)
        walk = length - self._first(length)
        return p.norm.name == "l0" and length - j < self._undoing(walk)

    def init(self, p: Problem) -> BrendelBethgeState:
        return _fresh(p, p.start("clean"))

    def update(self, p: Problem, s: BrendelBethgeState, e: Gradient, k: int) -> BrendelBethgeState:
        size = _length(p.norm).size(s.x - p.x0)
        better = e.success & (size < s.size)
        s = s._replace(best=choose(better, s.x, s.best), size=torch.where(better, size, s.size))
        if p.norm.name == "l0":
            s = s._replace(end=s.end.tried(p, s.x, e.success) if self.blind(p, k) else s.end.seen(p, s.x, e))
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
            length -= self._undoing(length)
        if j >= length:
            x, end = s.end.undone(p)
            return s._replace(x=x, end=end)
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
        ray = smooth_noise(p.stage(k)) - p.x0
        blend = min(1.0, self.blend * (1 + self._place(k)[0] / 4))
        hope = torch.where(s.size.isfinite(), 0.95 * s.size / norm.size(ray).clamp_min(TINY), blend).clamp_max(1)
        ray, share = choose(over, ray, s.ray), torch.where(over, hope, (near + far) / 2)
        x = (p.x0 + per_sample(share, ray) * ray).clamp(p.lower, p.upper)
        near, far = torch.where(over, 0, near), torch.where(over, torch.inf, far)
        return BrendelBethgeState(x, ray, near, far, s.best, s.size, s.trust, s.end)

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


def _fresh(p: Problem, x: Inputs) -> BrendelBethgeState:
    """Return the state of a walk that knows nothing yet."""
    never = p.full(torch.inf)
    return BrendelBethgeState(x, torch.zeros_like(x), p.full(0.0), never, x, never, p.full(1.0), End.none(p))


def _length(norm: Norm) -> Norm:
    """Return by what rays are compared: along a ray, a count of coordinates says nothing."""
    return NORMS["l2"] if norm.name == "l0" else norm
