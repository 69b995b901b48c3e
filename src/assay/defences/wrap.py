"""Defences put in front of a model, so that whatever is asked of the result is asked of the whole."""

from dataclasses import replace
from typing import Any, final

import torch
from torch import nn

from assay.core.errors import ModelError
from assay.core.types import Inputs, Logits
from assay.models.loaded import Net
from assay.models.model import Model, as_model
from assay.threats.threat import Box


@final
class Inside(nn.Module):
    """A model as a module: from inputs inside its box to the logits of one pass, its normalisation included."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = replace(model, samples=1, judged=0)
        self.net = model.module  # so that it is frozen, moved and restored with the rest
        self.box = model.domain

    def forward(self, x: Inputs) -> Logits:
        return self.model(x)

    def extra_repr(self) -> str:
        """Write what the answers depend on besides the net; a run's fingerprint reads it here."""
        mean, std = (None if v is None else torch.as_tensor(v).tolist() for v in (self.model.mean, self.model.std))
        return f"box={self.box}, mean={mean}, std={std}, probabilities={self.model.probabilities}"


def as_module(model: Model | Net) -> nn.Module:
    """Return a module from inputs inside the box to logits."""
    return model if isinstance(model, nn.Module) else Inside(as_model(model))


def defended(model: Model | Net, *defences: nn.Module, samples: int = 16, judged: int = 50) -> Model:
    """Put defences in front of a model, the first one nearest to the input.

    The result is one model: attacks, evaluations and training go through the defences, with the gradients that these
    give. Box, normalisation and all other settings are the model's; normalisation comes after the defences.

    Args:
        model: an :class:`assay.Model`, or a net that takes inputs in [0, 1].
        defences: modules from inputs inside the box to inputs of what follows.
        samples: random passes that are averaged for one answer to an attack (EOT), where a defence is random.
        judged: random passes that are averaged to decide whether a sample is right, or fooled.

    Passes that the model itself asks for are kept. Other models than random ones take one pass.

    Example:
        >>> import torch
        >>> from assay.defences import JPEG, GaussianNoise, defended
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> defended(net, JPEG(75)).samples, defended(net, JPEG(75), GaussianNoise(0.1)).samples
        (1, 16)

    Raises:
        ModelError: a defence, or a network inside the model, has another box than the model.

    References:
        Tramèr, Carlini, Brendel & Mądry 2020, arXiv:2002.08347 (why attacks must adapt to a defence).
    """
    model = as_model(model)
    net = nn.Sequential(*defences, Inside(model))
    _check_boxes(net, model.domain)
    if any(getattr(m, "random", False) for m in net.modules()):
        passes = model.samples if model.samples > 1 else samples
        model = replace(model, samples=passes, judged=model.judged or max(judged, passes))
    rejects = model.rejects or bool(getattr(model.net, "rejects", False))
    name = " + ".join([type(d).__name__ for d in defences] + [model.name])
    return replace(model, net=net, mean=None, std=None, probabilities=False, rejects=rejects, name=name)


def _check_boxes(net: nn.Module, box: Box) -> None:
    others: dict[str, Any] = {type(m).__name__: m.box for m in net.modules() if isinstance(vars(m).get("box"), Box)}
    for name, other in others.items():
        if other != box:
            raise ModelError(
                f"the model's box [{box.lo:g}, {box.hi:g}] in all defences",
                f"[{other.lo:g}, {other.hi:g}] in {name}",
                "Give both the same box=(lo, hi); for a net that does not take [0, 1], pass assay.Model(net, box=...).",
            )
