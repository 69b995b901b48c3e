"""A network on one region, with all that is settled there folded into matrices.

On a region most ReLUs are active or inactive for good, and between the others the network is affine. What is left is a
chain of matrices between the *open* neurons: bounding it takes a few matrix products, however deep the network is.
Every entry of another function, and every window of a max pooling without a sure winner, is open too.
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from assay.certification.bounds import Bounds, dense
from assay.certification.methods import ascend
from assay.certification.region import Region
from assay.certification.rules import Affine, Largest, Lines
from assay.certification.windows import Windows, chosen


class Rows(NamedTuple):
    """m expressions ``start @ x + sum(w[k] @ y[k]) + constant``, within ``wobble``: of the input and open neurons y."""

    start: Tensor  # (m, d)
    w: tuple[Tensor, ...]  # (m, u_k) for each layer
    constant: Tensor  # (m,)
    wobble: Tensor  # (m,)

    def take(self, rows: Tensor) -> "Rows":
        return Rows(self.start[rows], tuple(w[rows] for w in self.w), self.constant[rows], self.wobble[rows])

    def mixed(self, rows: Tensor, weights: Tensor) -> "Rows":
        """Return sums (m, ...) of the ``rows`` (m, k) with ``weights`` (m, k), none of them negative."""
        many = self.take(rows)
        start, *w = ((weights[:, None] @ t).squeeze(1) for t in (many.start, *many.w))
        return Rows(start, tuple(w), (weights * many.constant).sum(1), (weights * many.wobble).sum(1))

    def negated(self) -> "Rows":
        return Rows(-self.start, tuple(-w for w in self.w), -self.constant, self.wobble)

    def to(self, dtype: torch.dtype) -> "Rows":
        w = tuple(w.to(dtype) for w in self.w)
        return Rows(self.start.to(dtype), w, self.constant.to(dtype), self.wobble.to(dtype))


class Layer(NamedTuple):
    """The open neurons of one step: which entries of its result, their inputs as rows, and lines around them (u,)."""

    step: int
    entries: Tensor
    rows: Rows
    low: Tensor
    high: Tensor
    below: tuple[Tensor, Tensor]  # slope and constant of the line below
    above: tuple[Tensor, Tensor]
    free: Tensor  # ReLUs: any slope in [0, 1] will do below, and the sign of the input may be split

    def to(self, dtype: torch.dtype) -> "Layer":
        below, above = (tuple(t.to(dtype) for t in line) for line in (self.below, self.above))
        ends = self.low.to(dtype), self.high.to(dtype)
        return Layer(self.step, self.entries, self.rows.to(dtype), *ends, below, above, self.free)  # type: ignore[arg-type]


class State(NamedTuple):
    """What a bound of m rows depends on, (m, u) for each layer: slopes, signs of splits (0: none), multipliers."""

    slopes: tuple[Tensor, ...]
    signs: tuple[Tensor, ...] | None = None
    betas: tuple[Tensor, ...] | None = None


class Skeleton(NamedTuple):
    """The layers of open neurons, in order, and the region of the input (one region)."""

    layers: tuple[Layer, ...]
    region: Region

    def to(self, dtype: torch.dtype) -> "Skeleton":
        return Skeleton(tuple(k.to(dtype) for k in self.layers), self.region.to(dtype))

    def start(self, count: int) -> State:
        """Return the slopes that CROWN takes, for ``count`` rows."""
        return State(tuple(k.below[0].expand(count, -1) for k in self.layers))

    def lower(self, rows: Rows, state: State, seen: list[Tensor] | None = None) -> Tensor:
        """Return lower bounds (m,) of the rows; ``seen`` receives the coefficients of the open neurons, last first.

        A split says that the input of a neuron is not negative (sign 1) or not positive (-1); its multiplier brings
        that into the bound (Wang et al. 2021, arXiv:2103.06624, theorem 3.1).
        """
        a, start, total = list(rows.w), rows.start, rows.constant - rows.wobble
        for k in reversed(range(len(a))):
            layer = self.layers[k]
            if seen is not None:
                seen.append(a[k])
            plus = a[k].clamp(min=0)
            minus = a[k] - plus
            low, high, lift = self._lines(k, state)
            z = plus * low + minus * high
            if state.betas is not None and state.signs is not None:
                z = z - state.betas[k] * state.signs[k]
            total = total + (minus * lift).sum(1) + plus @ layer.below[1]
            total = total + z @ layer.rows.constant - z.abs() @ layer.rows.wobble
            for i, w in enumerate(layer.rows.w):
                a[i] = a[i] + z @ w
            start = start + z @ layer.rows.start
        return total + self.region.least(start.view(1, len(start), *self.region.x.shape[1:])).squeeze(0)

    def _lines(self, k: int, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Return slopes below and above and the constant above, (m, u) or (u,), with what the state says of them."""
        layer = self.layers[k]
        low = torch.where(layer.free, state.slopes[k], layer.below[0])
        high, lift = layer.above
        if state.signs is None:
            return low, high, lift
        split, on = state.signs[k] != 0, (state.signs[k] > 0).to(high.dtype)
        return torch.where(split, on, low), torch.where(split, on, high), lift * ~split


class TooLargeError(Exception):
    """The matrices between the open neurons would take too much memory."""


class NotLinesError(Exception):
    """A step of the network is not bounded by lines of one variable."""


_MOST = 2**27
"""Entries of all matrices together: 1 GiB in float64."""


def fold(bounds: Bounds, steps: int, rate: float, deadline: float = math.inf) -> Skeleton:
    """Fold the settled neurons of one region (``bounds`` of one sample), tightening the inputs of the open ones.

    Their bounds are optimised over the slopes of the layers before, each for itself: the alpha of alpha-CROWN (Xu et
    al. 2021, arXiv:2011.13824) for intermediate bounds, in the order of the network. ``bounds`` are tightened too.
    After the ``deadline``, on the clock ``time.monotonic``, nothing more is tightened.

    Raises:
        NotLinesError: the network has a step that lines of one variable do not bound.
        TooLargeError: it has too many open neurons.
    """
    layers: list[Layer] = []
    for v, step in enumerate(bounds.graph.steps):
        if step.rule is None or isinstance(step.rule, Affine):
            continue
        entries, places = _open(bounds, v)
        if not len(entries):
            continue
        width = bounds.region.x[0].numel() + sum(len(k.entries) for k in layers)
        if len(entries) * width + sum(k.rows.start.numel() for k in layers) > _MOST:
            raise TooLargeError
        (i,) = step.inputs
        ones = torch.ones(1, len(places), dtype=bounds.graph.dtype, device=places.device)
        rows = express(bounds, layers, i, chosen(places[None], ones, bounds.graph.steps[i].shape))
        if layers and time.monotonic() < deadline:
            _tighten(bounds, i, places, Skeleton(tuple(layers), bounds.region), rows, steps, rate)
            known = dict(zip(entries.tolist(), range(len(entries)), strict=True))
            entries, places = _open(bounds, v)
            rows = rows.take(torch.tensor([known[e] for e in entries.tolist()], dtype=torch.long))
        if len(entries):
            layers.append(_layer(bounds, v, entries, places, rows))
    return Skeleton(tuple(layers), bounds.region)


def _open(bounds: Bounds, v: int) -> tuple[Tensor, Tensor]:
    """Return the entries of step v that are not settled, and the entries of its input that bound them."""
    around = bounds.relaxed(v)
    if isinstance(around, Largest):
        entries = (~around.sure[0]).nonzero().squeeze(1)
        return entries, around.entry[0][entries]
    if not isinstance(around, Lines):
        raise NotLinesError(bounds.graph.steps[v].name)
    if around.free is not None:
        entries = around.free.flatten().nonzero().squeeze(1)
    else:
        entries = torch.arange(around.low.numel(), device=around.low.device)
    return entries, entries


def _layer(bounds: Bounds, v: int, entries: Tensor, places: Tensor, rows: Rows) -> Layer:
    around = bounds.relaxed(v)
    low, high = (t.flatten()[places] for t in bounds.pairs[bounds.graph.steps[v].inputs[0]])
    free = torch.zeros(len(entries), dtype=torch.bool, device=entries.device)
    if isinstance(around, Largest):
        one = torch.ones_like(low)
        return Layer(v, entries, rows, low, high, (one, 0 * one), (0 * one, around.most.flatten()[entries]), free)
    assert isinstance(around, Lines)
    below0 = torch.zeros_like(around.low) if around.low0 is None else around.low0
    lines = [t.flatten()[entries] for t in (around.low, below0, around.high, around.high0)]
    is_free = free | (around.free is not None)
    return Layer(v, entries, rows, low, high, (lines[0], lines[1]), (lines[2], lines[3]), is_free)


def _tighten(bounds: Bounds, i: int, places: Tensor, skeleton: Skeleton, rows: Rows, steps: int, rate: float) -> None:
    """Bound some entries of step i, given as rows, with slopes of their own, and keep what is better."""
    shape = bounds.pairs[i][0].shape
    low, high = (t.flatten().clone() for t in bounds.pairs[i])
    below, above = (best_of(skeleton, r, steps, rate)[0] for r in (rows, rows.negated()))
    low[places], high[places] = torch.maximum(low[places], below), torch.minimum(high[places], -above)
    bounds.pairs[i], bounds.around = (low.view(shape), high.view(shape)), {}


def best_of(skeleton: Skeleton, rows: Rows, steps: int, rate: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return lower bounds (m,) of rows and their slopes: searched in float32, computed in float64."""
    quick, low = skeleton.to(torch.float32), rows.to(torch.float32)
    slopes = [*quick.start(len(rows.start)).slopes]
    if not slopes:
        return skeleton.lower(rows, State(())), ()
    _, best = ascend(lambda leaves: quick.lower(low, State(tuple(leaves))), slopes, [1.0] * len(slopes), steps, rate)
    return skeleton.lower(rows, State(tuple(s.double() for s in best))), tuple(best)


def express(bounds: Bounds, layers: Sequence[Layer], v: int, a: "Tensor | Windows") -> Rows:
    """Write <a, step v>, a (1, m, *shape), with the input and the open neurons of ``layers``."""
    place = {layer.step: k for k, layer in enumerate(layers)}
    found: dict[int, Tensor] = {}
    constants: list[Tensor] = []
    wobbles: list[Tensor] = []

    def pull(w: int, a_w: "Tensor | Windows") -> "tuple[Tensor | Windows, ...]":
        if not isinstance(bounds.graph.steps[w].rule, Affine):
            a_w = dense(a_w)
            wobbles.append(a_w.flatten(2)[0].abs() @ bounds.slack[w].flatten())
            if w in place:
                entries = layers[place[w]].entries
                found[place[w]] = a_w.flatten(2)[0][:, entries]
                a_w = a_w.flatten(2).index_fill(2, entries, 0.0).view(a_w.shape)
            # What is left is settled: there the lines on both sides are one and the same.
            parts, constant = bounds.relaxed(w).pull(a_w)
            constants.append(constant[0])
            return parts
        parts, constant, wobble = bounds.pull(w, a_w)
        constants.append(constant[0])
        wobbles.append(wobble[0])
        return parts

    start = bounds.backward(v, a, pull)
    m = (a.a if isinstance(a, Windows) else a).shape[1]
    x = bounds.region.x
    rows = x.new_zeros(m, x[0].numel()) if start is None else dense(start)[0].flatten(1)
    wobbles.append(rows.abs() @ bounds.slack[0].flatten())
    w = tuple(found.get(k, x.new_zeros(m, len(layer.entries))) for k, layer in enumerate(layers))
    total = torch.stack(constants).sum(0) if constants else x.new_zeros(m)
    return _guarded(bounds, layers, Rows(rows, w, total, torch.stack(wobbles).sum(0)))


def _guarded(bounds: Bounds, layers: Sequence[Layer], rows: Rows) -> Rows:
    """Add to the allowance what matrix products with these rows round off."""
    unit = torch.finfo(rows.start.dtype).eps
    most = rows.start.abs() @ torch.maximum(bounds.region.low.abs(), bounds.region.high.abs()).flatten()
    for w, layer in zip(rows.w, layers, strict=True):
        reach = torch.maximum(*(t.flatten()[layer.entries].abs() for t in bounds.pairs[layer.step]))
        most = most + w.abs() @ reach
    terms = sum(w.shape[1] for w in rows.w) + rows.start.shape[1] + len(rows.start) + 16
    return rows._replace(wobble=rows.wobble + (most + rows.constant.abs()) * (terms * unit))
