"""Layers that are 1-Lipschitz in l2 by construction, and a network of them: its margins are certificates.

Weights are parametrised (``torch.nn.utils.parametrize``): training moves free ones, a pass uses rescaled ones.
"""

import copy
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from assay.core.registry import UsageError
from assay.nets.parts import Activation, activation_of

_TINY: Final = 1e-24


@final
class AlmostOrthogonal(nn.Module):
    """Rescales a weight P (o, i) or (o, i, k, k) so that the layer is 1-Lipschitz, whatever P is.

    ``W = P D, D_jj = (sum_l |P^T P|_jl)^(-1/2)``. For fewer outputs than inputs it is the rows that are rescaled, with
    P P^T: a matrix and its transpose have the same norm, and so have convolutions. The matrix of a convolution has one
    column a channel and place; on an image without borders all places are alike, and the sum is that of the absolute
    correlations of the kernels. Borders of zeros take rows and columns away, which cannot raise the norm. Stride s
    makes ``s^2`` channels of each, one a phase. Rows or columns that are orthogonal are left at length 1.

    Args:
        stride: of the convolution.

    References:
        Prach & Lampert 2022, arXiv:2208.03160, theorem 1 and sec. 3.2; the phases and the rows are ours.
    """

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, w: Tensor) -> Tensor:
        p = w if w.ndim == 4 else w[..., None, None]
        taps = p.shape[2]
        gap = -taps % self.stride
        p = F.pixel_unshuffle(F.pad(p, [0, gap, 0, gap]), self.stride)  # (o, i s^2, ceil(k / s), ceil(k / s))
        axis = 0 if len(p) < p.shape[1] else 1
        a = p.transpose(0, axis)
        sums = F.conv2d(a, a, padding=a.shape[2] - 1).abs().sum((1, 2, 3))
        p = p * sums.clamp_min(_TINY).rsqrt().view(-1, *[1] * (3 - axis))
        return F.pixel_shuffle(p, self.stride)[..., :taps, :taps].reshape(w.shape)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return a P for a wanted W: itself, which is exact where W has orthonormal columns (or rows)."""
        return w


class AOLLinear(nn.Linear):
    """A linear layer that is 1-Lipschitz in l2 (:class:`AlmostOrthogonal`); it begins orthogonal."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        parametrize.register_parametrization(self, "weight", AlmostOrthogonal())

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class AOLConv2d(nn.Conv2d):
    """A convolution that is 1-Lipschitz in l2 (:class:`AlmostOrthogonal`), with a border of zeros.

    It begins with an orthogonal matrix in the middle taps: an isometry, where there are ``inputs * stride^2`` outputs
    or more and the middle taps fall on all places.

    Raises:
        UsageError: a kernel that is smaller than the stride.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> None:
        if kernel < stride:
            raise UsageError(f"a kernel of at least the stride, {stride}", f"{kernel}", "It would skip inputs.")
        super().__init__(inputs, outputs, kernel, stride, padding, bias=bias)
        parametrize.register_parametrization(self, "weight", AlmostOrthogonal(stride))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        step, first = self.stride[0], (self.kernel_size[0] - self.stride[0]) // 2
        middle = self.weight.new_empty(self.out_channels, self.in_channels * step**2)
        nn.init.orthogonal_(middle)
        nn.init.zeros_(self.weight)
        self.weight[..., first : first + step, first : first + step] = middle.view(*self.weight.shape[:2], step, step)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def orthogonal_linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer with orthonormal rows (or columns, if there are more outputs), by PyTorch's own part.

    It costs more than :class:`AOLLinear` (a matrix of the larger side squared is inverted) and loses nothing.
    """
    layer = nn.Linear(inputs, outputs)
    # PyTorch's Householder map keeps signs as whole numbers, which weight decay and averages of weights turn into 0.
    parametrizations.orthogonal(layer, orthogonal_map="cayley")
    for kept in (*layer.parameters(), *layer.buffers()):
        kept.data = kept.data.contiguous()  # safetensors stores no transposed views
    return layer


@final
class GroupSort(nn.Module):
    """Sorts the channels (axis 1) in groups of neighbours, downwards: 1-Lipschitz, and keeps the length of gradients.

    Args:
        size: of a group; the number of channels must be a multiple of it.

    References:
        Anil, Lucas & Grosse 2019, arXiv:1811.05381, sec. 4.
    """

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), -1, self.size, *x.shape[2:])
        if self.size == 2:  # by operators that have bounds
            a, b = groups.unbind(2)
            return torch.stack([torch.maximum(a, b), torch.minimum(a, b)], 2).reshape(x.shape)
        return groups.sort(2, descending=True).values.reshape(x.shape)


MaxMin = GroupSort
"""Groups of two."""


def mnist_lipschitz(
    channels: int = 1, size: int = 28, classes: int = 10, activation: Activation = MaxMin
) -> nn.Sequential:
    """Build a convolutional network that is 1-Lipschitz in l2, from images in [0, 1] to logits.

    A difference of two logits then changes by at most sqrt(2) a unit of distance, so that a sample whose margin is m is
    proven within m / sqrt(2), up to the rounding of float32. Train it by a loss that asks for margins (cross-entropy of
    logits times 8, say): it cannot scale its logits up by itself.

    Args:
        channels: of the images.
        size: their height and width.
        classes: number of logits.
        activation: ``MaxMin``, ``abs`` or ``relu``; it must be 1-Lipschitz.

    References:
        Prach & Lampert 2022, arXiv:2208.03160; Tsuzuku, Sato & Sugiyama 2018, arXiv:1802.04034 (the certificate).
    """
    return nn.Sequential(
        AOLConv2d(channels, 16, 4, stride=2, padding=1),
        activation_of(activation),
        AOLConv2d(16, 64, 4, stride=2, padding=1),
        activation_of(activation),
        AOLConv2d(64, 64, 3, padding=1),
        activation_of(activation),
        nn.Flatten(),
        AOLLinear(64 * (size // 4) ** 2, 256),
        activation_of(activation),
        orthogonal_linear(256, classes),
    )


@torch.no_grad()
def fused(net: nn.Module) -> nn.Module:
    """Return a copy of a network with plain weights in the place of parametrised ones, to store and to certify.

    Weights are computed in float64 and rounded once to the precision of the network.
    """
    dtypes = [p.dtype for p in net.parameters()]
    plain = copy.deepcopy(net).double()
    for m in [*plain.modules()]:
        if isinstance(parts := getattr(m, "parametrizations", None), nn.ModuleDict):
            weights = {name: getattr(m, name) for name in parts}
            # Not remove_parametrizations: it changes a class that the copy shares with the original.
            m.__class__ = parametrize.type_before_parametrizations(m)
            del m._modules["parametrizations"]
            for name, w in weights.items():
                m.register_parameter(name, nn.Parameter(w))
    return plain.to(dtypes[0]) if dtypes else plain
