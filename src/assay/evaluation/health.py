"""What a model's input gradients are worth to an attack, measured by steps along them."""

import math
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor

from assay.attacks import LOSSES
from assay.attacks.gradient.pgd import climb
from assay.core.errors import ModelError
from assay.core.random import Draws
from assay.core.types import Inputs, Labels, Mask, PerSample, Rows
from assay.models import Door, Model
from assay.threats import Problem, Threat

LINEAR: Final = (0.4, 1.6)
"""What a short step gains, as a multiple of what the gradient promises: the median lies here on sound networks."""

EVEN: Final = 2.0
"""What a short step gains differs by less than this multiple of what was promised, between most samples."""

BLIND: Final = 0.02
"""Share of samples without any gradient up to which nothing is wrong."""

EOT: Final = (10, 100)
"""The least and the most random passes that are averaged for one gradient."""

JUDGED: Final = 50
"""Random passes, at least, whose mean decides whether a sample is right, and whether it is fooled."""

_LEFT_OVER = 0.3
"""Spread of the averaged gradient that attacks can live with."""

_DRAWN = 8
_LARGEST_SPREAD = 10.0
_STEP = 1 / 8
_SUPPORT = 0.05
_REACH = 0.05
_LEAST_MARGIN = 1e-12


@final
@dataclass(frozen=True, slots=True)
class Health:
    """What gradients are worth on a few samples.

    ``blind_ce`` and ``blind`` are the shares of samples whose gradient of cross-entropy and margin is exactly zero or
    not to be had; ``linearity`` is the median, over the others, of what a short step gains over what was promised
    (NaN without others), and ``spread`` its 90 % quantile less its 10 % quantile; ``steepest`` the largest gradient of
    the margin over the median one, in the dual norm.
    """

    blind_ce: float
    blind: float
    linearity: float
    steepest: float
    samples: int
    differentiable: bool = True
    spread: float = 0.0

    @property
    def even(self) -> bool:
        """Promises are kept about as well on all samples; where a network jumps, they are not."""
        return not self.spread > EVEN

    @property
    def linear(self) -> bool:
        return LINEAR[0] <= self.linearity <= LINEAR[1]


def pose(x: Inputs, y: Labels, threat: Threat, seed: int = 0) -> Problem:
    """Pose the problem of a threat for samples numbered from 0; without an eps, with one to measure by.

    For l0, whose steps are wide, linf stands in.
    """
    draws = Draws.of(seed, torch.arange(len(x), device=x.device))
    if threat.norm.name == "l0":
        threat = Threat("linf", box=threat.box)
    p = Problem.pose(x, y, replace(threat, targeted=False), draws)
    return p if not p.minimal else p.with_radius(p.full(_REACH * p.norm.diameter(p.box.width, x[0].numel())))


def measure(door: Door, p: Problem) -> Health:
    """Take two gradients and one step of eps / 8: five passes a sample.

    No gradient promises more than to reach the boundary: a step that fools keeps its promise, however long it is.
    """
    grads = [gradient(door, p, loss) for loss in ("ce", "margin")]
    (ce, _), (grad, before) = grads
    blind_ce, blind = (float(_is_zero(g).double().mean()) for g in (ce, grad))
    seeing = ~_is_zero(grad)
    x = climb(p, p.x0, grad, _STEP, _SUPPORT)
    after = door.score(x, p, LOSSES["margin"]).loss
    promised = (grad * (x - p.x0)).flatten(1).double().sum(1).minimum(before.abs().double())
    kept = torch.where(after > 0, 1.0, (after - before).double() / promised)
    counts = seeing & (promised > 0)
    ratio, low, high = _quantiles(kept[counts], 0.5, 0.1, 0.9) if counts.any() else [float("nan")] * 3
    sizes = p.norm.dual(grad)[seeing].double()
    steepest = float(sizes.max() / sizes.median()) if len(sizes) else float("nan")
    return Health(blind_ce, blind, ratio, steepest, len(p), door.differentiable, high - low)


def _quantiles(values: PerSample, *at: float) -> list[float]:
    return values.quantile(values.new_tensor(at), interpolation="lower").tolist()


def gradient(door: Door, p: Problem, loss: str) -> tuple[Inputs, PerSample]:
    """Return gradient and loss at the clean points; zeros where the model's backward pass raises."""
    try:
        e = door.gradient(p.x0, p, LOSSES[loss])
    except ModelError as error:
        if error.code != "model-failed":
            raise
        door.differentiable = False
        return torch.zeros_like(p.x0), door.score(p.x0, p, LOSSES[loss]).loss
    return e.grad, e.loss


def _is_zero(grad: Inputs) -> Mask:
    return grad.flatten(1).abs().amax(1) == 0


def gain(door: Door, p: Problem) -> float:
    """Return how much of its way to zero one step of eps takes the margin, on average over samples: three passes."""
    grad, before = gradient(door, p, "margin")
    x = climb(p, p.x0, grad, 1.0, _SUPPORT)
    rise = door.score(x, p, LOSSES["margin"]).loss - before
    return float((rise / before.abs().clamp_min(_LEAST_MARGIN)).clamp(-1, 1).mean())


@final
@dataclass(frozen=True, slots=True)
class Bench:
    """Samples to try repairs on: those that the model has right."""

    x: Inputs
    y: Labels
    threat: Threat
    device: torch.device | str | None

    def take(self, rows: Rows) -> "Bench":
        return replace(self, x=self.x[rows], y=self.y[rows])

    def head(self, n: int) -> "Bench":
        return replace(self, x=self.x[:n], y=self.y[:n])

    def pose(self) -> Problem:
        return pose(self.x, self.y, self.threat)

    def health(self, model: Model) -> Health:
        """Measure the gradients of a model: five passes a sample."""
        with model.frozen(self.device) as live:
            return measure(Door(live, len(self.x)), self.pose())

    def gain(self, model: Model) -> float:
        """Measure what a step of eps gains: three passes a sample."""
        with model.frozen(self.device) as live:
            return gain(Door(live, len(self.x)), self.pose())


def gradient_spread(model: Model, bench: Bench) -> float:
    """Return how far the gradient of one random pass strays from the mean, over the mean's length: the median sample.

    Where there is no gradient, the margin's spread over its size. Eight passes a sample, each with its gradient.
    """
    with replace(model, samples=1, judged=0).frozen(bench.device) as live:
        door, p = Door(live, len(bench.x)), bench.pose()
        passes = [gradient(door, p, "margin") for _ in range(_DRAWN)]
    ratios = [_spread(torch.stack(v).flatten(2)) for v in ([g for g, _ in passes], [m[:, None] for _, m in passes])]
    return next((r for r in ratios if math.isfinite(r)), 0.0)


def _spread(draws: Tensor) -> float:
    """Return the median coefficient of variation of vectors (draws, b, f), the mean's own noise taken off."""
    noise = draws.double().var(0).sum(1)
    signal = (draws.double().mean(0).square().sum(1) - noise / len(draws)).clamp_min(noise / _LARGEST_SPREAD**2)
    return float((noise / signal).sqrt().nanmedian())


def averaged(model: Model, spread: float) -> Model:
    """Return a random model with as many passes averaged as leave 0.3 of the spread, and more of them to judge by.

    What the user has set stays.
    """
    needed = min(max(math.ceil((spread / _LEFT_OVER) ** 2), EOT[0]), EOT[1])
    samples = model.samples if model.samples > 1 else needed
    return replace(model, samples=samples, judged=model.judged or max(samples, JUDGED))
