"""The normal of the decision boundary from labels: probes around a point of it, most of them in low frequencies."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from assay.attacks.score.images import cosines
from assay.core.types import Inputs, Mask, PerSample, per_sample
from assay.threats.norms import L2
from assay.threats.problem import Problem

L2_NORM = L2()


class Tally(NamedTuple):
    """Sums over the probes of a point: of their directions, once with a sign that tells whether the goal was met."""

    signed: Inputs
    plain: Inputs
    balance: PerSample  # probes that met the goal less those that missed it
    asked: PerSample

    @classmethod
    def empty(cls, p: Problem) -> "Tally":
        zero, none = torch.zeros_like(p.x0), p.full(0.0)
        return cls(zero, zero, none, none)

    def seen(self, u: Inputs, success: Mask) -> "Tally":
        """Return the tally with one more probe in the directions u."""
        vote = success.to(u.dtype) * 2 - 1
        return Tally(self.signed + per_sample(vote, u) * u, self.plain + u, self.balance + vote, self.asked + 1)

    def normal(self) -> Inputs:
        """Return the estimated normal, of l2 length 1; it points to where the goal is met.

        Votes are taken from their mean, which has the same expectation and a smaller variance, unless all are alike
        (HopSkipJump, sec. III.C).
        """
        mean = self.balance / self.asked.clamp_min(1)
        mean = torch.where(mean.abs() == 1, 0, mean)
        return L2_NORM.steepest(self.signed - per_sample(mean, self.plain) * self.plain)


def directions(p: Problem, band: float = 1.0) -> Inputs:
    """Draw directions of l2 length 1, uniform among those of the lowest frequencies.

    Args:
        p: whose random numbers are used.
        band: share of the frequencies of every axis but batch and channels; 1 for all, and for vectors.
    """
    if band >= 1 or p.x0.ndim < 3:
        return L2_NORM.steepest(p.draws.normal(p.x0.shape[1:], p.x0.dtype))
    kept = [math.ceil(band * n) for n in p.x0.shape[2:]]
    waves = p.draws.normal((p.x0.shape[1], *kept), torch.float64)
    return L2_NORM.steepest(from_waves(waves, p.x0.shape[2:]).to(p.x0.dtype))


def from_waves(waves: Tensor, shape: torch.Size) -> Tensor:
    """Return the images (b, c, *shape) whose lowest cosine coefficients are ``waves`` (b, c, *kept), kept <= shape."""
    for axis, n in enumerate(shape, 2):
        table = cosines(n).to(waves)[: waves.shape[axis]]
        last = waves.movedim(axis, -1)
        # One product a sample, for in one for the whole batch a sample's roundings depend on the others.
        product = torch.bmm(last.flatten(1, -2), table.expand(len(waves), *table.shape))
        waves = product.view(*last.shape[:-1], n).movedim(-1, axis)
    return waves
