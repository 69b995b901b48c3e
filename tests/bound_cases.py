"""Operators in small networks, points of regions, and the check that no value leaves its bounds."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.certification.bounds import FLOAT32, REAL, Arithmetic, Bounds
from assay.certification.graph import Graph, Program, record
from assay.certification.methods import refine
from assay.certification.prover import differences
from assay.certification.region import Region
from assay.models import Model

aten = torch.ops.aten
CLASSES = 3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache  # so that a network finds a constant, and draws nothing
def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def draw(net: nn.Module, seed: int) -> nn.Module:
    """Draw all weights of a network anew, and the statistics of its normalisations, as data would leave them."""
    g = seeded(seed)
    with torch.no_grad():
        for name, t in [*net.named_parameters(), *net.named_buffers()]:
            if not t.is_floating_point():
                continue
            fan = max(1, t[0].numel()) if t.ndim > 1 else 1
            new = torch.randn(t.shape, generator=g) / math.sqrt(fan)
            t.copy_(new.abs() + 0.3 if name.endswith("running_var") else new)
    return net.eval()


class Net(nn.Module):
    """A function of 2 x - 1, or of x + 1/2 where it needs positive values, flat, and a linear layer to three logits."""

    def __init__(self, f: Callable[..., Any], shape: tuple[int, ...], positive: bool = False) -> None:
        super().__init__()
        self.f = f
        self.scale, self.shift = (1.0, 0.5) if positive else (3.0, -1.5)
        with torch.no_grad():
            self.last = nn.Linear(self.inner(torch.zeros(1, *shape)).shape[1], CLASSES)
        draw(self.last, 1)

    def inner(self, x: Tensor) -> Tensor:
        found = self.f(self.scale * x + self.shift)
        parts = found if isinstance(found, tuple | list) else (found,)
        return torch.cat([p.reshape(1, -1) for p in parts], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


@dataclass(frozen=True)
class Case:
    """A function and the shape of its input; ``layer`` builds a module instead, and ``positive`` keeps its input so."""

    name: str
    f: Callable[..., Any]
    shape: tuple[int, ...] = (5,)
    positive: bool = False

    def net(self) -> nn.Module:
        return Net(self.f, self.shape, self.positive).eval()


MAPS, LINE, SOLID = (2, 5, 4), (2, 6), (1, 3, 4, 3)
CIRCULAR = draw(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), 0)
NORMED, PLAIN = draw(nn.BatchNorm2d(2), 0), draw(nn.BatchNorm1d(5, affine=False), 0)


def conv(x: Tensor, *shape: int, **how: Any) -> Tensor:
    return {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(shape)](x, normal(*shape), normal(shape[0], seed=1), **how)


def transposed(x: Tensor, *shape: int, **how: Any) -> Tensor:
    of = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
    return of[len(shape)](x, normal(*shape), **how)


PLAINLY = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups
MASK = torch.tensor([True, False, True, False, False])
PAIR = torch.tensor([[3, 0], [1, 1]])

COPIES = [
    Case("view", lambda x: aten.view(x, [1, 20, 2])[:, 3:], MAPS),
    Case("_unsafe_view", lambda x: aten._unsafe_view(x, [1, 40]), MAPS),
    Case("reshape", lambda x: x.transpose(1, 2).reshape(1, 8, 5), MAPS),
    Case("flatten", lambda x: x.flatten(2).unflatten(2, (4, 5)), MAPS),
    Case("squeeze", lambda x: x.unsqueeze(1).squeeze(1)),
    Case("permute", lambda x: x.permute(0, 3, 1, 2), MAPS),
    Case("t", aten.t),
    Case("numpy_T", aten.numpy_T),
    Case("movedim", lambda x: x.movedim(1, 3).swapaxes(1, 2), MAPS),
    Case("expand", lambda x: x.unsqueeze(1).expand(1, 3, 5).expand_as(torch.zeros(1, 3, 5))),
    Case("slice", lambda x: x[:, 1::2].narrow(1, 0, 2)),
    Case("select", lambda x: x[:, 1].index_select(1, torch.tensor([2, 0])), MAPS),
    Case("cat", lambda x: torch.cat([x, -2 * torch.ones(1, 2), x], 1)),
    Case("concat", lambda x: aten.concat([x, x], 1)),
    Case("stack", lambda x: torch.stack([x, -x], 1)),
    Case("pad", lambda x: F.pad(x, (1, 2), value=-2.0)),
    Case("circular pad", lambda x: F.pad(x, (1, 1, 2, 0), mode="circular"), MAPS),
    Case("constant_pad_nd", lambda x: aten.constant_pad_nd(x, [1, 2], -3.0)),
    Case("reflection_pad1d", lambda x: aten.reflection_pad1d(x, [1, 2]), LINE),
    Case("reflection_pad2d", lambda x: aten.reflection_pad2d(x, [1, 2, 1, 0]), MAPS),
    Case("replication_pad1d", lambda x: aten.replication_pad1d(x, [1, 2]), LINE),
    Case("replication_pad2d", lambda x: aten.replication_pad2d(x, [1, 2, 1, 0]), MAPS),
    Case("mT", lambda x: x.mT, MAPS),
    Case("upsample_nearest1d", lambda x: F.interpolate(x, scale_factor=1.7), LINE),
    Case("upsample_nearest2d", lambda x: F.interpolate(x, size=(7, 9)), MAPS),
    Case("upsample_nearest3d", lambda x: F.interpolate(x, scale_factor=2), SOLID),
    Case("repeat", lambda x: x.repeat(1, 2).tile(1, 2)),
    Case("flip", lambda x: x.flip(1).roll(1, 1)),
    Case("pixel_shuffle", lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), (4, 2, 2)),
    Case("channel_shuffle", lambda x: F.channel_shuffle(x, 2), (4, 2, 2)),
    Case("ravel", lambda x: x.ravel()),
    Case("diagonal", lambda x: x.diagonal(0, 2, 3), MAPS),
    Case("unfold", lambda x: x.unfold(1, 2, 1)),
    Case("im2col", lambda x: F.unfold(x, 2, padding=1), MAPS),
    Case("index", lambda x: x[:, PAIR]),
    Case("gather", lambda x: x.gather(1, PAIR[:1])),
    Case("where", lambda x: torch.where(MASK, x, torch.tensor(-2.0)) + torch.where(MASK, -x, x)),
    Case("masked_fill", lambda x: x.masked_fill(MASK, -3.0)),
    Case("tril", lambda x: x.tril() + x.triu(1), (3, 3)),
    Case("rot90", lambda x: x.rot90(1, (2, 3)), MAPS),
    Case("repeat_interleave", lambda x: x.repeat_interleave(2, 1)),
    Case("view_as", lambda x: x.view_as(torch.zeros(1, 5, 1))),
    Case("index_fill", lambda x: x.index_fill(1, torch.tensor([1]), -2.0)),
    Case("fill", lambda x: _written(x)),  # noqa: PLW0108 (defined below)
    Case("slice_scatter", lambda x: _written_slice(x)),  # noqa: PLW0108
    Case("split", lambda x: x.split(2, 1)),
    Case("split_with_sizes", lambda x: aten.split_with_sizes(x, [1, 4], 1)),
    Case("chunk", lambda x: x.chunk(2, 1)),
    Case("unbind", lambda x: x.unbind(1)),
    Case("tensor_split", lambda x: x.tensor_split(2, 1)),
]


def _written(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = -2.0
    y[:, 1] += 1
    y[:, 2].copy_(-x[:, 3])
    return y


def _written_slice(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3] = -2 * x[:, 3:5]
    return y


IDENTICAL = [
    Case("clone", lambda x: x.clone().flip(1).mT.contiguous().detach()),
    Case("alias", lambda x: aten.alias(aten.lift_fresh_copy(aten.detach(x)))),
    Case("contiguous", lambda x: aten.contiguous(2 * x)),
    Case("detach_", lambda x: (2 * x).detach_()),
    Case("to", lambda x: x.double().float().to(torch.float64).type_as(x)),
    Case("double", lambda x: aten._to_copy(x, dtype=torch.float64).float()),
    Case("nn.Identity", nn.Identity()),
    Case("dropout", lambda x: F.dropout(x, 0.5, False) + F.alpha_dropout(x, 0.5, False)),
    Case("feature_dropout", lambda x: F.dropout2d(x, 0.5, False), MAPS),
    Case("feature_alpha_dropout", lambda x: F.feature_alpha_dropout(x, 0.5, False), MAPS),
    Case("native_dropout", lambda x: aten.native_dropout(x, 0.5, False)[0]),
    Case("like", lambda x: x + torch.ones_like(x) + torch.full_like(x, 2.0) - torch.zeros_like(x)),
    Case("new", lambda x: x + x.new_ones(5) + x.new_full((5,), 2.0) - x.new_zeros(5)),
]

SUMS = [
    Case("sum", lambda x: x.sum((2, 3)), MAPS),
    Case("sum of all", lambda x: x.sum((0, 1), keepdim=True) + x.mean(0)),
    Case("mean", lambda x: x.mean((1, 2), keepdim=True), MAPS),
    Case("sum in float64", lambda x: x.sum(1, dtype=torch.float64).float(), MAPS),
    Case("cumsum", lambda x: x.cumsum(1)),
    Case("col2im", lambda x: F.fold(x, (3, 3), 2), (4, 4)),
    Case("avg_pool1d", lambda x: F.avg_pool1d(x, 3, 2, 1), LINE),
    Case("avg_pool2d", lambda x: F.avg_pool2d(x, (3, 2), 2, 1, ceil_mode=True, count_include_pad=False), MAPS),
    Case("avg_pool2d by 5", lambda x: F.avg_pool2d(x, 2, divisor_override=5), MAPS),
    Case("avg_pool3d", lambda x: F.avg_pool3d(x, 2, 1), SOLID),
    Case("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 4), LINE),
    Case("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (3, None)), MAPS),
    Case("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 2), SOLID),
    Case("_adaptive_avg_pool2d", lambda x: aten._adaptive_avg_pool2d(x, [2, 3]), MAPS),
    Case("_adaptive_avg_pool3d", lambda x: aten._adaptive_avg_pool3d(x, [2, 3, 1]), SOLID),
    Case("upsample_linear1d", lambda x: F.interpolate(x, size=7, mode="linear"), LINE),
    Case("upsample_bilinear2d", lambda x: F.interpolate(x, size=(7, 9), mode="bilinear", align_corners=True), MAPS),
    Case("upsample_bilinear2d half", lambda x: F.interpolate(x, scale_factor=0.6, mode="bilinear"), MAPS),
    Case("upsample_bicubic2d", lambda x: F.interpolate(x, size=(7, 9), mode="bicubic"), MAPS),
    Case("upsample_bicubic2d less", lambda x: F.interpolate(x, scale_factor=0.7, mode="bicubic"), MAPS),
    Case("upsample_bicubic2d corners", lambda x: F.interpolate(x, (6, 3), mode="bicubic", align_corners=True), MAPS),
    Case("upsample_trilinear3d", lambda x: F.interpolate(x, scale_factor=1.5, mode="trilinear"), SOLID),
]

LAYERS = [
    Case("linear", lambda x: F.linear(x, normal(4, 5), normal(4))),
    Case("conv1d", lambda x: conv(x, 3, 2, 3, padding=1, stride=2), LINE),
    Case("conv2d", lambda x: conv(x, 3, 2, 3, 2, padding=(1, 0), dilation=(2, 1)), MAPS),
    Case("conv2d groups", lambda x: conv(conv(x, 4, 1, 3, 3, padding=1, groups=2), 4, 2, 2, 2, groups=2), MAPS),
    Case("conv2d same", lambda x: F.conv2d(x, normal(2, 2, 3, 3), padding="same"), MAPS),
    Case("_convolution", lambda x: aten._convolution(x, normal(2, 2, 3, 3), None, *PLAINLY, *[False] * 4), MAPS),
    Case("conv2d circular", CIRCULAR, MAPS),
    Case("conv3d", lambda x: conv(x, 2, 1, 2, 2, 2), SOLID),
    Case("convolution", lambda x: aten.convolution(x, normal(2, 2, 3, 3), None, [1], [1], [1], False, [0], 1), MAPS),
    Case("conv_transpose1d", lambda x: transposed(x, 2, 3, 3, stride=2), LINE),
    Case("conv_transpose2d", lambda x: transposed(x, 2, 2, 3, 3, stride=2, output_padding=1, groups=2), MAPS),
    Case("conv_transpose3d", lambda x: transposed(x, 1, 2, 2, 2, 2), SOLID),
    Case("matmul", lambda x: x @ normal(5, 3) + torch.matmul(normal(2, 4), x.view(1, 5, 1)[:, :4]).sum(1)),
    Case("mm", lambda x: torch.mm(x, normal(5, 3))),
    Case("mv", lambda x: torch.mv(normal(4, 5), x[0])),
    Case("bmm", lambda x: torch.bmm(x, normal(1, 4, 3)), (5, 4)),
    Case("addmm", lambda x: torch.addmm(normal(3), x, normal(5, 3), beta=2, alpha=-1.5)),
    Case("baddbmm", lambda x: torch.baddbmm(normal(1, 5, 3), x, normal(1, 4, 3), alpha=-1), (5, 4)),
    Case("einsum", lambda x: torch.einsum("bij,jk->bki", x, normal(4, 3)), (5, 4)),
    Case("batch_norm", NORMED, MAPS),
    Case("batch_norm plain", PLAIN),
    Case(
        "_native_batch_norm_legit_no_training",
        lambda x: aten._native_batch_norm_legit_no_training(
            x, normal(2), normal(2), normal(2), normal(2).abs(), 0.1, 1e-5
        )[0],
        MAPS,
    ),
]

ENTRYWISE = [
    Case("add", lambda x: torch.add(x, x.flip(1), alpha=-2) + 0.1 + normal(5)),
    Case("sub", lambda x: x - 2 * x.flip(1) - torch.sub(normal(5), x, alpha=3)),
    Case("aliases", lambda x: x.subtract(normal(5)).multiply(-3).divide(normal(5)).true_divide(3).negative()),
    Case("rsub", lambda x: 1 - x + torch.rsub(x, 2.0, alpha=-3) + torch.rsub(x, normal(5))),
    Case("neg", lambda x: -x),
    Case("mul", lambda x: -0.3 * x * normal(5) * torch.tensor([-1, 2, 0, -3, 1])),
    Case("products", lambda x: x * x.flip(1) + x * x),
    Case("broadcast product", lambda x: x * x.mean((2, 3), keepdim=True), MAPS),
    Case("div", lambda x: x / -0.7 / normal(5)),
    Case("quotient", lambda x: 2 / x + x / x.sum(1, keepdim=True) + normal(5) / x, positive=True),
    Case("relu", lambda x: F.relu(x) + F.relu(x.clone(), inplace=True)),
    Case("leaky_relu", lambda x: F.leaky_relu(x, 0.1) + F.leaky_relu(x, 1.5) + F.leaky_relu(x, -0.5)),
    Case("prelu", lambda x: F.prelu(x, torch.tensor([0.2, -0.4])), MAPS),
    Case("_prelu_kernel", lambda x: aten._prelu_kernel(x, torch.tensor([0.2]))),
    Case("rrelu", lambda x: F.rrelu(x, 0.1, 0.5)),
    Case("abs", lambda x: x.abs()),
    Case("clamp", lambda x: x.clamp(-0.3, 0.4) + x.clip(max=0.1) + x.clamp(min=-0.2) + x.clamp(0.5, -0.5)),
    Case("clamp by tensors", lambda x: x.clamp(min=0.1 * normal(5)) + x.clamp(torch.tensor(-0.1), torch.tensor(0.3))),
    Case("hardtanh", lambda x: F.hardtanh(x, max_val=0.6, min_val=-0.4) + F.relu6(5 * x)),
    Case("clamp_min", lambda x: aten.clamp_min(x, -0.2) + aten.clamp_max(x, 0.3)),
    Case("threshold", lambda x: F.threshold(x, 0.2, 0.2)),
    Case("softshrink", lambda x: F.softshrink(x, 0.3)),
    Case("maximum", lambda x: torch.maximum(x, x.flip(1)) + torch.minimum(normal(5), x)),
    Case("fmax", lambda x: torch.fmax(x, x.flip(1)) - torch.fmin(x, 2 * x.flip(1))),
    Case("max_pool1d", lambda x: F.max_pool1d(x, 3, 2, 1), LINE),
    Case("max_pool2d", lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True) + F.max_pool2d(x, 2, 2, (1, 1)), MAPS),
    Case("max_pool2d dilated", lambda x: F.max_pool2d(x, 2, (1, 2), dilation=(3, 1)), MAPS),
    Case("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 4), LINE),
    Case("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, (3, None)), MAPS),
    Case("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, (2, 3, 2)), SOLID),
    Case("max_pool3d", lambda x: F.max_pool3d(x, 2, 1), SOLID),
    *(
        Case(f"max_pool{d}d_with_indices", lambda x, d=d: getattr(aten, f"max_pool{d}d_with_indices")(x, [2] * d)[0], s)
        for d, s in ((2, MAPS), (3, SOLID))
    ),
    Case("max_pool1d_with_indices", lambda x: aten.max_pool1d_with_indices(x, [2])[0], LINE),
    Case("amax", lambda x: x.amax((1, 3)) - x.amin(1).amin(2), MAPS),
    Case("max", lambda x: x.max(1, True)[0] - x.min(1, keepdim=True)[0] + torch.max(x, x.flip(1)) - torch.min(x, -x)),
]

SMOOTH = [
    *(Case(name, getattr(torch, name)) for name in ("sigmoid", "tanh", "erf", "exp", "expm1", "square", "sin", "cos")),
    *(Case(name, getattr(F, name)) for name in ("silu", "mish", "elu", "selu", "celu", "hardswish", "hardsigmoid")),
    *(Case(name, getattr(torch, name), positive=True) for name in ("log", "log1p", "sqrt", "rsqrt", "reciprocal")),
    Case("gelu", lambda x: F.gelu(x) + F.gelu(2 * x, approximate="tanh")),
    Case("gelu far below", lambda x: F.gelu(x - 6)),
    Case("softplus", lambda x: F.softplus(x) + F.softplus(x, 2.0, 1.0)),
    Case("elu, celu", lambda x: F.elu(x, 0.5) + F.celu(x, 2.0)),
    Case("log_sigmoid", F.logsigmoid),
    Case("glu", lambda x: F.glu(x, 1), (2, 3)),
    Case("softsign", lambda x: F.softsign(x) + F.tanhshrink(x)),
    Case("pow", lambda x: x**2 + x**3 + x**4 + x**1),
    Case("powers", lambda x: x**0.5 + x**-1 + x**-2 + x**1.7 + x**-0.5 + (-x) ** -3, positive=True),
]

COMPOSITES = [
    Case("softmax", lambda x: F.softmax(x, 1) + F.softmax(8 * x, 1)),
    Case("softmax over channels", lambda x: F.softmax(x, 1), (3, 2, 2)),
    Case("softmax far apart", lambda x: F.softmax(200 * x, 1)),
    Case("_softmax", lambda x: aten._softmax(x, 1, False) + aten._log_softmax(x, 1, False)),
    Case("log_softmax", lambda x: F.log_softmax(x, 1)),
    Case("layer_norm", lambda x: F.layer_norm(x, (5, 4), normal(5, 4), normal(5, 4)) + F.layer_norm(x, (4,)), (5, 4)),
    Case("native_layer_norm", lambda x: aten.native_layer_norm(x, [5], normal(5), None, 1e-5)[0]),
    Case("group_norm", lambda x: F.group_norm(x, 2, normal(4), normal(4)), (4, 2, 2)),
    Case("native_group_norm", lambda x: aten.native_group_norm(x, normal(4), None, 1, 4, 4, 2, 1e-5)[0], (4, 2, 2)),
    Case("instance_norm", lambda x: F.instance_norm(x, weight=normal(2)), MAPS),
    Case("var", lambda x: x.var(1) + x.var((1,), keepdim=True)[:, 0] + torch.var(x, (1,), correction=0), MAPS),
    Case("std", lambda x: (x * torch.linspace(1, 9, 5)).std(1), positive=True),
    Case("matmul of two results", lambda x: x @ x.transpose(1, 2), (3, 4)),
    Case("batched", lambda x: torch.matmul(x[:, None], torch.stack([x, -x], 1).mT) + torch.bmm(x, x.mT), (3, 2)),
    Case("scaled_dot_product_attention", lambda x: F.scaled_dot_product_attention(x, x, 2 * x), (2, 3, 2)),
    Case("attention scale", lambda x: F.scaled_dot_product_attention(x, x.flip(2), x, scale=-0.3), (3, 2)),
]

CASES = [*COPIES, *IDENTICAL, *SUMS, *LAYERS, *ENTRYWISE, *SMOOTH, *COMPOSITES]


# ----------------------------------------------------------------------------------------------- points of a region


def recorded(net: nn.Module, shape: tuple[int, ...]) -> Program:
    return record(Model(net), shape)


def ball(shape: tuple[int, ...], norm: str, n: int = 4, seed: int = 0) -> Region:
    """Return regions of different sizes, some cut by the box."""
    x = torch.rand(n, *shape, generator=seeded(seed))
    most = {"linf": 0.3, "l2": 0.8, "l1": 1.5, "l0": 3.0}[norm]
    radius = torch.tensor([most * 3.0 ** -(k % 4) for k in range(n)]).ceil() if norm == "l0" else None
    sizes = torch.tensor([most * 4.0 ** -(k % 5) for k in range(n)]) if radius is None else radius
    return Region.ball(x, sizes, norm, 0.0, 1.0)


def points(region: Region, graph: Graph, seed: int = 0, count: int = 24) -> Iterator[Tensor]:
    """Yield points (n, *f) of each region: its centre, random ones, corners, and where gradients lead."""
    g = seeded(seed)
    yield region.x
    for k in range(count):
        direction = torch.randn(region.x.shape, generator=g, dtype=torch.float64)
        yield moved(region, direction, torch.rand((), generator=g) if k % 3 == 0 else torch.ones(()), g)
    for _ in range(6):
        z = moved(region, torch.randn(region.x.shape, generator=g, dtype=torch.float64), torch.ones(()), g)
        for _ in range(3):
            z = z.detach().requires_grad_()
            with torch.enable_grad():
                out = graph.logits(z)
                (slope,) = torch.autograd.grad((out * torch.randn(CLASSES, generator=g)).sum(), z)
            z = moved(region, slope, torch.ones(()), g)
            yield z.detach()


def moved(region: Region, direction: Tensor, share: Tensor, g: torch.Generator) -> Tensor:
    """Return centres moved as far as the region allows in the steepest way for a direction."""
    flat, x = direction.flatten(1), region.x.flatten(1)
    radius = region.radius[:, None]
    if region.norm == "linf":
        z = x + share * radius * flat.sign()
    elif region.norm == "l2":
        z = x + share * radius * flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30) * (1 - 1e-12)
    elif region.norm == "l1":
        weight = flat.abs() ** 4 if torch.rand((), generator=g) < 0.5 else (flat.abs() == flat.abs().amax(1, True))
        weight = weight.double() / weight.double().sum(1, keepdim=True).clamp_min(1e-30)
        z = x + share * radius * weight * flat.sign() * (1 - 1e-12)
    else:
        ranks = flat.abs().argsort(1, descending=True).argsort(1)
        z = torch.where(ranks < radius, (flat > 0).double(), x)
    z = z.clamp(0, 1)
    return z.view_as(region.x) if region.norm != "linf" else z.view_as(region.x).clamp(region.low, region.high)


# ------------------------------------------------------------------------------------------------- what must hold


def bounded(graph: Graph, region: Region, arithmetic: Arithmetic, method: str) -> Bounds:
    bounds = Bounds.by_intervals(graph, region, arithmetic)
    if method == "crown":
        refine(bounds)
    return bounds


@torch.no_grad()
def check_sound(program: Program, region: Region, seed: int = 0) -> None:
    """Check that no value of any step leaves its bounds, and no margin falls below its own, with either arithmetic.

    In real arithmetic the network is evaluated in float64, with the arithmetic of float32 in float32: without slack.
    """
    graph, n = program.graph(torch.float64), len(region)
    some = [*points(region, graph, seed)]
    for arithmetic, dtype in ((REAL, torch.float64), (FLOAT32, torch.float32)):
        as_deployed = program.graph(dtype)
        inside = [z if dtype == torch.float64 else rounded(z, region) for z in some]
        for method in ("crown-ibp", "crown"):
            bounds = bounded(graph, region, arithmetic, method)
            found = [as_deployed.values(z) for z in inside]
            for v, (low, high) in enumerate(bounds.pairs):
                if v in rough(graph) and arithmetic is FLOAT32:
                    continue
                values = torch.stack([f[v].double() for f in found])
                name = f"{graph.steps[v].name} ({v}) by {method} in {arithmetic.name} arithmetic"
                assert low.isfinite().all(), name
                assert high.isfinite().all(), name
                assert (values >= low).all(), f"{name}: below by {float((low - values).max())}"
                assert (values <= high).all(), f"{name}: above by {float((values - high).max())}"
            logits = torch.stack([f[-1].double().view(n, -1) for f in found])
            check_margins(graph, bounds, logits)


def rough(graph: Graph) -> set[int]:
    """Return the steps whose rounding is allowed for one step later."""
    return {step.inputs[0] for step in graph.steps if step.name == "rounding"}


def rounded(z: Tensor, region: Region) -> Tensor:
    """Return points in float32 that lie in the region: rounded towards the centre."""
    near = z.float()
    out = (near.double() - region.x).abs() > (z - region.x).abs()
    return torch.where(out, torch.nextafter(near, region.x.float()), near).clamp(0, 1)


def check_margins(graph: Graph, bounds: Bounds, logits: Tensor) -> None:
    n = len(bounds.region)
    for label in range(CLASSES):
        y = torch.full((n,), label)
        c = differences(y, CLASSES)
        margins = logits[..., label, None] - logits
        for since in (graph.out + 1, 0):  # by intervals, and all the way back
            low = bounds.lower(graph.out, c, since=since)
            most = 1e-13 * (1 + logits.abs().amax())  # a margin of exact logits is itself rounded
            assert (margins >= low - most).all(), f"margin below by {float((low - margins).max())} (since={since})"
