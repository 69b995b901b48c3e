"""Defences that write inputs in another code, for a network that is trained on it."""

from functools import partial
from typing import final

import torch
from torch import Tensor

from assay.core.types import Inputs
from assay.defences.defence import Defence, boxed, check_range
from assay.models.bpda import BPDA
from assay.threats.threat import Box


@final
class Thermometer(Defence):
    """Each value as bits: one for each threshold that it is above, g(x)_k = [x > (k + 1/2) / levels] on [0, 1].

    Inputs (b, c, *s) become (b, c * levels, *s); the levels of a channel lie together, and their mean is x rounded to a
    multiple of 1 / levels. The network behind it has to be trained on such codes::

        net = nn.Sequential(Thermometer(16), nn.Conv2d(16 * 1, 32, 3), ...)
        assay.harden(net, data, threat, method="pgd")     # its attack differentiates through the code
        assay.evaluate(net, data, threat)

    *Gradient*: that of soft bits, sigmoid(levels x - k - 1/2) (BPDA); its own is zero.

    *Broken by* BPDA with soft bits: Athalye, Carlini & Wagner 2018, arXiv:1802.00420 (on this very
    defence). With adversarial training it was weaker than adversarial training alone.

    Args:
        levels: thresholds for each value.
        box: (lo, hi), the range that the thresholds divide.

    Example:
        >>> import torch
        >>> from assay.defences import Thermometer
        >>> Thermometer(levels=4)(torch.tensor([[[0.1, 0.6]]])).tolist()
        [[[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]]

    *Differs from the paper in*: thresholds are in the middle between levels, so that no bit is always one.

    Raises:
        UsageError: fewer than one level.

    References:
        Buckman, Roy, Raffel & Goodfellow 2018, "Thermometer encoding: one hot way to resist adversarial examples",
        ICLR, sec. 3.
    """

    def __init__(self, levels: int = 16, box: Box | tuple[float, float] = Box()) -> None:
        super().__init__()
        check_range("levels", levels, 1, 65536, "For example 16.")
        self.levels, self.box = levels, boxed(box)
        place = partial(_above, levels=levels, box=self.box)
        self.step = BPDA(partial(_bits, place=place), partial(_soft_bits, place=place))

    def forward(self, x: Inputs) -> Inputs:
        out: Tensor = self.step(x)
        return out


def _above(x: Inputs, levels: int, box: Box) -> Tensor:
    """Return how far each value is above each threshold, in levels: (b, c * levels, *s)."""
    at = torch.arange(levels, dtype=x.dtype, device=x.device).view(levels, *[1] * (x.ndim - 2)) + 0.5
    return ((x - box.lo)[:, :, None] * (levels / box.width) - at).flatten(1, 2)


def _bits(x: Inputs, place: "partial[Tensor]") -> Tensor:
    return (place(x) > 0).to(x.dtype)


def _soft_bits(x: Inputs, place: "partial[Tensor]") -> Tensor:
    return place(x).sigmoid()
