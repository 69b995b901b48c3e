"""The Square attack: random search with square windows."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F

from assay.attacks.loop import ScoreAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.attacks.score.images import image_shape
from assay.core.registry import one_of
from assay.core.types import Inputs, PerSample, choose, per_sample
from assay.models.door import Loss, Score
from assay.threats.norms import TINY
from assay.threats.problem import STARTS, Problem


class SquareState(NamedTuple):
    """The candidate to ask about, and the point it must beat."""

    x: Inputs
    kept: Inputs
    kept_loss: PerSample


@final
@ATTACKS.register("square", norm=("linf", "l2", "l1"), access="score", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class Square(ScoreAttack[SquareState]):
    """Repaints one square window at random and keeps it if the loss rises.

    linf: the window gets x0 + eps * s, one sign s per channel; the start is vertical stripes of +-eps.
    l2, l1: the mass of two windows and what is left of eps go to one of them, to which a pair of pyramids, one up and
    one down, is added; the start is a grid of such pairs. Mass and units are those of the norm.
    Windows shrink on the published schedule, stretched to ``steps``. Each sample has a window of its own.
    Inputs (b, c, h, w) are images; (b, c, t) and (b, d) are taken as images of height 1.

    *Sees* scores. *Cost* ``steps`` + 1 forwards.

    Args:
        steps: number of queries.
        p: share of the image that the first windows cover; a smaller one suits a warm start.
        start: ``pattern``, the published stripes or grid; or ``clean``, ``uniform`` in the ball, on its ``sphere``. A
            point that an earlier attack of a :class:`Chain` left comes before all of them.
        loss: what is to rise.

    *Differs from the paper in*: the nearest point of ball and box instead of scaling, then clipping (l2). The published
    code paints the same window in every sample of a batch; here each sample has its own.

    References:
        Andriushchenko et al. 2020, arXiv:1912.00049, algorithms 1 to 3; for l1 Croce & Hein 2021, arXiv:2103.01208,
        sec. 4.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    steps: int = 5000
    p: float = 0.8
    start: str = "pattern"
    loss: Loss = margin

    def __post_init__(self) -> None:
        one_of("start", self.start, ("pattern", *STARTS))

    def init(self, p: Problem) -> SquareState:
        if self.start != "pattern" or p.warm is not None:
            x = p.start(self.start)
        else:
            x = _stripes(p) if p.norm.is_box else _grid(p)
        return SquareState(x, x, p.full(-torch.inf))

    def update(self, p: Problem, s: SquareState, e: Score, k: int) -> SquareState:
        up = e.loss > s.kept_loss
        kept, loss = choose(up, s.x, s.kept), torch.where(up, e.loss, s.kept_loss)
        p = p.stage(k)
        share = self.share(k)
        x = _repaint(p, kept, share) if p.norm.is_box else _move_mass(p, kept, share)
        return SquareState(x, kept, loss)

    def share(self, k: int) -> float:
        """Return the share of the image that a window covers at query k (appendix B of the paper)."""
        return float(self.p / 2 ** halvings(k, self.steps))


def halvings(k: int, steps: int) -> int:
    """Return how often windows have been halved before query k; the published schedule is for 10,000 queries."""
    return sum(k * 10_000 // steps > t for t in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))


def _sides(share: float, h: int, w: int) -> tuple[int, int]:
    """Return height and width of a window that covers this share of an image, a square where there is room."""
    if h == 1:
        return 1, min(max(round(share * w), 1), w)
    side = max(round((share * h * w) ** 0.5), 1)
    return min(side, h), min(side, w)


def _window(p: Problem, sides: tuple[int, int], size: tuple[int, int], stream: int) -> tuple[Tensor, Tensor]:
    """Draw where one window a sample lies; return masks over rows (b, h) and columns (b, w)."""

    def line(axis: int) -> Tensor:
        corner = p.draws.fold(2 * stream + axis).integers(size[axis] - sides[axis] + 1)[:, None]
        at = torch.arange(size[axis], device=p.x0.device)[None]
        return (at >= corner) & (at < corner + sides[axis])

    return line(0), line(1)


def _cells(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the mask (b, 1, h, w) of the window that masks over rows and columns span."""
    return rows[:, None, :, None] & columns[:, None, None, :]


def _stripes(p: Problem) -> Inputs:
    c, h, w = image_shape(p.x0.shape)
    stripes = p.draws.signs((c, 1, w), p.x0.dtype).expand(-1, c, h, w).reshape(p.x0.shape)
    return p.project(p.x0 + per_sample(p.radius, p.x0) * stripes)


def _repaint(p: Problem, kept: Inputs, share: float) -> Inputs:
    """Give one window x0 + eps or x0 - eps, by channel (algorithm 2)."""
    c, h, w = image_shape(p.x0.shape)
    window = _cells(*_window(p, _sides(share, h, w), (h, w), 0)).expand(-1, c, h, w).reshape(p.x0.shape)
    signs = p.draws.fold(9).signs((c, 1, 1), p.x0.dtype).expand(-1, c, h, w).reshape(p.x0.shape)
    return p.project(torch.where(window, p.x0 + per_sample(p.radius, p.x0) * signs, kept))


def _pyramid(h: int, w: int) -> Tensor:
    """Pile up rectangles around the centre, the q-th from inside 1 / (q + 1)^2 high; of unit length (eq. 2)."""
    away = torch.maximum((torch.arange(h) - h // 2).abs()[:, None], (torch.arange(w) - w // 2).abs())
    heights = 1 / torch.arange(1, max(h, w) // 2 + 2, dtype=torch.float64).square()
    pile: Tensor = heights.flip(0).cumsum(0).flip(0)[away]
    return pile / pile.square().sum().sqrt()


def _pair(h: int, w: int) -> Tensor:
    """Return a pyramid up and, below it (beside it in a single row), one down: (h, w), of unit length."""
    if h == 1 < w:
        return _pair(w, 1).T
    pair = torch.cat([_pyramid(h // 2, w), -_pyramid(h - h // 2, w)])
    return pair / pair.square().sum().sqrt()


def _pairs(p: Problem, sides: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Draw pyramid pairs, one below or beside the other: (b, *shape, *sides)."""
    upright, lying = (v.to(p.x0) for v in (_pair(*sides), _pair(*sides[::-1]).T))
    turned = p.draws.fold(8).uniform(shape) < 0.5
    return torch.where(turned[..., None, None], lying, upright)


def _grid(p: Problem) -> Inputs:
    """Tile the image with pyramid pairs, signs by channel; five by five tiles in a square image (algorithm 3)."""
    c, h, w = image_shape(p.x0.shape)
    side = max((w if h == 1 else min(h, w)) // 5, 1)
    high, wide = min(side, h), side
    down, across = h // high, w // wide
    signs = p.draws.signs((c, down, across), p.x0.dtype)[..., None, None]
    tiles = _pairs(p, (high, wide), (1, down, across)) * signs
    field = tiles.transpose(3, 4).reshape(len(p), c, down * high, across * wide)
    left, top = (w - across * wide) // 2, (h - down * high) // 2
    d = F.pad(field, (left, w - across * wide - left, top, h - down * high - top)).reshape(p.x0.shape)
    return p.project(p.x0 + per_sample(p.radius / p.norm.size(d), d) * d)


def _move_mass(p: Problem, kept: Inputs, share: float) -> Inputs:
    """Empty a second window; give its mass, and what the ball has left, to the first (algorithm 3)."""
    c, h, w = image_shape(p.x0.shape)
    sides = _odd_sides(share, h, w)
    d = (kept - p.x0).view(len(p), c, h, w)
    (rows, columns), other = (_window(p, sides, (h, w), stream) for stream in (0, 1))
    first, second = _cells(rows, columns), _cells(*other)
    power = _POWERS[p.norm.name]
    left = (p.radius**power - _mass(d, power).flatten(1).sum(1)).clamp_min(0)
    mass = _mass(torch.where(first | second, d, 0), power) + (left / c).view(-1, 1, 1, 1)
    old = _unit(torch.where(first, d, 0), power)
    pair = _place(_pairs(p, sides, ()), rows, columns)[:, None] * p.draws.fold(9).signs((c, 1, 1), p.x0.dtype)
    new = _unit(old + _unit(pair, power), power) * mass ** (1 / power)
    d = torch.where(first, new, torch.where(second, 0, d))
    return p.project(p.x0 + d.view(p.x0.shape))


_POWERS = {"l2": 2, "l1": 1}
"""Of the coordinates, whose sum the ball bounds."""


def _odd_sides(share: float, h: int, w: int) -> tuple[int, int]:
    """Return sides of at least 3 and odd, as far as the image goes: a pyramid has a middle."""
    high, wide = (max(n, 3) // 2 * 2 + 1 for n in _sides(share, h, w))
    return min(high, h), min(wide, w)


def _mass(d: Tensor, power: int) -> Tensor:
    """Return what every channel of d (b, c, h, w) has of the budget: (b, c, 1, 1)."""
    return d.abs().pow(power).sum((2, 3), keepdim=True)


def _unit(d: Tensor, power: int) -> Tensor:
    """Scale every channel of d (b, c, h, w) to unit length."""
    return d / (_mass(d, power) ** (1 / power)).clamp_min(TINY)


def _place(pair: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Put one pair a sample (b, *sides) where the masks over rows and columns say: (b, h, w)."""
    r, q = ((mask.cumsum(1) - 1).clamp_min(0) for mask in (rows, columns))
    at = torch.arange(len(rows), device=pair.device)[:, None, None]
    return torch.where(rows[:, :, None] & columns[:, None, :], pair[at, r[:, :, None], q[:, None, :]], 0)
