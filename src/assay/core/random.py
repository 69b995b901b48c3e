"""Random numbers that belong to a sample, not to a batch.

Every number is a hash of (seed, the sample's index in the data, stage, step, position): no generator has a state,
so a draw is the same in any batch, in any order, on any device and after any resume.
The hash is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014, sec. 4) over a Weyl sequence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from assay.core.types import Rows


def _signed(word: int) -> int:
    """Write a 64-bit constant as the int64 of the same bits."""
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN, _M1, _M2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _right(z: Tensor, n: int) -> Tensor:
    """Shift right without the sign bit (torch shifts int64 arithmetically)."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _right(z, 30)) * _M1
    z = (z ^ _right(z, 27)) * _M2
    return z ^ _right(z, 31)


@final
@dataclass(frozen=True, slots=True)
class Draws:
    """One stream of random numbers a sample; ``keys`` (b,) int64 identifies the streams."""

    keys: Tensor

    @classmethod
    def of(cls, seed: int, indices: Tensor) -> "Draws":
        """Return the streams of the samples with these indices (b,) in the data."""
        return cls(_mix(_mix(indices.long() * _GOLDEN + 1) + _signed((seed * 2 + 1) * _M1 % (1 << 64))))

    def fold(self, word: int) -> "Draws":
        """Return streams independent of these ones, named by ``word`` (a stage, a restart, a step)."""
        return Draws(_mix(self.keys + _signed((word + 1) * 0xD1342543DE82EF95 % (1 << 64))))

    def take(self, rows: Rows) -> "Draws":
        return Draws(self.keys[rows])

    def uniform(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw from [0, 1), shape (b, *shape); multiples of 2**-24, exact in float32."""
        n = math.prod(shape)
        counter = torch.arange(1, n + 1, device=self.keys.device) * _GOLDEN
        words = _right(_mix(self.keys[:, None] + counter), 40)
        return (words.to(dtype) * 2.0**-24).view(-1, *shape)

    def normal(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw from the standard normal distribution, shape (b, *shape) (Box-Muller)."""
        u = self.uniform((2, *shape), dtype)
        return (-2 * torch.log1p(-u[:, 0])).sqrt() * torch.cos(2 * math.pi * u[:, 1])

    def signs(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw -1 or 1 with equal chances, shape (b, *shape)."""
        return (self.uniform(shape, dtype) < 0.5).to(dtype) * 2 - 1

    def integers(self, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Draw from 0 .. high - 1, shape (b, *shape), int64; ``high`` below 2**20."""
        return (self.uniform(shape, torch.float64) * high).long()
