"""The optimiser of the settings, and what it remembers, as tensors by name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from assay.hardening.settings import Settings


def optimiser_of(net: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """Return the optimiser of the settings; only weights with more than one axis decay."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": s.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if s.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=s.lr, momentum=s.sgd_momentum, nesterov=s.sgd_momentum > 0)
    kind: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[s.optimiser]
    return kind(groups, lr=s.lr, betas=(0.9, 0.99))


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimiser remembers of each parameter, as ``number/name``."""
    state = optimiser.state_dict()["state"]
    return {f"{i}/{name}": torch.as_tensor(v) for i, kept in state.items() for name, v in kept.items() if v is not None}


def restore_optimiser(optimiser: torch.optim.Optimizer, kept: Mapping[str, Tensor]) -> None:
    """Give an optimiser back what :func:`optimiser_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in kept.items():
        number, _, name = key.partition("/")
        state.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
