"""Bounds around one point of each region, with coefficients in float32: for very many neurons of deep networks.

In differences from the values at a point c of the region, ``y - y_c``, constants of affine steps fall away, and what
float32 rounds off is a share of the width of the bounds, not of the values. All of it is counted, so that bounds are as
sure as those in float64 (``docs/verified-arithmetic.md``). Deep in a network interval arithmetic leaves nearly every
sign open, and nearly all of these are settled by one band of two parallel lines around each ReLU: one pass for both
sides. Only what is open after that is asked about again, side by side, with the lines of CROWN.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from assay.certification.bounds import FLOAT32, Bounds, dense, gamma
from assay.certification.graph import Graph, Step
from assay.certification.region import Region
from assay.certification.rules import Affine, Band, Lines, Pair, Relaxed, dot
from assay.certification.windows import Windows, chosen

_UNIT = FLOAT32.unit
_GUARD = 2.0**-46
"""Relative error, with much to spare, of the few float64 operations that lines are made with."""

_SMALLEST = 2.0**-126
"""Coefficients below this may be flushed to zero."""

_PAYS = 2**20
"""Coefficients of one backward pass for all wanted neurons from which on this is faster than float64."""


class Side(NamedTuple):
    """A line ``slope * d + shift`` (n, *shape) on one side of a function, for a difference d of its argument."""

    slope: Tensor  # a float32 number, in float64
    shift: Tensor


@final
@dataclass(slots=True)
class Centred:
    """Bounds of differences from the values at a point of each region, made of ``bounds`` as these grow tighter.

    ``bands`` and ``lines`` are two of them: with one slope for both sides of each function, and with CROWN's two. Their
    ``slack`` is all that may be added to a step: the allowance of the network's rounding and that of this computation.
    """

    bounds: Bounds
    bands: Bounds
    lines: Bounds
    values: list[Tensor]
    floor: float = 0.0  # what underflow may cost

    @classmethod
    def of(cls, bounds: Bounds, quick: Graph) -> "Centred":
        """Return those of bounds in float64, with the steps of ``quick`` in float32."""
        r = bounds.region
        at = (r.low + r.high) / 2 if r.norm == "linf" else r.x
        around = Region(r.x - at, r.low - at, r.high - at, r.norm, r.radius)
        steps = tuple(_differences(step) for step in quick.steps)
        bands, lines = (Bounds(Graph(steps, quick.dtype), around, bounds.arithmetic) for _ in range(2))
        return cls(bounds, bands, lines, bounds.graph.values(at))

    def pays(self, v: int, wanted: Tensor) -> Tensor:
        """Return for which regions (n,) to bound the ``wanted`` entries of step v here.

        There where these are many, and lines bound all steps before.
        """
        size = sum(math.prod(step.shape) for step in self.bounds.graph.steps[: v + 1])
        many = wanted.flatten(1).sum(1) * size >= _PAYS
        return many if _sure(wanted) and many.any() and self._extend(v) else torch.zeros_like(many)

    def by_bands(self, v: int, rows: Tensor, at: Tensor) -> Pair:
        """Return bounds (k, m) of the entries ``at`` (k, m) of step v, on the regions ``rows`` (k,), in one pass."""
        part, constants, wobbles = _take(self.bands, rows), [], []

        def pull(w: int, a_w: "Tensor | Windows") -> "tuple[Tensor | Windows, ...]":
            parts, constant, wobble = part.pull(w, a_w)
            constants.append(constant.double())
            wobbles.append(wobble.double())
            return parts

        with _plain():
            a_0 = part.backward(v, self._entries(v, at, torch.ones(at.shape)), pull)
        middle, spread = torch.stack(constants).sum(0), torch.stack(wobbles).sum(0) + self.floor
        low = high = middle
        if a_0 is not None:
            flat = dense(a_0).double().reshape(*at.shape, *part.region.x.shape[1:])
            spread = spread + dot(flat.abs(), part.slack[0].double())
            low, high = middle + part.region.least(flat), middle - part.region.least(-flat)
        here = self.values[v].flatten(1)[rows].gather(1, at)
        return _finite(here + low - spread, here + high + spread)

    def by_lines(self, v: int, rows: Tensor, at: Tensor) -> Pair:
        """Return the same, each side by a pass of its own."""
        ones = torch.ones(at.shape)
        both = self._entries(v, torch.cat([at, at], 1), torch.cat([ones, -ones], 1))
        with _plain():
            found = _take(self.lines, rows).lower(v, both)
        below, above = torch.split(found - self.floor, at.shape[1], 1)
        here = self.values[v].flatten(1)[rows].gather(1, at)
        return _finite(here + below, here - above)

    def _entries(self, v: int, at: Tensor, sign: Tensor) -> "Tensor | Windows":
        return chosen(at, sign, self.bounds.graph.steps[v].shape)

    def _extend(self, v: int) -> bool:
        """Make what is lacking up to step v; False where a step is not bounded by lines of one variable."""
        for w in range(len(self.bands.slack), v + 1):
            rule = self.bounds.graph.steps[w].rule
            if isinstance(rule, Affine) and rule.signs == "positive" and rule.absolute is not None:
                return False  # weights that float32 has with an absolute error, as of interpolation
            if rule is None or isinstance(rule, Affine):
                slack = self._affine(w, rule)
                self._add(w, slack, slack)
            elif isinstance(lines := self.bounds.relaxed(w), Lines):
                self._lines(w, lines)
            else:
                return False
        return True

    def _add(self, w: int, *slack: Tensor) -> None:
        """Keep the allowance of step w, rounded upward, with what sums of products with it round off."""
        entries = self.values[w][0].numel()
        self.floor += _SMALLEST * 2 * entries * (entries + 4) * (1 + float(self._reach(w).amax()))
        more = 1 + 4 * gamma(entries + 16, _UNIT)
        for kept, s in zip((self.bands.slack, self.lines.slack), slack, strict=True):
            kept.append((s * more).float())

    def _reach(self, w: int) -> Tensor:
        """Return how far step w gets from its value at the point (n, *shape)."""
        low, high = self.bounds.pairs[w]
        return torch.maximum(high - self.values[w], self.values[w] - low).clamp_min(0)

    def _affine(self, w: int, rule: Affine | None) -> Tensor:
        """Return the allowance (n, *shape): what the network rounds, and what float32 does to the coefficients.

        An entry of them is a sum of ``fan`` products, each with few roundings of its own; sums over consumers follow.
        """
        step, base = self.bounds.graph.steps[w], self.bounds.slack[w]
        if rule is None:
            return base
        moved = rule.spread(*(self._reach(i) for i in step.inputs))
        return base + moved * gamma(rule.fan + len(self.values) + 16, _UNIT)

    def _lines(self, w: int, lines: Lines) -> None:
        """Keep the lines around step w, for differences, and their allowances."""
        (i,) = self.bounds.graph.steps[w].inputs
        pair, x, y = self.bounds.pairs[i], self.values[i], self.values[w]
        slope = lines.high.float().double()
        free = torch.zeros_like(slope, dtype=torch.bool) if lines.free is None else lines.free
        low0 = torch.zeros_like(slope) if lines.low0 is None else lines.low0
        above = _side(lines.high, lines.high0, slope, pair, x, y, torch.maximum)
        below = _side(lines.low, low0, lines.low.float().double(), pair, x, y, torch.minimum)
        # Below a ReLU, any slope in [0, 1] will do: the one above too.
        beside = _side(torch.where(free, slope, lines.low), low0, slope, pair, x, y, torch.minimum)
        middle, half = (above.shift + beside.shift) / 2, ((above.shift - beside.shift) / 2).clamp_min(0)
        self.bands.around[w] = Band(slope.float(), middle.float())
        self.lines.around[w] = Lines(below.slope.float(), below.shift.float(), slope.float(), above.shift.float())
        base = self.bounds.slack[w]
        self._add(
            w,
            base + half + self._rounded(i, w, slope, middle),
            base + self._rounded(i, w, below.slope, below.shift) + self._rounded(i, w, slope, above.shift),
        )

    def _rounded(self, i: int, w: int, slope: Tensor, shift: Tensor) -> Tensor:
        """Return what float32 makes of coefficients times a slope, and of sums of them times a constant."""
        rough = ((slope != 0) & (slope != 1)) * slope.abs() * self._reach(i) * (4 * _UNIT)
        sizes = slope.abs() * self.values[i].abs() + self.values[w].abs() + shift.abs()
        return rough + shift.abs() * gamma(shift[0].numel() + 16, _UNIT) + sizes * _GUARD


def _sure(x: Tensor) -> bool:
    """Whether products and sums in float32 are rounded as the definition says: on a GPU they may be coarser."""
    return x.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"


@contextmanager
def _plain() -> Iterator[None]:
    """Compute in float32 without convolutions and precisions that round more."""
    with torch.autocast("cpu", enabled=False), torch.backends.nnpack.flags(enabled=False):
        yield


def _side(slope: Tensor, shift: Tensor, near: Tensor, pair: Pair, x: Tensor, y: Tensor, most: Any) -> Side:
    """Return the line ``slope * x + shift`` with another slope ``near``, as far out as that needs, around (x, y)."""
    turned = most((slope - near) * pair[0], (slope - near) * pair[1])
    return Side(near, near * x + (shift + turned) - y)


def _differences(step: Step) -> Step:
    return replace(step, rule=step.rule.linear()) if isinstance(step.rule, Affine) else step


def _take(bounds: Bounds, rows: Tensor) -> Bounds:
    part = bounds.take(rows)
    part.around = {w: _of(around, rows) for w, around in bounds.around.items()}
    return part


def _of(around: Relaxed, rows: Tensor) -> Relaxed:
    assert isinstance(around, Lines | Band)
    return around._replace(**{name: t[rows] for name, t in around._asdict().items() if t is not None})


def _finite(low: Tensor, high: Tensor) -> Pair:
    """Return bounds, infinite ones where float32 overflows."""
    fine = low.isfinite() & high.isfinite()
    return torch.where(fine, low, -torch.inf), torch.where(fine, high, torch.inf)
