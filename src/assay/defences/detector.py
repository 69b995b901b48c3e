"""A detector with a reject option: a last logit that wins where an input looks suspicious."""

from collections.abc import Callable
from typing import ClassVar, Final, TypeAlias, final

import torch
from torch import nn

from assay.core.errors import DataError
from assay.core.registry import UsageError
from assay.core.types import Inputs, Logits, PerSample
from assay.defences.wrap import as_module, defended
from assay.models.door import Door
from assay.models.loaded import Net
from assay.models.model import Model

Suspicion: TypeAlias = Callable[[nn.Module, Inputs, Logits], PerSample]
"""How suspicious inputs (b, *f) are, (b,): from the network, the inputs, and the network's logits for them."""

_ROOM: Final = 1e-3
"""By how much of the largest suspicion a threshold lies above it, where nothing may be rejected: rounding is less."""


@final
class Detector(nn.Module):
    """A network that rejects what looks suspicious: logits (b, c + 1), of which the last one stands for "rejected".

    It is max_i z_i + scale (s(x) - threshold), so that it wins exactly where the suspicion s(x) is above the threshold.
    Give it to :func:`defended`, or to ``assay.Model(detector, rejects=True)``: then an input is fooled only where a
    wrong class is *accepted*, a clean input that is rejected counts as wrong, and losses are joint ones of network
    and detector (:meth:`assay.Model.joint`).

    *Gradient*: its own, through the suspicion too.

    *Broken by* attacks on the joint objective: Carlini & Wagner 2017, arXiv:1705.07263 (ten detectors); Tramèr et al.
    2020, arXiv:2002.08347. Reported detection rates are those of attacks that do not look at the detector.

    Args:
        net: a network that takes inputs in [0, 1], or a model.
        suspicion: of (net, inputs, logits), see :class:`FeatureSqueezing`.
        threshold: in units of the suspicion; :func:`calibrated` finds it.
        scale: logits for a unit of suspicion. No decision depends on it, but an attack's losses do; where it is large,
            attacks go back to what is not suspicious instead of on to what is wrong, and find less.

    Example:
        >>> import torch
        >>> from assay.defences import Detector
        >>> net = lambda x: torch.cat([x, 1 - x], 1)
        >>> bright = Detector(net, lambda net, x, z: x.amax(1), threshold=0.9)
        >>> bright(torch.tensor([[0.7], [0.99]])).argmax(1).tolist()
        [0, 2]

    Raises:
        UsageError: a scale that is not positive.
    """

    rejects: ClassVar[bool] = True

    def __init__(self, net: Model | Net, suspicion: Suspicion, threshold: float, scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise UsageError("scale > 0", f"{scale:g}", "For example 1.")
        self.net, self.suspicion, self.threshold, self.scale = as_module(net), suspicion, threshold, scale

    def forward(self, x: Inputs) -> Logits:
        z: Logits = self.net(x)
        over = self.suspicion(self.net, x, z) - self.threshold
        return torch.cat([z, (z.amax(1) + self.scale * over)[:, None]], 1)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold!r}, scale={self.scale!r}"


@final
class FeatureSqueezing(nn.Module):
    """Suspicious is what changes its prediction when squeezed: s(x) = max_j |softmax f(x) - softmax f(g_j(x))|_1.

    Squeezers g_j are modules from inputs to inputs, such as :class:`BitDepth` and :class:`Median`; s is from 0 to 2.

    *Gradient*: its own where squeezers have one, else theirs by BPDA.

    *Broken by* He et al. 2017, arXiv:1706.04701, and Sharma & Chen 2018, arXiv:1803.09868: attacks that look for points
    on which squeezed and unsqueezed predictions are wrong alike.

    *Cost*: one more pass of the network for each squeezer, inside what counts as one pass.

    Args:
        squeezers: modules from inputs inside the box to inputs inside the box.

    Example:
        >>> import torch
        >>> from assay.defences import BitDepth, FeatureSqueezing
        >>> net = lambda x: torch.cat([10 * x, 5 + 0 * x], 1)
        >>> x = torch.tensor([[0.0], [0.6]])
        >>> [round(s, 2) for s in FeatureSqueezing(BitDepth(1))(net, x, net(x)).tolist()]
        [0.0, 0.52]

    Raises:
        UsageError: no squeezers.

    References:
        Xu, Evans & Qi 2018, arXiv:1704.01155, sec. V-A (MNIST: one bit, and a median of 2 x 2 pixels).
    """

    def __init__(self, *squeezers: nn.Module) -> None:
        super().__init__()
        if not squeezers:
            raise UsageError("at least one squeezer", "none", "For example BitDepth(1), Median(2).")
        self.squeezers = nn.ModuleList(squeezers)

    def forward(self, net: nn.Module, x: Inputs, z: Logits) -> PerSample:
        p = z.softmax(1)
        gaps = [(p - net(squeeze(x)).softmax(1)).abs().sum(1) for squeeze in self.squeezers]
        return torch.stack(gaps).amax(0)


def calibrated(net: Model | Net, suspicion: Suspicion, x: Inputs, rate: float = 0.05) -> Detector:
    """Return a detector whose threshold rejects at most a share of clean inputs.

    The threshold lies in the middle between the suspicions of the last input that is accepted and of the first one
    that is rejected. Take inputs that neither training nor evaluation sees.

    *Cost*: one forward pass an input.

    Args:
        net: a network that takes inputs in [0, 1], or a model.
        suspicion: of (net, inputs, logits).
        x: clean inputs (n, *f) inside the box.
        rate: the share of them that may be rejected, from 0 to below 1.

    Example:
        >>> import torch
        >>> from assay.defences import calibrated
        >>> net = lambda x: torch.cat([x, 1 - x], 1)
        >>> detector = calibrated(net, lambda net, x, z: x.amax(1), torch.linspace(0, 1, 11)[:, None], rate=0.1)
        >>> round(detector.threshold, 3)
        0.95

    Raises:
        UsageError: a rate outside [0, 1).
        DataError: no inputs.

    References:
        Xu, Evans & Qi 2018, arXiv:1704.01155, sec. V-A (5 % of the clean inputs).
    """
    if not 0 <= rate < 1:
        raise UsageError("a rate from 0 to below 1", f"{rate:g}", "For example 0.05.")
    if not len(x):
        raise DataError("at least one clean input", "none", "Pass inputs (n, *f).")
    with defended(Detector(net, suspicion, threshold=0.0)).frozen() as live:
        x = x.to(live.device)
        z = Door(live, len(x)).logits(x, torch.arange(len(x), device=x.device)).double()
    s = (z[:, -1] - z[:, :-1].amax(1)).sort().values
    s = torch.cat([s, s[-1:] + _ROOM * s[-1:].abs()])
    last = len(x) - 1 - int(rate * len(x))
    return Detector(net, suspicion, float(s[last : last + 2].mean()))
