"""From a region to margins: interval bounds, CROWN-IBP, CROWN and optimised slopes, each a refinement of the former."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, final

import torch
from torch import Tensor

from assay.certification.bounds import Bounds, Slopes
from assay.certification.centred import Centred
from assay.certification.graph import Graph
from assay.certification.rules import Affine, Pair, Rule
from assay.certification.windows import Windows, chosen

MEMORY = 2**24
"""Bytes that the coefficients of one backward pass may take, per tensor about."""

OFTEN = 6
"""Where more than one of so many active neurons is open, all of them are bounded by backward passes."""


@final
@dataclass(frozen=True, slots=True)
class Ascent:
    """How slopes are optimised: steps of Adam (Xu et al. 2021, arXiv:2011.13824), in the dtype of ``quick``."""

    quick: Graph
    steps: int = 20
    rate: float = 0.25
    decay: float = 0.95

    def __call__(self, bounds: Bounds, v: int, a: Tensor | Windows) -> tuple[Tensor, Slopes]:
        """Return lower bounds (n, s) of <a, step v>, each with the best slopes found for it, and these.

        The slopes are searched in low precision; the bound is computed with the best of them in full precision.
        """
        search, slopes = bounds.to(self.quick), Slopes()
        low = a.to(self.quick.dtype)
        with torch.enable_grad():
            search.lower(v, low, slopes)  # makes the slopes
        if not slopes:
            return bounds.lower(v, a), slopes
        keys = [*slopes]

        def bound(leaves: list[Tensor]) -> Tensor:
            return search.lower(v, low, Slopes(zip(keys, leaves, strict=True)))

        start = [s.detach() for s in slopes.values()]
        _, best = ascend(bound, start, [1.0] * len(start), self.steps, self.rate, self.decay)
        chosen = Slopes(zip(keys, best, strict=True)).to(bounds.graph.dtype)
        return bounds.lower(v, a, chosen), chosen


def ascend(
    bound: Callable[[list[Tensor]], Tensor],
    leaves: list[Tensor],
    most: list[float],
    steps: int,
    rate: float,
    decay: float = 0.97,
    enough: float = torch.inf,
) -> tuple[Tensor, list[Tensor]]:
    """Maximise a bound, row by row, with Adam; return the best bounds and for each row the leaves that gave it.

    Args:
        bound: from leaves to bounds; those of one row depend only on that row of the leaves.
        leaves: each with the shape of the bounds in front, and at least 0.
        most: what the values of each leaf are at most.
        steps: of Adam.
        rate: its first rate.
        decay: what the rate is multiplied by after each step.
        enough: stop when all bounds exceed this.
    """
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    adam = torch.optim.Adam(leaves, lr=rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, decay)
    best: Tensor | None = None
    kept = leaves
    for k in range(steps + 1):
        with torch.enable_grad():
            found = bound(leaves)
        now = found.detach()
        better = torch.ones_like(now, dtype=torch.bool) if best is None else now > best
        best = now if best is None else torch.maximum(best, now)
        kept = [torch.where(_like(better, s), s.detach(), old.detach()) for s, old in zip(leaves, kept, strict=True)]
        if k == steps or (best > enough).all():
            break
        grads = torch.autograd.grad(found, leaves, -torch.ones_like(found))
        for s, g in zip(leaves, grads, strict=True):
            s.grad = g
        adam.step()
        schedule.step()
        with torch.no_grad():
            for s, top in zip(leaves, most, strict=True):
                s.clamp_(0, top)
    assert best is not None
    return best, kept


def _like(mask: Tensor, t: Tensor) -> Tensor:
    return mask.view(*mask.shape, *[1] * (t.ndim - mask.ndim))


def refine(
    bounds: Bounds, ascent: Ascent | None = None, deadline: float = math.inf, quick: Graph | None = None
) -> None:
    """Tighten the inputs of every step that is not affine, in order, by backward passes (CROWN).

    Only entries where that matters: a ReLU whose sign is known is exact already. After the ``deadline``, on the clock
    ``time.monotonic``, the intervals at hand have to do. With ``quick``, the graph in float32, coefficients are in
    float32 where there are many.
    """
    exact = exact_by_intervals(bounds)
    centred = Centred.of(bounds, quick) if quick is not None and ascent is None else None
    for step in bounds.graph.steps:
        if step.rule is None or isinstance(step.rule, Affine):
            continue
        for k, i in enumerate(step.inputs):
            wanted = step.rule.loose(*(bounds.pairs[j] for j in step.inputs))[k]
            if i in exact or not wanted.any():
                continue
            if centred is not None and len(step.inputs) == 1 and (many := centred.pays(i, wanted)).any():
                _settle(bounds, centred, step.rule, i, many, deadline)
                wanted = wanted & ~_like(many, wanted)
            tighten(bounds, i, wanted, partial(_both, bounds, i, ascent), deadline)
            bounds.forward(since=i)


def _settle(bounds: Bounds, centred: Centred, rule: Rule, i: int, rows: Tensor, deadline: float) -> None:
    """Tighten step i, the only input of a step, on the regions ``rows`` (n,): what is cheap first.

    Intervals of the layers after this one stay useful only if those that are open or active here are all tight.
    """
    (wanted,) = rule.loose(bounds.pairs[i])
    active = wanted | (bounds.pairs[i][1] > 0)
    often = wanted.flatten(1).sum(1) * OFTEN > active.flatten(1).sum(1)
    first = torch.where(_like(often, wanted), active, wanted) & _like(rows, wanted)
    tighten(bounds, i, first, partial(centred.by_bands, i), deadline)
    (wanted,) = rule.loose(bounds.pairs[i])
    tighten(bounds, i, wanted & _like(rows, wanted), partial(centred.by_lines, i), deadline)


def exact_by_intervals(bounds: Bounds) -> set[int]:
    """Return the steps on which intervals cannot be improved: boxes, and what is affine in one of them."""
    boxes, exact = {0}, {0}
    if bounds.region.norm != "linf":
        return exact
    for v, step in enumerate(bounds.graph.steps):
        if isinstance(step.rule, Affine) and len(step.inputs) == 1 and step.inputs[0] in boxes:
            exact.add(v)
            if step.rule.signs in ("copy", "vertex"):
                boxes.add(v)
    return exact


Both: TypeAlias = Callable[[Tensor, Tensor], Pair]
"""From the numbers of regions (k,) and of entries (k, m) on each to bounds (k, m)."""


def _both(bounds: Bounds, v: int, ascent: Ascent | None, rows: Tensor, at: Tensor) -> Pair:
    """Return bounds (k, m) of the entries ``at`` (k, m) of step v on the regions ``rows`` (k,)."""
    sign = torch.ones_like(at, dtype=bounds.graph.dtype)
    entries = chosen(torch.cat([at, at], 1), torch.cat([sign, -sign], 1), bounds.graph.steps[v].shape)
    part = bounds.take(rows)
    found = part.lower(v, entries) if ascent is None else ascent(part, v, entries)[0]
    return found[:, : at.shape[1]], -found[:, at.shape[1] :]


def tighten(bounds: Bounds, v: int, wanted: Tensor, both: Both, deadline: float = math.inf) -> None:
    """Bound the ``wanted`` (n, *shape) entries of step v by backward passes, and keep what is better."""
    n = len(wanted)
    low, high = (t.flatten(1).clone() for t in bounds.pairs[v])
    mask = wanted.flatten(1)
    widest = max(math.prod(step.shape) for step in bounds.graph.steps[: v + 1])
    most = max(2, int(MEMORY / (8 * widest)))  # rows
    order = mask.sum(1).argsort(descending=True)
    begin = 0
    while begin < n:
        count = int(mask[order[begin]].sum())
        if count == 0 or time.monotonic() > deadline:
            break
        together = max(1, most // (2 * count))
        rows = order[begin : begin + together]
        places = mask[rows].double().argsort(dim=1, descending=True, stable=True)[:, :count]
        for at in torch.split(places, max(1, most // (2 * len(rows))), 1):
            if time.monotonic() > deadline:
                break
            below, above = both(rows, at)
            where = rows[:, None].expand_as(at)
            here = mask[where, at]  # what is more than wanted would depend on the other regions
            low[where, at] = torch.where(here, torch.maximum(low[where, at], below), low[where, at])
            high[where, at] = torch.where(here, torch.minimum(high[where, at], above), high[where, at])
        begin += together
    bounds.pairs[v], bounds.around = (low.view(wanted.shape), high.view(wanted.shape)), {}
