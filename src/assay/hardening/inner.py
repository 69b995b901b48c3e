"""The inner maximisation of training: an attack's update rule on a network whose weights are moving.

What is found here is never counted as a success, so nothing is verified and no best point is kept: the last point is
what training learns from. Judging is done elsewhere, through the one door to a model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from assay.attacks.loop import GradientAttack, HasX
from assay.core.random import Draws
from assay.core.types import Inputs, Labels
from assay.models.door import Gradient
from assay.models.patches import patched, stem_patches
from assay.threats.problem import Goal, Problem
from assay.threats.threat import Threat

S = TypeVar("S", bound=HasX)


def around(x: Inputs, y: Labels, threat: Threat, grown: float, draws: Draws) -> Problem:
    """Return the problem around x (b, *f) with ``grown`` times the eps of a threat (its box settled).

    Unlike :meth:`Problem.pose` it rounds to nearest: points to learn from need not be inside to the last bit.
    """
    assert threat.box is not None
    assert threat.eps is not None
    eps, box = max(grown, 1e-6) * threat.eps, threat.box
    eps = float(max(1, round(eps))) if threat.norm.name == "l0" else eps
    reach = eps if threat.norm.is_box else box.width
    lower, upper = (x - reach).clamp_min(box.lo), (x + reach).clamp_max(box.hi)
    rows = torch.arange(len(x), device=x.device)
    return Problem(x, Goal(y), threat.norm, box, x.new_full((len(x),), eps), False, lower, upper, draws, rows)


def strongest(net: nn.Module, p: Problem, attack: GradientAttack[S]) -> Inputs:
    """Return the last point (b, *f) of an attack on a network in eval mode: its statistics stay clean.

    *Cost*: ``attack.questions`` forwards and backwards a sample.
    """
    with evaluating(net), patched(stem_patches(net)):
        s = attack.init(p)
        for k in range(attack.questions):
            x = s.x.detach().requires_grad_()
            z = net(x)
            value = attack.loss(z, p.goal)
            (grad,) = torch.autograd.grad(value.sum(), x)
            seen = Gradient(p.goal.reached(z.detach()), value.detach(), z.detach(), grad)
            s = attack.update(p, s, seen, k)
    return s.x.detach()


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put a network in eval mode, and every part back into its own mode at the end."""
    modes = [(m, m.training) for m in net.modules()]
    for m, _ in modes:
        m.training = False
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
