"""Averages of weights over training, which are flatter minima than any single point of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from assay.hardening.settings import Settings


def averaged(net: nn.Module, settings: Settings) -> AveragedModel | None:
    """Return what averages the weights of a network as the settings say, or None.

    References:
        Izmailov et al. 2018, arXiv:1803.05407, alg. 1 (swa); for robust networks Gowal et al. 2020, arXiv:2010.03593,
        sec. 4.5 (ema).
    """
    if settings.average == "none":
        return None
    kept: dict[str, Any] = {"multi_avg_fn": _moving(settings.ema_decay)} if settings.average == "ema" else {}
    return AveragedModel(net, use_buffers=False, **kept).requires_grad_(False)


def _moving(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return the update of a moving average that forgets its first steps faster."""

    @torch.no_grad()
    def update(mean: list[Tensor], now: list[Tensor], count: Tensor) -> None:
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(mean, now, weight)

    return update
