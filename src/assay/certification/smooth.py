"""Functions of one variable, between two lines.

A function is known by its pieces: between its knots it bends one way. Whatever the slope k of a line below it, the
least value of ``f(x) - k x`` over the box is bounded piece by piece: where f is convex by its tangents, elsewhere by
the ends of the piece. So any slope and any touching point, however they were found, give a sound line; those that are
tried are the chord, the tangent at the middle, and tangents through the ends of the box. The line above f is the one
below -f, mirrored.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torch.nn import functional

from assay.certification.rules import Lines, Pair
from assay.core.errors import ModelError

Function: TypeAlias = Callable[[Tensor], Tensor]

_HALVINGS = 24

_LARGEST = 88.0
"""The exponential of more than about this overflows in float32."""

_SMALLEST = 1e-37
"""What is smaller than about this may become 0 in float32."""


@final
@dataclass(frozen=True, slots=True)
class Curve:
    """A function of one variable.

    Args:
        f, df: it, and its derivative: at a knot, the one from the side of a piece that bends.
        knots: where pieces meet, in order.
        bends: for each piece, 1 if convex, -1 if concave, 0 if straight.
        turns: where it has a local least or largest value.
        domain: closed intervals, of which one must hold the whole box.
        known: where the argument lies in any case, for reasons that its bounds do not show.
        deployed: the function as the framework has it, where that is not f.
        drop: above the first number, the deployed function may be lower than f by the second.
        blur: the error of f, as computed here, in units of the argument's last place.
        ulps: see :class:`Rule`. Libraries state 1 to 4 units for these functions in float32.
    """

    f: Function
    df: Function
    knots: tuple[float, ...] = ()
    bends: tuple[int, ...] = (1,)
    turns: tuple[float, ...] = ()
    domain: tuple[tuple[float, float], ...] = ((-math.inf, math.inf),)
    known: tuple[float, float] = (-math.inf, math.inf)
    deployed: Function | None = None
    drop: tuple[float, float] = (math.inf, 0.0)
    blur: float = 0.0
    ulps: float = 8.0

    def value(self, x: Tensor) -> Tensor:
        return (self.deployed or self.f)(x)

    def interval(self, x: Pair) -> Pair:
        """Return the least and the largest value over the ends and the turns inside.

        Raises:
            ModelError: the box is not inside the domain.
        """
        low, high = self._argument(x)
        values = [self.f(low), self.f(high), *(self.f(low.clamp(min=t).minimum(high)) for t in self.turns)]
        ends = torch.stack(values)
        error = self.blur * torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs()) + _SMALLEST
        return ends.amin(0) - self._dropped(high) - error, ends.amax(0) + error

    def loose(self, x: Pair) -> tuple[Tensor]:
        return (x[1] > x[0],)

    def relax(self, x: Pair) -> Lines:
        low, high = self._argument(x)
        below = _below(_Side(self.f, self.df, self._pieces(1)), low, high)
        above = _below(_Side(lambda t: -self.f(t), lambda t: -self.df(t), self._pieces(-1)), low, high)
        return Lines(below[0], below[1] - self._dropped(high), -above[0], -above[1])

    def _pieces(self, sign: int) -> list[tuple[float, float, bool]]:
        ends = (-math.inf, *self.knots, math.inf)
        return [(a, b, sign * bend > 0) for a, b, bend in zip(ends[:-1], ends[1:], self.bends, strict=True)]

    def _dropped(self, high: Tensor) -> Tensor:
        return (high > self.drop[0]).to(high.dtype) * self.drop[1]

    def _argument(self, x: Pair) -> Pair:
        low, high = (t.clamp(*self.known) for t in x)
        inside = [(low >= a) & (high <= b) for a, b in self.domain if (a, b) != _ALL[0]]
        if inside and not torch.stack(inside).any(0).all():
            raise ModelError(
                f"bounds of an argument inside {' or '.join(f'[{a:g}, {b:g}]' for a, b in self.domain)}",
                f"bounds from {float(low.min()):g} to {float(high.max()):g}",
                "Add a constant that keeps it away from where the function is not defined, or take a smaller eps.",
                code="outside-domain",
            )
        return low, high


class _Side(NamedTuple):
    """A function to put a line below: each piece from, to, and whether it is convex there."""

    f: Function
    df: Function
    pieces: list[tuple[float, float, bool]]

    def cut(self, low: Tensor, high: Tensor) -> "list[_Piece]":
        """Return the pieces inside a box; of those outside of it one end of the box remains."""
        found = []
        for a, b, convex in self.pieces:
            p, q = (low.clamp(min=t).minimum(high) for t in (a, b))
            found.append(_Piece(p, q, convex, self.f(p), self.f(q), self.df(p), self.df(q)))
        return found


class _Piece(NamedTuple):
    """From p to q a function bends one way; values and derivatives at both ends."""

    p: Tensor
    q: Tensor
    convex: bool
    fp: Tensor
    fq: Tensor
    dp: Tensor
    dq: Tensor

    def least(self, k: Tensor, d: Tensor, fd: Tensor, dd: Tensor) -> Tensor:
        """Return a lower bound of ``f(x) - k x`` on the piece, by the tangents at p, q and d."""
        at_p, at_q = self.fp - k * self.p, self.fq - k * self.q
        if not self.convex:
            return torch.minimum(at_p, at_q)
        wide = self.q - self.p
        error = 16 * torch.finfo(k.dtype).eps * wide  # of a derivative, beside 1 and itself
        inside = (d >= self.p) & (d <= self.q)
        bounds = (
            at_p + ((self.dp - k) * wide).clamp(max=0) - error * (1 + self.dp.abs()),
            at_q - ((self.dq - k) * wide).clamp(min=0) - error * (1 + self.dq.abs()),
            torch.where(inside, fd - k * d - (dd - k).abs() * wide - error * (1 + dd.abs()), -math.inf),
        )
        return torch.stack(bounds).nan_to_num(nan=-math.inf).amax(0)


def _below(side: _Side, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope and intercept of the line, of those tried, that is highest at the middle of the box."""
    pieces, middle = side.cut(low, high), low + (high - low) / 2
    ends = side.f(low), side.f(high)
    chord = ((ends[1] - ends[0]) / (high - low)).nan_to_num(0, 0, 0)
    tried = [(chord, middle), (side.df(middle), middle)]
    tried += [(side.df(d), d) for d in _touching(side, low, high, middle)]
    largest = torch.stack([t.abs() for piece in pieces for t in (piece.fp, piece.fq)]).amax(0)
    far = torch.maximum(low.abs(), high.abs())
    # The rounding in what is computed here, and in sums over the entries of a step with these lines; what becomes 0.
    unit = (64 + math.prod(low.shape[1:])) * torch.finfo(low.dtype).eps
    best: tuple[Tensor, ...] = (torch.zeros_like(low), torch.full_like(low, -math.inf), torch.full_like(low, -math.inf))
    for k, d in tried:
        fd = side.f(d)
        least = torch.stack([piece.least(k, d, fd, side.df(d)) for piece in pieces]).amin(0)
        k0 = least - unit * (torch.maximum(largest, fd.abs()) + (k.abs() + 1) * far) - _SMALLEST
        height = (k * middle + k0).nan_to_num(nan=-math.inf)
        best = tuple(torch.where(height > best[2], new, old) for new, old in zip((k, k0, height), best, strict=True))
    return best[0], best[1]


def _touching(side: _Side, low: Tensor, high: Tensor, middle: Tensor) -> list[Tensor]:
    """Return, for each convex piece, where the convex hull of f touches it nearest to the middle."""
    knots = [a for a, _, _ in side.pieces[1:]]
    mixed = torch.zeros_like(low, dtype=torch.bool)
    for knot in knots:
        mixed |= (low < knot) & (knot < high)
    if not mixed.any():
        return []
    down, up, m, found = low[mixed], high[mixed], middle[mixed], []
    for a, b, convex in side.pieces:
        if convex:
            p, q = (down.clamp(min=t).minimum(up) for t in (a, b))
            d = m.maximum(_tangent(side, down, p, q)).minimum(_tangent(side, up, q, p))
            found.append(middle.masked_scatter(mixed, d))
    return found


def _tangent(side: _Side, end: Tensor, bad: Tensor, good: Tensor) -> Tensor:
    """Return where the tangent goes through the function's value at ``end``, or just below; between bad and good."""
    f_end = side.f(end)
    for _ in range(_HALVINGS):
        d = (bad + good) / 2
        fits = side.f(d) + side.df(d) * (end - d) <= f_end
        bad, good = torch.where(fits, bad, d), torch.where(fits, d, good)
    return good


@final
@dataclass(frozen=True, slots=True)
class Wave:
    """sin(x + phase): on boxes shorter than a period a curve, on others between -1 and 1."""

    phase: float = 0.0
    ulps: float = 8.0

    def value(self, x: Tensor) -> Tensor:
        return torch.sin(x) if self.phase == 0 else torch.cos(x)

    def interval(self, x: Pair) -> Pair:
        moved, _, whole, error = self._moved(x)
        low, high = _SINE.interval(moved)
        return torch.where(whole, -1.0, low - error), torch.where(whole, 1.0, high + error)

    def loose(self, x: Pair) -> tuple[Tensor]:
        return (x[1] > x[0],)

    def relax(self, x: Pair) -> Lines:
        moved, by, whole, error = self._moved(x)
        a, a0, b, b0, _ = _SINE.relax(moved)
        assert a0 is not None
        zero, n = torch.zeros_like(a), math.prod(a.shape[1:])
        unit = (8 + n) * torch.finfo(a.dtype).eps
        below, above = (t + s * unit * (k * by).abs() for t, k, s in ((a0 + a * by, a, -1), (b0 + b * by, b, 1)))
        return Lines(
            torch.where(whole, zero, a),
            torch.where(whole, zero - 1, below - error),
            torch.where(whole, zero, b),
            torch.where(whole, zero + 1, above + error),
        )

    def _moved(self, x: Pair) -> tuple[Pair, Tensor, Tensor, Tensor]:
        """Return the box of x + by, with its lower end in [0, 2 pi], by, where it is too long, and the error in it."""
        low, high = x
        turn = 2 * math.pi
        by = self.phase - turn * ((low + self.phase) / turn).floor()
        whole = high - low >= turn
        moved = low + by, torch.where(whole, low, high) + by
        return moved, by, whole, 16 * torch.finfo(low.dtype).eps * (1 + torch.maximum(low.abs(), high.abs()))


_SINE = Curve(
    torch.sin,
    torch.cos,
    knots=(0.0, *(k * math.pi for k in (1, 2, 3, 4))),
    bends=(1, -1, 1, -1, 1, -1),
    turns=tuple((k + 0.5) * math.pi for k in (-1, 0, 1, 2, 3, 4)),
)


def _gelu(approximate: str = "none") -> Curve:
    if approximate == "tanh":
        return Curve(
            lambda x: functional.gelu(x, approximate="tanh"), _dgelu_tanh, (-_GELU_TANH, _GELU_TANH), (-1, 1, -1),
            (-0.75246142207101625849,), blur=8,
        )  # fmt: skip
    return Curve(functional.gelu, _dgelu, (-math.sqrt(2), math.sqrt(2)), (-1, 1, -1), (-0.75179152469356446,), blur=8)


_GELU_TANH = 1.4185040087908283555


def _dgelu(x: Tensor) -> Tensor:
    return torch.erfc(-x / math.sqrt(2)) / 2 + x * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _dgelu_tanh(x: Tensor) -> Tensor:
    root, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(root * (x + cubic * x**3))
    return (1 + t) / 2 + x * (1 - t.square()) * root * (1 + 3 * cubic * x.square()) / 2


def _silu() -> Curve:
    def slope(x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return s + x * s * (1 - s)

    knot = 2.3993572805154676678
    return Curve(functional.silu, slope, (-knot, knot), (-1, 1, -1), (-1.2784645427610737951,))


def _mish() -> Curve:
    def slope(x: Tensor) -> Tensor:
        t = torch.tanh(functional.softplus(x))
        return t + x * (1 - t.square()) * torch.sigmoid(x)

    knots = (-2.25637639636079312, 1.4905711794854284593)
    return Curve(functional.mish, slope, knots, (-1, 1, -1), (-1.1924312145154952121,))


def _softplus(beta: float = 1, threshold: float = 20) -> Curve:
    """Above the threshold, torch returns x, which is lower by at most ``log(1 + exp(-threshold)) / beta``."""
    _positive(beta=beta)
    jump = (max(0.0, -threshold) + math.log1p(math.exp(-abs(threshold)))) / beta
    return Curve(
        lambda x: torch.logaddexp(beta * x, torch.zeros_like(x)) / beta,
        lambda x: torch.sigmoid(beta * x),
        deployed=partial(functional.softplus, beta=beta, threshold=threshold),
        drop=(threshold / beta - 1e-6 * (1 + abs(threshold / beta)), jump),
        ulps=8.0 if beta == 1 else 100.0,  # the exponent beta x, rounded, may be as large as 88
    )


def _elu(alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Curve:
    _positive(alpha=alpha, scale=scale, input_scale=input_scale)

    def f(x: Tensor) -> Tensor:
        return torch.where(x > 0, scale * x, scale * alpha * torch.expm1(input_scale * x.clamp(max=0)))

    def slope(x: Tensor) -> Tensor:
        low = scale * alpha * input_scale * torch.exp(input_scale * x.clamp(max=0))
        return torch.where(x > 0, torch.full_like(x, scale), low)

    return Curve(f, slope, (0.0,), (1, 0), ulps=8.0 if input_scale == 1 else 100.0)


def _selu() -> Curve:
    return _elu(1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def _celu(alpha: float = 1) -> Curve:
    return _elu(alpha, 1, 1 / alpha)


def _hardswish() -> Curve:
    def slope(x: Tensor) -> Tensor:
        return torch.where(x < -3, torch.zeros_like(x), torch.where(x > 3, torch.ones_like(x), (2 * x + 3) / 6))

    return Curve(functional.hardswish, slope, (-3.0, 3.0), (0, 1, 0), (-3.0, -1.5))


def _pow(exponent: float) -> Curve:
    whole = float(exponent).is_integer()
    if exponent in (0, 1):
        return Curve(lambda x: x**exponent, lambda x: torch.full_like(x, exponent), bends=(0,))
    if whole and exponent > 0:
        bends, turns, domain = ((1, 1), (0.0,), _ALL) if exponent % 2 == 0 else ((-1, 1), (), _ALL)
    elif whole:
        bends, turns, domain = ((1, 1) if exponent % 2 == 0 else (-1, 1)), (), _NOT_ZERO
    else:
        domain = ((0.0 if exponent > 0 else _SMALLEST, math.inf),)
        bends, turns = ((-1, -1) if 0 < exponent < 1 else (1, 1)), ()
    power = partial(torch.pow, exponent=exponent)
    return Curve(power, lambda x: exponent * x ** (exponent - 1), (0.0,), bends, turns, domain, ulps=16.0)


_ALL: tuple[tuple[float, float], ...] = ((-math.inf, math.inf),)
_NOT_ZERO: tuple[tuple[float, float], ...] = ((-math.inf, -_SMALLEST), (_SMALLEST, math.inf))
_ABOVE_ZERO: tuple[tuple[float, float], ...] = ((_SMALLEST, math.inf),)
_NO_OVERFLOW: tuple[tuple[float, float], ...] = ((-math.inf, _LARGEST),)


def _positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if number <= 0:
            raise ModelError(f"{name} > 0", f"{number}", "Other values have no bound.", code="no-bound-for-operator")


def exponential(limit: float = 60.0) -> Curve:
    """Return exp, continued by its tangent above ``limit``: it never overflows, stays convex, and is never larger."""

    def f(x: Tensor) -> Tensor:
        return torch.exp(x.clamp(max=limit)) * (1 + (x - limit).clamp(min=0))

    return Curve(f, lambda x: torch.exp(x.clamp(max=limit)))


def known(name: str, least: float) -> Curve:
    """Return a function whose argument is at least ``least``, whatever its bounds say."""
    curve = SMOOTH[name]()
    assert isinstance(curve, Curve)
    return replace(curve, known=(least, math.inf))


SMOOTH: dict[str, Callable[..., Curve | Wave]] = {
    "sigmoid": lambda: Curve(torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x), (0.0,), (1, -1)),
    "tanh": lambda: Curve(torch.tanh, lambda x: 1 - torch.tanh(x).square(), (0.0,), (1, -1)),
    "erf": lambda: Curve(torch.erf, lambda x: 2 / math.sqrt(math.pi) * torch.exp(-x.square()), (0.0,), (1, -1)),
    "gelu": _gelu,
    "silu": _silu,
    "mish": _mish,
    "softplus": _softplus,
    "log_sigmoid": lambda: Curve(functional.logsigmoid, lambda x: torch.sigmoid(-x), bends=(-1,)),
    "elu": _elu,
    "selu": _selu,
    "celu": _celu,
    "hardswish": _hardswish,
    "exp": lambda: Curve(torch.exp, torch.exp, domain=_NO_OVERFLOW),
    "expm1": lambda: Curve(torch.expm1, torch.exp, domain=_NO_OVERFLOW),
    "log": lambda: Curve(torch.log, torch.reciprocal, bends=(-1,), domain=_ABOVE_ZERO),
    "log1p": lambda: Curve(torch.log1p, lambda x: 1 / (1 + x), bends=(-1,), domain=((-1 + 1e-7, math.inf),)),
    "sqrt": lambda: Curve(torch.sqrt, lambda x: x.rsqrt() / 2, bends=(-1,), domain=((0.0, math.inf),)),
    "rsqrt": lambda: Curve(torch.rsqrt, lambda x: -(x**-1.5) / 2, domain=_ABOVE_ZERO),
    "reciprocal": lambda: Curve(torch.reciprocal, lambda x: -(x**-2), (0.0,), (-1, 1), domain=_NOT_ZERO),
    "square": lambda: Curve(torch.square, lambda x: 2 * x, turns=(0.0,), ulps=1.0),
    "pow": _pow,
    "sin": Wave,
    "cos": lambda: Wave(math.pi / 2),
}
"""For each operator, from its further arguments to its rule."""

ROUGH: dict[str, tuple[int, float]] = {"gelu": (16, 0.0)}
"""Operators whose error is not small beside their result: its roundings, of the size of the argument, and of a floor.

GELU is computed as ``x (1 + erf(x / sqrt 2)) / 2``, or with tanh: below about -3 what is left of 1 + erf is rounding.
"""
