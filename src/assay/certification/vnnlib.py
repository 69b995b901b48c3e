"""Properties in VNN-LIB (:mod:`assay.certification.vnnlib_format`): falsified, verified, and the answers written.

A property describes what must not happen: boxes of inputs, and for each box the outputs that are unsafe there. It is
``sat`` where some point of a box has an unsafe output, ``unsat`` where that is proven impossible.

References:
    Rules and results of the competition: Brix, Bak, Liu & Johnson 2023, arXiv:2312.16760, sec. 2.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from assay.certification.vnnlib_format import Conjunction, Floats, Property, Region, parse, read
from assay.core.errors import DataError, ModelError
from assay.core.random import Draws
from assay.models.loaded import Net
from assay.models.model import Model

__all__ = [
    "Conjunction",
    "Counterexample",
    "Judge",
    "Property",
    "Prover",
    "Region",
    "Verdict",
    "falsify",
    "parse",
    "read",
    "verify_file",
    "verify_property",
    "write_counterexample",
]

Judge: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Runs the network in float32: inputs (b, *shape) to outputs (b, *out); ``models.loaders.onnx.Runtime`` is one."""

_ROWS: Final = 256
_NUMBERS: Final = 1 << 22
"""Starting points that are searched at once, and the most numbers in them."""

_FIRST_STEP, _LAST_STEP = 0.5, 0.01
"""Steps of the search, as a fraction of the width of the box in each coordinate."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Counterexample:
    """An input x (n,), float64, inside a box of the property, and the unsafe outputs y (m,), float32, for it."""

    x: Floats
    y: NDArray[np.float32]


def falsify(
    net: Net,
    prop: Property,
    *,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    steps: int = 50,
    restarts: int = 200,
    deadline: float | None = None,
    judge: Judge | None = None,
) -> Counterexample | None:
    """Search for a counterexample by projected signed gradients from many starting points.

    x <- clip(x - s_k * (hi - lo) * sign(grad of the worst row of A y - b)), s_k falling geometrically. The first
    start is the middle of the box. Of the others one in four is drawn from it; the rest are the corners in which
    random directions in layers of the network point: noise on many inputs averages out before it changes what a
    network sees, and such a corner does not. It stops at the first point that ``judge`` confirms.
    All points are float32 numbers inside the box; where a coordinate's bounds have none between them, the network
    sees the rounded bound, and the counterexample has the bound itself.

    Sees: gradients. Cost: restarts * (steps + 1) forward and backward passes for each conjunction, at most.

    Args:
        net: inputs (b, *shape) to outputs (b, *out), which are flattened; a :class:`assay.Model` will do. Not counted.
        prop: what to violate.
        shape: of one sample; flat, (n,), if not given.
        seed: of the starting points.
        steps: from each starting point.
        restarts: starting points for each conjunction.
        deadline: when to give up, on the clock ``time.monotonic``.
        judge: the network that the verdict is about, run anew for each candidate: ONNX Runtime for an ONNX file;
            ``net`` itself if not given.

    Raises:
        DataError: the property has other numbers of inputs or outputs than the network.

    References:
        Madry et al. 2018, arXiv:1706.06083, sec. 2.1 (PGD), on boxes and linear constraints.
        Tashiro, Song & Ermon 2020, arXiv:2003.06878, sec. 3 (starts by random directions), in inner layers too.
    """
    game = _Game(net, prop, tuple(shape or (prop.inputs,)), judge)
    cases = [(r, c) for r in prop.regions for c in r.unsafe]
    total = len(cases) * restarts
    most = net.rows if isinstance(net, Model) and net.rows else max(1, min(_ROWS, _NUMBERS // prop.inputs))
    size = most if isinstance(net, Model) and net.fixed_rows else min(most, max(total, 1))
    for first in range(0, total, size):
        if _late(deadline):
            break
        rows = range(first, first + size)  # the last batch is filled up with further starting points
        chosen = [cases[i % len(cases)] for i in rows]
        batch = _Batch.of(chosen, prop.outputs)
        start = _starts(game, batch, Draws.of(seed, torch.tensor(rows)), torch.tensor(rows) // len(cases))
        for at, x in _descend(game, batch, start, steps, deadline):
            if found := game.confirmed(x, chosen[at][0]):
                return found
    return None


@final
@dataclass(frozen=True, slots=True)
class _Game:
    """The network, and what it must not do."""

    net: Net
    prop: Property
    shape: tuple[int, ...]
    judge: Judge | None

    def __post_init__(self) -> None:
        if math.prod(self.shape) != self.prop.inputs:
            found = f"a network with inputs of shape {self.shape}"
            raise DataError(f"a network with {self.prop.inputs} inputs", found, "Check that both belong together.")

    def outputs(self, x: Tensor) -> Tensor:
        """Return the outputs (b, m) for x (b, n)."""
        y: Tensor = self.net(x.view(-1, *self.shape)).flatten(1)
        self._check(y.shape[1])
        return y

    def confirmed(self, x: NDArray[Any], region: Region) -> Counterexample | None:
        """Return the counterexample that x (n,) is, run alone; None if it is none."""
        inside = np.clip(x.astype(np.float64), region.lo, region.hi)
        y = self._judged(inside.astype(np.float32))
        return Counterexample(inside, y) if np.isfinite(y).all() and self.prop.violated(inside, y) else None

    def _judged(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.judge is not None:
            y = self.judge(x.reshape(1, *self.shape)).reshape(-1)
            self._check(len(y))
            return y
        rows = self.net.rows if isinstance(self.net, Model) and self.net.fixed_rows and self.net.rows else 1
        with torch.no_grad():
            out: NDArray[np.float32] = self.outputs(torch.from_numpy(x).expand(rows, -1))[0].numpy()
        return out

    def _check(self, outputs: int) -> None:
        if outputs != self.prop.outputs:
            found = f"a network with {outputs} outputs"
            raise DataError(f"a network with {self.prop.outputs} outputs", found, "Check that both belong together.")


class _Batch(NamedTuple):
    """Boxes lo, hi (b, n), in float32 numbers, and conjunctions a (b, k, m), b (b, k), one for each row."""

    lo: Tensor
    hi: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, cases: Sequence[tuple[Region, Conjunction]], outputs: int) -> "_Batch":
        boxes = {id(r): _float32_box(r) for r, _ in cases}
        lo, hi = (torch.from_numpy(np.stack([boxes[id(r)][i] for r, _ in cases])) for i in (0, 1))
        k = max(1, *(len(c.b) for _, c in cases))
        a, b = torch.zeros(len(cases), k, outputs), torch.zeros(len(cases), k)  # rows 0 y <= 0 hold always
        for i, (_, c) in enumerate(cases):
            a[i, : len(c.b)], b[i, : len(c.b)] = torch.from_numpy(c.a), torch.from_numpy(c.b)
        return cls(lo, hi, a, b)


def _starts(game: _Game, batch: _Batch, draws: Draws, turn: Tensor) -> Tensor:
    """Return starting points (b, n): the middle at turn 0, a random point at every fourth, else a corner."""
    width = batch.hi - batch.lo
    point = torch.where(turn[:, None] == 0, 0.5, draws.fold(0).uniform(batch.lo.shape[1:]))
    slope = _directions(game, batch.lo + width / 2, draws.fold(1))
    corner = torch.where(slope == 0, point, (slope > 0).float())
    return batch.lo + torch.where(turn[:, None] % 4 > 0, corner, point) * width


def _directions(game: _Game, x: Tensor, draws: Draws) -> Tensor:
    """Return for each row of x (b, n) the gradient of a random linear function of a random layer's output."""
    x = x.requires_grad_()
    seen: list[Tensor] = []

    def keep(_layer: nn.Module, _given: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.requires_grad and len(out) == len(x):
            seen.append(out.flatten(1))

    module = game.net.module if isinstance(game.net, Model) else game.net
    layers = list(module.modules()) if isinstance(module, nn.Module) else []
    learned = [m for m in layers if next(m.parameters(recurse=False), None) is not None]
    hooks = [m.register_forward_hook(keep) for m in learned]
    try:
        seen.append(game.outputs(x))
    finally:
        for h in hooks:
            h.remove()
    layer = draws.integers(len(seen))
    total = x.new_zeros(())
    for i, out in enumerate(seen):
        rows = (layer == i).nonzero()[:, 0]
        total = total + (out[rows] * draws.take(rows).fold(i).normal(out.shape[1:])).sum()
    (slope,) = torch.autograd.grad(total, x, materialize_grads=True)
    return slope


def _descend(
    game: _Game, batch: _Batch, start: Tensor, steps: int, deadline: float | None
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield at each step the row and the point (n,) that looks most unsafe, if any does."""
    width = batch.hi - batch.lo
    x = start.detach().clamp(batch.lo, batch.hi)
    for k in range(steps + 1):
        if _late(deadline):
            return
        x.requires_grad_()
        excess = (batch.a @ game.outputs(x)[:, :, None]).squeeze(2) - batch.b
        worst = excess.amax(1)
        (slope,) = torch.autograd.grad(worst.sum(), x, materialize_grads=True)
        best = int(worst.argmin())
        if worst[best] <= 0:
            yield best, x[best].detach().numpy()
        step = _FIRST_STEP * (_LAST_STEP / _FIRST_STEP) ** (k / max(steps, 1))
        x = (x.detach() - step * width * slope.sign()).clamp(batch.lo, batch.hi)


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _float32_box(region: Region) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the smallest and the largest float32 numbers inside; where there are none, the rounded lower bound."""
    low, high = region.lo.astype(np.float32), region.hi.astype(np.float32)
    inner_low = np.where(low < region.lo, np.nextafter(low, np.float32(np.inf)), low)
    inner_high = np.where(high > region.hi, np.nextafter(high, np.float32(-np.inf)), high)
    thin = inner_low > inner_high
    return np.where(thin, low, inner_low), np.where(thin, low, inner_high)


class Prover(Protocol):
    """Proves that no x with lo <= x <= hi, both (n,), has outputs y with a @ y <= b, a (k, m), b (k,).

    Returns True where that is proven, False where it is open at the deadline (of the clock ``time.monotonic``), and
    otherwise a point (n,) that it takes for a counterexample, which is checked.
    """

    def __call__(self, lo: Floats, hi: Floats, a: Floats, b: Floats, deadline: float) -> bool | NDArray[Any]: ...


@final
@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """``sat`` with its counterexample x (n,), y (m,); ``unsat``: proven; or ``unknown``; and the seconds it took."""

    answer: Literal["sat", "unsat", "unknown"]
    x: Floats | None
    y: NDArray[np.float32] | None
    seconds: float
    reason: str = ""  # why nothing could be proven, where the network has no bounds


_SEARCHED: Final = 0.1
"""The share of the time that is left for the search that comes before the proofs."""


def verify_property(
    net: Net,
    prop: Property,
    timeout: float,
    prove: Prover,
    *,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    judge: Judge | None = None,
) -> Verdict:
    """Answer whether a property can be violated: search for a counterexample for a while, then prove.

    Every conjunction is tried with an equal share of the time that is left. What stays open is searched longer, from
    other points, and tried once more.

    Args:
        net: as :func:`falsify` takes it.
        prop: the property.
        timeout: seconds.
        prove: proves one conjunction on one box.
        shape: of one sample.
        seed: of the search.
        judge: confirms counterexamples.

    Raises:
        DataError: the property has other numbers of inputs or outputs than the network.
    """
    start = time.monotonic()
    end = start + timeout
    game = _Game(net, prop, tuple(shape or (prop.inputs,)), judge)
    found, unproven = None, prop
    for turn, restarts in enumerate((200, 1_000_000)):
        now = time.monotonic()
        stop = now + _SEARCHED * (end - now)
        found = falsify(net, unproven, shape=shape, seed=seed + turn, restarts=restarts, deadline=stop, judge=judge)
        if found is None:
            found, unproven = _proved(game, unproven, prove, end)
        if found is not None or not unproven.regions or time.monotonic() > end:
            break
    seconds = time.monotonic() - start
    if found is not None:
        return Verdict("sat", found.x, found.y, seconds)
    return Verdict("unknown" if unproven.regions else "unsat", None, None, seconds)


def verify_file(model: str | Path, file: str | Path, timeout: float, seed: int = 0) -> Verdict:
    """Answer a property file about an ONNX file. A counterexample is one for ONNX Runtime.

    Raises:
        DataError, ModelError: a file cannot be read, or they do not belong together.
    """
    from assay.certification.prover import BoxProver
    from assay.certification.prover import Prover as Complete
    from assay.models.loaders import load_model
    from assay.models.loaders.onnx import Runtime

    begin = time.monotonic()
    prop, net, judge = read(file), load_model(str(model)), Runtime.open(str(model))
    shape, reason = judge.shape, ""
    prove: Prover = lambda *_: False  # noqa: E731
    try:
        prove = BoxProver(Complete(net, shape, "complete"))
    except ModelError as e:  # it may still be falsified
        reason = str(e)
    left = max(0.0, timeout - (time.monotonic() - begin))
    verdict = verify_property(net, prop, left, prove, shape=shape, seed=seed, judge=judge)
    return replace(verdict, seconds=time.monotonic() - begin, reason=reason if verdict.answer == "unknown" else "")


def _proved(game: _Game, prop: Property, prove: Prover, end: float) -> tuple[Counterexample | None, Property]:
    """Return a counterexample that came up, and what stays open of a property."""
    left = sum(len(r.unsafe) for r in prop.regions)
    regions = []
    for r in prop.regions:
        unproven = []
        for c in r.unsafe:
            now = time.monotonic()
            answer = prove(r.lo, r.hi, c.a, c.b, now + (end - now) / left) if now < end else False
            left -= 1
            if isinstance(answer, np.ndarray) and (found := game.confirmed(answer, r)):
                return found, prop
            if answer is not True:
                unproven.append(c)
        if unproven:
            regions.append(Region(r.lo, r.hi, tuple(unproven)))
    return None, Property(prop.inputs, prop.outputs, tuple(regions))


def write_counterexample(path: Path | str, x: NDArray[Any], y: NDArray[Any]) -> None:
    """Write a result file of the competition: the line ``sat``, then a list of the values of inputs and outputs.

    Each value is written so that it is read back as the same float64.
    """
    values = [(f"{kind}_{i}", float(v)) for kind, part in (("X", x), ("Y", y)) for i, v in enumerate(np.ravel(part))]
    lines = "\n".join(f"({name} {value!r})" for name, value in values)
    Path(path).write_text(f"sat\n({lines})\n")
