"""Sparse-RS: random search over which pixels change, with colours from the corners of the colour cube."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.loop import ScoreAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.attacks.score.images import image_shape, pixels
from assay.core.types import Inputs, PerSample, choose
from assay.models.door import Loss, Score
from assay.threats.norms import largest
from assay.threats.problem import Problem


class SparseRSState(NamedTuple):
    """The candidate, the point it must beat, and which pixels (b, h * w) each of them changes."""

    x: Inputs
    changed: Tensor
    kept: Inputs
    kept_changed: Tensor
    kept_loss: PerSample


@final
@ATTACKS.register("sparse-rs", norm=("l0",), access="score", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class SparseRS(ScoreAttack[SparseRSState]):
    """Swaps some of the changed pixels for others at random, and keeps the swap if the loss rises.

    As many pixels change as eps pays for, eps / channels; each has a colour out of the corners of the colour cube.
    The share of them that is swapped falls on the published schedule, stretched to ``steps``.

    *Sees* scores. *Cost* ``steps`` + 1 forwards.

    Args:
        steps: number of queries.
        swap: share of the changed pixels that the first swaps are about.
        loss: what is to rise.

    *Differs from the paper in*: eps counts values, so that a pixel of a colour image costs three; a pixel may be
    swapped for itself, in another colour, so that the search goes on where eps pays for all pixels. Pixels that a step
    leaves alone keep their colours, as in the published code.

    References:
        Croce, Andriushchenko, Singh, Flammarion & Hein 2022, arXiv:2006.12834, algorithms 1 and 2, sec. 4.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    steps: int = 5000
    swap: float = 0.3
    loss: Loss = margin

    def init(self, p: Problem) -> SparseRSState:
        _, h, w = image_shape(p.x0.shape)
        changed = largest(p.draws.fold(_IN).uniform((h * w,)), pixels(p, "Sparse-RS"))
        x = _recoloured(p, p.x0, changed)
        return SparseRSState(x, changed, x, changed, p.full(-torch.inf))

    def update(self, p: Problem, s: SparseRSState, e: Score, k: int) -> SparseRSState:
        up = e.loss > s.kept_loss
        kept, old = choose(up, s.x, s.kept), choose(up, s.changed, s.kept_changed)
        loss = torch.where(up, e.loss, s.kept_loss)
        p = p.stage(k)
        count = (self.share(k) * old.sum(1)).floor().clamp_min(1)
        left = old - largest(torch.where(old > 0, p.draws.fold(_OUT).uniform(old.shape[1:]), -1), count)
        new = largest(torch.where(left > 0, -1, p.draws.fold(_IN).uniform(old.shape[1:])), count)
        x = _recoloured(p, _where(p, left, kept, p.x0), new)
        return SparseRSState(x, left + new, kept, old, loss)

    def share(self, k: int) -> float:
        """Return the share of the changed pixels that is swapped at query k (the published schedule for l0)."""
        k = k * 10_000 // self.steps
        passed = sum(k > t for t in (50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        return self.swap / (1, 2, 4, 5, 6, 8, 10, 12, 15)[passed]


_IN, _OUT, _COLOUR = 1, 2, 3
"""Name random numbers."""


def _where(p: Problem, mask: Tensor, a: Inputs, b: Inputs) -> Inputs:
    """Take the pixels of a mask (b, h * w) from a, the others from b."""
    c, h, w = image_shape(p.x0.shape)
    inside = (mask > 0).view(len(p), 1, h, w).expand(-1, c, h, w).reshape(p.x0.shape)
    return torch.where(inside, a, b)


def _recoloured(p: Problem, x: Inputs, mask: Tensor) -> Inputs:
    """Give the pixels of a mask (b, h * w) colours whose values are the ends of the box."""
    c, h, w = image_shape(p.x0.shape)
    high = p.draws.fold(_COLOUR).uniform((c, h * w)) < 0.5
    colours = torch.where(high.view(p.x0.shape), p.upper, p.lower)
    return _where(p, mask, colours, x)
