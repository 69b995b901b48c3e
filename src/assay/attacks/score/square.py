"""The Square attack: random search with square windows."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.loop import ScoreAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, PerSample, choose, per_sample
from assay.models.door import Loss, Score
from assay.threats.norms import TINY
from assay.threats.problem import Problem


class SquareState(NamedTuple):
    """The candidate to ask about, and the point it must beat."""

    x: Inputs
    kept: Inputs
    kept_loss: PerSample


@final
@ATTACKS.register("square", norm=("linf", "l2"), access="score", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class Square(ScoreAttack[SquareState]):
    """Repaints one square window at random and keeps it if the loss rises.

    linf: the window gets x0 + eps * s, one sign s per channel; the start is vertical stripes of +-eps.
    l2: the mass of two windows is moved into one, in the shape of two pyramids; the start is a grid of them.
    Windows shrink on the published schedule, stretched to ``steps``. Each sample has a window of its own.
    Inputs (b, c, h, w) are images; (b, c, t) and (b, d) are taken as images of height 1.

    *Sees* scores. *Cost* ``steps`` + 1 forwards.

    Args:
        steps: number of queries.
        p: share of the image that the first windows cover.
        loss: what is to rise.

    *Differs from the paper in*: window positions per sample instead of one for the batch.

    References:
        Andriushchenko et al. 2020, arXiv:1912.00049, algorithms 1 to 3.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    steps: int = 5000
    p: float = 0.8
    loss: Loss = margin

    def init(self, p: Problem) -> SquareState:
        x = _stripes(p) if p.norm.is_box else _grid(p)
        return SquareState(x, x, p.full(-torch.inf))

    def update(self, p: Problem, s: SquareState, e: Score, k: int) -> SquareState:
        up = (e.loss > s.kept_loss) | e.success
        kept, loss = choose(up, s.x, s.kept), torch.where(up, e.loss, s.kept_loss)
        p = p.stage(k)
        share = self.share(k)
        x = _repaint(p, kept, share) if p.norm.is_box else _move_mass(p, kept, share)
        return SquareState(x, kept, loss)

    def share(self, k: int) -> float:
        """Return the share of the image that a window covers at query k (appendix B of the paper)."""
        k = k * 10_000 // self.steps
        return float(self.p / 2 ** sum(k > t for t in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)))


def _image(shape: torch.Size) -> tuple[int, int, int]:
    """Return (c, h, w) of one sample of any shape."""
    if len(shape) == 4:
        return shape[1], shape[2], shape[3]
    c = shape[1] if len(shape) == 3 else 1
    return c, 1, shape[1:].numel() // c


def _windows(p: Problem, side: tuple[int, int], size: tuple[int, int], stream: int) -> tuple[Tensor, Tensor]:
    """Draw the top left corner of one window a sample; return masks over rows and columns."""
    h, w = size
    masks = []
    for axis, (n, length) in enumerate(((h, side[0]), (w, side[1]))):
        corner = p.draws.fold(2 * stream + axis).integers(n - length + 1)[:, None]
        line = torch.arange(n, device=p.x0.device)[None]
        masks.append((line >= corner) & (line < corner + length))
    return masks[0], masks[1]


def _sides(share: float, h: int, w: int, least: int = 1) -> tuple[int, int]:
    side = max(round((share * h * w) ** 0.5), least)
    if h == 1:
        return 1, min(max(round(share * w), 1), w)
    return min(side, h), min(side, w)


def _stripes(p: Problem) -> Inputs:
    c, h, w = _image(p.x0.shape)
    stripes = p.draws.signs((c, 1, w), p.x0.dtype).expand(-1, c, h, w).reshape(p.x0.shape)
    return p.project(p.x0 + per_sample(p.radius, p.x0) * stripes)


def _repaint(p: Problem, kept: Inputs, share: float) -> Inputs:
    c, h, w = _image(p.x0.shape)
    rows, columns = _windows(p, _sides(share, h, w), (h, w), 0)
    window = (rows[:, None, :, None] & columns[:, None, None, :]).expand(-1, c, h, w).reshape(p.x0.shape)
    signs = p.draws.fold(9).signs((c, 1, 1), p.x0.dtype).expand(-1, c, h, w).reshape(p.x0.shape)
    painted = (p.x0 + per_sample(p.radius, p.x0) * signs).clamp(p.lower, p.upper)
    return torch.where(window, painted, kept)


def _pyramid(side: int) -> Tensor:
    """Return the paper's eta: squares around the centre, each adding 1 over the square of its distance, unit length."""
    at = torch.arange(side, dtype=torch.float64)
    rings = torch.minimum(at, side - 1 - at)
    depth = torch.minimum(rings[:, None], rings[None, :])
    steps = torch.cumsum(1 / (torch.arange(side // 2 + 1, 0, -1, dtype=torch.float64) ** 2), 0)
    shape = steps[depth.long()]
    return shape / shape.norm()


def _eta(h: int, w: int) -> Tensor:
    """Return a window h x w with a positive and a negative pyramid side by side (algorithm 3)."""
    if h == 1:
        half = w // 2
        line = torch.cat([torch.ones(half), -torch.ones(w - half)]).double()[None]
        return line / line.norm()
    side = max(h, w)
    half = side // 2
    eta = torch.zeros(side, side, dtype=torch.float64)
    eta[:half] = _stretch(_pyramid(side), half)
    eta[half:] = -_stretch(_pyramid(side), side - half)
    eta = eta[:h, :w]
    return eta / eta.norm()


def _stretch(pyramid: Tensor, rows: int) -> Tensor:
    """Squeeze a square pyramid into ``rows`` rows by picking rows evenly."""
    at = (torch.arange(rows) + 0.5) * len(pyramid) / rows
    return pyramid[at.long().clamp_max(len(pyramid) - 1)]


def _grid(p: Problem) -> Inputs:
    c, h, w = _image(p.x0.shape)
    side = max(h, w) // 5 if h > 1 else w // 5
    side = max(side, 1)
    down = max(h // side, 1) if h > 1 else 1
    tile = _eta(side if h > 1 else 1, side).to(p.x0)
    across = max(w // side, 1)
    signs = p.draws.signs((c, down, across), p.x0.dtype)
    field = torch.zeros(len(p), c, h, w, dtype=p.x0.dtype, device=p.x0.device)
    tiles = signs.repeat_interleave(tile.shape[0], 2).repeat_interleave(tile.shape[1], 3)
    painted = tiles * tile.repeat(down, across)
    field[:, :, : painted.shape[2], : painted.shape[3]] = painted
    d = field.reshape(p.x0.shape)
    return p.project(p.x0 + d * per_sample(p.radius / p.norm.size(d).clamp_min(TINY), d))


def _move_mass(p: Problem, kept: Inputs, share: float) -> Inputs:
    """Empty a second window and give its mass, and what the ball has left, to the first (algorithm 3)."""
    c, h, w = _image(p.x0.shape)
    sides = _sides(share, h, w, least=3)
    d = (kept - p.x0).view(len(p), c, h, w)
    (r1, c1), (r2, c2) = (_windows(p, sides, (h, w), i) for i in (0, 1))
    first, second = (r[:, None, :, None] & q[:, None, None, :] for r, q in ((r1, c1), (r2, c2)))
    budget = (p.radius.square() - d.flatten(1).square().sum(1)).clamp_min(0)
    union = torch.where(first | second, d, 0).flatten(2).square().sum(2)
    lengths = (union + budget[:, None] / c).sqrt()
    old = torch.where(first, d, 0)
    old = old / old.flatten(2).norm(dim=2).clamp_min(TINY)[:, :, None, None]
    eta = _eta(*sides).to(p.x0)
    turned = p.draws.fold(8).uniform() < 0.5
    if sides[0] == sides[1]:
        eta = torch.where(turned[:, None, None], eta, eta.T)
    placed = _place(eta, r1, c1)[:, None] * p.draws.fold(9).signs((c, 1, 1), p.x0.dtype)
    new = placed + old
    new = new / new.flatten(2).norm(dim=2).clamp_min(TINY)[:, :, None, None] * lengths[:, :, None, None]
    d = torch.where(first, new, torch.where(second, 0, d))
    return p.project(p.x0 + d.reshape(p.x0.shape))


def _place(eta: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Put a window (or one a sample) where the masks over rows and columns say."""
    eta = eta.expand(len(rows), *eta.shape[-2:])
    inside_r, inside_c = (rows.cumsum(1) - 1).clamp_min(0), (columns.cumsum(1) - 1).clamp_min(0)
    inside_r, inside_c = inside_r.clamp_max(eta.shape[1] - 1), inside_c.clamp_max(eta.shape[2] - 1)
    at = torch.arange(len(rows), device=eta.device)[:, None, None]
    spread = eta[at, inside_r[:, :, None], inside_c[:, None, :]]
    return torch.where(rows[:, :, None] & columns[:, None, :], spread, 0)
