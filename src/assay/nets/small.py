"""The small convolutional networks that papers on robustness compare on."""

import math
from itertools import pairwise

import torch
from torch import nn

from assay.nets.parts import Activation, Normalise, activation_of


def mnist_small(channels: int = 1, size: int = 28, classes: int = 10, activation: Activation = "relu") -> nn.Sequential:
    """Build two strided convolutions (16, 32 channels of 4x4) and a hidden layer of 100: 166,406 parameters.

    References:
        Wong & Kolter 2018, arXiv:1711.00851, sec. 4.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        activation_of(activation),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        activation_of(activation),
        nn.Flatten(),
        nn.Linear(32 * (size // 4) ** 2, 100),
        activation_of(activation),
        nn.Linear(100, classes),
    )


def mnist_wide(channels: int = 1, size: int = 28, classes: int = 10, activation: Activation = "relu") -> nn.Sequential:
    """Build two convolutions (32, 64 channels of 5x5) with pooling and a hidden layer of 1,024: 3,274,634 parameters.

    Weights begin as normal numbers of standard deviation 0.1, cut at two of it, biases at 0.1.

    References:
        Madry et al. 2018, arXiv:1706.06083, sec. 5, and its published code.
    """
    net = nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        activation_of(activation),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        activation_of(activation),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (size // 4) ** 2, 1024),
        activation_of(activation),
        nn.Linear(1024, classes),
    )
    for name, values in net.named_parameters():
        if name.endswith("bias"):
            nn.init.constant_(values, 0.1)
        else:
            nn.init.trunc_normal_(values, std=0.1, a=-0.2, b=0.2)
    return net


def mnist_trades(
    channels: int = 1, size: int = 28, classes: int = 10, activation: Activation = "relu"
) -> nn.Sequential:
    """Build four convolutions (32, 32, 64, 64 channels of 3x3) and two hidden layers of 200: 312,202 parameters.

    The last layer begins at 0, as published: before the first step all logits, and their gradients, are 0.

    References:
        Zhang et al. 2019, arXiv:1901.08573 (TRADES), sec. 5, and its published code.
    """
    last = nn.Linear(200, classes)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    net = nn.Sequential(
        *_pair(channels, 32, activation),
        *_pair(32, 64, activation),
        nn.Flatten(),
        nn.Linear(64 * (((size - 4) // 2 - 4) // 2) ** 2, 200),
        activation_of(activation),
        nn.Dropout(0.5),
        nn.Linear(200, 200),
        activation_of(activation),
        last,
    )
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return net


def _pair(inputs: int, outputs: int, activation: Activation) -> tuple[nn.Module, ...]:
    """Return two unpadded convolutions and a pooling: n x n places become (n - 4) // 2 squared."""
    return (
        nn.Conv2d(inputs, outputs, 3),
        activation_of(activation),
        nn.Conv2d(outputs, outputs, 3),
        activation_of(activation),
        nn.MaxPool2d(2),
    )


def cnn7(
    channels: int = 1,
    size: int = 28,
    classes: int = 10,
    activation: Activation = "relu",
    normalise: nn.Module | None = None,
) -> nn.Sequential:
    """Build CNN7, the usual network of certified training: batch normalisation behind all layers but the last.

    Convolutions of 3x3 with 64, 64, 128 (stride 2), 128, 128 channels and a hidden layer of 512. Weights begin with the
    standard deviation sqrt(2 pi) / fan-in, which keeps the width of interval bounds from growing layer by layer.

    Args:
        channels: of the images.
        size: their height and width.
        classes: number of logits.
        activation: after each batch normalisation.
        normalise: the first module; None for :meth:`Normalise.usual`.

    References:
        Gowal et al. 2018, arXiv:1810.12715 (the architecture); Shi et al. 2021, arXiv:2103.17268, sec. 3.2 and 3.3
        (batch normalisation and the beginning).
    """
    layers: list[nn.Module] = [normalise or Normalise.usual(channels)]
    widths = (channels, 64, 64, 128, 128, 128)
    for inputs, outputs in pairwise(widths):
        stride = 2 if outputs == 2 * inputs else 1
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        layers += [conv, nn.BatchNorm2d(outputs), activation_of(activation)]
    hidden = nn.Linear(128 * math.ceil(size / 2) ** 2, 512)
    layers += [nn.Flatten(), hidden, nn.BatchNorm1d(512), activation_of(activation), nn.Linear(512, classes)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
            layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))
    return nn.Sequential(*layers)


def cifar_cnn7(channels: int = 3, size: int = 32, classes: int = 10, activation: Activation = "relu") -> nn.Sequential:
    """Build :func:`cnn7` with the shapes of CIFAR-10: 17,192,650 parameters."""
    return cnn7(channels, size, classes, activation)
