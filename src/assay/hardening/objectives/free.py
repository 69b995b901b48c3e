"""Free adversarial training: one backward pass moves the weights and the perturbation."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from assay.attacks.gradient.pgd import climb
from assay.core.types import Inputs
from assay.hardening.objective import OBJECTIVES, Objective, Step
from assay.hardening.objectives.checks import require


@final
@OBJECTIVES.register("free")
@dataclass(frozen=True, slots=True, kw_only=True)
class Free(Objective):
    """Free adversarial training: each batch is learned from m times while one perturbation d goes on.

    Each time, one backward pass of CE(x + d) gives the gradient to the weights and the one to the points, and
    d <- P(d + a eps steepest(grad)), P onto ball and box. d belongs to the position in the batch, and the next
    batch goes on with it. Divide the number of epochs by m to pay what plain training costs.

    *Cost* 1 forward and 1 backward, ``replays`` times.

    Args:
        replays: m, how many times in a row a batch is learned from.
        rel_step: a, length of a step as a fraction of eps.

    *Differs from the paper in*: positions that a smaller batch does not reach keep their d; in l1 and l0 the step is
    that of our PGD.

    References:
        Shafahi et al. 2019, arXiv:1904.12843, algorithm 1.
    """

    replays: int = 8
    rel_step: float = 1.0

    def __post_init__(self) -> None:
        require("replays", self.replays, 1)

    def find(self, s: Step) -> Inputs:
        return s.problem.project(s.problem.x0 + _kept(s)[: len(s.x)]).detach().requires_grad_()

    def learned(self, s: Step, x: Inputs) -> None:
        assert x.grad is not None
        d = climb(s.problem, x.detach(), x.grad, self.rel_step, support=0.02) - s.problem.x0
        s.memory["delta"] = torch.cat([d, _kept(s)[len(d) :]])


def _kept(s: Step) -> Tensor:
    """Return the perturbations (rows, *f) so far, with zeros for positions that no batch has reached."""
    kept = s.memory.get("delta")
    if kept is None:
        return torch.zeros_like(s.x)
    kept = kept.to(s.x)
    return torch.cat([kept, torch.zeros_like(s.x)[len(kept) :]])
