"""Names of tensors. Axes: b = sample, f = one sample's features (any rank), c = class."""

from typing import TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

Inputs: TypeAlias = Float[Tensor, "b *f"]
Logits: TypeAlias = Float[Tensor, "b c"]
Labels: TypeAlias = Int[Tensor, "b"]
PerSample: TypeAlias = Float[Tensor, "b"]
Mask: TypeAlias = Bool[Tensor, "b"]
Rows: TypeAlias = Int[Tensor, "r"]
"""Positions of samples in a batch; indexing with them selects and orders."""


def per_sample(v: Tensor, like: Tensor) -> Tensor:
    """Reshape (b,) to (b, 1, ..., 1), so that it broadcasts against ``like``."""
    return v.view(-1, *[1] * (like.ndim - 1))


def choose(mask: Mask, a: Tensor, b: Tensor) -> Tensor:
    """Take row i of ``a`` where ``mask[i]``, else of ``b``."""
    return b if not a.numel() else a.where(per_sample(mask, a), b)
