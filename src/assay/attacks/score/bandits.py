"""Bandits: a guess of the gradient that is carried from step to step and from pixel to pixel."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.loop import ScoreAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.attacks.score.images import blown_up, smaller
from assay.core.types import Inputs, Labels, Mask, PerSample, choose, per_sample
from assay.models.door import Loss, Score
from assay.threats.norms import TINY
from assay.threats.problem import Problem

AHEAD, BEHIND, HERE = 0, 1, 2
"""What a query asks about: the two sides of the point, or the point itself."""


class BanditsState(NamedTuple):
    """The point to ask about; the point of the ascent; the guess and the direction being tried (b, c, h', w')."""

    x: Inputs
    here: Inputs
    guess: Tensor
    u: Tensor
    ahead: PerSample  # the loss on that side
    near: Mask  # a side that was asked about meets the goal
    scale: PerSample  # mean size of differences
    phase: Labels


@final
@ATTACKS.register("bandits", norm=("linf", "l2"), access="score", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class Bandits(ScoreAttack[BanditsState]):
    """Ascent along a guess v of the gradient, which every step makes better with two queries.

    A step draws u, asks about x + s q for q = v + r u and q = v - r u (of unit length per value), and moves v along u
    by the difference of the answers. Time prior: v stays from step to step. Data prior: v is a smaller image, blown up.
    Under linf v = tanh(a), and a moves, so that v stays in the cube (exponentiated gradients); else v moves itself.

    *Sees* scores. *Cost* ``steps`` + 1 forwards: two a step; the point itself is asked about first, and where one of
    its sides meets the goal.

    Args:
        steps: number of queries.
        rel_step: length of a step of the point, as a fraction of eps.
        rate: of the guess, when a difference is as large as usual.
        explore: r, the length of the direction that is tried.
        sigma: s, the root mean square change of a value, in widths of the box.
        share: of the sides of the image that those of v have; 1: no data prior.
        loss: what is ascended.

    *Differs from the paper in*: differences are divided by their running mean size, so that ``rate`` does not depend
    on the scale of the logits; ``sigma`` is by value instead of for the whole image; the margin instead of the
    cross-entropy.

    References:
        Ilyas, Engstrom & Madry 2019, arXiv:1807.07978, algorithms 1 to 3.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    steps: int = 5000
    rel_step: float = 0.1
    rate: float = 0.1
    explore: float = 1.0
    sigma: float = 0.01
    share: float = 0.5
    loss: Loss = margin

    def init(self, p: Problem) -> BanditsState:
        x, zero = p.start("clean"), p.full(0.0)
        guess = x.new_zeros(len(p), *smaller(x.shape, self.share))
        return BanditsState(x, x, guess, guess, zero, zero > 0, zero, torch.full_like(p.rows, HERE))

    def update(self, p: Problem, s: BanditsState, e: Score, k: int) -> BanditsState:
        """Go on with each sample from where its step is: AHEAD -> BEHIND -> (HERE, where a side met the goal) -> ..."""
        asked_ahead, asked_behind = s.phase == AHEAD, s.phase == BEHIND
        near = torch.where(asked_behind, s.near | e.success, e.success)
        moved = self._moved(p, s, e)
        guess, here = choose(asked_behind, moved.guess, s.guess), choose(asked_behind, moved.here, s.here)
        scale = torch.where(asked_behind, moved.scale, s.scale)
        look = asked_behind & near
        u = choose(asked_ahead, s.u, p.stage(k).draws.normal(s.guess.shape[1:], s.guess.dtype))
        side = torch.where(asked_ahead, -1.0, 1.0).to(scale.dtype)
        x = choose(look, here, self._aside(p, here, guess, u, side))
        phase = torch.where(asked_ahead, BEHIND, torch.where(look, HERE, AHEAD))
        return BanditsState(x, here, guess, u, e.loss, near, scale, phase)

    def _moved(self, p: Problem, s: BanditsState, e: Score) -> BanditsState:
        """Return the state after both sides have answered."""
        rise = s.ahead - e.loss
        scale = torch.where(s.scale > 0, 0.9 * s.scale + 0.1 * rise.abs(), rise.abs())
        guess = s.guess + self.rate * per_sample(rise / scale.clamp_min(TINY), s.u) * s.u
        uphill = blown_up(self._valued(p, guess), p.x0.shape, "nearest")
        return s._replace(here=p.ascend(s.here, uphill, self.rel_step * p.radius), guess=guess, scale=scale)

    def _valued(self, p: Problem, guess: Tensor) -> Tensor:
        return guess.tanh() if p.norm.is_box else guess

    def _aside(self, p: Problem, here: Inputs, guess: Tensor, u: Tensor, side: PerSample) -> Inputs:
        away = self.explore * side / u[0].numel() ** 0.5
        q = blown_up(self._valued(p, guess) + per_sample(away, u) * u, p.x0.shape, "nearest")
        q = q / per_sample(q.flatten(1).square().mean(1).sqrt().clamp_min(TINY), q)
        return (here + self.sigma * p.box.width * q).clamp(p.box.lo, p.box.hi)
