"""What a step of a network means for bounds: affine steps in one rule, others by two lines around each function.

Every rule works on batches: values and bounds are (n, *shape), coefficients that are carried backward (n, s, *shape).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, final, runtime_checkable

import torch
from torch import Tensor

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Lower and upper bounds of a tensor, each (n, *shape)."""

Pulled: TypeAlias = tuple[tuple[Tensor, ...], Tensor]
"""Coefficients (n, s, *shape) for each input of a step, and a constant (n, s)."""


class Relaxed(Protocol):
    """A function between two affine ones, on the bounds of its inputs."""

    def pull(self, a: Tensor) -> Pulled:
        """Return coefficients and constant such that ``<a, f(x)> >= sum <coefficients, x> + constant``."""
        ...


@runtime_checkable
class Rule(Protocol):
    """A step that is not affine. Each of its functions takes as many arguments as the step has inputs."""

    @property
    def value(self) -> Callable[..., Tensor]:
        """Return f at x (n, *shape)."""
        ...

    @property
    def interval(self) -> Callable[..., Pair]:
        """Return bounds of f on the box of its inputs' bounds."""
        ...

    @property
    def loose(self) -> Callable[..., tuple[Tensor, ...]]:
        """Return for each input a mask (n, *shape): where tighter bounds of it would make the relaxation tighter."""
        ...

    @property
    def relax(self) -> Callable[..., Relaxed]:
        """Return two affine functions around f on the box of its inputs' bounds."""
        ...

    @property
    def ulps(self) -> float:
        """The relative error of f in floating point, in units of the last place of the result."""
        ...


class Conv(NamedTuple):
    """What a two-dimensional convolution does, for rows that see only a window (``windows.py``)."""

    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


Signs: TypeAlias = Literal["copy", "positive", "weighted", "vertex"]


@final
@dataclass(slots=True)
class Affine:
    """Any affine step, by its vector-Jacobian product.

    Args:
        call: the step on tensors of one sample.
        shapes: of its inputs.
        signs: what interval arithmetic needs to know: each output is a ``copy`` of an input, a sum with ``positive``
            weights, a sum with weights of both signs (``weighted``, then ``absolute`` is the step with the absolute
            values of weights and bias), or an expression of one entry of each input (``vertex``: the extremes lie at
            the ends).
        absolute: on absolute values, returns the sum of the absolute values of all terms; ``call`` itself by default.
        terms: how many numbers, at most, are added up for one output.
        conv: the weights, where the step is a two-dimensional convolution.
    """

    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    signs: Signs = "copy"
    absolute: Callable[..., Tensor] | None = None
    terms: int = 0
    conv: Conv | None = None
    shifts: bool = field(default=True, init=False)  # False where it is known to have no constant
    _pull: tuple[Callable[[Tensor], tuple[Tensor, ...]], Tensor] | None = field(default=None, init=False)

    def value(self, *x: Tensor) -> Tensor:
        found: Tensor = torch.func.vmap(self.call)(*x)
        return found

    def magnitude(self, *x: Tensor) -> Tensor:
        """Return the sum of the absolute values of the terms of each output, for inputs of absolute value x."""
        found: Tensor = torch.func.vmap(self.absolute or self.call)(*x)
        return found

    def interval(self, *pairs: Pair) -> Pair:
        if self.signs in ("copy", "positive"):
            return self.value(*(p[0] for p in pairs)), self.value(*(p[1] for p in pairs))
        if self.signs == "vertex":
            ends = [self.value(*ends) for ends in _vertices(pairs)]
            low, high = ends[0], ends[0]
            for end in ends[1:]:
                low, high = torch.minimum(low, end), torch.maximum(high, end)
            return low, high
        middle = self.value(*((low + high) / 2 for low, high in pairs))
        half = tuple((high - low) / 2 for low, high in pairs)
        wide = self.spread(*half)
        return middle - wide, middle + wide

    def pull(self, a: Tensor) -> Pulled:
        parts: tuple[Tensor, ...] = _Transposed.apply(self, a)  # type: ignore[no-untyped-call]
        return parts, a.flatten(2) @ self.offset.flatten() if self.shifts else a.new_zeros(a.shape[:2])

    def transposed(self, a: Tensor) -> tuple[Tensor, ...]:
        """Return the vector-Jacobian products (m, *shape) of a (m, *shape)."""
        found: tuple[Tensor, ...] = torch.func.vmap(self._linear()[0])(a)
        return found

    @property
    def offset(self) -> Tensor:
        """The value (*shape) at 0."""
        return self._linear()[1]

    def linear(self) -> "Affine":
        """Return the step without its constant: what it makes of differences."""
        found = replace(self)
        back, offset = self._linear()
        found._pull, found.shifts = (back, torch.zeros_like(offset)), False
        return found

    @property
    def fan(self) -> int:
        """How many products, at most, are added up for one entry of a vector-Jacobian product."""
        if self.conv is not None:
            return self.conv.weight[:, 0].numel() // self.conv.groups
        if self.signs == "copy":
            return round(max(float(f.amax()) for f in self.factors))
        shape = tuple(self.offset.shape)
        return 1 if self.signs == "vertex" and all(s == shape for s in self.shapes) else math.prod(shape)

    def spread(self, *x: Tensor) -> Tensor:
        """Return how large differences can get, for inputs that differ by at most x (n, *shape)."""
        return (self.magnitude(*x) - self.magnitude(*(torch.zeros_like(t[:1]) for t in x))).clamp_min(0)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """Of a step that works entry by entry: the factor of each input (*shape); of copies: how many there are."""
        back, offset = self._linear()
        return back(torch.ones_like(offset))

    def _linear(self) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], Tensor]:
        if self._pull is None:
            zeros = [torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in self.shapes]
            offset, back, *_ = torch.func.vjp(self.call, *zeros)
            self._pull = back, offset.detach()
        return self._pull


class _Transposed(torch.autograd.Function):
    """Vector-Jacobian products of an affine step. Their own derivative is the step without its constant."""

    @staticmethod
    def forward(ctx: Any, rule: Affine, a: Tensor) -> tuple[Tensor, ...]:
        ctx.rule, ctx.rows = rule, a.shape[:2]
        return tuple(part.view(*ctx.rows, *part.shape[1:]) for part in rule.transposed(a.flatten(0, 1)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        rule: Affine = ctx.rule
        moved = rule.value(*(g.flatten(0, 1) for g in grads)) - rule.offset
        return None, moved.view(*ctx.rows, *moved.shape[1:])


def _vertices(pairs: tuple[Pair, ...]) -> list[tuple[Tensor, ...]]:
    corners: list[tuple[Tensor, ...]] = [()]
    for pair in pairs:
        corners = [(*c, end) for c in corners for end in pair]
    return corners


class Lines(NamedTuple):
    """Two lines a neuron: ``low * x + low0 <= f(x) <= high * x + high0``; each (n, *shape).

    Where ``free``, any slope in [0, 1] may take the place of ``low``.
    """

    low: Tensor
    low0: Tensor | None
    high: Tensor
    high0: Tensor
    free: Tensor | None = None

    def pull(self, a: Tensor, slopes: Tensor | None = None) -> Pulled:
        """Return coefficients and constant, with ``slopes`` (n, s, *shape) where these are free."""
        plus = a.clamp(min=0)
        minus = a - plus
        low = self.low[:, None]
        if slopes is not None and self.free is not None:
            low = torch.where(self.free[:, None], slopes, low)
        constant = dot(minus, self.high0)
        if self.low0 is not None:
            constant = constant + dot(plus, self.low0)
        return (plus * low + minus * self.high[:, None],), constant


class Band(NamedTuple):
    """A function ``slope * x + middle``, each (n, *shape), give or take what is allowed for elsewhere."""

    slope: Tensor
    middle: Tensor

    def pull(self, a: Tensor) -> Pulled:
        return (a * self.slope[:, None],), dot(a, self.middle)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return <a, b> (n, s) for a (n, s, *shape) and b (n, *shape)."""
    return (a.flatten(2) @ b.flatten(1)[..., None]).squeeze(2)


@final
@dataclass(frozen=True, slots=True)
class ReLU:
    """max(x, 0): the chord above, and below any line through 0 with a slope in [0, 1] (Zhang et al. 2018, fig. 1)."""

    ulps: float = 0.0

    def value(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    def interval(self, x: Pair) -> Pair:
        return x[0].clamp(min=0), x[1].clamp(min=0)

    def loose(self, x: Pair) -> tuple[Tensor]:
        return ((x[0] < 0) & (x[1] > 0),)

    def relax(self, x: Pair) -> Lines:
        low, high = x
        on, free = low >= 0, (low < 0) & (high > 0)
        chord = torch.where(free, high / (high - low).clamp_min(_TINY), on.to(low.dtype))
        lift = torch.where(free, -chord * low, torch.zeros_like(low))
        below = torch.where(free, (high > -low).to(low.dtype), chord)
        return Lines(below, None, chord, lift, free)


_TINY = 1e-300


@final
@dataclass(frozen=True, slots=True)
class MaxPool:
    """The largest entry of each window.

    Below: the entry with the largest lower bound. Above: that entry where no other of its window can be larger, else
    the largest upper bound (Boopathy et al. 2019 use planes; this is the simpler choice of auto_LiRPA).

    Args:
        windows: from one sample's tensor (*shape) to (windows, size), by copying; padding is -inf.
        shape: of the result.
    """

    windows: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    ulps: float = 0.0

    def value(self, x: Tensor) -> Tensor:
        found: Tensor = torch.func.vmap(self.windows)(x)
        return found.amax(-1).view(-1, *self.shape)

    def interval(self, x: Pair) -> Pair:
        return self.value(x[0]), self.value(x[1])

    def loose(self, x: Pair) -> tuple[Tensor]:
        return (x[1] > x[0],)

    def relax(self, x: Pair) -> "Largest":
        low, high = (torch.func.vmap(self.windows)(t) for t in x)  # (n, w, k)
        places = self.windows(
            torch.arange(x[0][0].numel(), dtype=torch.float64, device=low.device).view(x[0].shape[1:])
        )
        first = torch.arange(low.shape[-1], 0, -1, device=low.device)  # of several alike, the first
        best = torch.where(low == low.amax(-1, keepdim=True), first, 0).argmax(-1, keepdim=True)
        others = high.scatter(-1, best, -math.inf).amax(-1)
        sure = low.gather(-1, best).squeeze(-1) >= others
        chosen = places.long().expand(len(low), -1, -1).gather(-1, best).squeeze(-1)
        return Largest(chosen, sure, high.amax(-1), tuple(x[0].shape[1:]))


class Largest(NamedTuple):
    """For each window: an entry of it (n, w), whether it is the largest for sure, and what none exceeds."""

    entry: Tensor
    sure: Tensor
    most: Tensor
    shape: tuple[int, ...]

    def pull(self, a: Tensor) -> Pulled:
        n, s = a.shape[:2]
        flat = a.flatten(2)
        plus = flat.clamp(min=0)
        minus, sure = flat - plus, self.sure[:, None]
        zero = torch.zeros((), dtype=a.dtype, device=a.device)
        carried = plus + torch.where(sure, minus, zero)
        constant = (torch.where(sure, zero, minus) @ self.most[..., None]).squeeze(2)
        back = torch.zeros(n, s, math.prod(self.shape), dtype=a.dtype, device=a.device)
        back = back.scatter_add(2, self.entry[:, None].expand(n, s, -1), carried)
        return (back.view(n, s, *self.shape),), constant


@final
@dataclass(frozen=True, slots=True)
class Product:
    """x * y of two tensors of the same shape: the planes of McCormick (1976).

    Args:
        most: what the absolute value is known not to exceed, for reasons that lie outside of the two intervals.
    """

    most: float = math.inf
    ulps: float = 1.0

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def interval(self, x: Pair, y: Pair) -> Pair:
        ends = torch.stack([a * b for a in x for b in y])
        return ends.amin(0).clamp(-self.most, self.most), ends.amax(0).clamp(-self.most, self.most)

    def loose(self, x: Pair, y: Pair) -> tuple[Tensor, Tensor]:
        open_ = (x[1] > x[0]) & (y[1] > y[0])
        return open_, open_

    def relax(self, x: Pair, y: Pair) -> "Planes":
        (lx, ux), (ly, uy) = x, y
        # Of the two planes on either side, the one that is nearer at the middle of the box.
        below = _nearer(torch.maximum, (ly, lx, -lx * ly), (uy, ux, -ux * uy), x, y)
        above = _nearer(torch.minimum, (uy, lx, -lx * uy), (ly, ux, -ux * ly), x, y)
        return Planes(below, above)


Plane: TypeAlias = tuple[Tensor, Tensor, Tensor]


def _nearer(best: Any, one: Plane, other: Plane, x: Pair, y: Pair) -> Plane:
    mx, my = (x[0] + x[1]) / 2, (y[0] + y[1]) / 2
    values = [p[0] * mx + p[1] * my + p[2] for p in (one, other)]
    first = best(*values) == values[0]
    a, b, c = (torch.where(first, s, t) for s, t in zip(one, other, strict=True))
    return a, b, c


class Planes(NamedTuple):
    """Planes ``a x + b y + c`` below and above, each of three (n, *shape)."""

    below: Plane
    above: Plane

    def pull(self, a: Tensor) -> Pulled:
        plus = a.clamp(min=0)
        minus = a - plus
        parts = tuple(plus * self.below[k][:, None] + minus * self.above[k][:, None] for k in (0, 1))
        return parts, dot(plus, self.below[2]) + dot(minus, self.above[2])


@final
@dataclass(frozen=True, slots=True)
class Clamp:
    """min(max(x, lo), hi), as ReLU6 and Hardtanh: on each side the better of the steepest and the flattest line."""

    lo: float
    hi: float
    ulps: float = 0.0

    def value(self, x: Tensor) -> Tensor:
        return x.clamp(self.lo, self.hi)

    def interval(self, x: Pair) -> Pair:
        return self.value(x[0]), self.value(x[1])

    def loose(self, x: Pair) -> tuple[Tensor]:
        kink = ((x[0] < self.lo) & (x[1] > self.lo)) | ((x[0] < self.hi) & (x[1] > self.hi))
        return (kink,)

    def relax(self, x: Pair) -> Lines:
        """A line below touches the kink at lo, a line above the one at hi, where these lie inside; else the chord."""
        low, high = x
        ends, middle = (self.value(low), self.value(high)), (low + high) / 2
        chord = (ends[1] - ends[0]) / (high - low).clamp_min(_TINY)
        chord = torch.where(high > low, chord, torch.zeros_like(chord))
        below, above = (low < self.lo) & (high > self.lo), (low < self.hi) & (high > self.hi)
        rise = (ends[1] - self.lo) / (high - self.lo).abs().clamp_min(_TINY)
        fall = (self.hi - ends[0]) / (self.hi - low).abs().clamp_min(_TINY)
        flat = torch.zeros_like(chord)
        a = torch.where(below, torch.where(middle > self.lo, rise, flat), chord)
        b = torch.where(above, torch.where(middle < self.hi, fall, flat), chord)
        a0 = torch.where(below, self.lo - a * self.lo, ends[0] - a * low)
        b0 = torch.where(above, self.hi - b * self.hi, ends[0] - b * low)
        return Lines(a, a0, b, b0)
