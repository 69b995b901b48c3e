"""Several networks that answer together."""

import math
from collections.abc import Callable, Sequence
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.core.registry import UsageError, one_of
from assay.core.types import Inputs, Logits
from assay.defences.wrap import as_module
from assay.models.loaded import Net
from assay.models.model import Model

_HALF: Final = 10.0
"""The mean log probability, below zero, that counts as half a vote less: what decides equal votes is less than one."""


def _probabilities(z: Tensor) -> Logits:
    return z.log_softmax(2).logsumexp(0) - math.log(len(z))


def _logits(z: Tensor) -> Logits:
    return z.mean(0)


def _vote(z: Tensor) -> Logits:
    mean = _probabilities(z)
    return F.one_hot(z.argmax(2), z.shape[2]).sum(0) + mean / (_HALF - mean)


_COMBINED: Final[dict[str, Callable[[Tensor], Logits]]] = {
    "probabilities": _probabilities,
    "logits": _logits,
    "vote": _vote,
}


@final
class Ensemble(nn.Module):
    """Networks f_1 to f_m that answer together, from inputs (b, *f) inside the box to logits (b, c).

    ``probabilities``: log of the mean of softmax f_i(x); ``logits``: the mean of f_i(x); ``vote``: how many f_i choose
    each class, plus the mean log probability l as l / (10 - l), which is less than a vote and decides equal ones.

    *Gradient*: its own; of a ``vote``, which is flat, that of the part that decides equal ones.

    *Broken by* one attack on the whole: He et al. 2017, arXiv:1706.04701; Tramèr et al. 2020, arXiv:2002.08347 (on
    networks trained to differ). Perturbations carry over from member to member, so that one fools most.

    *Cost*: a pass of every member is one pass here.

    Args:
        nets: networks that take the same inputs, or models with the same box; random ones among them are averaged
            when the ensemble is given to :func:`defended`.
        combine: ``probabilities``, ``logits`` or ``vote``.

    Example:
        >>> import torch
        >>> from assay.defences import Ensemble
        >>> a, b = (lambda x: torch.tensor([[4.0, 0.0]])), (lambda x: torch.tensor([[0.0, 1.0]]))
        >>> Ensemble([a, b], combine="logits")(torch.zeros(1, 3)).tolist()
        [[2.0, 0.5]]

    Raises:
        UsageError: no nets, or an unknown way to combine them.

    References:
        Hansen & Salamon 1990 (votes and means of networks); Pang et al. 2019, arXiv:1901.08846 (as a defence).
    """

    def __init__(self, nets: Sequence[Model | Net], combine: str = "probabilities") -> None:
        super().__init__()
        one_of("combine", combine, [*_COMBINED])
        if not nets:
            raise UsageError("at least one net", "none", "Pass a list of networks.")
        self.nets, self.combine = nn.ModuleList(as_module(net) for net in nets), combine

    def forward(self, x: Inputs) -> Logits:
        return _COMBINED[self.combine](torch.stack([net(x) for net in self.nets]))

    def extra_repr(self) -> str:
        return f"combine={self.combine!r}"
