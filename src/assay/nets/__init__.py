"""Architectures: the small networks of the field, and modules to build others with.

Every function builds an untrained network that takes images inside [0, 1], normalisation inside, and gives logits.
Without arguments it has the shapes of its usual data set: ``py:assay.nets:preact_resnet18`` on the command line.
"""

from assay.nets.lipschitz import AOLConv2d, AOLLinear, GroupSort, MaxMin, fused, mnist_lipschitz, orthogonal_linear
from assay.nets.parts import ACTIVATIONS, BlurPool, Denoise, Normalise, activation_of
from assay.nets.residual import PreActBlock, preact_resnet18, wide_resnet28_10, wide_resnet34_10
from assay.nets.small import cifar_cnn7, cnn7, mnist_small, mnist_trades, mnist_wide

__all__ = [
    "ACTIVATIONS",
    "AOLConv2d",
    "AOLLinear",
    "BlurPool",
    "Denoise",
    "GroupSort",
    "MaxMin",
    "Normalise",
    "PreActBlock",
    "activation_of",
    "cifar_cnn7",
    "cnn7",
    "fused",
    "mnist_lipschitz",
    "mnist_small",
    "mnist_trades",
    "mnist_wide",
    "orthogonal_linear",
    "preact_resnet18",
    "wide_resnet28_10",
    "wide_resnet34_10",
]
