"""Rotations and shifts of images."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.core.errors import AssayError, DataError, ThreatError
from assay.core.types import Inputs, PerSample, choose
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY
from assay.threats.problem import Problem


class SpatialState(NamedTuple):
    """The next image and the pose it comes from, and the pose of the highest loss with its loss."""

    x: Inputs
    pose: Tensor  # (b, 3): rotation, shift down, shift right, each from -1 to 1 times its limit
    best: Tensor
    loss: PerSample
    slope: Tensor  # (b, 3): d loss / d pose at the best pose, once it was asked for


@final
@ATTACKS.register("spatial", norm=("linf", "l2", "l1", "l0"), access="gradient", kind="spatial")
@dataclass(frozen=True, slots=True, kw_only=True)
class Spatial(GradientAttack[SpatialState]):
    """The worst rotation and shift of an image: a grid of poses, then gradient ascent from the best of them.

    x = x0 turned by r * ``max_rotation`` degrees and moved by (s, t) * ``max_shift`` of its sides, r, s, t in [-1, 1];
    what comes in from outside is the low end of the box. The grid is tried from the mildest pose to the wildest, until
    a sample falls. Then pose <- clip(pose + a * g / max|g|), g = d loss / d pose by the chain rule through the
    interpolation. A model without a gradient is searched by the grid alone. It needs a threat without an eps: no norm
    bounds how far a rotation goes; the norm only says how ``size`` is measured.

    *Sees* the gradient. *Cost* ``rotations`` * ``shifts`` ** 2 (or ``random``) + ``steps`` + 1 forwards, ``steps``
    backwards, and less where a sample falls.

    Args:
        max_rotation: in degrees, to either side.
        max_shift: as a share of height and width, to either side.
        rotations: angles of the grid.
        shifts: shifts of the grid, in each direction.
        random: try this many random poses instead of the grid (0: the grid).
        steps: gradient steps after that.
        rel_step: length of the first step as a fraction of the limits; lengths fall to 0 along half a cosine.
        loss: what is ascended.

    *Differs from the paper in*: the gradient steps start at the best pose of the grid; padding and interpolation are
    bilinear; the mildest poses come first, so that of those that fool a mild one is found.

    References:
        Engstrom et al. 2019, arXiv:1712.02779, sec. 3.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    any_size: ClassVar[bool] = True
    sizeless: ClassVar[bool] = True
    max_rotation: float = 30.0
    max_shift: float = 0.1
    rotations: int = 9
    shifts: int = 3
    random: int = 0
    steps: int = 10
    rel_step: float = 0.25
    loss: Loss = margin

    def __post_init__(self) -> None:
        counts = min(self.rotations, self.shifts, self.random + 1)
        if counts < 1 or min(self.max_rotation, self.max_shift) < 0 or self.max_rotation > 180 or self.max_shift > 1:
            raise AssayError(
                "rotations and shifts >= 1, random >= 0, max_rotation in 0..180, max_shift in 0..1",
                f"{self.rotations}, {self.shifts}, {self.random}, {self.max_rotation:g}, {self.max_shift:g}",
                "max_rotation is in degrees, max_shift a share of the image's sides.",
            )

    @property
    def tried(self) -> int:
        """The number of poses before the gradient steps; the first is to leave the image as it is."""
        return 1 + self.random if self.random else len(self.grid())

    @property
    def questions(self) -> int:
        return self.tried + self.steps

    def differentiates(self, k: int) -> bool:
        return self.tried <= k < self.questions

    def grid(self) -> list[tuple[float, float, float]]:
        """Return the poses of the grid, the clean one first, then by how far they are from it."""
        return _grid(self.rotations if self.max_rotation else 1, self.shifts if self.max_shift else 1)

    def init(self, p: Problem) -> SpatialState:
        if p.x0.ndim != 4:
            raise DataError("images (c, h, w) to turn and move", f"{tuple(p.x0.shape[1:])}", "Choose another attack.")
        if not p.minimal:
            raise ThreatError(
                "a threat without an eps for Spatial", f"an eps for {p.norm.name}", "Write linf, l2, l1 or l0 alone."
            )
        still = p.x0.new_zeros(len(p), 3)
        return SpatialState(p.x0, still, still, p.full(-torch.inf), still)

    def update(self, p: Problem, s: SpatialState, e: Gradient, k: int) -> SpatialState:
        refining = self.differentiates(k)
        better = (e.loss > s.loss) | (refining and k == self.tried)
        slope = self._slope(p, s.pose, e.grad) if refining else s.slope
        s = s._replace(
            best=choose(better, s.pose, s.best),
            loss=torch.where(better, e.loss, s.loss),
            slope=choose(better, slope, s.slope),
        )
        pose = self._next(p, s, k + 1)
        return s._replace(pose=pose, x=self.warp(p, pose))

    def _next(self, p: Problem, s: SpatialState, k: int) -> Tensor:
        """Return the pose of query k: one of the grid, the best of them, or one step from it."""
        if k < self.tried:
            if self.random:
                return 2 * p.draws.fold(k).uniform((3,), p.x0.dtype) - 1
            return p.x0.new_tensor(self.grid()[k]).expand(len(p), 3)
        if k == self.tried:
            return s.best
        fade = (1 + math.cos(math.pi * (k - self.tried - 1) / self.steps)) / 2
        unit = s.slope / s.slope.abs().amax(1, keepdim=True).clamp_min(TINY)
        return (s.best + self.rel_step * fade * unit).clamp(-1, 1)

    def warp(self, p: Problem, pose: Tensor) -> Inputs:
        """Return the images (b, c, h, w) in these poses (b, 3)."""
        return (F.grid_sample(p.x0 - p.box.lo, self._places(p, pose), align_corners=False) + p.box.lo).clamp(
            p.box.lo, p.box.hi
        )

    def _places(self, p: Problem, pose: Tensor) -> Tensor:
        """Return where each pixel comes from (b, h, w, 2), in halves of the sides from the middle, right and down."""
        h, w = p.x0.shape[2:]
        angle = pose[:, 0, None, None] * math.radians(self.max_rotation)
        down, right = (2 * self.max_shift * pose[:, i, None, None] for i in (1, 2))
        y, x = ((torch.arange(n, device=pose.device, dtype=pose.dtype) * 2 + 1) / n - 1 for n in (h, w))
        y, x = (y[:, None] - down) * (h / w) ** 0.5, (x[None, :] - right) * (w / h) ** 0.5  # in units alike
        c, s = angle.cos(), angle.sin()
        return torch.stack([(c * x + s * y) * (h / w) ** 0.5, (c * y - s * x) * (w / h) ** 0.5], 3)

    def _slope(self, p: Problem, pose: Tensor, grad: Inputs) -> Tensor:
        """Carry the gradient at the image over to the pose it comes from."""
        with torch.enable_grad():
            pose = pose.detach().clone().requires_grad_()
            return torch.autograd.grad(self.warp(p, pose), pose, grad)[0].nan_to_num(0.0)


@lru_cache
def _grid(rotations: int, shifts: int) -> list[tuple[float, float, float]]:
    moves = _spread(shifts)
    poses = {(r, s, t) for r in _spread(rotations) for s in moves for t in moves} | {(0.0, 0.0, 0.0)}
    return sorted(poses, key=lambda p: (max(map(abs, p)), sum(map(abs, p)), p))


def _spread(n: int) -> list[float]:
    """Return n numbers, evenly from -1 to 1; one alone is 0."""
    return [2 * i / (n - 1) - 1 for i in range(n)] if n > 1 else [0.0]
