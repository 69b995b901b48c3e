"""Losses: what attacks ascend, from logits (b, c) and the goal to (b,). All are defined for c >= 2.

Nothing is reduced over the batch: there is one value a sample, and it depends on that sample only.

With a label only, a loss grows as the label is left; with a target, as the target is reached. Where there is a target
and no label (a targeted threat), the class to beat is the strongest other one.
"""

import torch
from torch.nn import functional as F

from assay.core.registry import Registry
from assay.core.types import Labels, Logits, PerSample
from assay.models.door import Loss
from assay.threats.problem import Goal

LOSSES: Registry[Loss] = Registry("loss")

_LEAST_GAP = 1e-12
"""Below every gap between two different float32 logits that matters: only where the largest logits tie."""

_MOST_GAP = 10.0
"""A gap whose softmax float32 still tells from 1 with three digits."""


@LOSSES.register("ce")
def cross_entropy(logits: Logits, goal: Goal) -> PerSample:
    """Cross-entropy to the label; with a target, minus that to the target."""
    if goal.target is not None:
        return -F.cross_entropy(logits, goal.target, reduction="none")
    assert goal.label is not None
    return F.cross_entropy(logits, goal.label, reduction="none")


@LOSSES.register("rescaled-ce")
def rescaled_cross_entropy(logits: Logits, goal: Goal) -> PerSample:
    """Cross-entropy of the logits over the gap between the two largest, a constant to the gradient.

    Its gradient does not vanish however large the logits are. Its value says little: the gap is always 1, so that only
    the other classes move it as long as the same class stays in front.

    References:
        Yu & Xu 2023 ("Efficient Loss Function by Minimizing the Detrimental Effect of Floating-Point Errors on
        Gradient-Based Attacks", CVPR), sec. 4.
    """
    top = logits.detach().topk(2, 1).values
    gap = top[:, :1] - top[:, 1:]
    return cross_entropy(logits / torch.where(gap > _LEAST_GAP, gap, 1), goal)


@LOSSES.register("tempered-ce")
def tempered_cross_entropy(logits: Logits, goal: Goal) -> PerSample:
    """Cross-entropy of logits that are scaled down, where they must, until the two largest are ``_MOST_GAP`` apart.

    On ordinary logits this is cross-entropy; on huge ones, where in float32 a softmax is 0 or 1 and has no gradient,
    it is :func:`rescaled_cross_entropy` at another temperature. The factor is a constant to the gradient.
    """
    top = logits.detach().topk(2, 1).values
    return cross_entropy(logits / ((top[:, :1] - top[:, 1:]) / _MOST_GAP).clamp_min(1), goal)


@LOSSES.register("margin")
def margin(logits: Logits, goal: Goal) -> PerSample:
    """Rival's logit minus the label's (Carlini & Wagner 2017, arXiv:1608.04644, f6).

    The rival is the target, or the strongest other class; against a targeted threat the target's logit minus
    the strongest other. But for ties it is positive exactly when the goal is met; where a label is to be left by way
    of a target, positive means met, but the goal may be met by way of another class too.
    """
    if goal.label is None:
        assert goal.target is not None
        return pick(logits, goal.target) - strongest_but(logits, goal.target)
    rival = strongest_but(logits, goal.label) if goal.target is None else pick(logits, goal.target)
    return rival - pick(logits, goal.label)


@LOSSES.register("pm")
def probability_margin(logits: Logits, goal: Goal) -> PerSample:
    """Rival's probability minus the label's: the margin of the softmax, between -1 and 1.

    It has the sign of the margin, and like cross-entropy it goes flat where one class has all the probability.

    References:
        Ma et al. 2024, arXiv:2411.15210.
    """
    return margin(logits.softmax(1), goal)


@LOSSES.register("dlr")
def dlr(logits: Logits, goal: Goal) -> PerSample:
    """Difference of logits ratio: the margin over a gap among the largest logits, free of their scale.

    The gap is z(1) - z(3), and with a target z(1) - (z(3) + z(4)) / 2 (Croce & Hein 2020, arXiv:2003.01690,
    eqs. 6 and 7). Where there are too few classes for the gap (2, or 3 with a target) the plain margin is left: over
    z(1) - z(3), the margin to a target that is last of three would be -1 everywhere.
    """
    top = logits.topk(min(4, logits.shape[1]), 1).values
    if top.shape[1] < (3 if goal.target is None else 4):
        return margin(logits, goal)
    low = top[:, 2] if goal.target is None else top[:, 2:].mean(1)
    return margin(logits, goal) / (top[:, 0] - low).clamp_min(_LEAST_GAP)


def along(logits: Logits, goal: Goal) -> PerSample:
    """Return <w, z>: how far the logits went in the goal's direction ``weights``, whatever its label and target are."""
    assert goal.weights is not None
    return (goal.weights * logits).sum(1)


def pick(logits: Logits, classes: Labels) -> PerSample:
    """Return the logit of one class a sample."""
    return logits.gather(1, classes[:, None])[:, 0]


def strongest_but(logits: Logits, classes: Labels) -> PerSample:
    """Return the largest logit of all classes but one."""
    return logits.scatter(1, classes[:, None], -torch.inf).amax(1)
