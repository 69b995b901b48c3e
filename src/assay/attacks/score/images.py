"""Inputs of any shape as images (b, c, h, w), and what random search on them needs."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from assay.core.errors import ThreatError
from assay.core.types import PerSample
from assay.threats.problem import Problem


def image_shape(shape: torch.Size) -> tuple[int, int, int]:
    """Return (c, h, w) of a sample of a batch of any shape; sequences and vectors are images of height 1."""
    if len(shape) == 4:
        return shape[1], shape[2], shape[3]
    c = shape[1] if len(shape) == 3 else 1
    return c, 1, shape[1:].numel() // c


def smaller(shape: torch.Size, share: float) -> tuple[int, int, int]:
    """Return (c, h, w) of an image whose sides are a share of those of a sample, at least 1."""
    c, h, w = image_shape(shape)
    return c, max(round(share * h), 1), max(round(share * w), 1)


def blown_up(v: Tensor, shape: torch.Size, mode: str) -> Tensor:
    """Return images v (b, c, h', w') of the size and shape of the samples."""
    c, h, w = image_shape(shape)
    return (v if v.shape[1:] == (c, h, w) else F.interpolate(v, (h, w), mode=mode)).reshape(shape)


def cosines(n: int) -> Tensor:
    """Return the orthonormal vectors of the discrete cosine transform (type II) as rows (n, n), slow ones first."""
    at, k = torch.arange(n, dtype=torch.float64) + 0.5, torch.arange(n, dtype=torch.float64)
    rows: Tensor = (math.pi / n * k[:, None] * at).cos() * math.sqrt(2 / n)
    return rows * torch.where(k == 0, math.sqrt(0.5), 1.0)[:, None]


def pixels(p: Problem, what: str) -> PerSample:
    """Return how many pixels a budget of values pays for.

    Raises:
        ThreatError: for none.
    """
    channels, h, w = image_shape(p.x0.shape)
    count = (p.radius / channels).floor().clamp_max(h * w)
    if (count < 1).any():
        raise ThreatError(
            f"l0:{channels} or more for {what}", f"l0:{float(p.radius.min()):g}", "One pixel has as many values."
        )
    return count
