"""What cameras do: blur and lost contrast. Their size is measured in the norm of the threat."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from assay.attacks.noise.strength import Noise, Way
from assay.attacks.registry import ATTACKS
from assay.attacks.score.images import cosines, image_shape
from assay.core.registry import UsageError
from assay.core.types import Inputs, per_sample
from assay.threats.problem import Problem

_NORMS = ("linf", "l2", "l1")

_GREYS: Final[tuple[Callable[[Problem], Tensor | float], ...]] = (
    lambda p: _mean(p.x0),
    lambda p: (p.box.lo + p.box.hi) / 2,
    lambda p: p.box.lo,
    lambda p: p.box.hi,
)
"""What draws fade to: the mean of each channel; the middle, the smallest and the largest value of the box."""


@final
@dataclass(frozen=True, slots=True)
class Contrast:
    """Fades to grey g: x0 + t (g - x0). First to the mean of each channel; further draws to values of the box."""

    norms: ClassVar[tuple[str, ...]] = _NORMS
    keeps_mean: ClassVar[bool] = False

    def way(self, p: Problem, draw: int) -> Way:
        grey = _GREYS[draw](p)

        def at(strength: Tensor) -> Inputs:
            return (p.x0 + per_sample(strength, p.x0) * (grey - p.x0)).clamp(p.box.lo, p.box.hi)

        return at


@final
@dataclass(frozen=True, slots=True)
class Blur:
    """Blurs with a Gaussian kernel whose sigma is t times the longest side; images are mirrored at their edges.

    With such edges the cosine transform diagonalises the convolution: a wave of frequency w shrinks by
    exp(-sigma^2 w^2 / 2), at w = pi k / n for row k of n. Sequences are blurred along their last axis; vectors
    likewise.
    """

    norms: ClassVar[tuple[str, ...]] = _NORMS
    keeps_mean: ClassVar[bool] = True

    def way(self, p: Problem, draw: int) -> Way:
        images = p.x0.double().reshape(len(p), *image_shape(p.x0.shape))
        sides = images.shape[2:]
        tables = [cosines(n).to(images) for n in sides]
        waves = _each_axis(images, [t.T for t in tables])
        squares = sum(
            (math.pi * torch.arange(n, device=images.device) / n).square().view(-1, *[1] * (1 - axis))
            for axis, n in enumerate(sides)
        )

        def at(strength: Tensor) -> Inputs:
            sigma = per_sample(strength.double() * max(sides), images)
            blurred = _each_axis(waves * torch.exp(-sigma.square() * squares / 2), tables)
            rounded = blurred.to(p.x0.dtype).reshape(p.x0.shape).clamp(p.box.lo, p.box.hi)
            return torch.where(per_sample(strength, rounded) > 0, rounded, p.x0)

        return at


def _each_axis(images: Tensor, tables: list[Tensor]) -> Tensor:
    """Multiply the rows along the two last axes of images (b, c, h, w) by a table each."""
    for axis, table in enumerate(tables, 2):
        last = images.movedim(axis, -1)
        # One product a sample, for in one for the whole batch a sample's roundings depend on the others.
        product = torch.bmm(last.flatten(1, -2), table.expand(len(images), *table.shape))
        images = product.view(last.shape).movedim(-1, axis)
    return images


def _mean(x: Inputs) -> Tensor:
    """Return the mean of each channel, of a shape that broadcasts against x."""
    c = image_shape(x.shape)[0]
    return x.reshape(len(x), c, -1).mean(2).view(len(x), *([c] if x.ndim > 2 else []), *[1] * (x.ndim - 2 or 1))


@ATTACKS.register("blur", norm=_NORMS, access="decision", kind="minimal")
def blur(rounds: int = 15) -> Noise:
    """Gaussian blur as strong as the ball lets it be, or the weakest that is enough; see :class:`Noise`."""
    return Noise(Blur(), 1, rounds)


@ATTACKS.register("contrast", norm=_NORMS, access="decision", kind="minimal")
def contrast(draws: int = 1, rounds: int = 15) -> Noise:
    """Contrast lost as far as the ball lets it, or the least loss that is enough; see :class:`Noise`.

    With more ``draws`` than one, images fade to the middle of the box as well, to black (3), and to white (4); more
    than four raise a UsageError.
    """
    if draws > len(_GREYS):
        raise UsageError(f"draws from 1 to {len(_GREYS)} for contrast", f"{draws}", "There are no more greys.")
    return Noise(Contrast(), draws, rounds)
