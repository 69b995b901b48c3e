"""Loss and margin over a plane through a sample, or through the weights of a network: pictures, and their numbers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn

from assay.attacks.attack import Result
from assay.attacks.gradient.pgd import PGD
from assay.attacks.losses import cross_entropy, margin
from assay.core.errors import ModelError, ThreatError
from assay.core.random import Draws
from assay.core.registry import UsageError, one_of
from assay.core.types import Inputs, Labels, Logits
from assay.models import Door, Model
from assay.models.door import default_batch
from assay.models.model import Live
from assay.reports.landscape import write_landscape
from assay.study.curvature import Classifier, as_model, copies, curvature, linearity, off_tangent, pose_one
from assay.threats import Goal, Problem, Threat

DIRECTIONS: Final = ("gradient-random", "gradient-adversarial")

MASKED: Final = 0.02
"""Share of points without any gradient from which gradients are called masked; on sound networks there is none."""

_SPAN: Final = 1.5
"""How far a plane extends by default, in eps."""

_REACH: Final = 0.05
"""Where there is no eps: the radius, as a share of the box's diameter."""

_DIRECTIONS, _ADVERSARIAL = 0x1A00, 0x1A01
"""Streams of random numbers."""


@final
@dataclass(frozen=True, slots=True)
class Surface:
    """One model over a plane.

    ``loss`` and ``margin`` (s, s): cross-entropy, and the label's logit minus the strongest other (negative: wrong);
    row i is at offset ``along[i]`` of the second direction, column j at ``along[j]`` of the first. Over weights both
    are means. ``vanished`` (s, s): where the gradient of cross-entropy is exactly zero; ``saturated``: the share of
    points at which float32 cannot tell the largest probability from 1. ``eigenvalues`` of the input Hessian at the
    sample; ``nonlinearity`` in the ball, the largest that ascent and the points of the plane show (see
    :mod:`assay.study.curvature`). NaN and none over weights.
    """

    name: str
    loss: np.ndarray
    margin: np.ndarray
    vanished: np.ndarray | None = None
    saturated: float = float("nan")
    eigenvalues: tuple[float, ...] = ()
    nonlinearity: float = float("nan")
    forwards: int = 0
    backwards: int = 0

    @property
    def blind(self) -> float:
        """The share of points at which the gradient is exactly zero; NaN over weights."""
        return float("nan") if self.vanished is None else float(self.vanished.mean())

    @property
    def masked(self) -> bool:
        """Whether attacks that follow the gradient of cross-entropy are blind somewhere that matters."""
        return self.blind > MASKED

    @property
    def centre(self) -> tuple[float, float]:
        """Loss and margin where the plane touches the sample, or the weights as they are."""
        middle = len(self.loss) // 2
        return float(self.loss[middle, middle]), float(self.margin[middle, middle])

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, without the grid."""
        loss, gap = self.centre
        numbers = {"blind": self.blind, "saturated": self.saturated, "nonlinearity": self.nonlinearity}
        return {
            "model": self.name,
            "loss": loss,
            "margin": gap,
            "largest_loss": float(self.loss.max()),
            **{k: None if np.isnan(v) else v for k, v in numbers.items()},
            "masked": self.masked,
            "eigenvalues": list(self.eigenvalues),
            "passes": {"forwards": self.forwards, "backwards": self.backwards},
        }


@final
@dataclass(frozen=True, slots=True)
class Landscape:
    """Models side by side over one plane, whose offsets in both directions are ``along`` (s,), 0 in the middle.

    ``of`` is ``input`` or ``weights``; ``axes`` name the directions. ``size`` (s, s) is how far each point is from the
    sample in the norm of the threat, after it is drawn back into the box, and ``marks`` are points of interest (name,
    first offset, second offset); both only over inputs, as ``index``, ``label``, ``threat`` and ``eps``.
    """

    of: str
    along: np.ndarray
    axes: tuple[str, str]
    surfaces: tuple[Surface, ...]
    samples: int = 1
    index: int = 0
    label: str = ""
    threat: str = ""
    eps: float = float("nan")
    size: np.ndarray | None = None
    marks: tuple[tuple[str, float, float], ...] = ()
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return what was measured, without the grids."""
        return {
            "of": self.of,
            "axes": list(self.axes),
            "span": float(self.along[-1]),
            "steps": len(self.along),
            "samples": self.samples,
            "index": self.index,
            "label": self.label,
            "threat": self.threat or None,
            "eps": None if np.isnan(self.eps) else self.eps,
            "marks": [{"name": n, "at": [a, b]} for n, a, b in self.marks],
            "seed": self.seed,
            "models": [s.to_json() for s in self.surfaces],
        }

    def report(self, path: Path | str, command: str = "") -> Path:
        """Write the page, one file that needs nothing else, and return where it is.

        Raises:
            RunError: it cannot be written.
        """
        return write_landscape(Path(path), self, command)


# ----------------------------------------------------------------------------------------------------------- of inputs


def landscape(
    models: Classifier | Sequence[Classifier], x: Tensor, y: int, threat: Threat | str,
    directions: str = "gradient-random", span: float | None = None, steps: int = 41, seed: int = 0, *,
    index: int = 0, label: str = "", eigenvalues: int = 3, device: torch.device | str | None = None,
) -> Landscape:  # fmt: skip
    """Measure loss and margin over the plane x + a u + b v, drawn back into the box, for models side by side.

    u is the step of steepest ascent of the first model's cross-entropy (of its margin where that gradient is zero, a
    random direction where both are), v a random direction (signs for linf, else normal) or the perturbation that PGD
    finds, made orthogonal to u. Both have size 1 in the norm of the threat, so that a and b are in units of the box.

    Args:
        models: one or several; the plane is that of the first.
        x: one sample (*f) inside the box.
        y: its label.
        threat: its norm measures lengths, its eps is the ball that is drawn and in which linearity is measured; without
            an eps it is a twentieth of the box's diameter.
        directions: ``gradient-random`` or ``gradient-adversarial``.
        span: how far the plane extends to either side; None for 1.5 eps.
        steps: points along a side; odd, so that the sample is one of them.
        seed: of the random numbers.
        index: of the sample in its data.
        label: how the page calls y; its number by default.
        eigenvalues: how many of the Hessian's to compute; 0 for none.
        device: where to run; None for where the parameters of each model are.

    Raises:
        ThreatError: the norm l0, whose ball has no directions, or an eps that does not fit the box.
        UsageError: an unknown kind of directions, or an even number of steps.
        DataError: x is not inside the box, or y no class of the model.

    Example:
        >>> import torch
        >>> line = lambda x: torch.stack([0.5 - x.mean(1), x.mean(1) - 0.5], 1)
        >>> found = landscape(line, torch.full((4,), 0.6), 1, "linf:0.2", steps=5)
        >>> found.surfaces[0].masked
        False
    """
    nets = _as_models(models)
    threat = Threat.parse(threat) if isinstance(threat, str) else threat
    one_of("directions", directions, DIRECTIONS)
    _check_steps(steps)
    if threat.norm.name == "l0":
        raise ThreatError("a norm that has directions: linf, l2 or l1", "l0", "Choose another --threat.")
    if threat.eps is None:
        width = nets[0].domain.width
        threat = replace(threat, eps=_REACH * threat.norm.diameter(width, x.numel()))
    assert threat.eps is not None
    along = _offsets(_SPAN * threat.eps if span is None else span, steps)
    case = _Case(x, y, threat, seed, index, device)
    plane = _plane(nets[0], case, directions)
    size = torch.cat([plane.size(at) for at in _grid(along, x)]).view(steps, steps).numpy()
    inside = torch.from_numpy(size <= threat.eps)
    surfaces = []
    for name, net in zip(_names(nets), nets, strict=True):
        bare = _over_input(net, case, plane, along, inside)
        surfaces.append(replace(_with_numbers(bare, net, case, eigenvalues), name=name))
    return Landscape(
        of="input",
        along=along,
        axes=plane.axes,
        surfaces=tuple(surfaces),
        index=index,
        label=label or str(y),
        threat=str(threat),
        eps=threat.eps,
        size=size,
        marks=plane.marks,
        seed=seed,
    )


@final
@dataclass(frozen=True, slots=True)
class _Case:
    """One sample, and how it is looked at."""

    x: Tensor
    y: int
    threat: Threat
    seed: int
    index: int
    device: torch.device | str | None

    def pose(self, live: Live) -> Problem:
        return pose_one(live, self.x, self.y, self.threat, self.seed, self.index)


@final
@dataclass(frozen=True, slots=True)
class _Plane:
    """The plane through the sample of ``p`` along u and v (*f); ``marks`` are points on it."""

    p: Problem
    u: Tensor
    v: Tensor
    axes: tuple[str, str]
    marks: tuple[tuple[str, float, float], ...] = ()

    def points(self, at: Tensor) -> Inputs:
        """Return the points (b, *f) with offsets ``at`` (b, 2), inside the box."""
        a, b = (at[:, i].to(self.u).view(-1, *[1] * self.u.ndim) for i in (0, 1))
        return (self.p.x0 + a * self.u + b * self.v).clamp(self.p.box.lo, self.p.box.hi)

    def size(self, at: Tensor) -> Tensor:
        return self.p.norm.size(self.points(at).double() - self.p.x0.double()).cpu()


def _plane(model: Model, case: _Case, directions: str) -> _Plane:
    with model.frozen(case.device) as live:
        p = case.pose(live)
        slope, first = _slope(Door(live, 1), p)
    u = p.norm.steepest(slope, _support(slope))[0]
    random = p.draws.fold(_DIRECTIONS)
    drawn = (random.signs if p.norm.name == "linf" else random.normal)(p.x0.shape[1:], p.x0.dtype)[0]
    plane = _Plane(p, u, _across(p, drawn, u), (first, "a random direction"))
    if directions == "gradient-random":
        return plane
    found = _strongest(model, case)
    d = found.x[0].to(u) - p.x0[0]
    v = _across(p, d, u)
    if not v.any():  # the adversarial point lies on the first axis, as in a linear model
        return plane
    mark = ("adversarial" if bool(found.success) else "strongest tried", _along(d, u), _along(d, v))
    return replace(plane, v=v, axes=(first, "the adversarial perturbation"), marks=(mark,))


def _strongest(model: Model, case: _Case) -> Result:
    """Return the strongest point that PGD finds in the ball."""
    x, y = case.x.detach()[None].float(), torch.tensor([case.y])
    at = torch.tensor([case.index])
    return PGD(steps=40)(model, x, y, case.threat, case.seed, indices=at, full=True, device=case.device)


def _slope(door: Door, p: Problem) -> tuple[Inputs, str]:
    """Return a direction (1, *f) in which the model gets worse, and what it is."""
    for loss, name in ((cross_entropy, "the gradient step"), (margin, "the gradient step of the margin")):
        slope = door.gradient(p.x0, p, loss).grad
        if slope.any():
            return slope, name
    return p.draws.fold(_ADVERSARIAL).normal(p.x0.shape[1:], p.x0.dtype), "another random direction (no gradient)"


def _support(slope: Inputs) -> int:
    """Return how many coordinates an l1 step moves."""
    return max(1, slope[0].numel() // 20)


def _along(d: Tensor, u: Tensor) -> float:
    return float((d.double() * u.double()).sum() / (u.double() ** 2).sum())


def _across(p: Problem, d: Tensor, u: Tensor) -> Tensor:
    """Return d without its part along u, at size 1; zero where nothing but rounding is left of it."""
    rest = d - _along(d, u) * u
    size = p.norm.size(rest[None])[0]
    return torch.zeros_like(d) if size <= 1e-5 * p.norm.size(d[None])[0] else rest / size


def _over_input(model: Model, case: _Case, plane: _Plane, along: np.ndarray, inside: Tensor) -> Surface:
    """Ask a model for logits and gradients all over the plane; ``inside`` (s, s) says which points are in the ball."""
    found: list[tuple[Tensor, ...]] = []
    with model.frozen(case.device) as live:
        door, one = Door(live, 1), case.pose(live)
        here = door.gradient(one.x0, one, cross_entropy)
        for at in _grid(along, case.x, case.device):
            p, points = copies(one, len(at)), plane.points(at).to(one.x0)
            e = door.gradient(points, p, cross_entropy)
            blind = e.grad.flatten(1).abs().amax(1) == 0
            sure = e.logits.float().softmax(1).amax(1) == 1
            off = off_tangent(here, p, points, e).abs()
            found.append(tuple(v.cpu() for v in (e.loss, -margin(e.logits, p.goal), blind, sure, off)))
        passes = int(door.forwards[0]), int(door.backwards[0])
    loss, gap, blind, sure, off = (torch.cat(v).view(len(along), -1) for v in zip(*found, strict=True))
    return Surface(
        model.name,
        loss.double().numpy() + 0.0,  # no -0
        gap.double().numpy(),
        blind.numpy(),
        float(sure.double().mean()),
        nonlinearity=float(off[inside].max()),
        forwards=passes[0],
        backwards=passes[1],
    )


def _with_numbers(s: Surface, model: Model, case: _Case, count: int) -> Surface:
    """Add what needs more than the plane. Ascent may be blind too: the plane may know more about linearity."""
    how: dict[str, Any] = {"seed": case.seed, "index": case.index, "device": case.device}
    bend = curvature(model, case.x, case.y, count, **how) if count else None
    line = linearity(model, case.x, case.y, case.threat, **how)
    return replace(
        s,
        eigenvalues=bend.eigenvalues if bend else (),
        nonlinearity=max(s.nonlinearity, line.error),
        forwards=s.forwards + line.forwards + (bend.forwards if bend else 0),
        backwards=s.backwards + line.backwards + (bend.backwards if bend else 0),
    )


# ---------------------------------------------------------------------------------------------------------- of weights


def weight_landscape(
    models: Classifier | Sequence[Classifier], x: Inputs, y: Labels, span: float = 1.0, steps: int = 21, seed: int = 0,
    *, device: torch.device | str | None = None,
) -> Landscape:  # fmt: skip
    """Measure mean loss and margin over two random directions in the weights, normalised filter by filter.

    A direction is drawn from the normal distribution, and each filter of it (each row of a matrix) gets the length of
    the filter of the weights; parameters with one axis (biases, normalisation) do not move, nor do statistics of batch
    normalisation. Afterwards every weight is what it was, to the bit: only copies are moved.

    Args:
        models: one or several; each has directions of its own, from the same random numbers.
        x: samples (n, *f) inside the box.
        y: their labels (n,).
        span: how far to go to either side; at 1 each filter has changed by its own length.
        steps: points along a side; odd.
        seed: of the directions.
        device: where to run.

    Raises:
        ModelError: a model that is no ``torch.nn.Module`` with floating-point parameters.
        UsageError: an even number of steps.

    References:
        Li et al. 2018, arXiv:1712.09913, sec. 4.
    """
    nets = _as_models(models)
    _check_steps(steps)
    along = _offsets(span, steps)
    made = [_over_weights(net, along, x, y, seed, device) for net in nets]
    surfaces = tuple(replace(s, name=name) for name, s in zip(_names(nets), made, strict=True))
    axes = "a random direction", "another"
    return Landscape("weights", along, axes, surfaces, samples=len(x), seed=seed)


def _over_weights(
    model: Model, along: np.ndarray, x: Inputs, y: Labels, seed: int, device: torch.device | str | None
) -> Surface:
    with model.frozen(device) as live:
        door, rows = Door(live, len(x)), torch.arange(len(x), device=live.device)
        points, goal = x.detach().to(live.device), Goal(y.to(live.device).long())
        answers = []
        with _movable(live, seed) as move:
            for a, b in torch.cat([*_grid(along, x)]).tolist():
                move(a, b)
                answers.append(_means(door.logits(points, rows), goal))
        passes = int(door.forwards.sum())
    loss, gap = (np.array(v).reshape(len(along), -1) for v in zip(*answers, strict=True))
    return Surface(model.name, loss, gap, forwards=passes)


def _means(z: Logits, goal: Goal) -> tuple[float, float]:
    return float(cross_entropy(z, goal).double().mean()), float(-margin(z, goal).double().mean())


@contextmanager
def _movable(live: Live, seed: int) -> Iterator[Any]:
    """Yield what moves the weights of a frozen model to w + a d + b e; at the end they are the same tensors again."""
    module = live.model.module
    parameters = [q for q in module.parameters() if q.is_floating_point()] if module is not None else []
    if not parameters:
        raise ModelError(
            "a torch.nn.Module with parameters", live.model.name, "The landscape over inputs works for any model."
        )
    kept = [q.data for q in parameters]
    first, second = ([filter_direction(w, seed, i, which) for i, w in enumerate(kept)] for which in (0, 1))

    def move(a: float, b: float) -> None:
        for q, w, d, e in zip(parameters, kept, first, second, strict=True):
            q.data = w + a * d + b * e if w.ndim > 1 else w

    try:
        yield move
    finally:
        for q, w in zip(parameters, kept, strict=True):
            q.data = w


def filter_direction(w: Tensor, seed: int, number: int, which: int) -> Tensor:
    """Return a random direction of the shape of w, each filter (along axis 0) as long as that of w.

    It is zero where w has one axis or none. ``number`` is the position of w among the parameters, ``which`` tells the
    directions of a plane apart.
    """
    if w.ndim < 2:
        return torch.zeros_like(w)
    keys = torch.tensor([number], device=w.device)
    d = Draws.of(seed, keys).fold(_DIRECTIONS + 2 + which).normal(w.shape, torch.float32)[0].to(w)
    lengths = [v.flatten(1).norm(dim=1).clamp_min(1e-30) for v in (w, d)]
    ratio = torch.where(lengths[0] > 1e-30, lengths[0] / lengths[1], 0)
    return d * ratio.view(-1, *[1] * (w.ndim - 1))


# -------------------------------------------------------------------------------------------------------------- shared


def _as_models(models: Classifier | Sequence[Classifier]) -> list[Model]:
    several = isinstance(models, Sequence) and not isinstance(models, nn.Module)
    found = [as_model(net) for net in models] if several else [as_model(models)]  # type: ignore[union-attr,arg-type]
    if not found:
        raise UsageError("at least one model", "none", "Pass a model, or several.")
    return found


def _names(models: Sequence[Model]) -> list[str]:
    """Return the names of models, numbered where they are the same."""
    names = [m.name for m in models]
    return [f"{n} ({i})" if names.count(n) > 1 else n for i, n in enumerate(names, 1)]


def _check_steps(steps: int) -> None:
    if steps < 3 or steps % 2 == 0:
        raise UsageError("an odd number of steps from 3 on", f"{steps}", "So that the middle of the plane is a point.")


def _offsets(span: float, steps: int) -> np.ndarray:
    if not (np.isfinite(span) and span > 0):
        raise UsageError("a span > 0", f"{span}", "It is how far the plane extends to either side.")
    return np.linspace(-span, span, steps)


def _grid(along: np.ndarray, x: Tensor, device: torch.device | str | None = None) -> Iterator[Tensor]:
    """Yield the offsets (b, 2) of all points, row by row of the grid, as many at a time as fit."""
    a = torch.from_numpy(along)
    at = torch.cartesian_prod(a, a).flip(1)  # the first direction runs fastest
    yield from torch.split(at, default_batch(tuple(x.shape), device))
