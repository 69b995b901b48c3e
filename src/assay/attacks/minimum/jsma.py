"""JSMA: the coordinates that a saliency map puts first, moved to the end of the box."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from assay.attacks.loop import SlopesAttack
from assay.attacks.registry import ATTACKS
from assay.core.errors import AssayError
from assay.core.types import Inputs, Logits, Mask
from assay.models.door import Slopes
from assay.threats.norms import TINY
from assay.threats.problem import Goal, Problem

_CANDIDATES = 64
"""Pairs are formed of that many coordinates, those that help most by themselves."""


class JSMAState(NamedTuple):
    """The next point, and whether one before it succeeded."""

    x: Inputs
    over: Mask


@final
@ATTACKS.register("jsma", norm=("l0",), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class JSMA(SlopesAttack[JSMAState]):
    """JSMA: each step moves the one or two coordinates of the largest saliency to the end of the box.

    a_i = r_i dF_t / dx_i and b_i = r_i d(sum of the other F) / dx_i, where t is the class to reach and r_i the way
    to the end that helps. The saliency of coordinates is (sum of a) |sum of b| where the first is positive and the
    second negative; where there are none such, the largest a - b decides. Without a target, the roles of the label
    and the others are exchanged. Pairs are formed of the 64 coordinates that help most alone.

    *Sees* one gradient a query, or two for ``logits``. *Cost* as many backwards, and a forward.

    Args:
        steps: largest number of steps.
        at_once: coordinates that a step moves, 1 or 2.
        outputs: F. For ``probabilities`` b = -a, so that one gradient is enough, and its largest coordinate wins;
            for ``logits`` the two differ, and the other logits count as much as their probabilities among themselves.

    *Differs from the paper in*: coordinates may rise or fall, and are weighed by the way they have left (as in Taylor
    JSMA); one at a time by default; the other logits are weighed (as in weighted JSMA); nothing ends the search early.

    References:
        Papernot et al. 2016, arXiv:1511.07528, algorithms 2 and 3; without a target: Wiyatno & Xu 2018,
        arXiv:1808.07945; weights: Combey et al. 2020, arXiv:2007.06032.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    any_size: ClassVar[bool] = True
    minimal: ClassVar[bool] = True
    steps: int = 200
    at_once: int = 1
    outputs: Literal["probabilities", "logits"] = "probabilities"

    def __post_init__(self) -> None:
        if self.at_once not in (1, 2):
            raise AssayError("at_once 1 or 2 for JSMA", f"{self.at_once}", "The paper moves 2.")

    @property
    def functions(self) -> int:
        return 1 if self.outputs == "probabilities" else 2

    def measure(self, logits: Logits, goal: Goal) -> Tensor:
        own = goal.label if goal.target is None else goal.target
        assert own is not None
        mine = logits.gather(1, own[:, None])[:, 0]
        rest = logits.scatter(1, own[:, None], -torch.inf).logsumexp(1)
        near, far = (rest, mine) if goal.target is None else (mine, rest)
        # The gradient of the log-odds is that of the probability up to a factor, and does not vanish with it.
        return (near - far)[:, None] if self.functions == 1 else torch.stack([near, far], 1)

    def init(self, p: Problem) -> JSMAState:
        return JSMAState(p.start("clean"), p.full(0.0) > 0)

    def update(self, p: Problem, s: JSMAState, e: Slopes, k: int) -> JSMAState:
        slopes = e.slopes.flatten(2)
        near, far = slopes[:, 0], slopes[:, 1] if self.functions == 2 else -slopes[:, 0]
        x, x0 = s.x.flatten(1), p.x0.flatten(1)
        end = torch.where(near > far, p.upper.flatten(1), p.lower.flatten(1))
        way = torch.where(x == x0, end - x, 0)
        chosen = self._salient(near * way, -far * way)
        moved = x.scatter(1, chosen, torch.where(way != 0, end, x).gather(1, chosen))
        return JSMAState(moved.view(s.x.shape), s.over | e.success)

    def _salient(self, a: Tensor, b: Tensor) -> Tensor:
        """Return which coordinates (b, 1 or 2) move, from what they add to the goal's side and take from the other."""
        if self.at_once == 1 or a.shape[1] == 1:
            return _score(a, b).argmax(1, keepdim=True)
        best = (a + b).topk(min(_CANDIDATES, a.shape[1]), 1).indices
        a, b = a.gather(1, best), b.gather(1, best)
        n = a.shape[1]
        score = _score((a[:, :, None] + a[:, None]).flatten(1), (b[:, :, None] + b[:, None]).flatten(1))
        same = torch.eye(n, dtype=torch.bool, device=a.device).flatten()
        pair = score.masked_fill(same, -torch.inf).argmax(1)
        return best.gather(1, torch.stack([pair // n, pair % n], 1))

    def done(self, s: JSMAState) -> Mask:
        return s.over


def _score(a: Tensor, b: Tensor) -> Tensor:
    """Return the saliency; below all that qualify come the others, in the order of a + b."""
    scale = torch.maximum(a.abs(), b.abs()).amax(1, keepdim=True).clamp_min(TINY)
    a, b = a / scale, b / scale
    return torch.where((a > 0) & (b > 0), 1 + a * b, a + b - 2)
