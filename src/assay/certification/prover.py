"""Lower bounds of margins: methods in order of their strength, each only for what the ones before left open."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.certification.bounds import FLOAT32, Arithmetic, Bounds
from assay.certification.branch import Search
from assay.certification.graph import Graph, Program, record
from assay.certification.inputs import FEW, halve
from assay.certification.methods import Ascent, refine
from assay.certification.pieces import in_pieces
from assay.certification.region import Region
from assay.certification.skeleton import NotLinesError, Skeleton, TooLargeError, best_of, express, fold
from assay.core.errors import ModelError, ThreatError
from assay.core.registry import UsageError, closest
from assay.models import Model

METHODS = ("ibp", "crown-ibp", "crown", "alpha", "complete")
"""From the loosest and fastest to the tightest and slowest."""

NORMS = ("linf", "l2", "l1", "l0")

_TIE = 16.0
"""A softmax may make a tie of logits that are nearer to each other than this many roundings."""

Floats: TypeAlias = NDArray[np.float64]

Tell: TypeAlias = Callable[[str, int], None]
"""Is told, as work goes on, the method and how many samples are still open."""


def ignore(method: str, open_: int) -> None:
    """Tell nobody."""


@final
@dataclass(slots=True)
class Prover:
    """Proves that a class stays ahead of the others on whole regions.

    Args:
        model: the network, its box and its normalisation; differentiable, and one fixed function.
        shape: of one input.
        method: one of ``METHODS``; those before it are tried first.
        seconds: for ``complete``: the time for each sample.
        arithmetic: how the deployed network computes; what is claimed holds for every way of doing so.
        device: where to compute.
        search: how ``complete`` splits.

    Raises:
        ModelError: the network cannot be recorded, or has an operator without a bound.
        UsageError: an unknown method.
    """

    model: Model
    shape: tuple[int, ...]
    method: str = "crown"
    seconds: float = 30.0
    arithmetic: Arithmetic = FLOAT32
    device: torch.device | str | None = None
    search: Search = field(default_factory=Search)
    program: Program = field(init=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError("a method of proof", repr(self.method), closest(self.method, [*METHODS]))
        _check_precision(self.model, self.arithmetic)
        with self.model.frozen() as live:
            self.program = record(self.model, tuple(self.shape))
            self.device = self.device or live.device

    @property
    def exact(self) -> Graph:
        """The graph that claims are computed with."""
        return self.program.graph(torch.float64, self.device or "cpu")

    @property
    def quick(self) -> Graph:
        """The graph that is searched with; nothing is claimed by it."""
        return self.program.graph(torch.float32, self.device or "cpu")

    @property
    def softmax(self) -> bool:
        """Whether bounds are of the logits before a softmax at the end of the network."""
        return self.exact.softmax

    @property
    def stages(self) -> tuple[str, ...]:
        """The methods that are tried, in order; ``complete`` begins with what ``alpha`` does."""
        upto = METHODS[: METHODS.index(self.method) + 1]
        return tuple(m for m in upto if m != "alpha" or m == self.method)

    def margins(self, x: Tensor, y: Tensor, radius: Tensor, norm: str, tell: Tell = ignore) -> Tensor:
        """Return lower bounds (n, c) of ``logit_y - logit_j`` over the ball of each sample, infinite for j = y.

        A sample is proven where all are positive. Rounding is allowed for already; no further slack is needed.

        Args:
            x: inside the box, (n, *f).
            y: labels (n,).
            radius: (n,), in the norm.
            norm: ``linf``, ``l2``, ``l1`` or ``l0``.
            tell: is told how far the work is.

        Raises:
            ThreatError: another norm.
        """
        if norm not in NORMS:
            raise ThreatError(f"a norm out of {', '.join(NORMS)}", repr(norm), "These have linear bounds.")
        box = self.model.domain
        region = Region.ball(x.to(self.device), radius.to(self.device), norm, box.lo, box.hi)
        y = y.to(self.device)
        found = torch.full((len(x), self.exact.classes), -torch.inf, dtype=torch.float64, device=self.device)
        for method in self.stages:
            rest = (found.amin(1) <= 0).nonzero().squeeze(1)
            if not len(rest):
                break
            together = 1 if method in ("alpha", "complete") else _TOGETHER
            for k, rows in enumerate(torch.split(rest, together)):
                tell(method, len(rest) - k * together)
                better = self._by(method, region.take(rows), y[rows], found[rows])
                found[rows] = torch.maximum(found[rows], better)
        return found

    @torch.no_grad()
    def _by(self, method: str, region: Region, y: Tensor, known: Tensor) -> Tensor:
        """Return margins (n, c) by one method alone; for the slow ones n is 1."""
        end = time.monotonic() + (self.seconds if method == "complete" else math.inf)
        graph, c = self.exact, differences(y, self.exact.classes).to(self.device)
        bounds = Bounds.by_intervals(graph, region, self.arithmetic)
        if method in ("ibp", "crown-ibp"):
            margins = bounds.lower(graph.out, c, since=graph.out if method == "ibp" else 0)
        else:
            refine(bounds, deadline=_half_way(end), quick=self.quick)
            margins = bounds.lower(graph.out, c)
        if method in ("alpha", "complete"):
            open_ = ((known <= 0) & (margins <= 0))[0].nonzero().squeeze(1)
            margins[0, open_] = self._searched(method, bounds, c[:, open_], end)
        if graph.softmax:
            margins = margins - _TIE * max(self.arithmetic.unit, self.arithmetic.stored)
        return margins.scatter(1, y[:, None], torch.inf)

    def _searched(self, method: str, bounds: Bounds, c: Tensor, end: float) -> Tensor:
        """Return lower bounds (s,) of c (1, s, 1, c) on one region, with optimised slopes or by splitting."""
        if method == "complete" and bounds.region.norm == "linf" and bounds.region.x[0].numel() <= FEW:
            claims = c[0, :, 0][:, None], c.new_zeros(c.shape[1], 1)
            return halve(bounds.graph, bounds.region, claims, end, self.arithmetic)
        out, how = bounds.graph.out, self.ascent
        try:
            skeleton = fold(bounds, how.steps, how.rate, _half_way(end))
        except NotLinesError:
            refine(bounds, how, _half_way(end))
            return how(bounds, out, c)[0][0]
        except TooLargeError:
            return how(bounds, out, c)[0][0]
        rows = express(bounds, skeleton.layers, out, c)
        lower, _ = best_of(skeleton, rows, 2 * how.steps, how.rate)
        if method == "complete" and (lower <= 0).any():
            rest = (lower <= 0).nonzero().squeeze(1)
            bounds, skeleton = _in_pieces(bounds, skeleton, how, end)
            rows = express(bounds, skeleton.layers, bounds.graph.out, c[:, rest])
            lower[rest] = torch.maximum(lower[rest], self.search(skeleton, rows, end).lower)
        return lower

    @property
    def ascent(self) -> Ascent:
        """How slopes are optimised."""
        return Ascent(self.quick)


@final
@dataclass(slots=True)
class BoxProver:
    """Proves what a property says of one box after the other, for ``vnnlib.verify_property``; ``prover`` is complete.

    What is found about a box is kept for the next claim about it.
    """

    prover: Prover
    _box: tuple[bytes, bytes] = (b"", b"")
    _bounds: Bounds | None = None
    _skeleton: Skeleton | None = None

    @torch.no_grad()
    def __call__(self, lo: Floats, hi: Floats, a: Floats, b: Floats, deadline: float) -> bool:
        """Return whether it is proven that no x with lo <= x <= hi (d,) has ``a @ logits <= b``; a (k, c), b (k,)."""
        graph, device = self.prover.exact, self.prover.device
        low, high = (torch.from_numpy(t).to(device).view(1, *self.prover.shape) for t in (lo, hi))
        near = FLOAT32.unit * torch.maximum(low.abs(), high.abs())  # the network sees inputs rounded to float32
        low, high = low - near, high + near
        c, least = torch.from_numpy(a).to(device), torch.from_numpy(b).to(device)
        region = Region.between(low, high)
        if graph.softmax:
            return False  # bounds are of what goes into it
        if region.x[0].numel() <= FEW:
            found = halve(graph, region, (c[None], least[None]), deadline, self.prover.arithmetic)
            return bool(found > 0)
        self._prepare(region, (lo.tobytes(), hi.tobytes()), deadline)
        assert self._bounds is not None
        out = self._bounds.graph.out
        if (self._bounds.lower(out, c[None, :, None]) > least).any():
            return True
        if self._skeleton is None:
            return bool((self.prover.ascent(self._bounds, out, c[None, :, None])[0] > least).any())
        rows = express(self._bounds, self._skeleton.layers, out, c[None, :, None])
        rows = rows._replace(constant=rows.constant - least)
        claims = torch.arange(len(c), device=device)[None]
        return bool(self.prover.search(self._skeleton, rows, deadline, claims).lower > 0)

    def _prepare(self, region: Region, box: tuple[bytes, bytes], deadline: float) -> None:
        if self._box == box:
            return
        self._box, self._skeleton = box, None
        self._bounds = Bounds.by_intervals(self.prover.exact, region, self.prover.arithmetic)
        refine(self._bounds, deadline=_half_way(deadline), quick=self.prover.quick)
        with suppress(NotLinesError, TooLargeError):
            how = self.prover.ascent
            skeleton = fold(self._bounds, how.steps, how.rate, _half_way(deadline))
            self._bounds, self._skeleton = _in_pieces(self._bounds, skeleton, how, deadline)


def _in_pieces(bounds: Bounds, skeleton: Skeleton, how: Ascent, end: float) -> tuple[Bounds, Skeleton]:
    """Return bounds and skeleton of the network in pieces that can be split; what is given where it has no others."""
    if (pieces := in_pieces(bounds.graph, bounds.region.x.device)) is None:
        return bounds, skeleton
    parts = Bounds.by_intervals(pieces.graph, bounds.region, bounds.arithmetic)
    parts.forward(dict(zip(pieces.places, bounds.pairs, strict=True)))
    refine(parts, deadline=_half_way(end))
    try:
        return parts, fold(parts, how.steps, how.rate, _half_way(end))
    except TooLargeError:
        return bounds, skeleton


def _half_way(end: float) -> float:
    """Return the moment at which half of the time until ``end`` is spent."""
    now = time.monotonic()
    return now + (end - now) / 2


_TOGETHER = 16
"""Samples whose bounds are computed together; memory is bounded within."""


def _check_precision(model: Model, arithmetic: Arithmetic) -> None:
    """Refuse to claim for an arithmetic that is finer than the parameters of the network."""
    kinds = {p.dtype for p in model.module.parameters() if p.is_floating_point()} if model.module is not None else set()
    coarse = [d for d in kinds if torch.finfo(d).eps / 2 > max(arithmetic.stored, FLOAT32.unit)]
    if coarse:
        raise ModelError(
            f"a network whose parameters are as precise as {arithmetic.name}",
            f"parameters in {coarse[0]}".replace("torch.", ""),
            "Convert it with .float() first; or give --arithmetic bfloat16.",
        )


def differences(y: Tensor, classes: int) -> Tensor:
    """Return coefficients (n, c, 1, c) of ``logit_y - logit_j`` for every class j; zero for j = y."""
    eye = torch.eye(classes, dtype=torch.float64, device=y.device)
    return (eye[y][:, None] - eye)[:, :, None]
