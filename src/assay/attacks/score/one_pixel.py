"""The one-pixel attack: differential evolution over places and colours of a few pixels."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F

from assay.attacks.loop import ScoreAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.attacks.score.images import image_shape, pixels
from assay.core.registry import UsageError, one_of
from assay.core.types import Inputs
from assay.models.door import Loss, Score
from assay.threats.problem import Problem


class OnePixelState(NamedTuple):
    """The point to ask about; the population (b, n, g), the losses of its members, and the trial (b, g)."""

    x: Inputs
    members: Tensor
    losses: Tensor  # (b, n)
    trial: Tensor


@final
@ATTACKS.register("one-pixel", norm=("l0",), access="score", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class OnePixel(ScoreAttack[OnePixelState]):
    """Differential evolution: a trial a + F (b - c) takes the place of a member that is no better.

    Of these three, b and c are members drawn at random, a is the best one or drawn too; of the trial, each number is
    that of the member with chance 1 - ``crossover``. A member says for each of eps / channels pixels where it is and
    what colour it gets, as numbers from 0 to 1. The first ``population`` queries are about members drawn at random,
    colours by a normal distribution around grey; then each query is about one trial, for the members in turn. Every
    sample has a population of its own.

    *Sees* scores. *Cost* ``steps`` + 1 forwards.

    Args:
        steps: number of queries.
        population: number of members.
        strategy: ``best``: a is the best member; or ``rand``: it is drawn.
        scale: F.
        crossover: the chance that a number is taken from the trial.
        loss: what is to rise.

    *Differs from the paper in*: made for thousands of queries instead of 40,000, where the paper's 400 members, a drawn
    (``rand``) and no crossover (1) find little; a better trial takes its place at once instead of after the
    generation; numbers that leave 0 to 1 are drawn anew; the margin instead of the probability of the label. Written
    here, not called in SciPy, whose solver cannot be asked for one point of every sample at a time.

    References:
        Su, Vargas & Sakurai 2019, arXiv:1710.08864, sec. 3; Storn & Price 1997 ("Differential evolution", Journal
        of Global Optimization 11).
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    steps: int = 5000
    population: int = 20
    strategy: str = "best"
    scale: float = 0.5
    crossover: float = 0.7
    loss: Loss = margin

    def __post_init__(self) -> None:
        one_of("strategy", self.strategy, ("rand", "best"))
        if self.population < 4:
            raise UsageError("population >= 4", f"{self.population}", "A trial is made of three other members.")

    def init(self, p: Problem) -> OnePixelState:
        c, _, _ = image_shape(p.x0.shape)
        count = int(pixels(p, "one-pixel").max())
        shape = (self.population, count)
        places = p.draws.fold(_PLACES).uniform((*shape, 2), p.x0.dtype)
        colours = (0.5 + 0.5 * p.draws.fold(_COLOURS).normal((*shape, c), p.x0.dtype)).clamp(0, 1)
        members = torch.cat([places, colours], 3).flatten(2)
        losses = members.new_full((len(p), self.population), -torch.inf)
        return OnePixelState(_painted(p, members[:, 0]), members, losses, members[:, 0])

    def update(self, p: Problem, s: OnePixelState, e: Score, k: int) -> OnePixelState:
        i, after = k % self.population, (k + 1) % self.population
        better = e.loss >= s.losses[:, i]
        place = torch.arange(self.population, device=better.device) == i
        members = torch.where(place[:, None] & better[:, None, None], s.trial[:, None], s.members)
        losses = torch.where(place & better[:, None], e.loss[:, None], s.losses)
        drawn = k + 1 < self.population  # one of those that were drawn at the start
        trial = members[:, after] if drawn else self._mutant(p.stage(k), members, losses, after)
        return OnePixelState(_painted(p, trial), members, losses, trial)

    def _mutant(self, p: Problem, members: Tensor, losses: Tensor, but: int) -> Tensor:
        """Combine three members, those that are drawn different ones and not the one that is to be replaced."""
        u = p.draws.uniform((self.population,))
        others = torch.arange(self.population, device=u.device) != but
        first, second, third = torch.where(others, u, -1).topk(3, 1).indices.unbind(1)
        first = losses.argmax(1) if self.strategy == "best" else first
        rows = torch.arange(len(members), device=u.device)
        a, b, c = (members[rows, n] for n in (first, second, third))
        trial = a + self.scale * (b - c)
        trial = torch.where((trial < 0) | (trial > 1), p.draws.fold(_PLACES).uniform(trial.shape[1:]), trial)
        return torch.where(p.draws.fold(_CROSSED).uniform(trial.shape[1:]) < self.crossover, trial, members[:, but])


_PLACES, _COLOURS, _CROSSED = 1, 2, 3
"""Name random numbers."""


def _painted(p: Problem, genes: Tensor) -> Inputs:
    """Paint the pixels of one member a sample (b, g) on the clean images; of two at one place the later one shows."""
    c, h, w = image_shape(p.x0.shape)
    parts = genes.view(len(genes), -1, 2 + c)
    row, column = ((parts[:, :, i] * n).long().clamp_max(n - 1) for i, n in ((0, h), (1, w)))
    at, number = row * w + column, torch.arange(parts.shape[1], device=genes.device)
    paid = number < pixels(p, "one-pixel")[:, None]
    over = (at[:, :, None] == at[:, None, :]) & (number[:, None] < number) & paid[:, None, :]
    at = torch.where(paid & ~over.any(2), at, h * w)  # what does not show goes to a place behind the image
    colours = p.box.lo + p.box.width * parts[:, :, 2:]
    blank = F.pad(p.x0.reshape(len(p), c, h * w), (0, 1))
    x = blank.scatter(2, at[:, None].expand(-1, c, -1), colours.mT)[:, :, :-1]
    return x.reshape(p.x0.shape).clamp(p.lower, p.upper)
