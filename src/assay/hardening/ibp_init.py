"""Initial weights for training with interval bounds."""

import math

import torch
from torch import nn

_LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@torch.no_grad()
def ibp_init(net: nn.Module, seed: int = 0) -> None:
    """Draw the weights of a network anew so that the width of intervals neither grows nor shrinks from layer to layer.

    Weights of linear and convolutional layers come from a normal distribution with mean 0 and standard deviation
    sqrt(2 pi) / fan_in, their biases are set to 0, all else stays. The numbers depend on the seed and the order of the
    layers only: not on torch's own generator, not on the device.

    References:
        Shi et al. 2021, arXiv:2103.17268 (IBP initialisation).
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, _LAYERS):
            std = math.sqrt(2 * math.pi) / layer.weight[0].numel()
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * std)
            if layer.bias is not None:
                layer.bias.zero_()
