"""The Brendel-Bethge attack: a walk along the boundary, one trust region after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import NORMS, TINY
from assay.threats.problem import Problem

Pull: TypeAlias = Callable[["Region", Inputs, Tensor], Inputs]
"""From a region, a point v and a strength from 0 to 1 to a point of the box that is v at strength 0, and else smaller.

It minimises the size plus a multiple of the squared distance to v; the stronger the pull, the smaller the multiple.
"""

_FAR = 100.0
"""Threshold of the strongest pull in units of the box: far above every perturbation, so that only the normal counts."""

_PULLS, _PUSHES = 12, 26
"""Halvings that settle how strong a pull the trust region allows, and how long a push reaches the plane."""


class BrendelBethgeState(NamedTuple):
    """The point, the two ends of the bisection, and how far each sample has come."""

    x: Inputs
    near: Inputs  # does not meet the goal
    far: Inputs  # meets it, where ``halvings`` is not negative
    halvings: PerSample  # -1: no start yet, inf: the clean input is one
    walked: PerSample  # steps of the walk


@final
@ATTACKS.register("brendel-bethge", norm=("linf", "l2", "l1", "l0"), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class BrendelBethge(GradientAttack[BrendelBethgeState]):
    """From an adversarial point to the boundary, and along it to the point that is nearest to the clean input.

    x' = argmin ||z - x0|| over the box, where <g, z - x> = -f(x) (the boundary as the gradient g of the margin f
    shows it) and ||z - x||_2 <= r. Where no z can be had, x' goes as far to the plane as r allows.
    The start is found by ever longer steps of gradient signs, or of noise where there is no gradient, and bisection.

    *Sees* the gradient. *Cost* ``steps`` + 1 forwards, ``steps`` backwards, the start included.

    Args:
        steps: number of queries.
        reach: first r as a share of the l2 distance to the clean input; it falls to 0 along half a cosine.
        beyond: share of the boundary's distance by which the point aimed at lies behind it.
        halvings: queries of the bisection.
        loss: f, positive where the goal is met.

    *Differs from the paper in*: the start (the paper takes an adversarial point of any kind); r follows the size of the
    perturbation; the problem is solved by two nested bisections, all samples at once: over the multiplier of the plane,
    and over that of the trust region.

    References:
        Brendel et al. 2019, arXiv:1907.01003, sec. 2 and appendix.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    minimal: ClassVar[bool] = True
    any_size: ClassVar[bool] = True
    steps: int = 100
    reach: float = 0.5
    beyond: float = 0.005
    halvings: int = 5
    loss: Loss = margin

    def init(self, p: Problem) -> BrendelBethgeState:
        x = p.start("clean")
        return BrendelBethgeState(x, p.x0, x, p.full(-1.0), p.full(0.0))

    def update(self, p: Problem, s: BrendelBethgeState, e: Gradient, k: int) -> BrendelBethgeState:
        begun = s.halvings >= 0
        bisecting = begun & (s.halvings < self.halvings)
        starts = ~begun & e.success
        far = choose(starts | (bisecting & e.success), s.x, s.far)
        near = choose(bisecting & ~e.success, s.x, s.near)
        halvings = torch.where(starts, 0, s.halvings + bisecting)
        halvings = torch.where(starts & (s.x == p.x0).flatten(1).all(1), torch.inf, halvings)
        middle = choose(halvings < self.halvings, near + (far - near) / 2, far)
        walking = begun & ~bisecting
        x = choose(walking, self._walk(p, s, e), choose(halvings >= 0, middle, self._search(p, s.x, e, k)))
        return BrendelBethgeState(x.clamp(p.lower, p.upper), near, far, halvings, s.walked + walking)

    def done(self, s: BrendelBethgeState) -> Mask:
        return s.halvings.isinf()

    def _search(self, p: Problem, x: Inputs, e: Gradient, k: int) -> Inputs:
        noise = p.draws.fold(k).uniform(x.shape[1:], x.dtype) * p.box.width + p.box.lo - x
        blind = (e.grad == 0).flatten(1).all(1)
        length = min(0.5, 0.02 * 1.3**k) * p.box.width
        return x + choose(blind, noise * min(1.0, 0.1 * (k + 1)), length * e.grad.sign())

    def _walk(self, p: Problem, s: BrendelBethgeState, e: Gradient) -> Inputs:
        fade = (1 + torch.cos(torch.pi * s.walked / self.steps)) / 2
        steep = NORMS["l2"].dual(e.grad).clamp_min(TINY)
        normal = e.grad / per_sample(steep, e.grad)
        d, width = (s.x - p.x0) / p.box.width, p.box.width
        to_plane = -e.loss / (steep * width)
        # The boundary as seen from the clean input: what is aimed at lies a little behind.
        aim = to_plane + self.beyond * (_dot(normal, d) + to_plane).abs()
        span = NORMS["l2"].size(d) + (p.norm.name == "l0")  # one value may have to cross the box
        lo, hi = (p.lower - p.x0) / width, (p.upper - p.x0) / width
        region = Region(d, normal, aim, fade * self.reach * span, lo, hi)
        return p.x0 + width * region.smallest(PULLS[p.norm.name])


class Region(NamedTuple):
    """Where the next perturbation may lie: on a plane, not far from d, and inside the box."""

    d: Inputs
    normal: Inputs  # of length 1
    aim: PerSample  # distance of the plane from d
    radius: PerSample
    lo: Inputs
    hi: Inputs

    def smallest(self, pull: Pull) -> Inputs:
        """Return the perturbation that the strongest possible pull leads to."""
        none = torch.zeros_like(self.aim)
        weak, strong = none, none + 1
        best, _ = self.on_plane(pull, none)
        length = NORMS["l2"].size(best - self.d)
        best = self.d + (best - self.d) * per_sample((self.radius / length.clamp_min(TINY)).clamp_max(1), best)
        strength = strong
        for _ in range(_PULLS):
            z, reached = self.on_plane(pull, strength)
            fits = reached & (NORMS["l2"].size(z - self.d) <= self.radius)
            best = choose(fits, z, best)
            weak, strong = torch.where(fits, strength, weak), torch.where(fits, strong, strength)
            strength = (weak + strong) / 2
        return best

    def on_plane(self, pull: Pull, strength: PerSample) -> tuple[Inputs, Mask]:
        """Return the pulled perturbation with the least push that reaches the plane, and whether it does."""
        s, span = per_sample(strength, self.d), 4 * self.d[0].numel() ** 0.5 * (1 + _FAR * strength**3)
        low, high = -span, span
        for _ in range(_PUSHES):
            push = (low + high) / 2
            short = _dot(self.normal, self._at(pull, push, s) - self.d) < self.aim
            low, high = torch.where(short, push, low), torch.where(short, high, push)
        z = self._at(pull, high, s)
        return z, _dot(self.normal, z - self.d) >= self.aim

    def _at(self, pull: Pull, push: PerSample, strength: Tensor) -> Inputs:
        return pull(self, self.d + per_sample(push, self.d) * self.normal, strength)


def _pull_l2(r: Region, v: Inputs, strength: Tensor) -> Inputs:
    return (v - strength * r.d).clamp(r.lo, r.hi)


def _pull_linf(r: Region, v: Inputs, strength: Tensor) -> Inputs:
    cap = 2 * (1 - strength) * per_sample(NORMS["linf"].size(r.d), v)  # twice as large as d, or less
    return v.clamp(torch.maximum(r.lo, -cap), torch.minimum(r.hi, cap))


def _pull_l1(r: Region, v: Inputs, strength: Tensor) -> Inputs:
    return (v.sign() * (v.abs() - _FAR * strength**3).clamp_min(0)).clamp(r.lo, r.hi)


def _pull_l0(r: Region, v: Inputs, strength: Tensor) -> Inputs:
    z = v.clamp(r.lo, r.hi)
    return torch.where(z * (2 * v - z) > _FAR * strength**3, z, 0)  # v^2 - (v - z)^2: what giving z up would cost


PULLS: dict[str, Pull] = {"linf": _pull_linf, "l2": _pull_l2, "l1": _pull_l1, "l0": _pull_l0}


def _dot(a: Inputs, b: Inputs) -> PerSample:
    return (a * b).flatten(1).sum(1)
