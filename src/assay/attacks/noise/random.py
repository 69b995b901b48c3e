"""Random noise: Gaussian, uniform, and salt and pepper."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from assay.attacks.noise.strength import Noise, Way
from assay.attacks.registry import ATTACKS
from assay.attacks.score.images import blown_up, smaller
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.core.types import Inputs, per_sample
from assay.threats.problem import Problem

_LOUDEST = 8.0
"""Widths of the box that the largest scale of noise is: nearly all of it is clipped there."""


@final
@dataclass(frozen=True, slots=True)
class Gaussian:
    """Independent normal numbers, one for each square of values of a channel.

    Args:
        grain: side of the squares, in values; 1 for white noise.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    keeps_mean: ClassVar[bool] = False
    grain: int = 1

    def __post_init__(self) -> None:
        _check_grain(self.grain)

    def way(self, p: Problem, draw: int) -> Way:
        return _added(p, p.stage(draw).draws.normal, self.grain)


@final
@dataclass(frozen=True, slots=True)
class Uniform:
    """Independent numbers, uniform between two opposite ones, one for each square of values of a channel.

    Args:
        grain: side of the squares, in values; 1 for white noise.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    keeps_mean: ClassVar[bool] = False
    grain: int = 1

    def __post_init__(self) -> None:
        _check_grain(self.grain)

    def way(self, p: Problem, draw: int) -> Way:
        uniform = p.stage(draw).draws.uniform
        return _added(p, lambda shape, dtype: 2 * uniform(shape, dtype) - 1, self.grain)


@final
@dataclass(frozen=True, slots=True)
class SaltPepper:
    """Values chosen at random become the smallest or the largest of the box, with equal chances."""

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    keeps_mean: ClassVar[bool] = False

    def way(self, p: Problem, draw: int) -> Way:
        draws, shape = p.stage(draw).draws, p.x0.shape[1:]
        extreme = p.box.lo + p.box.width * (draws.signs(shape, p.x0.dtype) + 1) / 2
        turn = _ranks(draws.fold(1), p.x0)

        def at(strength: Tensor) -> Inputs:
            return torch.where(turn < per_sample(strength, turn), extreme, p.x0)

        return at


def _ranks(draws: Draws, like: Inputs) -> Inputs:
    """Return the order in which values are changed, as shares: all different, so that any number can be changed."""
    order = draws.uniform(like.shape[1:], torch.float64).flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
    return (order / order.shape[1]).to(like.dtype).view(like.shape)


def _added(p: Problem, numbers: Callable[[tuple[int, ...], torch.dtype], Tensor], grain: int) -> Way:
    """Return the way of growing multiples of noise, clipped into the box; the numbers are those of each square."""
    noise = blown_up(numbers(smaller(p.x0.shape, 1 / grain), p.x0.dtype), p.x0.shape, "nearest")

    def at(strength: Tensor) -> Inputs:
        scale = per_sample(_LOUDEST * p.box.width * strength, noise)
        return (p.x0 + scale * noise).clamp(p.box.lo, p.box.hi)

    return at


def _check_grain(grain: int) -> None:
    if grain < 1:
        raise UsageError("grain >= 1", f"{grain}", "1 draws every value on its own.")


@ATTACKS.register("gaussian-noise", norm=("l2",), access="decision", kind="minimal")
def gaussian_noise(draws: int = 20, rounds: int = 10, grain: int = 1) -> Noise:
    """Gaussian noise of the size of the ball, or the smallest that is enough; see :class:`Noise`.

    ``grain`` is the side in values of the squares that share a number: coarse noise does more.
    """
    return Noise(Gaussian(grain), draws, rounds)


@ATTACKS.register("uniform-noise", norm=("linf",), access="decision", kind="minimal")
def uniform_noise(draws: int = 20, rounds: int = 10, grain: int = 1) -> Noise:
    """Uniform noise of the size of the ball, or the smallest that is enough; as :func:`gaussian_noise`."""
    return Noise(Uniform(grain), draws, rounds)


@ATTACKS.register("salt-and-pepper", norm=("l0",), access="decision", kind="minimal")
def salt_and_pepper(draws: int = 20, rounds: int = 10) -> Noise:
    """Random values at the ends of the box, as many as allowed or as few as are enough; see :class:`Noise`."""
    return Noise(SaltPepper(), draws, rounds)
