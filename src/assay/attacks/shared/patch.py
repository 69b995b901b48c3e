"""One patch for all samples, wherever it lies."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from assay.attacks.attack import needs_eps
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.attacks.shared.ascent import SharedAttack
from assay.core.errors import DataError, ThreatError
from assay.core.types import Inputs, Mask
from assay.models.door import Loss
from assay.threats.problem import Problem


@final
@ATTACKS.register("patch", norm=("l0",), access="gradient", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class Patch(SharedAttack):
    """An adversarial patch: v <- clip(v + a * sign(mean over samples and places of d min(loss, clip) / dv)).

    Under ``l0:eps`` v is a square of as many pixels as eps values pay for: side = floor(sqrt(eps / channels)). Each
    sample gets it at a place of its own that is drawn, anew in every epoch; the answer is about one more place.

    *Sees* the gradient. *Cost* 2 ``epochs`` forwards, ``epochs`` backwards, and less where all samples fall.

    Args:
        epochs: how often each sample is looked at.
        batch: samples that make one step.
        rel_step: length of the first step as a fraction of the box; lengths fall to 0 along half a cosine.
        rotation: the patch is turned by up to this many degrees.
        scale: the patch is shrunk to this share of its side at the most (1: never).
        clip: the loss above which a sample adds nothing.
        loss: what is ascended; ``clip`` is in its units.

    *Differs from the paper in*: signs of the gradient and a clipped margin instead of the log-probability of the
    target; the patch's size comes from the threat; nearest pixels when it is turned or shrunk, so that it changes no
    more values than the threat allows.

    References:
        Brown et al. 2017, arXiv:1712.09665, sec. 2.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    epochs: int = 40
    batch: int = 64
    rel_step: float = 0.2
    rotation: float = 0.0
    scale: float = 1.0
    clip: float = 1.0
    loss: Loss = margin

    def __post_init__(self) -> None:
        if not (0 < self.scale <= 1 and 0 <= self.rotation <= 180):
            found = f"rotation={self.rotation:g}, scale={self.scale:g}"
            raise ThreatError("rotation from 0 to 180 degrees, 0 < scale <= 1", found, "Write for example scale=0.8.")

    def side(self, p: Problem) -> int:
        """Return how many pixels wide the patch is.

        Raises:
            DataError: the samples are no images.
            ThreatError: eps does not pay for a pixel.
        """
        needs_eps(p, "Patch")
        if p.x0.ndim != 4:
            raise DataError("images (c, h, w) for a patch", f"{tuple(p.x0.shape[1:])}", "Choose another attack.")
        channels, *room = p.x0.shape[1:]
        side = min(math.isqrt(int(p.radius[0]) // channels), *room)
        if not side:
            raise ThreatError(f"l0:{channels} or more", f"l0:{p.radius[0]:g}", "One pixel has as many values.")
        return side

    def init(self, p: Problem) -> Tensor:
        self.side(p)
        return torch.full_like(p.x0[:1], (p.box.lo + p.box.hi) / 2)  # the patch is its upper left corner

    def place(self, p: Problem, v: Tensor) -> Inputs:
        covered, source = self._source(p)
        pixels = v.expand_as(p.x0).flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, p.x0.shape[1], -1))
        return torch.where(covered[:, None], pixels.view(p.x0.shape), p.x0)

    def _source(self, p: Problem) -> tuple[Mask, Tensor]:
        """Return which pixels (b, h, w) are covered, and by which pixel of the patch, as a position in v."""
        side, (h, w) = self.side(p), p.x0.shape[2:]
        u = p.draws.fold(_PLACE).uniform((4,), torch.float64)
        top, left = (u[:, :2] * torch.tensor([h - side + 1, w - side + 1], device=u.device)).floor().unbind(1)
        angle = (2 * u[:, 2] - 1) * math.radians(self.rotation)
        scale = 1 - u[:, 3] * (1 - self.scale)
        # Centres of pixels, seen from the centre of the patch, turned back and blown up: where they are in the patch.
        i, j = (torch.arange(n, device=u.device) + 0.5 - side / 2 for n in (h, w))
        i, j = (i - top[:, None])[:, :, None], (j - left[:, None])[:, None, :]
        c, s = ((f(angle) / scale)[:, None, None] for f in (torch.cos, torch.sin))
        row, column = (torch.floor(t + side / 2).long() for t in (c * i + s * j, c * j - s * i))
        covered = (row >= 0) & (row < side) & (column >= 0) & (column < side)
        return covered, torch.where(covered, row * w + column, 0)

    def step(self, p: Problem, v: Tensor, grad: Tensor, share: float) -> Tensor:
        return (v + self.rel_step * share * p.box.width * grad.sign()).clamp(p.box.lo, p.box.hi)

    def cut(self, p: Problem, v: Tensor) -> Tensor:
        side = self.side(p)
        return v[:, :, :side, :side]


_PLACE = 77
