"""The attack on whoever looks at sparseness: it fools, and leaves the sparseness of every layer where it was."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from assay.attacks import PGD
from assay.attacks.gradient.pgd import PGDState
from assay.attacks.loop import GradientAttack
from assay.attacks.losses import margin
from assay.core.types import Inputs, Labels, Logits, PerSample, Rows
from assay.models import Door, Model
from assay.models.door import Gradient, Loss
from assay.study.layers import Layer, Tap, module_of, tapped
from assay.study.moments import population_sparseness
from assay.threats import Goal, Threat
from assay.threats.problem import Problem

_LEAST = 1e-4
"""A layer whose PSI hardly differs between samples is held to this, not to its standard deviation."""

_AHEAD = 1.0
"""Logits by which the wrong class is to lead; more of it earns nothing, and the rest of the steps go into hiding."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden(GradientAttack[PGDState]):
    """PGD that ascends min(margin, 1) - ``weight`` * mean over layers of ((PSI - wanted) / scale)**2.

    A detector is only as good as the attack that knows it (Carlini & Wagner 2017, arXiv:1705.07263, sec. 6), so the
    loss has a term for it. Of all points that fool, the one with the largest loss is kept: the best hidden.

    Args:
        tap: listens to the layers, and keeps their PSI with its gradient.
        wanted: (n, layers) the PSI of the clean samples, by the row under which the door counts them.
        scale: (layers,) in what units a change counts.
        weight: of hiding.
        steps: number of steps.
        start: where to start, as for PGD.
    """

    norms: ClassVar[tuple[str, ...]] = PGD.norms
    tap: Tap
    wanted: Tensor
    scale: Tensor
    weight: float = 10.0
    steps: int = 40
    start: str = "clean"
    loss: Loss = margin

    @property
    def _moves(self) -> PGD:
        return PGD(steps=self.steps, rel_step=0.25, decay="cosine", momentum=0.75, start=self.start)

    def init(self, p: Problem) -> PGDState:
        return self._moves.init(p)

    def update(self, p: Problem, s: PGDState, e: Gradient, k: int) -> PGDState:
        return self._moves.update(p, s, e, k)

    def differentiates(self, k: int) -> bool:
        return True  # also the last: the value needs the responses, and the door hands them out with gradients

    def query(self, door: Door, x: Inputs, p: Problem, k: int) -> Gradient:
        asked = p.rows[:0]

        def through(part: Inputs, at: Rows) -> Inputs:
            nonlocal asked
            asked = p.rows[at]
            return part

        def loss(z: Logits, goal: Goal) -> PerSample:
            seen = torch.stack(self.tap.taken()[-1], 1)[: len(z)]  # rows that fill up the batch are last
            drift = (seen - self.wanted[asked]) / self.scale
            known = ~drift.isnan()  # a silent layer has no PSI
            cost = torch.where(known, drift, 0).square().sum(1) / known.sum(1).clamp_min(1)
            return self.loss(z, goal).clamp_max(_AHEAD) - self.weight * cost

        return door.gradient(x, p, loss, through)


def hide(
    model: Model, layers: Sequence[Layer], x: Inputs, y: Labels, threat: Threat,
    *, wanted: Tensor, scale: Tensor, weight: float, seed: int, indices: Tensor, device: torch.device | str | None,
) -> tuple[Inputs, int, int]:  # fmt: skip
    """Run :class:`Hidden` on samples x (b, *f) with labels y (b,); return its points, forwards and backwards.

    ``wanted`` is (b, layers), ``scale`` (layers,); the rest as for every attack.
    """
    plain = replace(model, tuned=False)  # layers that are replaced while searching would not be heard
    with tapped(module_of(model), layers, lambda r: population_sparseness(r.flatten(1))) as tap:
        attack = Hidden(tap=tap, wanted=wanted, scale=scale.clamp_min(_LEAST), weight=weight)
        r = attack(plain, x, y, threat, seed, full=True, indices=indices, device=device)
    return r.x, int(r.forwards.sum()), int(r.backwards.sum())
