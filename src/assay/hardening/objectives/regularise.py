"""Penalties on how fast a network changes with its input: no points are looked for, so every threat will do."""

from dataclasses import dataclass
from typing import final

import torch

from assay.core.types import Inputs
from assay.hardening.objective import OBJECTIVES, Objective, Step, Terms, mean_terms
from assay.hardening.objectives.checks import require
from assay.threats.norms import L2

_PROJECTION = 41
"""The stream of random numbers for directions in output space."""


@final
@OBJECTIVES.register("input-gradient")
@dataclass(frozen=True, slots=True, kw_only=True)
class InputGradient(Objective):
    """Input gradient regularisation: J = CE(x) + w ||grad of CE at x||^2, the l2 norm over all features.

    The eps of the threat plays no part.

    *Cost* 1 forward, 1 backward, and one backward through both.

    Args:
        weight: w, in units of the box squared.

    *Differs from the paper in*: the mean over the batch in place of the sum over the data.

    References:
        Ross & Doshi-Velez 2018, arXiv:1711.09404, the loss of double backpropagation.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        require("weight", self.weight, 0)

    def loss(self, s: Step, x: Inputs) -> Terms:
        x = x.detach().requires_grad_()
        z = s.net(x)
        ce = s.cross_entropy(z)
        (grad,) = torch.autograd.grad(ce.sum(), x, create_graph=True)
        steep = grad.flatten(1).square().sum(1)
        return mean_terms(ce + self.weight * steep, z, clean=ce, penalty=steep)


@final
@OBJECTIVES.register("jacobian")
@dataclass(frozen=True, slots=True, kw_only=True)
class Jacobian(Objective):
    """Jacobian regularisation: J = CE(x) + w / 2 ||dz / dx||_F^2, with the norm estimated from random projections.

    For v uniform on the unit sphere of c logits, c ||grad of <v, z>||^2 has the squared Frobenius norm as its mean.
    The eps of the threat plays no part.

    *Cost* 1 forward, ``projections`` backwards, and one backward through them all.

    Args:
        weight: w, in units of the box squared.
        projections: how many v a sample; the estimate is their mean.

    References:
        Hoffman, Roberts & Yaida 2019, arXiv:1908.02729, algorithm 1.
    """

    weight: float = 0.01
    projections: int = 1

    def __post_init__(self) -> None:
        require("weight", self.weight, 0)
        require("projections", self.projections, 1)

    def loss(self, s: Step, x: Inputs) -> Terms:
        x = x.detach().requires_grad_()
        z = s.net(x)
        draws, c = s.problem.draws.fold(_PROJECTION), z.shape[1]
        sizes = []
        for i in range(self.projections):
            v = L2().steepest(draws.fold(i).normal((c,), z.dtype))
            (grad,) = torch.autograd.grad((v * z).sum(), x, create_graph=True)
            sizes.append(c * grad.flatten(1).square().sum(1))
        ce, size = s.cross_entropy(z), torch.stack(sizes).mean(0)
        return mean_terms(ce + self.weight / 2 * size, z, clean=ce, penalty=size)
