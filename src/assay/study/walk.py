"""The walk to the decision boundary: what would have to change before the model calls a sample something else."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from assay.attacks import TargetedAscent, get
from assay.attacks.attack import Result, Runnable
from assay.core.registry import UsageError
from assay.core.types import Inputs
from assay.data import Data
from assay.models import Door, Model, as_model
from assay.models.line import default_batch
from assay.reports.walk import write_gif, write_walk
from assay.study.curvature import Classifier, copies, pose_one
from assay.threats import Problem, Threat

STEPS: Final = 200
"""Steps of the attack that looks for the smallest change."""

_PER_WAY: Final = 40
"""The model is asked at multiples of a fortieth of a way, so that its end is among them, and up to a quarter beyond."""

_POINTS: Final = 51

_FRAMES: Final = (0, 8, 16, 24, 32, 40, 50)
"""Which of these points are shown as pictures."""

_SLICE_MARGIN: Final = 0.35
"""How far a slice extends beyond the three points that it goes through, as a share of their extent."""

_OUT_OF_LINE: Final = 1e-3
"""Share of a way across another from which the two span a plane."""

_SURE: Final = 0.95
"""Probability of the target at which an ascent ends."""


@final
@dataclass(frozen=True, slots=True)
class Way:
    """The straight way from a sample to the nearest point found that the model calls ``target``, and a little beyond.

    ``size`` is the length of the change in the walk's norm, inf where no such point was found; it was verified by a
    fresh pass, and a smaller one may exist. ``confidences`` (t, c) are probabilities at the points x + ``shares``[i]
    (end - x), drawn back into the box, and ``frames`` (m, *f) the points at ``shares[shown]``; empty without a find.
    """

    target: int
    size: float
    end: np.ndarray
    shares: np.ndarray
    confidences: np.ndarray
    frames: np.ndarray
    shown: tuple[int, ...]

    @property
    def found(self) -> bool:
        return bool(np.isfinite(self.size))


@final
@dataclass(frozen=True, slots=True)
class Slice:
    """The plane through a sample and two points of other classes, coloured by the model's answer.

    ``predictions`` and ``confidences`` (s, s) at x + ``first``[j] u + ``second``[i] v, drawn back into the box; u and v
    of l2 length 1. ``marks``: name, first and second offset.
    """

    first: np.ndarray
    second: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    marks: tuple[tuple[str, float, float], ...]


@final
@dataclass(frozen=True, slots=True)
class Ascent:
    """Plain targeted gradient ascent, step by step: ``frames`` (n, *f) and the probabilities (n, c) at each."""

    target: int
    frames: np.ndarray
    confidences: np.ndarray

    @property
    def reached(self) -> int | None:
        """The first step at which the model says the target."""
        said = np.flatnonzero(self.confidences.argmax(1) == self.target)
        return int(said[0]) if len(said) else None


@final
@dataclass(frozen=True, slots=True)
class Distances:
    """Median least sizes (c, c), from the class of a sample (row) to a class wanted (column).

    Only samples that the model has right count, ``counts`` (c,) of each class; a change that was not found counts as
    infinite. NaN where there is no sample, 0 on the diagonal. ``found`` is the share of all searches that succeeded.
    """

    median: np.ndarray
    counts: np.ndarray
    found: float
    norm: str
    attack: str
    forwards: int
    backwards: int

    def to_json(self) -> dict[str, Any]:
        plain = [[float(v) if np.isfinite(v) else None for v in row] for row in self.median]
        passes = {"forwards": self.forwards, "backwards": self.backwards}
        found = self.found if np.isfinite(self.found) else None
        return {"median": plain, "counts": self.counts.tolist(), "found": found, "passes": passes}


@final
@dataclass(frozen=True, slots=True)
class Walk:
    """What it takes before a model calls one sample something else; ``ways`` from the shortest to the longest."""

    model: str
    x: np.ndarray
    label: int
    prediction: int
    confidences: np.ndarray
    norm: str
    attack: str
    ways: tuple[Way, ...]
    plane: Slice | None
    ascent: Ascent | None
    box: tuple[float, float]
    index: int
    seed: int
    forwards: int
    backwards: int

    @property
    def nearest(self) -> Way | None:
        return self.ways[0] if self.ways and self.ways[0].found else None

    def to_json(self) -> dict[str, Any]:
        """Return the sizes, without pictures."""
        ascent = None
        if self.ascent is not None:
            a = self.ascent
            ascent = {"target": a.target, "steps": len(a.frames) - 1, "reached": a.reached}
        return {
            "model": self.model,
            "index": self.index,
            "label": self.label,
            "prediction": self.prediction,
            "confidence": float(self.confidences[self.prediction]),
            "norm": self.norm,
            "attack": self.attack,
            "ways": [{"target": w.target, "size": w.size if w.found else None} for w in self.ways],
            "ascent": ascent,
            "seed": self.seed,
            "passes": {"forwards": self.forwards, "backwards": self.backwards},
        }

    def report(
        self, path: Path | str, names: Sequence[str] | None = None, matrix: Distances | None = None, command: str = ""
    ) -> Path:
        """Write the page, with the names of the classes and a matrix of distances where there are any.

        Raises:
            RunError: it cannot be written.
        """
        return write_walk(Path(path), self, names, matrix, command)

    def gif(self, path: Path | str, milliseconds: int = 120) -> Path:
        """Write the ascent as an animation, a frame a step.

        Raises:
            UsageError: there was no ascent.
            DataError: the samples are no images.
            RunError: it cannot be written.
        """
        if self.ascent is None:
            raise UsageError("a walk with an ascent", "one without", "Leave out ascent=False.")
        return write_gif(Path(path), self.ascent.frames, *self.box, milliseconds=milliseconds)


def walk(
    model: Classifier, x: Tensor, y: int, norm: str = "l2", attack: str | Runnable = "fmn", steps: int = STEPS,
    seed: int = 0, *, index: int = 0, target: int | None = None, ascent: bool = True, slice_steps: int = 61,
    targets: Sequence[int] | None = None, device: torch.device | str | None = None,
) -> Walk:  # fmt: skip
    """Look for the least change before the model calls a sample each other class, and for what happens on the way.

    The attack is minimal-norm and targeted, one search a class; a size is that of a point verified by a fresh pass, an
    upper bound on the least. Where the model is wrong on x, the label is one of the classes to reach.

    Args:
        model: whom to ask.
        x: one sample (*f) inside the box.
        y: its label.
        norm: ``linf``, ``l2``, ``l1`` or ``l0``.
        attack: a minimal-norm attack, or its name.
        steps: of an attack given by name.
        seed: of the random numbers.
        index: of the sample in its data.
        target: the class of the ascent; None for the nearest one.
        ascent: whether to make one.
        slice_steps: points along a side of the slice; 0 for none.
        targets: the classes to look for; None for every other one.
        device: where to run.

    Raises:
        DataError: x is not inside the box.
        UsageError: no such attack, or a target that is no other class.
        ThreatError: the attack does not know the norm, or needs an eps.

    Example:
        >>> import torch
        >>> line = lambda x: torch.stack([0.5 - x.mean(1), x.mean(1) - 0.5], 1)
        >>> found = walk(line, torch.full((4,), 0.4), 0, "linf", steps=20)
        >>> found.nearest.target, round(found.nearest.size, 2)
        (1, 0.1)
    """
    model = as_model(model)
    threat = Threat(norm, targeted=True)
    with model.frozen(device) as live:
        door, p = Door(live, 1), pose_one(live, x, y, threat, seed, index)
        here = door.logits(p.x0, p.rows).softmax(1)[0]
        said, classes = int(here.argmax()), len(here)
        wanted = [c for c in range(classes) if c != said] if targets is None else targets
        goals = torch.tensor([_other(c, said, classes) for c in wanted])
        chosen = get(attack, steps=steps) if isinstance(attack, str) else attack
        name = attack if isinstance(attack, str) else type(attack).__name__
        many = x.detach()[None].float().expand(len(goals), *x.shape).contiguous()
        at = torch.full_like(goals, index)
        result = chosen(model, many, goals, threat, seed, indices=at, device=device)
        ways = sorted(_ways(door, p, goals, result), key=lambda w: (w.size, w.target))
        found = [w for w in ways if w.found]
        top = _target(target, found, said, classes)
        climbed = _ascend(door, p, top) if ascent and top is not None else None
        plane = _slice(door, p, found, slice_steps) if slice_steps and len(found) > 1 else None
        forwards, backwards = (int(n[0]) for n in (door.forwards, door.backwards))
    return Walk(
        model=model.name,
        x=x.detach().cpu().numpy(),
        label=int(y),
        prediction=said,
        confidences=here.cpu().numpy(),
        norm=norm,
        attack=name,
        ways=tuple(ways),
        plane=plane,
        ascent=climbed,
        box=(model.domain.lo, model.domain.hi),
        index=index,
        seed=seed,
        forwards=forwards + int(result.forwards.sum()),
        backwards=backwards + int(result.backwards.sum()),
    )


def climb(
    model: Classifier, x: Tensor, target: int, norm: str = "l2", seed: int = 0, *, index: int = 0,
    device: torch.device | str | None = None,
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:  # fmt: skip
    """Climb towards a class, step by step, for whoever wants to watch: the ascent of :func:`walk`.

    Until the iterator ends or is closed, the model is in use.

    Args:
        model: whom to ask.
        x: one sample (*f) inside the box.
        target: the class to reach.
        norm: of the threat; without an eps only the box bounds the climb.
        seed: of the random numbers.
        index: of the sample in its data.
        device: where to run.

    Yields:
        A point (*f), and the probabilities (c,) there; x itself comes first.

    Raises:
        DataError: x is not inside the box.
        UsageError: no such class, or the one that x is in already.
    """
    with as_model(model).frozen(device) as live:
        door, p = Door(live, 1), pose_one(live, x, 0, Threat(norm, targeted=True), seed, index)
        here = door.logits(p.x0, p.rows)[0]
        yield from _steps(door, p, _other(target, int(here.argmax()), len(here)))


def distances(
    model: Classifier, data: Data, norm: str = "l2", limit: int | None = None, attack: str | Runnable = "fmn",
    steps: int = 100, seed: int = 0, *, batch_size: int | None = None, device: torch.device | str | None = None,
) -> Distances:  # fmt: skip
    """Measure how far each class is from each other: medians of the least changes found, over samples that are right.

    Args:
        model: whom to ask.
        data: samples with their labels.
        norm: of the changes.
        limit: use the first samples only; each costs a search for every other class.
        attack: a minimal-norm attack, or its name.
        steps: of an attack given by name.
        seed: of the random numbers.
        batch_size: samples in work together; changes no result.
        device: where to run.

    Raises:
        DataError: samples that do not fit the model.
        UsageError, ThreatError: see :func:`walk`.
    """
    model, data = as_model(model), data if limit is None else data.head(limit)
    chosen = get(attack, steps=steps) if isinstance(attack, str) else attack
    tally = _Tally(model, chosen, Threat(norm, targeted=True), seed, device)
    for rows in torch.split(torch.arange(len(data)), batch_size or default_batch(data.shape, device)):
        tally.take(rows, data.batch(rows), data.labels[rows])
    return tally.summary(norm, attack if isinstance(attack, str) else type(attack).__name__)


class _Tally:
    """Sizes by class of the sample and class wanted, batch by batch."""

    def __init__(
        self, model: Model, attack: Runnable, threat: Threat, seed: int, device: torch.device | str | None
    ) -> None:
        self.model, self.attack, self.threat, self.seed, self.device = model, attack, threat, seed, device
        self.sizes: dict[tuple[int, int], list[float]] = {}
        self.counts: dict[int, int] = {}
        self.classes = 0
        self.passes = np.zeros(2, dtype=np.int64)

    def take(self, rows: Tensor, x: Inputs, y: Tensor) -> None:
        with self.model.frozen(self.device) as live:
            z = Door(live, len(x)).logits(x.to(live.device), torch.arange(len(x), device=live.device)).cpu()
        self.classes = z.shape[1]
        self.passes += (len(x), 0)
        right = (z.argmax(1) == y).nonzero()[:, 0]
        for label in y[right].tolist():
            self.counts[label] = self.counts.get(label, 0) + 1
        for target in range(self.classes):
            at = right[y[right] != target]
            if len(at):
                self._search(target, rows[at], x[at], y[at])

    def _search(self, target: int, rows: Tensor, x: Inputs, y: Tensor) -> None:
        how: dict[str, Any] = {"indices": rows, "device": self.device}
        r = self.attack(self.model, x, torch.full_like(y, target), self.threat, self.seed, **how)
        self.passes += (int(r.forwards.sum()), int(r.backwards.sum()))
        for label, size in zip(y.tolist(), r.size.tolist(), strict=True):
            self.sizes.setdefault((label, target), []).append(size)

    def summary(self, norm: str, attack: str) -> Distances:
        c = self.classes
        median = np.full((c, c), np.nan)
        for at, found in self.sizes.items():
            median[at] = np.median(found)
        counts = np.array([self.counts.get(k, 0) for k in range(c)])
        np.fill_diagonal(median, np.where(counts > 0, 0.0, np.nan))
        every = [s for found in self.sizes.values() for s in found]
        reached = float(np.isfinite(every).mean()) if every else float("nan")
        return Distances(median, counts, reached, norm, attack, *map(int, self.passes))


def _target(target: int | None, found: Sequence[Way], said: int, classes: int) -> int | None:
    if target is None:
        return found[0].target if found else None
    return _other(target, said, classes)


def _other(target: int, said: int, classes: int) -> int:
    if not 0 <= target < classes or target == said:
        raise UsageError(f"a class from 0 to {classes - 1} other than {said}", f"{target}", "Choose another target.")
    return target


def _ways(door: Door, p: Problem, targets: Tensor, r: Result) -> list[Way]:
    return [_way(door, p, int(t), float(r.size[i]), r.x[i]) for i, t in enumerate(targets)]


def _way(door: Door, p: Problem, target: int, size: float, end: Tensor) -> Way:
    if not np.isfinite(size):
        none = np.empty(0)
        return Way(target, size, end.cpu().numpy(), none, none, none, ())
    shares = torch.arange(_POINTS, device=p.x0.device) / _PER_WAY
    end = end.to(p.x0)
    t = shares.to(p.x0).view(-1, *[1] * end.ndim)
    points = torch.where(t == 1, end, p.x0 + t * (end - p.x0)).clamp(p.box.lo, p.box.hi)
    sure = door.logits(points, copies(p, _POINTS).rows).softmax(1)
    at, said, frames = (v.cpu().numpy() for v in (shares, sure, points[list(_FRAMES)]))
    return Way(target, size, end.cpu().numpy(), at, said, frames, _FRAMES)


def _ascend(door: Door, p: Problem, target: int) -> Ascent:
    frames, sure = zip(*_steps(door, p, target), strict=True)
    return Ascent(target, np.stack(frames), np.stack(sure))


def _steps(door: Door, p: Problem, target: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Climb until the model is sure, yielding every step: the attack's own steps, seen one by one."""
    attack = TargetedAscent(steps=100, step=0.01)
    wanted = torch.full_like(p.rows, target)
    q = replace(p, goal=replace(p.goal, label=None, target=wanted))
    s = attack.init(q)
    for k in range(attack.steps + 1):
        e = attack.query(door, s.x, q, k)
        sure = e.logits.float().softmax(1)[0].cpu().numpy()
        yield s.x[0].cpu().numpy(), sure
        if sure[target] >= _SURE:
            return
        s = attack.update(q, s, e, k)


def _slice(door: Door, p: Problem, ways: Sequence[Way], steps: int) -> Slice | None:
    """Colour the plane through the sample and the ends of the two shortest ways that are not in line with it."""
    ends = [torch.from_numpy(w.end).to(p.x0).double() - p.x0[0].double() for w in ways]
    u = ends[0] / ends[0].norm()
    rests = [end - (end * u).sum() * u for end in ends]
    other = next((i for i, rest in enumerate(rests) if rest.norm() > _OUT_OF_LINE * ends[i].norm()), None)
    if other is None:
        return None
    end, v = ends[other], rests[other] / rests[other].norm()
    at = [(0.0, 0.0), (float(ends[0].norm()), 0.0), (float((end * u).sum()), float((end * v).sum()))]
    first, second = _extents(np.array(at), steps)
    names = ("sample", f"to {ways[0].target}", f"to {ways[other].target}")
    b, a = (torch.from_numpy(g.reshape(-1)) for g in np.meshgrid(second, first, indexing="ij"))
    parts = torch.split(torch.stack([a, b], 1), default_batch(p.x0.shape[1:], p.x0.device))
    sure = torch.cat([_ask(door, p, u, v, part) for part in parts])
    top = sure.max(1)
    predictions, confidences = (t.view(steps, steps).numpy() for t in (top.indices, top.values))
    marks = tuple((name, *place) for name, place in zip(names, at, strict=True))
    return Slice(first, second, predictions, confidences, marks)


def _extents(at: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets (steps,) of a square in both directions that holds all points (n, 2), with room around."""
    low, high = at.min(0), at.max(0)
    half = (0.5 + _SLICE_MARGIN) * float((high - low).max())
    first, second = (np.linspace(m - half, m + half, steps) for m in (low + high) / 2)
    return first, second


def _ask(door: Door, p: Problem, u: Tensor, v: Tensor, at: Tensor) -> Tensor:
    a, b = (at[:, i].to(u).view(-1, *[1] * u.ndim) for i in (0, 1))
    points = (p.x0.double() + a * u + b * v).to(p.x0.dtype).clamp(p.box.lo, p.box.hi)
    return door.logits(points, copies(p, len(at)).rows).softmax(1).cpu()
