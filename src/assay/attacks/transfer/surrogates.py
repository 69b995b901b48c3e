"""Several surrogates as one network: the mean of what they say."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, final

import torch
from torch import Tensor, nn

from assay.core.errors import ModelError
from assay.core.registry import UsageError
from assay.core.types import Inputs, Logits
from assay.models.fingerprint import fingerprint
from assay.models.loaded import Net
from assay.models.model import Model, as_model

MEANS: Final[dict[str, Callable[[Tensor], Logits]]] = {
    "logits": lambda z: z.mean(0),
    "probabilities": lambda z: z.softmax(2).mean(0).clamp_min(torch.finfo(z.dtype).tiny).log(),
}
"""How the logits (m, b, c) of several networks become those of one."""


@final
class Mean(nn.Module):
    """Models that answer together, from inputs (b, *f) inside their common box to logits (b, c)."""

    def __init__(self, models: Sequence[Model], by: str) -> None:
        super().__init__()
        self.models, self.by = tuple(models), by
        self.parts = nn.ModuleList(m.module for m in models if m.module is not None)  # so that they are frozen

    def forward(self, x: Inputs) -> Logits:
        z = [m(x) for m in self.models]
        if len({v.shape for v in z}) > 1:
            found = ", ".join(str(v.shape[1]) for v in z)
            raise ModelError("surrogates with equally many classes", found, "Leave out those of other classes.")
        return MEANS[self.by](torch.stack(z))


def as_surrogates(given: "Model | Net | Sequence[Model | Net]") -> tuple[Model, ...]:
    """Return one or several networks as models whose names tell their weights.

    Raises:
        UsageError: none.
        ModelError: not all have the same box.
    """
    several = given if isinstance(given, tuple | list) else (given,)
    models = tuple(_named(as_model(g)) for g in several)
    if not models:
        raise UsageError("at least one surrogate", "none", "Pass a network, or a list of them.")
    if len({m.domain for m in models}) > 1:
        found = ", ".join(str(m.domain) for m in models)
        raise ModelError("surrogates with the same box", found, "Give every surrogate the box of the attacked model.")
    return models


def joint(models: Sequence[Model], by: str) -> Model:
    """Return one model that answers as the mean of several."""
    return models[0] if len(models) == 1 else Model(Mean(models, by), models[0].domain)


def _named(model: Model) -> Model:
    about = f"SHA-256 {fingerprint(model)}"
    return model if about in model.name else replace(model, name=f"{model.name}, {about}")
