"""What training minimises: hyper-parameters and two pure functions of a network, a batch and a threat."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import Tensor, nn
from torch.nn import functional as F

from assay.core.registry import Registry
from assay.core.types import Inputs, Labels, Logits, PerSample
from assay.threats.problem import Problem

OBJECTIVES: "Registry[type[Objective]]" = Registry("training method")


@final
@dataclass(frozen=True, slots=True)
class Step:
    """A batch to learn from, and all that an objective may look at.

    Args:
        net: the network in training mode, from inputs (b, *f) inside the box to logits (b, c), normalisation inside.
        x: the clean inputs (b, *f), augmented.
        y: their labels (b,).
        problem: the geometry around them at the present eps (``ramp`` times the final one, never 0), their labels as
            the goal, and random numbers that belong to (seed, epoch, sample).
        soft: (b, c), a distribution over the classes for each sample, where augmentation mixed samples; else None.
        label_smoothing: share of a label's probability that is spread over all classes.
        share: of training that is done, from 0 to 1.
        ramp: the present eps as a share of the final one, from 0 to 1.
        helpers: networks that were trained before, one for each of the objective's ``helpers``; frozen, in eval mode.
        memory: what the objective keeps from batch to batch, tensors by name; stored in checkpoints.
    """

    net: nn.Module
    x: Inputs
    y: Labels
    problem: Problem
    soft: Tensor | None = None
    label_smoothing: float = 0.0
    share: float = 0.0
    ramp: float = 1.0
    helpers: tuple[nn.Module, ...] = ()
    memory: MutableMapping[str, Tensor] = field(default_factory=dict)

    def cross_entropy(self, logits: Logits) -> PerSample:
        """Return the cross-entropy (b,) to the labels, smoothed or mixed as the settings say."""
        if self.soft is not None:
            return F.cross_entropy(logits, self.soft, reduction="none", label_smoothing=self.label_smoothing)
        return F.cross_entropy(logits, self.y, reduction="none", label_smoothing=self.label_smoothing)


@final
@dataclass(frozen=True, slots=True)
class Terms:
    """What a batch gave: the ``loss`` to differentiate (a scalar), and what the history shows beside it.

    ``logits`` (b, c), detached, are those of the points learned from, in the order of the batch; ``parts`` are parts
    of the loss by name, detached scalars.
    """

    loss: Tensor
    logits: Logits
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Objective:
    """A way to train. A subclass is a final frozen dataclass of hyper-parameters, one file a family.

    ``norms`` are those of the threats it is defined for, ``ramp`` is how eps grows unless the settings say otherwise.
    """

    __slots__ = ()
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    ramp: ClassVar[str] = "0,0"

    @property
    def replays(self) -> int:
        """How many times a batch is learned from before the next one comes."""
        return 1

    @property
    def helpers(self) -> tuple["Objective", ...]:
        """Objectives to train a network by before this one begins, each from weights of its own."""
        return ()

    def find(self, s: Step) -> Inputs:
        """Return the points (b, *f) to learn from; by default the clean ones. Parameters get no gradient here."""
        return s.x

    def loss(self, s: Step, x: Inputs) -> Terms:
        """Return the loss at the points that ``find`` returned; by default the cross-entropy there."""
        z = s.net(x)
        return mean_terms(s.cross_entropy(z), z)

    def learned(self, s: Step, x: Inputs) -> None:
        """Look at what the step's backward pass left (``x.grad``, where ``find`` asked for it); by default nothing."""


def mean_terms(loss: PerSample, logits: Logits, **parts: Tensor) -> Terms:
    """Return the mean (b,) -> () of a loss, with parts reduced in the same way."""
    return Terms(loss.mean(), logits.detach(), {n: v.detach().mean() for n, v in parts.items()})
