"""Loss and margin over a plane through a sample: pictures, and their numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from assay.attacks.attack import Result
from assay.attacks.gradient.pgd import PGD
from assay.attacks.losses import cross_entropy, margin
from assay.core.errors import ThreatError
from assay.core.registry import one_of
from assay.core.types import Inputs
from assay.models import Door, Model
from assay.models.model import Live
from assay.study.curvature import Classifier, copies, curvature, linearity, off_tangent, pose_one
from assay.study.plane import DRAWN, Landscape, Surface, check_steps, grid, models_of, names_of, offsets
from assay.threats import Problem, Threat

DIRECTIONS: Final = ("gradient-random", "gradient-adversarial")

_SPAN: Final = 1.5
"""How far a plane extends by default, in eps."""

_REACH: Final = 0.05
"""Where there is no eps: the radius, as a share of the box's diameter."""

_ADVERSARIAL = 0x1A01
"""A stream of random numbers."""


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
    nets = models_of(models)
    threat = Threat.parse(threat) if isinstance(threat, str) else threat
    one_of("directions", directions, DIRECTIONS)
    check_steps(steps)
    if threat.norm.name == "l0":
        raise ThreatError("a norm that has directions: linf, l2 or l1", "l0", "Choose another --threat.")
    if threat.eps is None:
        width = nets[0].domain.width
        threat = replace(threat, eps=_REACH * threat.norm.diameter(width, x.numel()))
    assert threat.eps is not None
    along = offsets(_SPAN * threat.eps if span is None else span, steps)
    case = _Case(x, y, threat, seed, index, device)
    plane = _plane(nets[0], case, directions)
    size = torch.cat([plane.size(at) for at in grid(along, x)]).view(steps, steps).numpy()
    inside = torch.from_numpy(size <= threat.eps)
    surfaces = []
    for name, net in zip(names_of(nets), nets, strict=True):
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
    random = p.draws.fold(DRAWN)
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
        for at in grid(along, case.x, case.device):
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
