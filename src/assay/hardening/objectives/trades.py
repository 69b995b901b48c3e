"""TRADES: accuracy on clean samples, and the same answer all over the ball."""

from dataclasses import dataclass
from typing import final

import torch
from torch.nn import functional as F

from assay.attacks import PGD
from assay.core.types import Inputs, Logits, PerSample
from assay.hardening.inner import evaluating, strongest
from assay.hardening.objective import OBJECTIVES, Objective, Step, Terms, mean_terms
from assay.hardening.objectives.checks import require
from assay.threats.problem import Goal


@final
@OBJECTIVES.register("trades")
@dataclass(frozen=True, slots=True, kw_only=True)
class Trades(Objective):
    """TRADES: J = CE(x) + beta KL(p(x) || p(x')), with x' the point of the ball where the divergence is largest.

    *Cost* ``steps`` + 3 forwards, ``steps`` + 2 backwards.

    Args:
        beta: what robustness weighs; 1 to 10 (the authors: 6 for 8/255 on CIFAR-10, 1 on MNIST).
        steps: of projected gradient ascent on the divergence.
        rel_step: length of a step as a fraction of eps.
        near: standard deviation of the normal noise at which x' starts, as a fraction of the width of the box: at x
            itself the divergence has no gradient.

    *Differs from the paper in*: nothing but the size of a step, which the authors give in units of the box.

    References:
        Zhang et al. 2019, arXiv:1901.08573, eq. 5 and algorithm 1.
    """

    beta: float = 6.0
    steps: int = 10
    rel_step: float = 0.25
    near: float = 0.001

    def __post_init__(self) -> None:
        require("beta", self.beta, 0)
        require("near", self.near, 0, above=True)

    def find(self, s: Step) -> Inputs:
        with torch.no_grad(), evaluating(s.net):
            clean = s.net(s.x).softmax(1)
        noise = self.near * s.problem.box.width * s.problem.draws.normal(s.x.shape[1:], s.x.dtype)
        p = s.problem.along(clean).starting(s.x + noise)
        return strongest(s.net, p, PGD(steps=self.steps, rel_step=self.rel_step, loss=_from_clean))

    def loss(self, s: Step, x: Inputs) -> Terms:
        z, hard = s.net(s.x), s.net(x)
        clean, apart = s.cross_entropy(z), divergence(z, hard)
        return mean_terms(clean + self.beta * apart, hard, clean=clean, divergence=apart)


def divergence(z: Logits, other: Logits) -> PerSample:
    """Return KL(p || q) (b,) of the softmax p of z and q of ``other``, in nats."""
    return F.kl_div(other.log_softmax(1), z.log_softmax(1), reduction="none", log_target=True).sum(1)


def _from_clean(logits: Logits, goal: Goal) -> PerSample:
    """KL(w || softmax): how far an answer is from the one that the goal carries."""
    assert goal.weights is not None
    return F.kl_div(logits.log_softmax(1), goal.weights, reduction="none").sum(1)
