"""Loss and margin over directions in the weights of a network."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.attacks.losses import cross_entropy, margin
from assay.core.errors import ModelError
from assay.core.random import Draws
from assay.core.types import Inputs, Labels, Logits
from assay.models import Door, Model
from assay.models.model import Live
from assay.study.curvature import Classifier
from assay.study.plane import DRAWN, Landscape, Surface, check_steps, grid, models_of, names_of, offsets
from assay.threats import Goal


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
    nets = models_of(models)
    check_steps(steps)
    along = offsets(span, steps)
    made = [_over_weights(net, along, x, y, seed, device) for net in nets]
    surfaces = tuple(replace(s, name=name) for name, s in zip(names_of(nets), made, strict=True))
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
            for a, b in torch.cat([*grid(along, x)]).tolist():
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
    d = Draws.of(seed, keys).fold(DRAWN + 2 + which).normal(w.shape, torch.float32)[0].to(w)
    lengths = [v.flatten(1).norm(dim=1).clamp_min(1e-30) for v in (w, d)]
    ratio = torch.where(lengths[0] > 1e-30, lengths[0] / lengths[1], 0)
    return d * ratio.view(-1, *[1] * (w.ndim - 1))
