"""ZOO: ascent coordinate by coordinate, with slopes and curvatures from differences."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.loop import ScoreAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.attacks.score.images import blown_up, smaller
from assay.core.registry import UsageError, one_of
from assay.core.types import Inputs, PerSample
from assay.models.door import Loss, Score
from assay.threats.problem import Problem

SOLVERS = ("adam", "newton")


class ZOOState(NamedTuple):
    """The point to ask about; that of the ascent; coordinates of this step (b, m); what each coordinate remembers."""

    x: Inputs
    here: Inputs
    chosen: Tensor
    middle: PerSample  # the loss at the point itself
    ahead: PerSample  # and on one side of it
    moves: Tensor  # (b, n): of this step so far
    first: Tensor  # (b, n): mean slope
    second: Tensor  # (b, n): mean squared slope
    age: Tensor  # (b, n): how often it was moved


@final
@ATTACKS.register("zoo", norm=("l2",), access="score", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class ZOO(ScoreAttack[ZOOState]):
    """Ascent on a few coordinates at a time, whose slopes are (f(x + h e) - f(x - h e)) / 2 h.

    A coordinate moves by Adam (its own means and age) or by Newton's method, slope over curvature
    (f(x + h e) - 2 f(x) + f(x - h e)) / h^2, where f bends down; else by its slope. With ``share`` below 1 the
    coordinates are the pixels of a smaller image, blown up: fewer of them, and each moves more of the input.

    *Sees* scores. *Cost* ``steps`` + 1 forwards: 1 + 2 ``coordinates`` for a step of the point.

    Args:
        steps: number of queries.
        coordinates: how many move at a time.
        solver: ``adam`` or ``newton``.
        rel_step: Adam: the most that a coordinate moves at first, as a fraction of eps; Newton: this times the step
            that is right for a parabola, and at the most this fraction of eps.
        sigma: h, in widths of the box.
        share: of the sides of the image that those of the smaller one have.
        loss: what is ascended.

    *Differs from the paper in*: the ball bounds the size, where the paper adds the squared size to the loss with a
    weight that it bisects; coordinates are drawn evenly, the paper's importance sampling is left out; h is 100 times
    the paper's, for which float32 has no curvature; Newton's steps are bounded.

    References:
        Chen et al. 2017, arXiv:1708.03999, algorithms 1 to 3 and sec. 3.4.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    steps: int = 5000
    coordinates: int = 8
    solver: str = "adam"
    rel_step: float = 0.1
    sigma: float = 0.01
    share: float = 0.5
    loss: Loss = margin

    def __post_init__(self) -> None:
        one_of("solver", self.solver, SOLVERS)
        if self.coordinates < 1:
            raise UsageError("coordinates >= 1", f"{self.coordinates}", "The paper takes 128.")

    def init(self, p: Problem) -> ZOOState:
        x, zero = p.start("clean"), p.full(0.0)
        c, h, w = smaller(x.shape, self.share)
        none = x.new_zeros(len(p), c * h * w)
        chosen = torch.zeros(len(p), min(self.coordinates, c * h * w), dtype=torch.int64, device=x.device)
        return ZOOState(x, x, chosen, zero, zero, none, none, none, none)

    def update(self, p: Problem, s: ZOOState, e: Score, k: int) -> ZOOState:
        count = s.chosen.shape[1]
        step, at = divmod(k, 1 + 2 * count)
        number, second = divmod(at - 1, 2)
        if at == 0:
            chosen = p.stage(step).draws.uniform(s.moves.shape[1:]).topk(count, 1).indices
            s = s._replace(chosen=chosen, middle=e.loss, moves=torch.zeros_like(s.moves))
            return s._replace(x=self._aside(p, s, 0, 1))
        if not second:
            return s._replace(ahead=e.loss, x=self._aside(p, s, number, -1))
        s = self._moved(p, s, e.loss, number)
        if number + 1 < count:
            return s._replace(x=self._aside(p, s, number + 1, 1))
        here = p.project(s.here + self._shown(p, s.moves))
        return s._replace(x=here, here=here)

    def _moved(self, p: Problem, s: ZOOState, behind: PerSample, number: int) -> ZOOState:
        """Note the move of one coordinate, whose two sides have answered."""
        h, at = self.sigma * p.box.width, s.chosen[:, number : number + 1]
        slope = ((s.ahead - behind) / (2 * h))[:, None]
        bend = ((s.ahead - 2 * s.middle + behind) / h**2)[:, None]
        first = 0.9 * s.first.gather(1, at) + 0.1 * slope
        second = 0.999 * s.second.gather(1, at) + 0.001 * slope.square()
        age = s.age.gather(1, at) + 1
        if self.solver == "adam":
            move = first / (1 - 0.9**age) / ((second / (1 - 0.999**age)).sqrt() + 1e-8)
            move = self.rel_step * p.radius[:, None] * move
        else:
            most = self.rel_step * p.radius[:, None]
            move = (self.rel_step * slope / torch.where(bend < 0, -bend, 1)).clamp(-most, most)
        parts = ((s.moves, move), (s.first, first), (s.second, second), (s.age, age))
        moves, first, second, age = (old.scatter(1, at, new) for old, new in parts)
        return s._replace(moves=moves, first=first, second=second, age=age)

    def _aside(self, p: Problem, s: ZOOState, number: int, side: int) -> Inputs:
        """Return the point on one side of a coordinate, inside the box."""
        e = torch.zeros_like(s.moves).scatter(1, s.chosen[:, number : number + 1], side * self.sigma * p.box.width)
        return (s.here + self._shown(p, e)).clamp(p.box.lo, p.box.hi)

    def _shown(self, p: Problem, v: Tensor) -> Inputs:
        """Return what numbers of coordinates (b, n) look like."""
        return blown_up(v.view(len(v), *smaller(p.x0.shape, self.share)), p.x0.shape, "bilinear")
