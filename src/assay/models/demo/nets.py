"""The architecture of the demo networks."""

from __future__ import annotations

from torch import nn

from assay.nets import mnist_small


def mnist_cnn() -> nn.Sequential:
    """Build the untrained demo network: 166,406 parameters, convolutions, ReLU and linear layers only.

    It takes images of shape (b, 1, 28, 28) with values in [0, 1] and gives logits of shape (b, 10).

    Example:
        >>> import torch
        >>> mnist_cnn()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    return mnist_small()
