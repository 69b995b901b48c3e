"""SimBA: one direction of an orthonormal basis after the other, forwards, else backwards."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.loop import ScoreAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.attacks.score.images import cosines, image_shape, smaller
from assay.core.registry import one_of
from assay.core.types import Inputs, Labels, PerSample, choose, per_sample
from assay.models.door import Loss, Score
from assay.threats.problem import Problem

BASES = ("pixel", "dct")
"""Values one by one, or the waves of the discrete cosine transform."""


class SimBAState(NamedTuple):
    """The candidate; the point it must beat; the order of the directions (b, n), where in it, and which way."""

    x: Inputs
    kept: Inputs
    kept_loss: PerSample
    order: Tensor
    at: Labels
    side: PerSample


@final
@ATTACKS.register("simba", norm=("l2",), access="score", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class SimBA(ScoreAttack[SimBAState]):
    """Tries x + a q, then x - a q, for one direction q of an orthonormal basis, and keeps the first that is better.

    Each sample has an order of its own, without repetition until all directions have been tried. Past eps, points are
    drawn back onto the ball.

    *Sees* scores. *Cost* ``steps`` + 1 forwards: one or two a direction.

    Args:
        steps: number of queries.
        rel_step: a as a fraction of eps.
        basis: ``pixel``, single values, or ``dct``, waves over each channel.
        share: dct only: of the frequencies of each axis, the slow ones, that are tried.
        loss: what is to rise.

    *Differs from the paper in*: the ball is given, where the paper bounds the size by the number of steps; the margin
    instead of the probability of the label, which saturates.

    References:
        Guo et al. 2019, arXiv:1905.07121, algorithm 1 and sec. 3.2.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    steps: int = 5000
    rel_step: float = 0.1
    basis: str = "dct"
    share: float = 0.5
    loss: Loss = margin

    def __post_init__(self) -> None:
        one_of("basis", self.basis, BASES)

    def init(self, p: Problem) -> SimBAState:
        x = p.start("clean")
        c, h, w = self._frequencies(p)
        order = p.draws.fold(_ORDER).uniform((c * h * w,)).argsort(dim=1, stable=True)
        return SimBAState(x, x, p.full(-torch.inf), order, torch.full_like(p.rows, -1), p.full(1.0))

    def update(self, p: Problem, s: SimBAState, e: Score, k: int) -> SimBAState:
        up = e.loss > s.kept_loss
        kept, loss = choose(up, s.x, s.kept), torch.where(up, e.loss, s.kept_loss)
        over = up | (s.side < 0)  # with this direction
        at, side = s.at + over, torch.where(over, 1.0, -1.0).to(s.side.dtype)
        q = self.direction(p, s.order.gather(1, at[:, None] % s.order.shape[1])[:, 0])
        x = p.project(kept + per_sample(side * self.rel_step * p.radius, q) * q)
        return SimBAState(x, kept, loss, s.order, at, side)

    def direction(self, p: Problem, number: Labels) -> Inputs:
        """Return one vector of the basis a sample, of unit length."""
        if self.basis == "pixel":
            return torch.zeros_like(p.x0).flatten(1).scatter(1, number[:, None], 1.0).view(p.x0.shape)
        _, high, wide = self._frequencies(p)
        c, h, w = image_shape(p.x0.shape)
        rows, columns = (cosines(n).to(p.x0) for n in (h, w))
        wave = rows[number // wide % high][:, :, None] * columns[number % wide][:, None, :]
        one = torch.nn.functional.one_hot(number // (wide * high), c).to(p.x0)
        return (one[:, :, None, None] * wave[:, None]).reshape(p.x0.shape)

    def _frequencies(self, p: Problem) -> tuple[int, int, int]:
        return image_shape(p.x0.shape) if self.basis == "pixel" else smaller(p.x0.shape, self.share)


_ORDER = 0x51B
"""Names the random numbers of the order, beside those of the start."""
