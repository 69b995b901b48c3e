"""What the attacks that linearise the decision boundary share: gaps to rivals, the nearest facet, the last search."""

from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from assay.attacks.loop import HasX, SlopesAttack
from assay.attacks.losses import margin, pick
from assay.core.types import Inputs, Logits, Mask, PerSample, choose, per_sample
from assay.models.door import Slopes
from assay.threats.norms import TINY, Norm
from assay.threats.planes import Move, inner, to_plane
from assay.threats.problem import Goal, Problem


def nudge(p: Problem, x: Inputs, norm: Norm) -> PerSample:
    """Return how far beyond a boundary to aim, for two logits that tie are no success: 0.1 % of the perturbation."""
    return 0.001 * norm.size(x - p.x0) + 1e-6 * p.box.width


def gaps(logits: Logits, goal: Goal, most: int) -> Tensor:
    """Return how far ahead of the label the ``most`` strongest rivals are (b, m), the strongest first.

    Where the goal names a target, there is one gap, the margin.
    """
    if goal.label is None or goal.target is not None:
        return margin(logits, goal)[:, None]
    others = logits.scatter(1, goal.label[:, None], -torch.inf)
    rivals = others.topk(min(most, logits.shape[1] - 1), 1).values
    return rivals - pick(logits, goal.label)[:, None]


S = TypeVar("S", bound=HasX)


class BoundaryAttack(SlopesAttack[S]):
    """A minimal-norm attack that linearises the gaps to the ``rivals`` strongest other classes."""

    __slots__ = ()
    any_size: ClassVar[bool] = True
    minimal: ClassVar[bool] = True
    rivals: int

    @property
    def functions(self) -> int:
        return self.rivals

    def measure(self, logits: Logits, goal: Goal) -> Tensor:
        return gaps(logits, goal, self.rivals)


def crossing(p: Problem, x: Inputs, e: Slopes, norm: Norm | None = None) -> Inputs:
    """Return the way to the nearest linearised boundary with no regard to the box, but no longer than it is wide."""
    norm = p.norm if norm is None else norm
    b, m = e.values.shape
    far = e.values.abs() / norm.dual(e.slopes.flatten(0, 1)).view(b, m).clamp_min(TINY)
    slope = _pick(e.slopes, far.argmin(1))
    most = norm.diameter(p.box.width, slope[0].numel())
    length = torch.maximum(far.amin(1), nudge(p, x, norm)).clamp_max(most)
    return per_sample(length, slope) * norm.steepest(slope)


def winning(e: Slopes) -> Inputs:
    """Return the gradient of the gap to the strongest rival."""
    return _pick(e.slopes, e.values.argmax(1))


def _pick(v: Tensor, which: Tensor) -> Tensor:
    return v[torch.arange(len(v), device=v.device), which]


class Facet(NamedTuple):
    """A piece of the linearised decision boundary, seen from a point."""

    gap: PerSample  # what its linear function is at the point
    slope: Inputs
    d: Inputs  # the way there


def nearest_facet(p: Problem, x: Inputs, e: Slopes, d: Inputs | None = None) -> Facet:
    """Return the facet nearest to x + d of those that were linearised at x; a facet out of the box comes last."""
    at = x if d is None else x + d
    values = e.values if d is None else e.values + (e.slopes * d[:, None]).flatten(2).sum(2)
    b, m = values.shape
    values = values - nudge(p, at, p.norm)[:, None] * p.norm.dual(e.slopes.flatten(0, 1)).view(b, m)
    lo, hi = (v.repeat_interleave(m, 0) for v in (p.lower - at, p.upper - at))
    move = to_plane(p.norm, e.slopes.flatten(0, 1), values.flatten(), lo, hi)
    far = torch.where(move.arrives, p.norm.size(move.d), torch.inf).view(b, m)
    first = torch.arange(b, device=x.device) * m + far.argmin(1)
    return Facet(values.flatten()[first], e.slopes.flatten(0, 1)[first], move.d[first])


def from_clean(p: Problem, x: Inputs, facet: Facet) -> Move:
    """Return the way from the clean input to a facet that was seen from x."""
    gap = facet.gap + inner(facet.slope, p.x0 - x)
    return to_plane(p.norm, facet.slope, gap, p.lower - p.x0, p.upper - p.x0)


class Ray(NamedTuple):
    """The smallest success so far, and where the boundary is between it and the clean input.

    ``low`` and ``high`` are shares of the way from the clean input at which the goal was missed and met.
    """

    end: Inputs
    size: PerSample
    low: PerSample
    high: PerSample
    low_gap: PerSample
    high_gap: PerSample

    @classmethod
    def start(cls, p: Problem) -> "Ray":
        zero = p.full(0.0)
        return cls(p.x0, p.full(torch.inf), zero, zero + 1, zero - 1, zero)

    def seen(self, p: Problem, x: Inputs, e: Slopes, rows: Mask | None = None) -> "Ray":
        """Return the ray after x was asked: it ends there if that is the smallest success; of ``rows``, where given."""
        gap, size = e.values.amax(1), p.size(x)
        better = e.success & (size < self.size)
        if rows is not None:
            better = better & rows
        return self._replace(
            end=choose(better, x, self.end),
            size=torch.where(better, size, self.size),
            high_gap=torch.where(better, gap, self.high_gap),
            low_gap=torch.where((size == 0) & ~e.success, gap, self.low_gap),
        )

    def ending(self, p: Problem, x: Inputs, e: Slopes, rows: Mask) -> "Ray":
        """Return the ray that ends at x for ``rows``, be it the smallest success or not."""
        return self._replace(
            end=choose(rows, x, self.end),
            size=torch.where(rows, p.size(x), self.size),
            high_gap=torch.where(rows, e.values.amax(1), self.high_gap),
        )

    def share(self) -> PerSample:
        """Return where the gap is zero if it is linear in between, and a tenth of the rest beyond."""
        rise = (self.high_gap - self.low_gap).clamp_min(torch.finfo(self.low.dtype).tiny)
        zero = (-self.low_gap / rise).clamp(0, 1)
        return self.low + (self.high - self.low) * (0.1 + 0.9 * zero).clamp_max(0.99)

    def point(self, p: Problem) -> Inputs:
        """Return the next point to ask."""
        return (p.x0 + per_sample(self.share(), p.x0) * (self.end - p.x0)).clamp(p.lower, p.upper)

    def narrowed(self, e: Slopes, rows: Mask | None = None) -> "Ray":
        """Return the ray after its point was asked; of ``rows`` only, where given."""
        at, gap = self.share(), e.values.amax(1)
        met, missed = e.success, ~e.success
        if rows is not None:
            met, missed = met & rows, missed & rows
        return self._replace(
            low=torch.where(missed, at, self.low),
            high=torch.where(met, at, self.high),
            low_gap=torch.where(missed, gap, self.low_gap),
            high_gap=torch.where(met, gap, self.high_gap),
        )
