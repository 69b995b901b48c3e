"""The l0 attack of Carlini and Wagner: an l2 attack on ever fewer coordinates."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.loop import GradientAttack
from assay.attacks.losses import margin
from assay.attacks.minimum.carlini_wagner import Adam, linear_weight, short
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Mask, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY
from assay.threats.problem import Problem

_MOST = 1e12
"""The weight of the goal stays below this, so that squares of weighted gradients stay finite."""


class CarliniWagnerL0State(NamedTuple):
    """The point and where it may differ from the clean input; the sparsest success; how the search goes on."""

    x: Inputs
    free: Inputs  # 1 where a coordinate may change, else 0
    best: Inputs
    worth: Inputs  # of each change of the sparsest success; inf where there is none
    size: PerSample  # of the sparsest success
    adam: Adam
    c: PerSample
    share: PerSample  # of the changes that are undone next
    spared: PerSample  # the least changes, as far as none of them could be undone alone
    age: PerSample  # queries of this round so far


@final
@ATTACKS.register("cw-l0", norm=("l0",), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class CarliniWagnerL0(GradientAttack[CarliniWagnerL0State]):
    """Descent on ||d||^2 + c max(confidence - margin, 0) on free coordinates; each success freezes the least of them.

    Adam on d, clipped to the box. A round ends at a success, or after ``patience`` queries. The next one begins at the
    sparsest success, with those changes undone and frozen that are worth least: g_i d_i, with the gradient g of the
    margin. A round that failed makes c ten times as large, and undoes half as many changes in the next one; at last
    one, and each of the others in turn. Until there is a success, c rises with every query after those of a round.

    *Sees* the gradient. *Cost* ``steps`` + 1 forwards, ``steps`` backwards.

    Args:
        steps: number of queries, of all rounds.
        patience: largest number of queries of a round.
        share: of the changes, is undone at most.
        rate: learning rate in widths of the box.
        confidence: margin that is aimed at.
        loss: what is kept above ``confidence``; positive where the goal is met.

    *Differs from the paper in*: a round ends at its first success; steps are clipped to the box, not made in the space
    of tanh; many changes may be undone at once, as in the authors' code; a failure is not the end; the first c is that
    of :class:`CarliniWagner`.

    References:
        Carlini & Wagner 2017, arXiv:1608.04644, sec. VI-B.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    minimal: ClassVar[bool] = True
    any_size: ClassVar[bool] = True
    steps: int = 500
    patience: int = 10
    share: float = 0.3
    rate: float = 0.03
    confidence: float = 0.0
    loss: Loss = margin

    def init(self, p: Problem) -> CarliniWagnerL0State:
        x, one, zero = p.start("clean"), torch.ones_like(p.x0), p.full(0.0)
        never = zero + torch.inf
        return CarliniWagnerL0State(x, one, x, one, never, Adam.blank(x), never, zero + self.share, zero, zero)

    def update(self, p: Problem, s: CarliniWagnerL0State, e: Gradient, k: int) -> CarliniWagnerL0State:
        s, over = self._told(p, s if k else s._replace(c=linear_weight(p, e).clamp_max(_MOST)), e)
        d = (s.x - p.x0) / p.box.width
        slope = s.free * (2 * d - per_sample(short(e, self.confidence) * s.c, d) * e.grad * p.box.width)
        adam, direction = s.adam.step(slope, s.age)
        x = choose(over, s.best, s.x - self.rate * p.box.width * direction).clamp(p.lower, p.upper)
        x, age = torch.where(s.free > 0, x, p.x0), torch.where(over, 0, s.age + 1)
        return s._replace(x=x, adam=adam.blank_where(over), age=age)

    def _told(self, p: Problem, s: CarliniWagnerL0State, e: Gradient) -> tuple[CarliniWagnerL0State, Mask]:
        """Note what a query told; return the state, with other free coordinates where a round is over, and where."""
        size = p.size(s.x)
        won = e.success & (size < s.size)
        worth = torch.where(s.x == p.x0, torch.inf, e.grad * (s.x - p.x0))
        best, worth, least = choose(won, s.x, s.best), choose(won, worth, s.worth), torch.where(won, size, s.size)
        late = ~won & (s.age + 1 >= self.patience)
        over = (won | late) & least.isfinite()
        alone = s.share * least < 2  # one change only was undone
        spared = torch.where(won, 0, s.spared + (late & alone))
        share = torch.where(won, (2 * s.share).clamp_max(self.share), torch.where(late & ~alone, s.share / 2, s.share))
        c = torch.where(late, s.c * 10, s.c).clamp(TINY, _MOST)
        s = s._replace(best=best, worth=worth, size=least, c=c, share=share, spared=spared)
        return s._replace(free=choose(over, _kept(s), s.free)), over

    def done(self, s: CarliniWagnerL0State) -> Mask:
        return (s.size <= 1) | (s.spared >= s.size)


def _kept(s: CarliniWagnerL0State) -> Inputs:
    """Return where the sparsest success keeps its changes: not at the least ones, after those that it cannot spare."""
    order = s.worth.flatten(1).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1).view(s.worth.shape)
    count = (s.share * s.size).floor().clamp_min(1)
    undone = (rank >= per_sample(s.spared, rank)) & (rank < per_sample(s.spared + count, rank))
    return (~undone & s.worth.isfinite()).to(s.x.dtype)
