"""One perturbation for all samples."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from assay.attacks.attack import needs_eps
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.attacks.shared.ascent import SharedAttack
from assay.core.types import Inputs
from assay.models.door import Loss
from assay.threats.problem import Problem


@final
@ATTACKS.register("uap", norm=("linf", "l2", "l1"), access="gradient", kind="budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class Universal(SharedAttack):
    """A universal perturbation: v <- P(v + a * steepest(mean over samples of d min(loss, clip) / dv)), |v| <= eps.

    A sample is x0 + v, clipped to the box. All samples of the call get the same v.

    *Sees* the gradient. *Cost* 2 ``epochs`` forwards, ``epochs`` backwards, and less where all samples fall.

    Args:
        epochs: how often each sample is looked at.
        batch: samples that make one step.
        rel_step: length of the first step as a fraction of eps; lengths fall to 0 along half a cosine.
        support: l1 only: share of the coordinates that one step moves.
        clip: the loss above which a sample adds nothing.
        loss: what is ascended; ``clip`` is in its units.

    Example:
        >>> import torch
        >>> from assay import Threat
        >>> from assay.attacks import Universal
        >>> line = lambda x: torch.stack([0.5 - x.mean(1), x.mean(1) - 0.5], 1)
        >>> x, y = torch.linspace(0.55, 0.65, 5)[:, None].expand(5, 4), torch.ones(5, dtype=torch.long)
        >>> v = Universal().fit(line, x, y, Threat("linf", 0.2))
        >>> bool((line((x + v).clamp(0, 1)).argmax(1) == 0).all())
        True

    *Differs from the paper in*: the margin instead of cross-entropy as what is clipped; step sizes; best v of all
    epochs instead of the last. Moosavi-Dezfooli et al. add up minimal perturbations of one sample after another.

    References:
        Shafahi et al. 2020, arXiv:1811.11304, algorithm 1 and sec. 4; the aim from Moosavi-Dezfooli et al. 2017,
        arXiv:1610.08401.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    epochs: int = 20
    batch: int = 64
    rel_step: float = 0.5
    support: float = 0.02
    clip: float = 1.0
    loss: Loss = margin

    def init(self, p: Problem) -> Tensor:
        needs_eps(p, "Universal")
        return torch.zeros_like(p.x0[:1])

    def place(self, p: Problem, v: Tensor) -> Inputs:
        return (p.x0 + v).clamp(p.lower, p.upper)

    def step(self, p: Problem, v: Tensor, grad: Tensor, share: float) -> Tensor:
        length = self.rel_step * share * float(p.radius[0])
        support = max(1, round(self.support * v.numel()))
        most = torch.full_like(v, p.box.width)
        return p.norm.project(v + length * p.norm.steepest(grad, support), p.radius[:1], -most, most)

    def cut(self, p: Problem, v: Tensor) -> Tensor:
        return v
