"""The nearest point of the box on a plane, exactly, for every norm."""

from typing import NamedTuple

import torch
from torch import Tensor

from assay.core.types import Inputs, Mask, PerSample, per_sample
from assay.threats.norms import TINY, Norm

_NEWTON_STEPS = 50


class Move(NamedTuple):
    """The least change that leads to a plane, and whether the box lets it get there."""

    d: Inputs
    arrives: Mask


def to_plane(norm: Norm, slope: Inputs, gap: PerSample, lo: Inputs, hi: Inputs) -> Move:
    """Return the smallest d with gap + <slope, d> = 0 and lo <= d <= hi, where lo <= 0 <= hi.

    Where the box keeps the plane out of reach, d goes as far towards it as the box allows. For l0, d changes the
    fewest coordinates, and the last of them no further than needed.

    Args:
        norm: what is smallest.
        slope: normals of the planes (b, *f).
        gap: values of the linear functions where d = 0 (b,).
        lo: least allowed d (b, *f).
        hi: largest allowed d (b, *f).

    Example:
        >>> import torch
        >>> from assay.threats.norms import NORMS
        >>> slope, room = torch.tensor([[3.0, 4.0]]), torch.ones(1, 2)
        >>> to_plane(NORMS["l2"], slope, torch.tensor([-2.5]), -room, room).d
        tensor([[0.3000, 0.4000]])
    """
    toward = slope * per_sample(-gap.sign(), slope)
    room = torch.where(toward > 0, hi, -lo).flatten(1)
    # The largest slope is divided out first: squares of float32 gradients underflow below 1e-19.
    steepest = toward.flatten(1).abs().amax(1).clamp_min(TINY)
    steep = toward.flatten(1).abs() / steepest[:, None]
    need = (gap.abs() / steepest).clamp_max(torch.finfo(gap.dtype).max / 4)
    if norm.name in ("l1", "l0"):
        length = _one_by_one(steep, steep if norm.name == "l1" else steep * room, room, need)
    else:
        length = _together(steep, torch.ones_like(steep) if norm.name == "linf" else steep, room, need)
    d = toward.sign() * length.view(slope.shape)
    return Move(d.clamp(lo, hi), (steep * room).sum(1) >= need)


def inner(a: Inputs, b: Inputs) -> PerSample:
    """Return <a, b> of each sample."""
    return (a * b).flatten(1).sum(1)


def _together(steep: Tensor, rate: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Return min(room, t rate), with t such that <steep, that> = need.

    What is gained is concave and piecewise linear in t, so Newton's method from t = 0 rises to the solution and reaches
    it after finitely many steps.
    """
    t, far = torch.zeros_like(need), torch.finfo(need.dtype).max / 4  # finite, for 0 * inf is no number
    for _ in range(_NEWTON_STEPS):
        full = t[:, None] * rate >= room
        gained = torch.where(full, steep * room, 0).sum(1)
        grows = torch.where(full, 0, steep * rate).sum(1)
        new = torch.where(grows > 0, (need - gained) / grows.clamp_min(TINY), t).clamp_max(far).maximum(t)
        if torch.equal(new, t):
            break
        t = new
    return torch.minimum(room, t[:, None] * rate)


def _one_by_one(steep: Tensor, worth: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Return how far coordinates go that move one after the other, the worthiest first, until ``need`` is met."""
    order = worth.argsort(dim=1, descending=True, stable=True)
    gain, slope = ((v.gather(1, order)).double() for v in (steep * room, steep))
    missing = (need[:, None] - (gain.cumsum(1) - gain)).clamp_min(0)
    length = torch.minimum(missing / slope.clamp_min(TINY), room.gather(1, order).double())
    return torch.zeros_like(room).scatter(1, order, length.to(room.dtype))
