"""What landscapes have in common: surfaces over a plane, and the grid of points they are measured on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn

from assay.core.registry import UsageError
from assay.models import Model, as_model
from assay.models.line import default_batch
from assay.reports.landscape import write_landscape
from assay.study.curvature import Classifier

MASKED: Final = 0.02
"""Share of points without any gradient from which gradients are called masked; on sound networks there is none."""

DRAWN: Final = 0x1A00
"""The stream of random numbers that directions come from."""


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


def models_of(models: Classifier | Sequence[Classifier]) -> list[Model]:
    """Return one or several networks as models."""
    several = isinstance(models, Sequence) and not isinstance(models, nn.Module)
    found = [as_model(net) for net in models] if several else [as_model(models)]  # type: ignore[union-attr,arg-type]
    if not found:
        raise UsageError("at least one model", "none", "Pass a model, or several.")
    return found


def names_of(models: Sequence[Model]) -> list[str]:
    """Return the names of models, numbered where they are the same."""
    names = [m.name for m in models]
    return [f"{n} ({i})" if names.count(n) > 1 else n for i, n in enumerate(names, 1)]


def check_steps(steps: int) -> None:
    """Refuse an even number of points along a side."""
    if steps < 3 or steps % 2 == 0:
        raise UsageError("an odd number of steps from 3 on", f"{steps}", "So that the middle of the plane is a point.")


def offsets(span: float, steps: int) -> np.ndarray:
    """Return the offsets of the points along a side."""
    if not (np.isfinite(span) and span > 0):
        raise UsageError("a span > 0", f"{span}", "It is how far the plane extends to either side.")
    return np.linspace(-span, span, steps)


def grid(along: np.ndarray, x: Tensor, device: torch.device | str | None = None) -> Iterator[Tensor]:
    """Yield the offsets (b, 2) of all points, row by row of the grid, as many at a time as fit."""
    a = torch.from_numpy(along)
    at = torch.cartesian_prod(a, a).flip(1)  # the first direction runs fastest
    yield from torch.split(at, default_batch(tuple(x.shape), device))
