"""Modules to build networks with: normalisation, activations by name, anti-aliased pooling, feature denoising."""

import math
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.core.registry import UsageError, closest, one_of

Activation: TypeAlias = str | Callable[[], nn.Module]
"""A name out of ``ACTIVATIONS``, or what builds the module."""

ACTIVATIONS: Final[dict[str, Callable[[], nn.Module]]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": lambda: nn.Softplus(beta=10),
    "abs": lambda: nn.LeakyReLU(-1.0),
}
"""Activations by name. SiLU, GELU and softplus are smooth; ``softplus:BETA`` is log(1 + exp(BETA v)) / BETA.

References:
    Xie et al. 2020, arXiv:2006.14536, sec. 4.1 (smooth ones for adversarial training).
"""

_STATISTICS: Final = {
    1: ((0.1307,), (0.3081,)),
    3: ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
}
"""Mean and standard deviation of each channel of MNIST and of CIFAR-10."""


def activation_of(kind: Activation) -> nn.Module:
    """Build an activation.

    Raises:
        UsageError: no such name, or a beta that is not a positive number.

    Example:
        >>> activation_of("softplus:5")
        Softplus(beta=5.0, threshold=20.0)
    """
    if not isinstance(kind, str):
        return kind()
    name, _, beta = kind.partition(":")
    if name not in ACTIVATIONS or (beta and name != "softplus"):
        raise UsageError("the name of an activation", repr(kind), closest(name, [*ACTIVATIONS]))
    return nn.Softplus(beta=_positive(kind, beta)) if beta else ACTIVATIONS[name]()


def _positive(kind: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError("a number above 0 after softplus:", repr(kind), "Write for example softplus:10.")
    return value


@final
class Normalise(nn.Module):
    """``(x - mean) / std``, channel by channel (axis 1), or with one number for all; both are kept with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | float, std: Sequence[float] | float) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32).flatten())

    @classmethod
    def usual(cls, channels: int) -> "Normalise":
        """Return the normalisation of MNIST for one channel, of CIFAR-10 for three; else from [0, 1] to [-1, 1]."""
        return cls(*_STATISTICS.get(channels, ((0.5,), (0.5,))))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (v.view(-1, *[1] * (x.ndim - 2)) for v in (self.mean, self.std))
        return (x - mean) / std


@final
class BlurPool(nn.Module):
    """Anti-aliased subsampling: a binomial blur of each channel, then every ``stride``-th value; edges are reflected.

    For a strided convolution write the convolution with stride 1, the activation, and this; for max pooling
    ``MaxPool2d(2, stride=1)`` and this. Images (b, c, h, w) become (b, c, ceil(h / stride), ceil(w / stride)).

    Args:
        channels: of the images.
        stride: step between the values that stay.
        taps: width of the blur; h and w must be larger than half of it.

    Raises:
        UsageError: fewer than one tap.

    References:
        Zhang 2019, arXiv:1904.11486, sec. 3.2.
    """

    kernel: Tensor

    def __init__(self, channels: int, stride: int = 2, taps: int = 3) -> None:
        super().__init__()
        if taps < 1:
            raise UsageError("a blur of at least one tap", f"{taps}", "For example 3.")
        row = torch.tensor([math.comb(taps - 1, k) / 2 ** (taps - 1) for k in range(taps)])
        self.register_buffer("kernel", torch.outer(row, row).expand(channels, 1, taps, taps).clone(), persistent=False)
        self.stride, self.edges = stride, [(taps - 1) // 2, taps // 2] * 2

    def forward(self, x: Tensor) -> Tensor:
        wide = F.pad(x, self.edges, mode="reflect")
        return F.conv2d(wide, self.kernel, stride=self.stride, groups=len(self.kernel))


KINDS: Final = ("gaussian", "dot")


@final
class Denoise(nn.Module):
    """Feature denoising: non-local means over all places of the features, a 1x1 convolution, and the input added.

    Place i becomes ``sum_j f(x_i, x_j) x_j / C``. ``gaussian``: f = exp(a(x_i) . b(x_j) / sqrt(d)) and C its sum over
    j, where a and b are 1x1 convolutions to d channels (the identity for d = 0). ``dot``: f = a(x_i) . b(x_j), and C is
    the number of places. The convolution ends in a batch normalisation whose scale begins at 0, so that the block
    begins as the identity. Put it after a stage of residual blocks; memory grows with the square of h w.

    Args:
        channels: of the features (b, channels, h, w).
        kind: ``gaussian`` or ``dot``.
        embedding: d; None takes half of the channels, at least 1.

    Raises:
        UsageError: another kind.

    References:
        Xie et al. 2019, arXiv:1812.03411, sec. 4.1 and figure 4.
    """

    def __init__(self, channels: int, kind: str = "gaussian", embedding: int | None = None) -> None:
        super().__init__()
        one_of("kind", kind, KINDS)
        d = max(1, channels // 2) if embedding is None else embedding
        self.kind, self.scale = kind, 1 / math.sqrt(d or channels)
        self.a, self.b = ((nn.Conv2d(channels, d, 1, bias=False) if d else nn.Identity()) for _ in range(2))
        last = nn.BatchNorm2d(channels)
        nn.init.zeros_(last.weight)
        self.mix = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), last)

    def forward(self, x: Tensor) -> Tensor:
        a, b, values = self.a(x).flatten(2), self.b(x).flatten(2), x.flatten(2)  # (b, d or c, places)
        alike = a.transpose(1, 2) @ b
        weights = (alike * self.scale).softmax(2) if self.kind == "gaussian" else alike / alike.shape[2]
        means: Tensor = values @ weights.transpose(1, 2)
        out: Tensor = x + self.mix(means.view_as(x))
        return out
