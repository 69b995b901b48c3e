"""The pointwise attack: values of an adversarial input go back to the clean ones, as long as the goal is met."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.decision.start import Start
from assay.attacks.decision.walk import Opening, Walk
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Labels, Mask, choose
from assay.models.door import Decision
from assay.threats.norms import largest
from assay.threats.problem import Problem


class PointwiseState(NamedTuple):
    """The point so far, and which of its changed values are tried next."""

    base: Inputs
    group: Inputs  # 0/1: the values that the next query has put back
    failed: Inputs  # 0/1: the values that could not be put back alone, in this round
    size: Labels  # of a group
    gained: Mask  # a value was put back in this round of groups of one
    over: Mask


@final
@ATTACKS.register("pointwise", norm=("l0",), access="decision", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class Pointwise(Walk[PointwiseState]):
    """Puts groups of changed values, chosen at random, back to their clean values, and keeps what meets the goal.

    A group that meets the goal is followed by one twice as large, another by one half as large. A single value that
    cannot go back is not tried again before all others were; the attack ends where no single one can go back.

    *Sees* the predicted label. *Cost* at most ``steps`` + 1 forwards.

    Args:
        steps: number of queries.
        share: share of the changed values in the first group.
        start: as for :class:`assay.attacks.HopSkipJump`; ``sparse`` halves the queries that ``noise`` needs.

    *Differs from the paper in*: groups; the paper tries one value after the other from the beginning, for as many
    queries as there are values. It takes the best of ten starts; here there is one.

    References:
        Schott et al. 2019, arXiv:1805.09190, sec. 5.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    steps: int = 2000
    share: float = 0.25
    start: Start | str = "sparse"

    def enter(self, p: Problem, o: Opening) -> PointwiseState:
        base, no = o.point(p), torch.zeros_like(p.rows, dtype=torch.bool)
        size = (self.share * p.size(base)).long().clamp_min(1)
        nothing = torch.zeros_like(p.x0)
        return PointwiseState(base, _group(p, base, nothing, size), nothing, size, no, no)

    def learn(self, p: Problem, w: PointwiseState, x: Inputs, e: Decision, k: int) -> PointwiseState:
        base, single = choose(e.success, x, w.base), w.size == 1
        failed = torch.maximum(w.failed, choose(single & ~e.success, w.group, torch.zeros_like(w.group)))
        gained = w.gained | (single & e.success)
        left = _count((base != p.x0) & (failed == 0))
        round_over = left == 0
        failed = choose(round_over, torch.zeros_like(failed), failed)
        left = torch.where(round_over, _count(base != p.x0), left)
        size = torch.where(e.success, 2 * w.size, w.size // 2).clamp_min(1)
        size = torch.minimum(torch.where(round_over, 1, size), left.clamp_min(1))
        group = _group(p.stage(k), base, failed, size)
        return PointwiseState(base, group, failed, size, gained & ~round_over, w.over | (round_over & ~gained))

    def ask(self, p: Problem, w: PointwiseState, k: int) -> Inputs:
        return torch.where(w.group > 0, p.x0, w.base)

    def over(self, w: PointwiseState) -> Mask:
        return w.over


def _group(p: Problem, base: Inputs, failed: Inputs, size: Labels) -> Inputs:
    """Draw ``size`` of the values that are changed and have not failed: a 0/1 mask."""
    open_ = (base != p.x0) & (failed == 0)
    return largest(torch.where(open_, 1 + p.draws.uniform(base.shape[1:], base.dtype), 0), size) * open_


def _count(mask: Tensor) -> Labels:
    return mask.flatten(1).sum(1)
