"""Sparse-RS on patches and frames: random search over the colours of a window, and over where it is."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.loop import ScoreAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.attacks.score.images import pixels
from assay.attacks.score.square import halvings
from assay.core.errors import DataError, ThreatError
from assay.core.registry import UsageError, one_of
from assay.core.types import Inputs, Labels, PerSample, choose
from assay.models.door import Loss, Score
from assay.threats.problem import Problem

REGIONS = ("patch", "frame")


class Drawing(NamedTuple):
    """What is shown: colours (b, c, h, w), of which a patch is the upper left corner, and where that goes (b, 2)."""

    colours: Tensor
    corner: Labels


class SparseRSPatchState(NamedTuple):
    """The candidate and the drawing it comes from; the drawing it must beat."""

    x: Inputs
    drawing: Drawing
    kept: Drawing
    kept_loss: PerSample


@final
@ATTACKS.register("sparse-rs-patch", norm=("l0",), access="score", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class SparseRSPatch(ScoreAttack[SparseRSPatchState]):
    """Gives a square of a patch another colour, or moves the patch, and keeps what is better.

    Under ``l0:eps`` the patch is as large a square as eps pays for, and the frame as wide. Colours are corners of the
    colour cube; squares shrink on the schedule of :class:`Square`, stretched to ``steps``. Every ``period``-th query
    is about a patch elsewhere, at first anywhere, in the end one pixel away.

    *Sees* scores. *Cost* ``steps`` + 1 forwards.

    Args:
        steps: number of queries.
        region: ``patch``, which moves, or ``frame``, around the image.
        p: share of the region that the first squares cover.
        period: one query in so many moves the patch; 0: it stays where it was put.
        loss: what is to rise.

    *Differs from the paper in*: eps counts values, and gives the size; a sample's own patch only, none for all samples;
    squares of a frame lie around a pixel of it, and are cut at its edge.

    References:
        Croce, Andriushchenko, Singh, Flammarion & Hein 2022, arXiv:2006.12834, sec. 5.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    steps: int = 5000
    region: str = "patch"
    p: float = 0.4
    period: int = 5
    loss: Loss = margin

    def __post_init__(self) -> None:
        one_of("region", self.region, REGIONS)
        if self.period < 0:
            raise UsageError("period >= 0", f"{self.period}", "Or 0: the patch stays where it is.")

    def init(self, p: Problem) -> SparseRSPatchState:
        if p.x0.ndim != 4:
            raise DataError("images (c, h, w) for Sparse-RS", f"{tuple(p.x0.shape[1:])}", "Choose another attack.")
        _, c, h, w = p.x0.shape
        stripes = torch.where(p.draws.fold(_COLOUR).uniform((c, 1, w)) < 0.5, p.box.hi, p.box.lo).to(p.x0.dtype)
        u, room = p.draws.fold(_PLACE).uniform((2,), torch.float64), self._room(p)
        drawing = Drawing(stripes.expand(-1, c, h, w), (u * (room + 1)).long())
        return SparseRSPatchState(self.shown(p, drawing), drawing, drawing, p.full(-torch.inf))

    def update(self, p: Problem, s: SparseRSPatchState, e: Score, k: int) -> SparseRSPatchState:
        up = e.loss > s.kept_loss
        kept = Drawing(*(choose(up, new, old) for new, old in zip(s.drawing, s.kept, strict=True)))
        moves = self.region == "patch" and self.period > 0 and (k + 1) % self.period == 0
        new = self._moved(p.stage(k), kept, k) if moves else self._repainted(p.stage(k), kept, k)
        return SparseRSPatchState(self.shown(p, new), new, kept, torch.where(up, e.loss, s.kept_loss))

    def shown(self, p: Problem, d: Drawing) -> Inputs:
        """Return the clean images with the patch or the frame on them."""
        b, _, h, w = p.x0.shape
        row, column = (torch.arange(n, device=p.x0.device) - d.corner[:, i : i + 1] for i, n in ((0, h), (1, w)))
        inside = self.inside(p, row, column)
        sample = torch.arange(b, device=p.x0.device)[:, None, None]
        colours = d.colours.permute(0, 2, 3, 1)[sample, row[:, :, None] % h, column[:, None, :] % w].permute(0, 3, 1, 2)
        return torch.where(inside[:, None], colours, p.x0)

    def inside(self, p: Problem, row: Tensor, column: Tensor) -> Tensor:
        """Tell which rows (b, h) and columns (b, w) of the drawing belong to the region: (b, h, w)."""
        h, w = p.x0.shape[2:]
        if self.region == "patch":
            most = self.side(p)[:, None]
            return ((row >= 0) & (row < most))[:, :, None] & ((column >= 0) & (column < most))[:, None, :]
        away = (torch.minimum(v, n - 1 - v) for v, n in ((row, h), (column, w)))
        near = [v < self.width(p)[:, None] for v in away]
        return near[0][:, :, None] | near[1][:, None, :]

    def side(self, p: Problem) -> Labels:
        """Return how many pixels wide each patch is."""
        h, w = p.x0.shape[2:]
        return pixels(p, "Sparse-RS").double().sqrt().long().clamp_max(min(h, w))

    def width(self, p: Problem) -> Labels:
        """Return how many pixels wide each frame is.

        Raises:
            ThreatError: eps does not pay for a frame of one pixel.
        """
        c, h, w = p.x0.shape[1:]
        n = torch.arange(1, (min(h, w) + 1) // 2 + 1, device=p.x0.device)
        needed = h * w - (h - 2 * n).clamp_min(0) * (w - 2 * n).clamp_min(0)
        width = (needed <= pixels(p, "Sparse-RS")[:, None]).sum(1)
        if (width < 1).any():
            raise ThreatError(f"l0:{c * int(needed[0])} or more for a frame", f"l0:{p.radius[0]:g}", "Try a patch.")
        return width

    def _room(self, p: Problem) -> Tensor:
        """Return how far down and to the right the drawing may go (b, 2)."""
        h, w = p.x0.shape[2:]
        if self.region == "frame":
            return torch.zeros_like(p.rows)[:, None].expand(-1, 2)
        return torch.tensor([h, w], device=p.x0.device) - self.side(p)[:, None]

    def _moved(self, p: Problem, d: Drawing, k: int) -> Drawing:
        room = self._room(p)
        reach = ((1 - k / self.steps) * room).long().clamp_min(1)
        u = p.draws.fold(_PLACE).uniform((2,), torch.float64)
        step = (u * (2 * reach + 1)).long() - reach
        return d._replace(corner=torch.minimum((d.corner + step).clamp_min(0), room))

    def _repainted(self, p: Problem, d: Drawing, k: int) -> Drawing:
        """Give one square of the region a colour."""
        c, h, w = p.x0.shape[1:]
        rows, columns = (torch.arange(n, device=p.x0.device).expand(len(p), n) for n in (h, w))
        region = self.inside(p, rows, columns)
        area = region.flatten(1).sum(1)
        side = (self.p / 2 ** halvings(k, self.steps) * area).sqrt().round().long().clamp_min(1)
        chosen = torch.where(region.flatten(1), p.draws.fold(_PLACE).uniform((h * w,)), -1).argmax(1)
        top, left = chosen // w - side // 2, chosen % w - side // 2
        if self.region == "patch":  # whole squares
            most = self.side(p) - side
            top, left = (torch.minimum(v.clamp_min(0), most) for v in (top, left))
        across, down = (
            (v >= first[:, None]) & (v < (first + side)[:, None]) for v, first in ((columns, left), (rows, top))
        )
        window = (down[:, :, None] & across[:, None, :])[:, None]
        colour = torch.where(p.draws.fold(_COLOUR).uniform((c, 1, 1)) < 0.5, p.box.hi, p.box.lo).to(d.colours.dtype)
        return d._replace(colours=torch.where(window, colour, d.colours))


_COLOUR, _PLACE = 1, 2
"""Name random numbers."""
