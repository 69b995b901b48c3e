"""Adversarial training: on points that an attack found at every step."""

from dataclasses import dataclass
from typing import final

from assay.attacks import PGD
from assay.core.types import Inputs
from assay.hardening.inner import strongest
from assay.hardening.objective import OBJECTIVES, Objective, Step, Terms, mean_terms


@final
@OBJECTIVES.register("pgd")
@dataclass(frozen=True, slots=True, kw_only=True)
class Adversarial(Objective):
    """Adversarial training: min over weights of the mean of the largest cross-entropy inside the ball.

    *Cost* ``steps`` + 1 forwards and backwards.

    Args:
        steps: of projected gradient descent.
        rel_step: length of a step as a fraction of eps.
        start: ``uniform``, ``sphere`` or ``clean``.

    References:
        Madry et al. 2018, arXiv:1706.06083, eq. 2.1.
    """

    steps: int = 10
    rel_step: float = 0.25
    start: str = "uniform"

    def find(self, s: Step) -> Inputs:
        return strongest(s.net, s.problem, PGD(steps=self.steps, rel_step=self.rel_step, start=self.start))

    def loss(self, s: Step, x: Inputs) -> Terms:
        z = s.net(x)
        return mean_terms(s.cross_entropy(z), z)
