"""Residual networks with activations before the convolutions: PreActResNet and WideResNet."""

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from assay.nets.parts import Activation, BlurPool, Denoise, Normalise, activation_of


@final
class PreActBlock(nn.Module):
    """Batch normalisation, activation, 3x3 convolution, twice, and the input added.

    Where channels or stride change, the input that is added goes through a 1x1 convolution, after the first activation.

    Args:
        inputs, outputs: channels.
        stride: of the first convolution.
        activation: as for :func:`activation_of`.
        blur: put a :class:`BlurPool` in the place of the stride.

    References:
        He et al. 2016, arXiv:1603.05027, figure 4 (e); Zagoruyko & Komodakis 2016, arXiv:1605.07146.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation, blur: bool = False) -> None:
        super().__init__()
        pooled = blur and stride > 1
        step = 1 if pooled else stride
        self.begin = nn.Sequential(nn.BatchNorm2d(inputs), activation_of(activation))
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, step, 1, bias=False),
            nn.BatchNorm2d(outputs),
            activation_of(activation),
            *([BlurPool(outputs, stride)] if pooled else []),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        self.shortcut: nn.Module | None = None
        if stride > 1 or inputs != outputs:
            first = [BlurPool(inputs, stride)] if pooled else []
            self.shortcut = nn.Sequential(*first, nn.Conv2d(inputs, outputs, 1, step, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = self.begin(x)
        skip = x if self.shortcut is None else self.shortcut(h)
        out: Tensor = skip + self.residual(h)
        return out


def _residual(
    stem: int, stages: Sequence[tuple[int, int]], channels: int, classes: int, activation: Activation,
    denoise: bool, blur: bool, normalise: nn.Module | None,
) -> nn.Sequential:  # fmt: skip
    """Build a network of stages (width, blocks); each but the first halves height and width.

    Convolutions begin as normal numbers of variance 2 / fan-out (He et al. 2015, arXiv:1502.01852, sec. 2.2).
    """
    layers: list[nn.Module] = [normalise or Normalise.usual(channels), nn.Conv2d(channels, stem, 3, 1, 1, bias=False)]
    inputs = stem
    for stage, (width, blocks) in enumerate(stages):
        for block in range(blocks):
            layers.append(PreActBlock(inputs, width, 2 if stage and not block else 1, activation, blur))
            inputs = width
        layers += [Denoise(width)] if denoise else []
    layers += [nn.BatchNorm2d(inputs), activation_of(activation), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    last = nn.Linear(inputs, classes)
    nn.init.zeros_(last.bias)
    net = nn.Sequential(*layers, last)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out")
    return net


def preact_resnet18(
    channels: int = 3,
    classes: int = 10,
    activation: Activation = "relu",
    *,
    width: int = 64,
    denoise: bool = False,
    blur: bool = False,
    normalise: nn.Module | None = None,
) -> nn.Sequential:
    """Build PreActResNet-18 for small images of any size: 11,172,170 parameters for CIFAR-10.

    Args:
        channels: of the images.
        classes: number of logits.
        activation: ``silu`` or ``softplus`` for smooth adversarial training.
        width: channels of the first of four stages; each next has twice as many.
        denoise: put a :class:`Denoise` block behind each stage.
        blur: put a :class:`BlurPool` in the place of each stride.
        normalise: the first module; None for :meth:`Normalise.usual`.

    References:
        He et al. 2016, arXiv:1603.05027; without the large stride at the beginning, as usual for CIFAR-10.
    """
    stages = [(width * 2**k, 2) for k in range(4)]
    return _residual(width, stages, channels, classes, activation, denoise, blur, normalise)


def _wide(depth: int, factor: int, channels: int, classes: int, activation: Activation, **parts: bool) -> nn.Sequential:
    """Build WideResNet: three stages of (depth - 4) / 6 blocks, 16, 32 and 64 times ``factor`` channels wide."""
    stages = [(16 * 2**k * factor, (depth - 4) // 6) for k in range(3)]
    return _residual(16, stages, channels, classes, activation, normalise=None, **parts)


def wide_resnet28_10(
    channels: int = 3, classes: int = 10, activation: Activation = "relu", *, denoise: bool = False, blur: bool = False
) -> nn.Sequential:
    """Build WideResNet-28-10 for small images of any size: 36,479,194 parameters for CIFAR-10.

    References:
        Zagoruyko & Komodakis 2016, arXiv:1605.07146, table 1; without dropout.
    """
    return _wide(28, 10, channels, classes, activation, denoise=denoise, blur=blur)


def wide_resnet34_10(
    channels: int = 3, classes: int = 10, activation: Activation = "relu", *, denoise: bool = False, blur: bool = False
) -> nn.Sequential:
    """Build WideResNet-34-10 for small images of any size: 46,160,474 parameters for CIFAR-10.

    References:
        As for :func:`wide_resnet28_10`; the network of Madry et al. 2018 and of TRADES.
    """
    return _wide(34, 10, channels, classes, activation, denoise=denoise, blur=blur)
