"""Gradient alignment: what keeps training on single steps from overfitting to them."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from assay.core.types import Inputs, PerSample, per_sample
from assay.hardening.objective import OBJECTIVES, Objective, Step, Terms, mean_terms
from assay.hardening.objectives.adversarial import attacked
from assay.hardening.objectives.checks import require

_ETA = 21
"""The stream of random numbers for the noise at which gradients are compared."""


@final
@OBJECTIVES.register("gradalign")
@dataclass(frozen=True, slots=True, kw_only=True)
class GradAlign(Objective):
    """FGSM training that keeps the loss locally linear: CE(x') + w (1 - cos(grad CE(x), grad CE(x + eta))).

    x' is one step of eps from x; eta is uniform in the ball. Where the two gradients point the same way, one step does
    as well as many, so training on one step is training on the worst point. A sample whose gradient
    has vanished counts as aligned.

    *Cost* 4 forwards and 4 backwards, and one backward more through each of the two gradients.

    Args:
        weight: w of the alignment; larger for larger eps (the authors: 0.2 for 8/255 on CIFAR-10).
        rel_step: length of the step as a fraction of eps.
        start: of the step, ``clean`` as in the authors' runs, ``uniform`` or ``sphere``.

    *Differs from the paper in*: both gradients learn, as in the formula, where the authors' code holds the one at x
    constant; x' is found with the network in eval mode; eta is uniform in the ball of the threat's norm, and x + eta
    inside the box.

    References:
        Andriushchenko & Flammarion 2020, arXiv:2007.02617, the regulariser of GradAlign.
    """

    weight: float = 0.2
    rel_step: float = 1.0
    start: str = "clean"

    def __post_init__(self) -> None:
        require("weight", self.weight, 0)

    def find(self, s: Step) -> Inputs:
        return attacked(s, 1, self.rel_step, self.start)

    def loss(self, s: Step, x: Inputs) -> Terms:
        z = s.net(x)
        ce = s.cross_entropy(z)
        here = input_gradient(s, s.x)
        there = input_gradient(s, s.problem.stage(_ETA).start("uniform"))
        apart = 1 - cosine(here, there)
        return mean_terms(ce + self.weight * apart, z, adversarial=ce, misalignment=apart)


def input_gradient(s: Step, x: Inputs) -> Inputs:
    """Return the gradient (b, *f) of the cross-entropy with respect to x, differentiable in the weights."""
    x = x.detach().requires_grad_()
    grad: Tensor
    (grad,) = torch.autograd.grad(s.cross_entropy(s.net(x)).sum(), x, create_graph=True)
    return grad


def cosine(a: Inputs, b: Inputs) -> PerSample:
    """Return the cosine (b,) of the angle between two gradients; 1, and no gradient, where one of them is zero."""
    tops = [v.detach().flatten(1).abs().amax(1) for v in (a, b)]
    alive = (tops[0] > 0) & (tops[1] > 0)
    # The largest coordinate is divided out first: squares of float32 gradients underflow below 1e-19.
    a, b = (v / per_sample(torch.where(alive, t, 1), v) for v, t in zip((a, b), tops, strict=True))
    return torch.where(alive, F.cosine_similarity(a.flatten(1), b.flatten(1)), 1)
