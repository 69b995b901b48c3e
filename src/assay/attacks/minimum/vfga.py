"""VFGA: one coordinate after the other, each of a length that the model's scores vote for."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Labels, Mask, PerSample, choose
from assay.models.door import Gradient, Loss
from assay.threats.problem import Problem


class VFGAState(NamedTuple):
    """The next point; where this round began, the coordinates it may change, and its best trial so far."""

    x: Inputs
    base: Inputs
    up: Labels  # the coordinate that promises most when it rises
    down: Labels
    best: Inputs
    value: PerSample  # the loss there
    over: Mask


@final
@ATTACKS.register("vfga", norm=("l0",), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class VFGA(GradientAttack[VFGAState]):
    """VFGA: changes one more coordinate a round, the one and as far as the loss is largest among trials.

    i+ = argmax g_i (hi - x_i) and i- = argmax -g_i (x_i - lo), over coordinates not yet changed; g is the gradient of
    the loss. Trials: x_i moves towards its end of the box, all the way and by half-normal lengths with the whole way
    as scale.

    *Sees* the gradient once a round, else scores. *Cost* 2 + 2 ``samples`` passes a round.

    Args:
        steps: largest number of coordinates.
        samples: trials of each of the two coordinates.
        loss: what votes.

    *Differs from the paper in*: the first trial goes all the way, so that no luck is needed where that is best; 5
    samples, not 10; the margin votes, not a probability, which may saturate.

    References:
        Hajri et al. 2020, arXiv:2011.12423, algorithm 2.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    any_size: ClassVar[bool] = True
    minimal: ClassVar[bool] = True
    steps: int = 200
    samples: int = 5
    loss: Loss = margin

    @property
    def questions(self) -> int:
        return self.steps * self._round

    @property
    def _round(self) -> int:
        return 1 + 2 * self.samples

    def differentiates(self, k: int) -> bool:
        return k % self._round == 0 and k < self.questions

    def init(self, p: Problem) -> VFGAState:
        x, none = p.start("clean"), torch.zeros_like(p.rows)
        return VFGAState(x, x, none, none, x, p.full(-torch.inf), none > 0)

    def update(self, p: Problem, s: VFGAState, e: Gradient, k: int) -> VFGAState:
        trial = k % self._round
        s = self._judged(s, e) if trial else self._begun(p, s, e)
        return s._replace(x=s.best if trial == 2 * self.samples else self._trial(p, s, k), over=s.over | e.success)

    def _begun(self, p: Problem, s: VFGAState, e: Gradient) -> VFGAState:
        """Choose the coordinates of a round; where all are changed already, it changes one again."""
        fresh = s.x == p.x0
        rise = torch.where(fresh, e.grad * (p.upper - s.x), -torch.inf)
        fall = torch.where(fresh, e.grad * (p.lower - s.x), -torch.inf)
        up, down = (gain.flatten(1).argmax(1) for gain in (rise, fall))
        return VFGAState(s.x, s.x, up, down, s.x, p.full(-torch.inf), s.over)

    def _judged(self, s: VFGAState, e: Gradient) -> VFGAState:
        better = e.loss > s.value
        return s._replace(best=choose(better, s.x, s.best), value=torch.where(better, e.loss, s.value))

    def _trial(self, p: Problem, s: VFGAState, k: int) -> Inputs:
        """Return the trial that follows query k."""
        trial = k % self._round
        rises, first = trial < self.samples, trial % self.samples == 0
        drawn = p.draws.fold(k).normal((), s.x.dtype).abs().clamp_max(1)
        return moved(s.base, p.upper if rises else p.lower, s.up if rises else s.down, p.full(1.0) if first else drawn)

    def done(self, s: VFGAState) -> Mask:
        return s.over


def moved(x: Inputs, end: Inputs, coordinate: Labels, share: PerSample) -> Inputs:
    """Return x with one coordinate (b,) of each sample moved by a share (b,) of its way to ``end``."""
    flat, at = x.flatten(1), coordinate[:, None]
    goal = end.flatten(1).gather(1, at)
    there: Tensor = goal - (goal - flat.gather(1, at)) * (1 - share[:, None])
    return flat.scatter(1, at, there).view(x.shape)
