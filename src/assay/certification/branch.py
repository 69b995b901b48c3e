"""Complete search: where bounds do not suffice, the open ReLUs are split, until every part is proven or time is up.

Beta-CROWN (Wang et al. 2021, arXiv:2103.06624) on the skeleton of the network: parts are bounded in batches by
optimising slopes and the multipliers of splits; the neuron to split is chosen by trying the few most promising ones
(filtered smart branching: De Palma et al. 2021, arXiv:2104.06718). Searching is in float32; a part is closed only by
its bound in float64, with the allowance for rounding.
"""

import time
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from assay.certification.methods import ascend
from assay.certification.skeleton import Rows, Skeleton, State

_LAST = (300, 1.0)
"""Steps of the ascent, and its rate, where no neuron is left to split: then multipliers may have far to go."""

_LEAST = 1e-9
"""The sum of weights is at least this."""


class Parts(NamedTuple):
    """m parts of the region: which claim each is about, the weights (m, k) of its rows, and its state (m, u).

    Where one of several rows is to be positive, a weighted mean of them that is positive will do.
    """

    claim: Tensor
    mix: Tensor
    slopes: Tensor
    signs: Tensor
    betas: Tensor

    def take(self, at: Tensor | slice) -> "Parts":
        return Parts(*(t[at] for t in self))

    def joined(self, other: "Parts") -> "Parts":
        return Parts(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


@final
@dataclass(frozen=True, slots=True)
class Search:
    """How the search goes.

    Args:
        batch: parts that are bounded together.
        steps: of the ascent on each, the root gets ten times as many.
        rate: of the ascent.
        candidates: neurons that are tried before a split.
    """

    batch: int = 256
    steps: int = 3
    rate: float = 0.05
    candidates: int = 3

    def __call__(self, skeleton: Skeleton, rows: Rows, deadline: float, claims: Tensor | None = None) -> "Outcome":
        """Prove claims on the region, until nothing is open any more or time is up.

        Args:
            skeleton: the network on the region, in float64.
            rows: m expressions.
            deadline: on the clock ``time.monotonic``.
            claims: (g, k) numbers of rows: everywhere on the region one of these is positive; by default, each row.
        """
        if claims is None:
            claims = torch.arange(len(rows.start), device=rows.start.device)[:, None]
        return _Tree(self, skeleton, rows, claims).grow(deadline)


class Outcome(NamedTuple):
    """Lower bounds (g,) of the claims: positive where the search ended with a proof, else -inf; and parts visited."""

    lower: Tensor
    visited: int


@final
class _Tree:
    """The parts of one region that are still open, the deepest on top of the stack."""

    def __init__(self, how: Search, skeleton: Skeleton, rows: Rows, claims: Tensor) -> None:
        self.how, self.exact, self.rows, self.claims = how, skeleton, rows, claims
        self.quick, self.quick_rows = skeleton.to(torch.float32), rows.to(torch.float32)
        self.widths = [len(k.entries) for k in skeleton.layers]
        self.free = torch.cat([k.free for k in skeleton.layers]) if self.widths else torch.zeros(0, dtype=torch.bool)
        self.visited = 0
        self.lower = torch.full((len(claims),), torch.inf, dtype=torch.float64, device=claims.device)

    def grow(self, deadline: float) -> Outcome:
        stack = [self._bounded(self._root(), 10 * self.how.steps, self.how.rate)]
        stack = [parts for parts in stack if len(parts.mix)]
        while stack and time.monotonic() < deadline:
            parts = self._batch(stack)
            can = (self.free & (parts.signs == 0)).any(1)
            if not can.all():  # everything is split: only multipliers are left to improve
                self.lower[self._bounded(parts.take(~can), *_LAST).claim] = -torch.inf
                parts = parts.take(can)
            parts = self._bounded(self._split(parts), self.how.steps, self.how.rate)
            parts = parts.take(self.lower[parts.claim] > -torch.inf)
            if len(parts.mix):
                stack.append(parts)
        for parts in stack:
            self.lower[parts.claim] = -torch.inf
        return Outcome(self.lower, self.visited)

    def _root(self) -> Parts:
        g, none = len(self.claims), self.quick_rows.start.new_zeros(len(self.claims), 0)
        slopes = torch.cat([*self.quick.start(g).slopes, none], 1)
        signs = torch.zeros_like(slopes, dtype=torch.int8)
        every = torch.arange(g, device=slopes.device)
        mix = torch.ones_like(self.claims, dtype=torch.float32)
        return Parts(every, mix, slopes, signs, torch.zeros_like(slopes))

    def _rows(self, rows: Rows, parts: Parts) -> Rows:
        """Return for each part the weighted mean of the rows of its claim."""
        mix = parts.mix.to(rows.start.dtype)
        return rows.mixed(self.claims[parts.claim], mix / mix.sum(1, keepdim=True).clamp_min(_LEAST))

    def _batch(self, stack: list[Parts]) -> Parts:
        parts = stack.pop()
        while stack and len(parts.mix) + len(stack[-1].mix) <= self.how.batch:
            parts = parts.joined(stack.pop())
        if len(parts.mix) > self.how.batch:
            stack.append(parts.take(slice(self.how.batch, None)))
            parts = parts.take(slice(self.how.batch))
        return parts

    def _state(self, parts: Parts, dtype: torch.dtype) -> State:
        slopes, betas = (torch.split(t.to(dtype), self.widths, 1) for t in (parts.slopes, parts.betas))
        return State(tuple(slopes), tuple(torch.split(parts.signs, self.widths, 1)), tuple(betas))

    def _bounded(self, parts: Parts, steps: int, rate: float) -> Parts:
        """Optimise the state of parts; return those that are still open."""
        if not len(parts.mix):
            return parts
        self.visited += len(parts.mix)
        state, k = self._state(parts, torch.float32), len(self.widths)
        # Rows are made anew at each step only where their weights are searched.
        fixed = self._rows(self.quick_rows, parts) if k and self.claims.shape[1] == 1 else None

        def bound(leaves: list[Tensor]) -> Tensor:
            rows = fixed or self._rows(self.quick_rows, parts._replace(mix=leaves[-1]))
            return self.quick.lower(rows, State(tuple(leaves[:k]), state.signs, tuple(leaves[k : 2 * k])))

        leaves = [*state.slopes, *(state.betas or ()), *(() if fixed else (parts.mix,))]
        most = [1.0] * k + [torch.inf] * k + [1.0]
        found, best = ascend(bound, leaves, most[: len(leaves)], steps, rate, enough=0.0)
        slopes, betas = (torch.cat([parts.slopes[:, :0], *best[i : i + k]], 1) for i in (0, k))
        parts = parts._replace(slopes=slopes, betas=betas, mix=parts.mix if fixed else best[-1])
        return parts.take(~self._closed(parts, found > 0))

    def _closed(self, parts: Parts, likely: Tensor) -> Tensor:
        """Return which parts are proven, by their bounds in float64."""
        closed = likely.clone()
        sure = parts.take(likely)
        if len(sure.mix):
            exact = self.exact.lower(self._rows(self.rows, sure), self._state(sure, torch.float64))
            closed[likely] = exact > 0
            self.lower.scatter_reduce_(0, sure.claim[exact > 0], exact[exact > 0], "amin")
        return closed

    def _split(self, parts: Parts) -> Parts:
        """Split each part at the best of a few neurons."""
        if not len(parts.mix):
            return parts
        scores, chosen = self._score(parts).topk(min(self.how.candidates, parts.signs.shape[1]), 1)
        n, c = chosen.shape
        trial = parts.take(torch.arange(n, device=chosen.device).repeat_interleave(2 * c))
        sides = torch.tensor([1, -1], dtype=torch.int8, device=chosen.device).repeat(n * c)
        signs = trial.signs.scatter(1, chosen.repeat_interleave(2, 1).view(-1, 1), sides[:, None])
        trial = trial._replace(signs=signs)
        with torch.no_grad():
            found = self.quick.lower(self._rows(self.quick_rows, trial), self._state(trial, torch.float32)).view(
                n, c, 2
            )
        found = found.masked_fill(scores[..., None] < 0, -torch.inf)  # a part may have fewer neurons to split
        # What counts is the worse side; the better one breaks ties.
        best = (found.amin(2) + 0.1 * found.amax(2).clamp(max=0)).argmax(1)
        kept = (torch.arange(n, device=chosen.device) * c + best)[:, None] * 2 + torch.arange(2, device=chosen.device)
        return trial.take(kept.flatten())

    def _score(self, parts: Parts) -> Tensor:
        """Estimate for each open neuron how much its relaxation costs the bound; -1 where it cannot be split."""
        seen: list[Tensor] = []
        state = self._state(parts, torch.float32)
        with torch.no_grad():
            self.quick.lower(self._rows(self.quick_rows, parts), state, seen)
        scores = []
        for a, slope, layer in zip(seen[::-1], state.slopes, self.quick.layers, strict=True):
            below = a.clamp(min=0) * torch.minimum(-slope * layer.low, (1 - slope) * layer.high)
            scores.append(below - a.clamp(max=0) * layer.above[1])
        return torch.where(self.free & (parts.signs == 0), torch.cat(scores, 1), torch.tensor(-1.0))
