"""Bounds of every step: forward by intervals, backward by lines, each with an allowance for rounding.

The allowance is what makes a bound one of the network *as it is deployed*: step v may return anything within
``slack[v]`` of the exact result (``docs/verified-arithmetic.md`` derives it), and the bound holds all the same.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from assay.certification.graph import Graph
from assay.certification.region import Region
from assay.certification.rules import Affine, Band, Lines, Pair, Relaxed, Rule, dot
from assay.certification.windows import Windows
from assay.core.errors import ModelError


@final
class Slopes(dict[int, Tensor]):
    """For the ReLU at a step, the slopes of the lines below it, a row each; made on first use, to be optimised."""

    def at(self, v: int, lines: Lines, a: "Tensor | Windows") -> Tensor:
        if v not in self:
            low = a.cut(lines.low) if isinstance(a, Windows) else lines.low[:, None].expand_as(a)
            self[v] = low.detach().clone().requires_grad_()
        return self[v]

    def to(self, dtype: torch.dtype) -> "Slopes":
        return Slopes({v: s.detach().to(dtype) for v, s in self.items()})


@final
@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How the network computes.

    Args:
        name: how it is called.
        unit: the largest relative error of an addition or a multiplication.
        stored: the largest relative error of keeping a number between two operations, beyond that.
    """

    name: str
    unit: float
    stored: float = 0.0

    def gamma(self, terms: int) -> float:
        """Return the largest relative error of a sum of products (Higham 2002, sec. 3.1); 0 for no terms.

        Raises:
            ModelError: so many terms may add up to an error of any size.
        """
        if terms * self.unit >= 0.5:
            raise ModelError(
                f"sums of fewer than {0.5 / self.unit:.0f} terms, as each may be off by {self.unit:.2g} in {self.name}",
                f"a layer that adds up {terms}",
                "Claim it for real numbers (--arithmetic real).",
                code="arithmetic-too-coarse",
            )
        kept = (1 + self.stored) ** 3 if terms else 1.0  # both operands, and the result
        return kept * (1 + gamma(terms, self.unit)) - 1


FLOAT32, REAL = Arithmetic("float32", 2.0**-24), Arithmetic("real", 0.0)
# Both cut or round what is multiplied, and add up in float32.
TF32, BFLOAT16 = Arithmetic("tf32", 2.0**-24, 2.0**-10), Arithmetic("bfloat16", 2.0**-24, 2.0**-8)
ARITHMETICS = {a.name: a for a in (FLOAT32, REAL, TF32, BFLOAT16)}


_SMALLEST = 2.0**-126
"""Results below this may be flushed to zero."""


@final
@dataclass(slots=True)
class Bounds:
    """What is known about the steps of a graph on n regions.

    ``pairs`` are bounds (n, *shape) of each step, ``slack`` the allowance (n, *shape) for the rounding in it.
    """

    graph: Graph
    region: Region
    arithmetic: Arithmetic
    pairs: list[Pair] = field(default_factory=list)
    slack: list[Tensor] = field(default_factory=list)
    around: dict[int, Relaxed] = field(default_factory=dict)

    @classmethod
    def by_intervals(cls, graph: Graph, region: Region, arithmetic: Arithmetic = FLOAT32) -> "Bounds":
        """Return the bounds of interval arithmetic (Gowal et al. 2018, arXiv:1810.12715, sec. 3.1)."""
        found = cls(graph, region.to(graph.dtype), arithmetic)
        found.forward()
        return found

    def forward(self, known: Mapping[int, Pair] | None = None, since: int = 0) -> None:
        """Find bounds of all steps from ``since`` on by intervals, never wider than those at hand or ``known``."""
        old, self.pairs, self.slack = self.pairs, self.pairs[:since], self.slack[:since]
        self.around = {v: lines for v, lines in self.around.items() if v < since}
        r, shape = self.region, self.graph.steps[0].shape
        for v, step in enumerate(self.graph.steps[since:], since):
            if step.rule is None:
                pair = r.low.view(-1, *shape), r.high.view(-1, *shape)
            else:
                pair = step.rule.interval(*(self.pairs[i] for i in step.inputs))
            slack = self._allowance(v, pair)
            if not _exact(step.rule):
                pair = pair[0] - slack, pair[1] + slack
            for better in (old[v] if old else None, (known or {}).get(v)):
                if better is not None:
                    pair = torch.maximum(pair[0], better[0]), torch.minimum(pair[1], better[1])
            self.pairs.append(pair)
            self.slack.append(slack)

    def _allowance(self, v: int, pair: Pair) -> Tensor:
        step, own = self.graph.steps[v], torch.finfo(self.graph.dtype).eps / 2
        # What the proof itself rounds: sums over the entries, over the steps, and the product with this allowance.
        entries = math.prod(step.shape) + len(self.graph.steps)
        paid = 1 + 2 * gamma(entries + 8, own)
        if not isinstance(step.rule, Affine):
            most = torch.maximum(pair[0].abs(), pair[1].abs())
            guard = gamma((1 if v else 4) * entries + 64, own)  # the minimum over the region takes more operations
            ulps = 0.0 if step.rule is None else step.rule.ulps
            share = 2 * self.arithmetic.unit * ulps + self.arithmetic.stored + guard
            return most * (share * paid) + _SMALLEST
        inputs = [torch.maximum(low.abs(), high.abs()) for low, high in (self.pairs[i] for i in step.inputs)]
        terms = step.rule.terms
        share = self.arithmetic.gamma(terms) + gamma(terms + entries + 8, own)
        return step.rule.magnitude(*inputs) * (share * paid) + terms * _SMALLEST

    def relaxed(self, v: int) -> Relaxed:
        """Return step v between two affine functions."""
        if v not in self.around:
            self.around[v] = self._relax(v)
        return self.around[v]

    def _relax(self, v: int) -> Relaxed:
        step = self.graph.steps[v]
        assert step.rule is not None
        assert not isinstance(step.rule, Affine)
        return step.rule.relax(*(self.pairs[i] for i in step.inputs))

    def lower(
        self,
        v: int,
        a: "Tensor | Windows",
        slopes: Slopes | None = None,
        since: int = 0,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """Return a lower bound (n, s) of <a, value of step v>, a (n, s, *shape), on each region.

        Backward through all steps (CROWN: Zhang et al. 2018, arXiv:1811.00866; on graphs: Xu et al. 2020,
        arXiv:2002.12920).

        Args:
            v: a step.
            a: coefficients of its value.
            slopes: of the lines below ReLUs.
            since: steps before this one that are not affine are not passed; there the intervals at hand are taken.
            seen: receives the coefficients (n, s, *f) of the input.
        """
        totals: list[Tensor] = []

        def pull(w: int, a_w: "Tensor | Windows") -> "tuple[Tensor | Windows, ...]":
            if w < since and not isinstance(self.graph.steps[w].rule, Affine):
                whole = dense(a_w)
                totals.append(_least(whole, self.pairs[w]) - dot(whole.abs(), self.slack[w]))
                return ()
            parts, constant, wobble = self.pull(w, a_w, slopes)
            totals.append(constant - wobble)
            return parts

        a_0 = self.backward(v, a, pull)
        if a_0 is not None:
            flat = dense(a_0).reshape(*totals[0].shape, *self.region.x.shape[1:])
            at = self.region.least(flat.to(self.region.x.dtype))
            totals.append(at - dot(flat.abs(), self.slack[0]))
            if seen is not None:
                seen.append(flat)
        return torch.stack([t.to(self.region.x.dtype) for t in totals]).sum(0)

    def backward(
        self, v: int, a: "Tensor | Windows", pull: "Callable[[int, Tensor | Windows], tuple[Tensor | Windows, ...]]"
    ) -> "Tensor | Windows | None":
        """Carry coefficients from step v to the input: ``pull`` turns those of a step into those of its inputs."""
        carried: dict[int, Tensor | Windows] = {v: a}
        for w in range(v, 0, -1):
            if (a_w := carried.pop(w, None)) is None:
                continue
            parts = pull(w, a_w)
            for i, part in zip(self.graph.steps[w].inputs, parts, strict=bool(parts)):
                carried[i] = _sum(carried[i], part) if i in carried else part
        return carried.get(0)

    def pull(
        self, v: int, a: "Tensor | Windows", slopes: Slopes | None = None
    ) -> "tuple[tuple[Any, ...], Tensor, Tensor]":
        """Return coefficients for the inputs of step v, a constant (n, s), and the allowance (n, s) for rounding."""
        rule = self.graph.steps[v].rule
        assert rule is not None
        around = rule if isinstance(rule, Affine) else self.relaxed(v)
        if isinstance(a, Windows) and (a.wide or not a.passes(around)):
            a = a.spread()
        chosen = None
        if slopes is not None and isinstance(around, Lines) and around.free is not None:
            chosen = slopes.at(v, around, a)
        if isinstance(a, Windows):
            assert isinstance(around, Affine | Lines | Band)
            return *a.through(around, chosen), a._replace(a=a.a.abs()).dot(self.slack[v])
        parts, constant = around.pull(a, chosen) if isinstance(around, Lines) else around.pull(a)
        return parts, constant, dot(a.abs(), self.slack[v])

    def to(self, graph: Graph) -> "Bounds":
        """Return these bounds for a graph of another dtype: to search with, not to claim."""
        d = graph.dtype
        pairs = [(low.to(d), high.to(d)) for low, high in self.pairs]
        return Bounds(graph, self.region.to(d), self.arithmetic, pairs, [s.to(d) for s in self.slack])

    def take(self, rows: Tensor | slice) -> "Bounds":
        """Return the bounds of some of the regions."""
        pairs = [(low[rows], high[rows]) for low, high in self.pairs]
        return Bounds(self.graph, self.region.take(rows), self.arithmetic, pairs, [s[rows] for s in self.slack])


def _exact(rule: Affine | Rule | None) -> bool:
    """Whether a step only chooses among numbers, so that its bounds are not rounded either."""
    return rule is None or (rule.signs == "copy" and not rule.terms if isinstance(rule, Affine) else not rule.ulps)


def gamma(terms: int, unit: float) -> float:
    """Return the largest relative error of a sum of products, for a rounding error of ``unit`` each."""
    return terms * unit / (1 - terms * unit)


def _least(a: Tensor, pair: Pair) -> Tensor:
    middle, half = (pair[0] + pair[1]) / 2, (pair[1] - pair[0]) / 2
    return dot(a, middle) - dot(a.abs(), half)


def dense(a: "Tensor | Windows") -> Tensor:
    """Return coefficients of the whole tensor."""
    return a.spread() if isinstance(a, Windows) else a


def _sum(a: "Tensor | Windows", b: "Tensor | Windows") -> "Tensor | Windows":
    if isinstance(a, Windows) and isinstance(b, Windows):
        return a.joined(b)
    return dense(a) + dense(b)
