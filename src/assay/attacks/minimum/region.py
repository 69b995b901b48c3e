"""Where the next perturbation may lie: on the boundary as a gradient shows it, not far away, and inside the box."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch

from assay.core.types import Inputs, Mask, PerSample, choose, per_sample
from assay.models.door import Gradient
from assay.threats.norms import NORMS, TINY, Norm, toward_zero
from assay.threats.planes import inner, to_plane
from assay.threats.problem import Problem

_PULLS, _PUSHES, _SQUEEZES = 6, 12, 8
"""Most trials that settle how strong a pull the trust region allows, how long a push reaches the plane, and how small a
perturbation in linf may be."""

_FULL, _CLOSE = 0.85, 1e-3
"""Shares of the radius: a step so long is long enough, and a point so near the plane is on it."""


def along_boundary(
    p: Problem, x: Inputs, e: Gradient, norm: Norm, reach: float | PerSample, beyond: float | PerSample = 0.001
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
