"""Where walks from outside begin: at what most networks call something else."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from assay.core.types import Inputs
from assay.threats.problem import Problem


def smooth_noise(p: Problem) -> Inputs:
    """Draw images of the box's values, a quarter as detailed as x0; series likewise, vectors without smoothing."""
    shape, dtype = p.x0.shape[1:], p.x0.dtype
    if len(shape) in (2, 3):
        coarse = p.draws.normal((shape[0], *(-(-n // 4) for n in shape[1:])), dtype)
        u = F.interpolate(coarse, size=shape[1:], mode="bicubic" if len(shape) == 3 else "linear")
    else:
        u = p.draws.normal(shape, dtype)
    return p.box.lo + p.box.width * torch.sigmoid(3 * u)


def blended(p: Problem, share: float | Tensor) -> Inputs:
    """Return the clean inputs blended with that share of smooth noise; shares of their own as (b, 1, ...)."""
    return p.x0 + share * (smooth_noise(p) - p.x0)


def walk_length(steps: int, walk: int) -> int:
    """Return the length, near ``walk``, of walks that share ``steps`` evenly."""
    return math.ceil(steps / max(1, round(steps / max(1, walk))))
