"""What training looks at between its steps: accuracy on samples it does not learn from, and signs of trouble."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import nn

from assay.attacks import FGSM, PGD, Runnable
from assay.data import Data
from assay.models import Model
from assay.models.line import default_batch
from assay.threats import Threat

_FALL = 0.5
"""A fall of PGD accuracy by this share of the best is no fluctuation ..."""

_LEAST_FALL = 0.05
"""... if it is at least this much of all samples."""

_GAP = 0.1
"""How far FGSM accuracy must then be above PGD accuracy: an honest network shows a few points."""

_LEARNED = 1.5
"""How much better than chance a network is that has learned something."""


@final
@dataclass(frozen=True, slots=True)
class Validation:
    """Shares of the validation samples that are right: clean, after FGSM, and after PGD as well, at the full eps."""

    clean: float
    fgsm: float
    pgd: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def validate(net: nn.Module, data: Data, threat: Threat, steps: int, seed: int) -> Validation:
    """Measure a network: clean accuracy, that under FGSM, and that under FGSM and then PGD of ``steps`` steps.

    *Cost* at most ``steps`` + 6 forwards and ``steps`` + 1 backwards a sample. This watches over training; what the
    network can take is said by :func:`assay.evaluate`.
    """
    assert threat.box is not None
    model, place = Model(net, threat.box), next(net.parameters()).device
    attacks: tuple[Runnable, ...] = FGSM(), PGD(steps=steps, rel_step=max(0.1, 2.5 / steps))
    counts = [0] * (1 + len(attacks))
    for rows in torch.split(torch.arange(len(data)), default_batch(data.shape, place)):
        x, y, at = data.batch(rows).to(place), data.labels[rows].to(place), rows.to(place)
        with model.frozen() as live:
            stands = live(x).argmax(1) == y
        counts[0] += int(stands.sum())
        for i, attack in enumerate(attacks, 1):
            x, y, at = x[stands], y[stands], at[stands]
            stands = ~attack(model, x, y, threat, seed, indices=at).success if len(x) else stands[stands]
            counts[i] += int(stands.sum())
    return Validation(*(n / len(data) for n in counts))


def catastrophic(past: Sequence[Validation], now: Validation, chance: float) -> bool:
    """Tell whether training has begun to overfit the single step that it trains against.

    The sign: FGSM accuracy is as high as it was at the best validation, and PGD accuracy collapses. Validations at
    which the network was little better than ``chance``, the share of the most frequent class, do not count: one that
    always says the same cannot be fooled.

    References:
        Wong, Rice & Kolter 2020, arXiv:2001.03994, sec. 5; Andriushchenko & Flammarion 2020, arXiv:2007.02617, fig. 1.
    """
    past = [v for v in past if v.clean > _LEARNED * chance]
    if not past:
        return False
    best = max(past, key=lambda v: v.pgd)
    fell = best.pgd - now.pgd > max(_LEAST_FALL, _FALL * best.pgd)
    return fell and now.fgsm - now.pgd > _GAP and now.fgsm >= best.fgsm - _LEAST_FALL
