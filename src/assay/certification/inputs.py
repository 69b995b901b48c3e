"""Complete search for inputs of few dimensions: the region is halved, again and again, until every part is proven.

Bounds of small boxes are tight, so that with a handful of inputs this needs no splits of neurons (as for ACAS Xu: Wang
et al. 2018, arXiv:1804.10829). Any operator with a rule will do.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from assay.certification.bounds import Arithmetic, Bounds
from assay.certification.graph import Graph
from assay.certification.methods import refine
from assay.certification.region import Region

FEW = 12
"""Dimensions up to which halving pays."""


class _Boxes(NamedTuple):
    low: Tensor  # (n, *f)
    high: Tensor
    claim: Tensor  # (n,)

    def take(self, at: Tensor | slice) -> "_Boxes":
        return _Boxes(*(t[at] for t in self))


def halve(
    graph: Graph,
    region: Region,
    claims: tuple[Tensor, Tensor],
    deadline: float,
    arithmetic: Arithmetic,
    batch: int = 256,
) -> Tensor:
    """Return lower bounds (g,): positive for claims that are proven on a box, -inf for those still open at the end.

    Args:
        graph: in float64.
        region: one box.
        claims: coefficients a (g, k, c) and constants b (g, k): everywhere one of ``a @ logits - b`` is positive.
        deadline: on the clock ``time.monotonic``.
        arithmetic: how the deployed network computes.
        batch: boxes that are bounded together.
    """
    a, b = claims
    g = len(a)
    lower = torch.full((g,), torch.inf, dtype=torch.float64, device=a.device)
    every = torch.arange(g, device=a.device)
    start = _Boxes(region.low.expand(g, *region.x.shape[1:]), region.high.expand(g, *region.x.shape[1:]), every)
    stack = [start]
    while stack:
        boxes = stack.pop()
        if time.monotonic() > deadline:
            stack.append(boxes)
            break
        if len(boxes.claim) > batch:
            stack.append(boxes.take(slice(batch, None)))
            boxes = boxes.take(slice(batch))
        found, slope = _bounded(graph, boxes, a[boxes.claim], b[boxes.claim], arithmetic)
        closed = found > 0
        lower.scatter_reduce_(0, boxes.claim[closed], found[closed], "amin")
        if not closed.all():
            stack.append(_halved(boxes.take(~closed), slope[~closed]))
    for boxes in stack:
        lower[boxes.claim] = -torch.inf
    return lower


def _bounded(graph: Graph, boxes: _Boxes, a: Tensor, b: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Return the bound (n,) of the best row of each claim, and by how much each input moves it (n, *f)."""
    bounds = Bounds.by_intervals(graph, Region.between(boxes.low, boxes.high), arithmetic)
    refine(bounds)
    slopes: list[Tensor] = []
    found = bounds.lower(graph.out, a[:, :, None], seen=slopes) - b
    best = found.argmax(1)
    rows = torch.arange(len(best), device=best.device)
    return found[rows, best], slopes[0][rows, best].abs()


def _halved(boxes: _Boxes, slope: Tensor) -> _Boxes:
    """Cut each box in the middle of the input that matters most."""
    wide = (boxes.high - boxes.low).flatten(1)
    at = (wide * slope.flatten(1) + 1e-9 * wide).argmax(1, keepdim=True)
    middle = ((boxes.low + boxes.high) / 2).flatten(1).gather(1, at)
    low = boxes.low.flatten(1).scatter(1, at, middle).view(boxes.low.shape)
    high = boxes.high.flatten(1).scatter(1, at, middle).view(boxes.high.shape)
    return _Boxes(torch.cat([boxes.low, low]), torch.cat([high, boxes.high]), torch.cat([boxes.claim, boxes.claim]))
