"""What the minimal-norm attacks by gradient descent share: schedules, unit gradients, and Adam as a value."""

import math
from typing import NamedTuple

import torch

from assay.core.types import Inputs, PerSample, choose
from assay.threats.norms import L2
from assay.threats.problem import Problem

_L2 = L2()
_STABLE = 1e-8
"""Added to the root of the second moment, as in the papers."""


def cosine(k: int, steps: int, first: float, last: float) -> float:
    """Return where step k of ``steps`` is on half a cosine from ``first`` to ``last``."""
    return last + (first - last) * (1 + math.cos(math.pi * k / steps)) / 2


def unit(p: Problem, grad: Inputs, k: int) -> Inputs:
    """Return the gradient at l2 length 1; where it is zero, a random direction of that length."""
    flat = grad.flatten(1).abs().amax(1) == 0
    if flat.any():
        grad = choose(flat, p.draws.fold(k).normal(grad.shape[1:], grad.dtype), grad)
    return _L2.steepest(grad)


def reach(p: Problem) -> PerSample:
    """Return the size of the largest perturbation that the box allows."""
    return p.norm.size(torch.maximum(p.upper - p.x0, p.x0 - p.lower))


class Adam(NamedTuple):
    """The moments of Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1), decayed by 0.9 and 0.999."""

    mean: Inputs
    square: Inputs

    @classmethod
    def start(cls, like: Inputs) -> "Adam":
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    def seen(self, grad: Inputs) -> "Adam":
        return Adam(0.9 * self.mean + 0.1 * grad, 0.999 * self.square + 0.001 * grad**2)

    def scale(self, k: int) -> Inputs:
        """Return what step k (0, 1, ...) divides each coordinate by."""
        return (self.square / (1 - 0.999 ** (k + 1))).sqrt() + _STABLE

    def step(self, k: int) -> Inputs:
        return self.mean / (1 - 0.9 ** (k + 1)) / self.scale(k)
