"""Ensemble adversarial training: on points that were found on other networks."""

from dataclasses import dataclass
from typing import final

from assay.core.random import Draws
from assay.core.types import Inputs
from assay.hardening.objective import OBJECTIVES, Objective, Step, Terms
from assay.hardening.objectives.adversarial import attacked, mixed
from assay.hardening.objectives.checks import require
from assay.hardening.objectives.plain import Plain

_PICK = 31
"""The stream of random numbers for the choice of the source."""


@final
@OBJECTIVES.register("ensemble")
@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble(Objective):
    """Ensemble adversarial training: J = a CE(x) + (1 - a) CE(x'), with x' found on a network that is drawn.

    Each batch draws one source among the network itself and ``sources`` others, which were trained plainly and stay
    as they are. It hardens against points that transfer; a white-box attack of many steps is not what it is for.

    *Cost* ``steps`` + 2 forwards and backwards, and plain training of ``sources`` networks before.

    Args:
        sources: number of networks that are trained plainly first.
        clean: a, the share of the clean samples in the loss, from 0 to 1.
        steps: of projected gradient descent; 1 of length 1 from the clean sample is FGSM.
        rel_step: length of a step as a fraction of eps.
        start: ``clean``, ``uniform`` or ``sphere``.

    *Differs from the paper in*: the sources have the architecture of the network, other weights; FGSM ascends the
    cross-entropy to the label, where the authors also descend the one to the least likely class.

    References:
        Tramer et al. 2018, arXiv:1705.07204, sec. 4.
    """

    sources: int = 3
    clean: float = 0.5
    steps: int = 1
    rel_step: float = 1.0
    start: str = "clean"

    def __post_init__(self) -> None:
        require("sources", self.sources, 1)
        require("clean", self.clean, 0, 1)

    @property
    def helpers(self) -> tuple[Objective, ...]:
        return (Plain(),) * self.sources

    def find(self, s: Step) -> Inputs:
        pool = (s.net, *s.helpers)
        # Of all samples together, so that their order makes no odds; the host has to know which network to run.
        pick = int(Draws(s.problem.draws.keys.sum()[None]).fold(_PICK).integers(len(pool)))
        return attacked(s, self.steps, self.rel_step, self.start, pool[pick])

    def loss(self, s: Step, x: Inputs) -> Terms:
        return mixed(s, x, self.clean)
