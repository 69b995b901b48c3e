"""Adversarial training: on points that an attack found at every step."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import nn
from torch.nn import functional as F

from assay.attacks import PGD
from assay.core.types import Inputs, Logits, PerSample
from assay.hardening.inner import strongest
from assay.hardening.objective import OBJECTIVES, Objective, Step, Terms, mean_terms
from assay.hardening.objectives.checks import require
from assay.threats.problem import Goal


@final
@OBJECTIVES.register("pgd")
@dataclass(frozen=True, slots=True, kw_only=True)
class Adversarial(Objective):
    """Adversarial training: min over weights of the mean of the largest cross-entropy inside the ball.

    *Cost* ``steps`` + 1 forwards and backwards.

    Args:
        steps: of projected gradient descent.
        rel_step: length of the first step as a fraction of eps.
        decay: of the lengths, ``none`` or ``cosine``.
        momentum: share of the new step in a move, as in our PGD; 1 for none.
        start: ``uniform``, ``sphere`` or ``clean``.

    *Differs from the paper in*: the points are found with the network in eval mode; the defaults are those of
    Rice et al. 2020 (arXiv:2002.11569) for 8/255: 10 steps of a quarter of eps.

    References:
        Madry et al. 2018, arXiv:1706.06083, eq. 2.1.
    """

    steps: int = 10
    rel_step: float = 0.25
    decay: str = "none"
    momentum: float = 1.0
    start: str = "uniform"

    def find(self, s: Step) -> Inputs:
        return attacked(s, self.steps, self.rel_step, self.start, decay=self.decay, momentum=self.momentum)


@final
@OBJECTIVES.register("mixed")
@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed(Objective):
    """Training on clean and adversarial points: J = a CE(x) + (1 - a) CE(x'), with x' by FGSM unless told otherwise.

    Of single steps from the clean sample networks learn to bend the loss right there: such a network looks robust to
    FGSM and is not (Tramer et al. 2018, arXiv:1705.07204, sec. 3). With more steps it is sound, at a lower weight of
    robustness than adversarial training.

    *Cost* ``steps`` + 2 forwards and backwards.

    Args:
        clean: a, the share of the clean samples in the loss, from 0 to 1.
        steps: of projected gradient descent; 1 of length 1 from the clean sample is FGSM.
        rel_step: length of a step as a fraction of eps.
        start: ``clean``, ``uniform`` or ``sphere``.

    *Differs from the paper in*: x' is found with the network in eval mode; in l1 and l0 the step is that of our PGD.

    References:
        Goodfellow et al. 2015, arXiv:1412.6572, sec. 6; Kurakin et al. 2017, arXiv:1611.01236, algorithm 1.
    """

    clean: float = 0.5
    steps: int = 1
    rel_step: float = 1.0
    start: str = "clean"

    def __post_init__(self) -> None:
        require("clean", self.clean, 0, 1)

    def find(self, s: Step) -> Inputs:
        return attacked(s, self.steps, self.rel_step, self.start)

    def loss(self, s: Step, x: Inputs) -> Terms:
        return mixed(s, x, self.clean)


@final
@OBJECTIVES.register("fast")
@dataclass(frozen=True, slots=True, kw_only=True)
class Fast(Objective):
    """Fast adversarial training: one step, from a random start: x' = P(x0 + d + a eps steepest(grad)).

    d is uniform in the ball, P the projection onto ball and box. It may fail all of a sudden in the middle of training
    (catastrophic overfitting: robust to one step, not to many), the more so the larger eps is: watch the robust
    accuracy to many steps on held-out data, or see ``gradalign``.

    *Cost* 2 forwards and backwards.

    Args:
        rel_step: a, length of the step as a fraction of eps; above 1, points end on the sphere more often.

    *Differs from the paper in*: x' is found with the network in eval mode.

    References:
        Wong, Rice & Kolter 2020, arXiv:2001.03994, algorithm 3.
    """

    rel_step: float = 1.25

    def find(self, s: Step) -> Inputs:
        return attacked(s, 1, self.rel_step, "uniform")


@final
@OBJECTIVES.register("alp")
@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing(Objective):
    """Adversarial logit pairing, kept as a warning: J = (CE(x) + CE(x')) / 2 + w mean over classes of (z - z')^2.

    Pairing pulls the logits z of the clean and z' of the adversarial point together, which bends the loss surface so
    that gradient attacks of few steps stall in it. With more steps the published ImageNet model fell to 0.6 %
    accuracy (Engstrom, Ilyas & Athalye 2018, arXiv:1807.10272). Use it to see what a verdict says of such a defence.

    *Cost* ``steps`` + 2 forwards and backwards.

    Args:
        weight: w of the pairing.
        steps: of projected gradient descent.
        rel_step: length of a step as a fraction of eps.
        start: ``uniform``, ``sphere`` or ``clean``.

    *Differs from the paper in*: x' is found with the network in eval mode, and is not targeted.

    References:
        Kannan, Kurakin & Goodfellow 2018, arXiv:1803.06373, the loss of adversarial logit pairing.
    """

    warning: ClassVar[str] = (
        "logit pairing was broken by attacks of more steps (Engstrom et al. 2018, arXiv:1807.10272): "
        "what few steps say about the result is too good to be true; for robustness take pgd or trades"
    )
    weight: float = 0.5
    steps: int = 10
    rel_step: float = 0.25
    start: str = "uniform"

    def __post_init__(self) -> None:
        require("weight", self.weight, 0)

    def find(self, s: Step) -> Inputs:
        return attacked(s, self.steps, self.rel_step, self.start)

    def loss(self, s: Step, x: Inputs) -> Terms:
        z, hard = s.net(s.x), s.net(x)
        clean, adversarial = s.cross_entropy(z), s.cross_entropy(hard)
        pairing = (z - hard).square().mean(1)
        total = (clean + adversarial) / 2 + self.weight * pairing
        return mean_terms(total, hard, clean=clean, adversarial=adversarial, pairing=pairing)


def mixed(s: Step, x: Inputs, share: float) -> Terms:
    """Return the mean of the losses at the clean samples, which weigh ``share``, and at the points x."""
    z, hard = s.net(s.x), s.net(x)
    clean, adversarial = s.cross_entropy(z), s.cross_entropy(hard)
    return mean_terms(share * clean + (1 - share) * adversarial, hard, clean=clean, adversarial=adversarial)


def attacked(
    s: Step, steps: int, rel_step: float, start: str, source: nn.Module | None = None, **options: Any
) -> Inputs:
    """Return the last points (b, *f) of PGD on the network, or on another ``source``, in eval mode.

    What is ascended is the cross-entropy to the labels, mixed where augmentation mixed them, never smoothed: smoothing
    is for the weights, and would make the attack aim at a rare class less.
    """
    p = s.problem if s.soft is None else s.problem.along(s.soft)
    return strongest(source or s.net, p, PGD(steps=steps, rel_step=rel_step, start=start, loss=to_labels, **options))


def to_labels(logits: Logits, goal: Goal) -> PerSample:
    """Cross-entropy to the label, or to the distribution over classes that the goal carries."""
    wanted = goal.label if goal.weights is None else goal.weights
    assert wanted is not None
    return F.cross_entropy(logits, wanted, reduction="none")
