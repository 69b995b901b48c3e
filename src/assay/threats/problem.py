"""One batch to attack: all that an attack may look at besides the model's answers."""

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from assay.core.random import Draws
from assay.core.types import Inputs, Labels, Logits, Mask, PerSample, Rows, per_sample
from assay.threats.levels import snapped
from assay.threats.norms import TINY, Norm
from assay.threats.threat import Box, Threat

_INSIDE = 1 - 1e-6
"""Balls that are no box are used a millionth short, so that float32 rounding of x0 + d cannot leave them."""

ROUNDING = 2e-6
"""Share of the larger of two logits by which float32 networks may differ between batches, kernels and machines."""


STARTS = ("uniform", "sphere", "clean")
"""Where attacks can start; see :meth:`Problem.start`."""


@final
@dataclass(frozen=True, slots=True)
class Goal:
    """What counts as success: to leave ``label``, or, where there is no label, to reach ``target``.

    With both, success is to leave ``label``; ``target`` is the class by way of which the loss tries it.
    ``weights`` is what else a loss needs to know: for ``along`` a direction (b, c) in output space.
    """

    label: Labels | None
    target: Labels | None = None
    weights: Tensor | None = None

    def reached(self, logits: Logits) -> Mask:
        guess = logits.argmax(1)
        if self.label is not None:
            return guess != self.label
        assert self.target is not None
        return guess == self.target

    def clearly_reached(self, logits: Logits, rounding: float = ROUNDING) -> Mask:
        """Tell where the goal is met by more than rounding: in another batch, or on another machine, it still is.

        ``rounding`` is a share of the larger of two logits.
        """
        own = self.label if self.label is not None else self.target
        assert own is not None
        mine = logits.gather(1, own[:, None])[:, 0]
        rival = logits.scatter(1, own[:, None], -torch.inf).amax(1)
        ahead = rival - mine if self.label is not None else mine - rival
        return ahead > rounding * torch.maximum(mine.abs(), rival.abs())

    def take(self, rows: Rows | slice) -> "Goal":
        return Goal(*(None if v is None else v[rows] for v in (self.label, self.target, self.weights)))


@final
@dataclass(frozen=True, slots=True)
class Problem:
    """Samples with their goal, the geometry around them, and their random numbers; one row a sample throughout.

    ``lower`` and ``upper`` (b, *f) are the box and, for linf, the ball, rounded inwards: a point between them is inside
    in exact arithmetic. ``rows`` are the positions under which the door to the model counts the samples.
    """

    x0: Inputs
    goal: Goal
    norm: Norm
    box: Box
    radius: PerSample  # eps, rounded down to the precision of x0; inf where the smallest perturbation is wanted
    minimal: bool
    lower: Inputs
    upper: Inputs
    draws: Draws
    rows: Rows
    levels: int | None = None  # allowed points are lo plus multiples of width / levels, so that they can be saved
    warm: Inputs | None = None  # where to start, if an earlier attack says so
    clean_logits: Logits | None = None  # if known already
    order: Labels | None = None  # (b, c): classes, the most promising target first, if an earlier attack says so

    @classmethod
    def pose(cls, x0: Inputs, y: Labels, threat: Threat, draws: Draws, rows: Rows | None = None) -> "Problem":
        """Pose the problem of ``threat`` (its box settled) for clean inputs x0 (b, *f) and labels or targets y (b,)."""
        box = threat.box or Box()
        goal = Goal(None, y) if threat.targeted else Goal(y)
        eps = x0.new_full((len(x0),), torch.inf if threat.eps is None else threat.eps, dtype=torch.float64)
        radius = _round_down(eps, x0.dtype)
        lower, upper = _bounds(x0, threat.norm, box, radius)
        rows = torch.arange(len(x0), device=x0.device) if rows is None else rows
        levels = None if threat.quantize is None else 2**threat.quantize - 1
        return cls(x0, goal, threat.norm, box, radius, threat.eps is None, lower, upper, draws, rows, levels)

    def __len__(self) -> int:
        return len(self.x0)

    def take(self, rows: Rows) -> "Problem":
        """Return the problem of these samples only."""
        names = ("x0", "radius", "lower", "upper", "rows", "warm", "clean_logits", "order")
        values = {n: getattr(self, n) for n in names}
        cut = {n: v[rows] for n, v in values.items() if v is not None}
        return replace(self, goal=self.goal.take(rows), draws=self.draws.take(rows), **cut)

    def toward(self, target: Labels) -> "Problem":
        """Return the problem with a class to try; what counts as success stays."""
        return replace(self, goal=Goal(self.goal.label, target))

    def stage(self, number: int) -> "Problem":
        """Return the problem with random numbers of its own."""
        return replace(self, draws=self.draws.fold(number))

    def with_radius(self, radius: PerSample) -> "Problem":
        """Return the problem with a budget of its own for each sample."""
        radius = _round_down(radius.double(), self.x0.dtype)
        lower, upper = _bounds(self.x0, self.norm, self.box, radius)
        return replace(self, radius=radius, lower=lower, upper=upper, minimal=False)

    def unbounded(self) -> "Problem":
        """Return the problem with the box as its only bound: the smallest perturbation is wanted."""
        if self.minimal:
            return self
        lower, upper = (torch.full_like(self.x0, v) for v in (self.box.lo, self.box.hi))
        return replace(self, radius=self.full(torch.inf), lower=lower, upper=upper, minimal=True)

    def starting(self, x: Inputs) -> "Problem":
        """Return the problem with points x (b, *f), drawn into box and ball, to start from."""
        return replace(self, warm=self.project(x))

    def along(self, weights: Tensor) -> "Problem":
        """Return the problem with ``weights`` in its goal: for the loss ``along`` a direction (b, c)."""
        return replace(self, goal=replace(self.goal, weights=weights))

    def full(self, value: float) -> PerSample:
        return self.x0.new_full((len(self.x0),), value)

    def project(self, x: Inputs, radius: PerSample | None = None) -> Inputs:
        """Return the allowed point nearest to x: inside the box and inside the ball (of ``radius`` where given)."""
        if self.norm.is_box and radius is None:
            return x.clamp(self.lower, self.upper)
        r = (self.radius if radius is None else radius) * _INSIDE
        d = self.norm.project(x - self.x0, r, self.lower - self.x0, self.upper - self.x0)
        return _move(self.x0, d).clamp(self.lower, self.upper)

    def start(self, kind: str = "uniform") -> Inputs:
        """Return where to start: the warm point if there is one, else a point of this kind.

        ``clean`` is the clean input; ``uniform`` is drawn from the ball (of the width of the box where there is no
        radius), ``sphere`` from its surface. Box and ball bound them all.
        """
        if self.warm is not None:
            return self.warm
        if kind == "clean":
            return self.x0
        reach = torch.where(self.radius.isinf(), self.box.width, self.radius)
        d = self.norm.sample(self.x0, reach, self.draws)
        if kind == "sphere" and self.norm.name != "l0":
            d = d * per_sample(reach / self.norm.size(d).clamp_min(TINY), d)
        return self.project(self.x0 + d)

    def snap(self, x: Inputs) -> Inputs:
        """Return points as they are after saving, where ``levels`` says how; without levels, x.

        They are the nearest ones inside box and ball, where there are any there: a small ball around values between
        two levels may hold none.
        """
        if self.levels is None:
            return x
        power = {"l1": 1, "l2": 2}.get(self.norm.name)
        return snapped(x, self.x0, (self.lower, self.upper), self.radius, power, self.box, self.levels)

    def ascend(self, x: Inputs, grad: Inputs, length: PerSample, support: int | Tensor = 1) -> Inputs:
        """Take one projected step of ``length`` (in the threat's norm) in the direction of steepest ascent."""
        return self.project(x + per_sample(length, x) * self.norm.steepest(grad, support))

    def size(self, x: Inputs) -> PerSample:
        return self.norm.size(x - self.x0)

    def allows(self, x: Inputs) -> Mask:
        """Tell which points are inside box and ball, as far as the working precision can tell."""
        # Differences and their least value: half the time of comparing, and NaN is outside all the same.
        inside = ((x - self.lower).flatten(1).amin(1) >= 0) & ((self.upper - x).flatten(1).amin(1) >= 0)
        return inside if self.norm.is_box else inside & (self.size(x) <= self.radius)


def exact_size(norm: Norm, x: Inputs, x0: Inputs) -> PerSample:
    """Measure a perturbation in float64 from the stored values of both points, where their difference is exact."""
    return norm.size(x.double() - x0.double())


def _move(x0: Inputs, d: Inputs) -> Inputs:
    """Return x0 + d rounded towards x0, so that rounding many coordinates cannot add up to a larger perturbation."""
    x = x0 + d
    return torch.where((x - x0).abs() > d.abs(), torch.nextafter(x, x0), x)


def _bounds(x0: Inputs, norm: Norm, box: Box, radius: PerSample) -> tuple[Inputs, Inputs]:
    """Return the least and the largest point of the box (to working precision) and, for linf, of the ball (exact)."""
    lo, hi = (torch.full_like(x0, v) for v in (box.lo, box.hi))
    if not norm.is_box:
        return lo, hi
    exact, r = x0.double(), per_sample(radius.double(), x0)
    upper, lower = _sum_down(exact, r, x0.dtype), -_sum_down(-exact, r, x0.dtype)
    return torch.maximum(lo, torch.minimum(lower, x0)), torch.minimum(hi, torch.maximum(upper, x0))


def _sum_down(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest number of ``dtype`` that is at most a + b, where a and b are float64."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)  # what rounding a + b lost, exactly (Knuth's two-sum)
    total = torch.where(error < 0, torch.nextafter(total, torch.full_like(total, -torch.inf)), total)
    return _round_down(total, dtype)


def _round_down(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest numbers of ``dtype`` that are at most v (float64)."""
    near = v.to(dtype)
    return torch.where(near.double() > v, torch.nextafter(near, torch.full_like(near, -torch.inf)), near)
