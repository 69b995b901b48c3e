"""Defensive distillation, kept as a warning: gradients vanish, robustness does not come."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch.nn import functional as F

from assay.core.types import Inputs
from assay.hardening.objective import OBJECTIVES, Objective, Step, Terms, mean_terms
from assay.hardening.objectives.checks import require


@final
@OBJECTIVES.register("tempered")
@dataclass(frozen=True, slots=True, kw_only=True)
class Tempered(Objective):
    """Plain training at a temperature T: J = CE of softmax(z / T). *Cost* 1 forward and 1 backward.

    Used at temperature 1, such a network has logits about T times as large as usual. It is what teaches in
    :class:`Distillation`.

    Args:
        temperature: T.
    """

    temperature: float = 20.0

    def __post_init__(self) -> None:
        require("temperature", self.temperature, 0, above=True)

    def loss(self, s: Step, x: Inputs) -> Terms:
        z = s.net(x)
        return mean_terms(s.cross_entropy(z / self.temperature), z)


@final
@OBJECTIVES.register("distillation")
@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation(Objective):
    """Defensive distillation: J = CE of softmax(z / T) to softmax(t / T), where t are the logits of a teacher.

    The teacher is trained first, :class:`Tempered`; the student is used at temperature 1. Its logits are then about T
    times as large, so that softmax is 0 or 1 in float32 and the cross-entropy has no gradient: attacks that need one
    stop, those that look at logits do not (Carlini & Wagner 2017, arXiv:1608.04644, sec. VIII). Use it to see what a
    verdict says of such a defence.

    *Cost* 2 forwards and 1 backward, and plain training of the teacher before.

    Args:
        temperature: T, of teacher and student.

    *Differs from the paper in*: the teacher sees each batch as it was augmented for the student.

    References:
        Papernot et al. 2016, arXiv:1511.04508, sec. IV.
    """

    warning: ClassVar[str] = (
        "distillation only masks gradients (Carlini & Wagner 2017, arXiv:1608.04644): attacks on the logits break it; "
        "for robustness take pgd or trades"
    )
    temperature: float = 20.0

    def __post_init__(self) -> None:
        require("temperature", self.temperature, 0, above=True)

    @property
    def helpers(self) -> tuple[Objective, ...]:
        return (Tempered(temperature=self.temperature),)

    def loss(self, s: Step, x: Inputs) -> Terms:
        with torch.no_grad():
            taught = (s.helpers[0](x) / self.temperature).softmax(1)
        z = s.net(x)
        return mean_terms(F.cross_entropy(z / self.temperature, taught, reduction="none"), z)
