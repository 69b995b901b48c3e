"""A zoo of networks that mask their gradients, each after a published defence that is broken, and controls that do not.

Most wrap the plain demo network, which no attack of size 0.3 leaves standing; a few are trained here in seconds, on
the demo images behind the first thousand. ``bound`` is an upper bound on the robust accuracy over the first
hundred images, measured by an attack that sees through the mask (``scripts/calibrate_diagnostics.py --bounds``).
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import assay
from assay.models.demo.nets import mnist_cnn

HELD_OUT = 1000
"""The first images are for evaluation; training sees those behind them."""


@dataclass(frozen=True)
class Animal:
    """A network, the threat that it claims to withstand, and the robust accuracy that it has at most."""

    name: str
    build: Callable[[], nn.Module]
    threat: str
    bound: float


def plain() -> nn.Module:
    return assay.load_model("demo:mnist-plain").net


def robust() -> nn.Module:
    return assay.load_model("demo:mnist-robust").net


class Around(nn.Module):
    """A function of a network and x."""

    def __init__(self, net: nn.Module, step: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.step = net, step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.net, x)


def around_plain(step: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Around(plain(), step)


# ---------------------------------------------------------------- outputs that saturate


def reverse_sigmoid(net: nn.Module, x: Tensor) -> Tensor:
    """Perturb probabilities where they are certain (Lee, Edwards, Molloy & Su 2018, arXiv:1806.00054, eq. 4)."""
    p = net(x).softmax(1).clamp(1e-7, 1 - 1e-7)
    q = p - 0.7 * (torch.sigmoid(0.2 * torch.logit(p)) - 0.5)
    q = q.clamp_min(1e-7)
    return q / q.sum(1, keepdim=True)


def votes(net: nn.Module, x: Tensor) -> Tensor:
    """Three shifted looks vote; what they say besides is too small to matter."""
    looks = [net(x.roll(shift, 3)) for shift in (-1, 0, 1)]
    return sum(F.one_hot(z.argmax(1), 10).float() * 10 + z * 1e-6 for z in looks)


# ---------------------------------------------------------------- steps without a gradient


class Jpeg(nn.Module):
    """Saves and loads each image as JPEG, outside torch (Guo et al. 2018, arXiv:1711.00117)."""

    def __init__(self, quality: int = 60) -> None:
        super().__init__()
        self.quality = quality

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.one(v) for v in (x.detach() * 255).round().to(torch.uint8)]).to(x)

    def one(self, v: Tensor) -> Tensor:
        file = io.BytesIO()
        Image.fromarray(v[0].numpy()).save(file, "JPEG", quality=self.quality)
        return torch.from_numpy(np.asarray(Image.open(file), np.float32).copy() / 255)[None]


class Steps(torch.autograd.Function):
    """Rounding with a backward pass of zeros, as a user would write it."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return torch.zeros_like(g)


def detached(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return net(x)


def halved(net: nn.Module, x: Tensor) -> Tensor:
    """Cut in the middle: what the second layer sees is rounded by numpy."""
    layers = list(net)
    h = layers[1](layers[0](x))
    h = torch.from_numpy(np.round(h.detach().numpy() * 8) / 8)
    return nn.Sequential(*layers[2:])(h)


def thermometer(x: Tensor, levels: int = 15) -> Tensor:
    """Write each value as the bits x > k / levels (Buckman et al. 2018)."""
    at = (torch.arange(levels) + 0.5) / levels
    return (x[:, :, None] > at.view(1, 1, -1, 1, 1)).to(x.dtype).flatten(1, 2)


def coded(net: nn.Module, x: Tensor) -> Tensor:
    return net(thermometer(x))


# ---------------------------------------------------------------- gradients that mislead


class TopShare(nn.Module):
    """k-winners-take-all over a whole layer (Xiao, Zhong & Zheng 2020, arXiv:1905.10510)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, int(self.share * flat.shape[1])), 1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


def winners(share: float = 0.1) -> nn.Sequential:
    net = mnist_cnn()
    for i in (1, 3, 6):
        net[i] = TopShare(share)
    return net


def ripples(net: nn.Module, x: Tensor) -> Tensor:
    """Waves on the input, too small to see and too steep to follow."""
    return net(x + torch.sin(400 * x) / 200)


def many_sigmoids(net: nn.Module, x: Tensor) -> Tensor:
    """Steep soft steps, one after another: a slope that vanishes nearly everywhere."""
    for _ in range(3):
        x = torch.sigmoid(24 * (x - 0.5))
    return net(x)


# ---------------------------------------------------------------- randomness


def resized(net: nn.Module, x: Tensor) -> Tensor:
    """Shrink by a random factor and put somewhere (Xie et al. 2018, arXiv:1711.01991)."""
    side = int(torch.randint(22, 29, ()))
    left, top = (int(v) for v in torch.randint(0, 28 - side + 1, (2,)))
    small = F.interpolate(x, (side, side), mode="nearest")
    return net(F.pad(small, (left, 28 - side - left, top, 28 - side - top)))


def noisy(net: nn.Module, x: Tensor) -> Tensor:
    return net(x + 0.2 * torch.randn_like(x))


def dropping(net: nn.Module, x: Tensor) -> Tensor:
    """Dropout that stays on (as in stochastic activation pruning)."""
    layers = list(net)
    for layer in layers:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            x = F.dropout(x, 0.3, training=True)
    return x


# ---------------------------------------------------------------- training


@cache
def pictures() -> tuple[Tensor, Tensor]:
    """Return the images and labels that training sees."""
    data = assay.load_data("demo:mnist")
    rows = range(HELD_OUT, len(data))
    return data.batch(rows), data.labels[list(rows)]


def train(net: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor, float], Tensor], epochs: int) -> nn.Module:
    """Minimise a loss of net, images, labels, and the share of training that is done."""
    x, y = pictures()
    torch.manual_seed(0)
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    batches = len(x) // 100
    for step in range(epochs * batches):
        if step % batches == 0:
            order = torch.randperm(len(x))
        rows = order[step % batches * 100 :][:100]
        optimiser.zero_grad()
        loss(net, x[rows], y[rows], step / (epochs * batches)).backward()
        optimiser.step()
    return net.eval()


def ordinary(net: nn.Module, x: Tensor, y: Tensor, done: float) -> Tensor:
    return F.cross_entropy(net(x), y)


@cache
def distilled(temperature: float = 50.0) -> nn.Module:
    """Defensive distillation (Papernot et al. 2016, arXiv:1511.04508): trained at a temperature, used at 1."""
    torch.manual_seed(0)
    teacher = train(mnist_cnn(), lambda net, x, y, _: F.cross_entropy(net(x) / temperature, y), 5)

    def imitate(net: nn.Module, x: Tensor, y: Tensor, done: float) -> Tensor:
        with torch.no_grad():
            soft = (teacher(x) / temperature).softmax(1)
        return F.cross_entropy(net(x) / temperature, soft)

    return train(mnist_cnn(), imitate, 5)


@cache
def single_step(eps: float = 0.3) -> nn.Module:
    """Adversarial training by one step, which ends in catastrophic overfitting (Wong et al. 2020, arXiv:2001.03994)."""

    def loss(net: nn.Module, x: Tensor, y: Tensor, done: float) -> Tensor:
        now = eps * min(1.0, 4 * done)
        x.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
        return F.cross_entropy(net((x + now * grad.sign()).clamp(0, 1).detach()), y)

    torch.manual_seed(0)
    return train(mnist_cnn(), loss, 12)


@cache
def few_winners() -> nn.Module:
    torch.manual_seed(0)
    return train(winners(), ordinary, 4)


@cache
def on_thermometers() -> nn.Module:
    torch.manual_seed(0)
    net = mnist_cnn()
    net[0] = nn.Conv2d(15, 16, 4, stride=2, padding=1)
    return train(Around(net, coded), ordinary, 4)


@cache
def pooled() -> nn.Module:
    """A control whose gradient at flat backgrounds promises too much: of many equal values, pooling follows one."""
    torch.manual_seed(0)
    parts = [
        (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)) for a, b in ((1, 16), (16, 32))
    ]
    return train(nn.Sequential(*parts[0], *parts[1], nn.Flatten(), nn.Linear(1568, 10)), ordinary, 2)


class Attentive(nn.Module):
    """A small transformer on patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(1, 32, 4, 4), nn.Parameter(0.1 * torch.randn(49, 32))
        self.mixer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixer(self.patches(x).flatten(2).mT + self.places).mean(1))


@cache
def attentive() -> nn.Module:
    torch.manual_seed(0)
    return train(Attentive(), ordinary, 6)


@cache
def certified(eps: float = 0.1) -> nn.Module:
    """A control: trained on interval bounds (Gowal et al. 2018, arXiv:1810.12715), eps growing over the first half."""

    def loss(net: nn.Module, x: Tensor, y: Tensor, done: float) -> Tensor:
        now = eps * min(1.0, 2 * done)
        low, high = interval(net, (x - now).clamp_min(0), (x + now).clamp_max(1))
        own = F.one_hot(y, 10).bool()
        return 0.5 * F.cross_entropy(net(x), y) + 0.5 * F.cross_entropy(torch.where(own, low, high), y)

    torch.manual_seed(0)
    return train(mnist_cnn(), loss, 12)


def interval(net: nn.Module, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bound the outputs of a chain of layers over a box of inputs."""
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            middle, reach = (low + high) / 2, (high - low) / 2
            middle, reach = layer(middle), _spread(layer, reach)
            low, high = middle - reach, middle + reach
        else:
            low, high = layer(low), layer(high)
    return low, high


def _spread(layer: nn.Module, reach: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(reach, layer.weight.abs(), None, layer.stride, layer.padding)
    return F.linear(reach, layer.weight.abs())


MASKED = (
    Animal("logits-x100", around_plain(lambda net, x: net(x) * 100), "linf:0.1", 0.09),
    Animal("softmax", around_plain(lambda net, x: net(x).softmax(1)), "linf:0.1", 0.09),
    Animal("softmax-x50", around_plain(lambda net, x: (50 * net(x)).softmax(1)), "linf:0.1", 0.09),
    Animal("probabilities-as-logits", around_plain(lambda net, x: 7 * (9 * net(x)).softmax(1)), "linf:0.1", 0.09),
    Animal("reverse-sigmoid", around_plain(reverse_sigmoid), "linf:0.1", 0.09),
    Animal("argmax-votes", around_plain(votes), "linf:0.1", 0.14),
    Animal("distilled", distilled, "linf:0.1", 0.08),
    Animal("four-levels", around_plain(lambda net, x: net((x * 4).round() / 4)), "linf:0.3", 0.0),
    Animal("binary", around_plain(lambda net, x: net((x > 0.5).float())), "linf:0.3", 0.66),
    Animal("zero-backward", around_plain(lambda net, x: net(Steps.apply(x))), "linf:0.3", 0.0),
    Animal("jpeg", lambda: nn.Sequential(Jpeg(), plain()), "linf:0.1", 0.14),
    Animal("detached", around_plain(detached), "linf:0.2", 0.0),
    Animal("cut-inside", around_plain(halved), "linf:0.1", 0.04),
    Animal("thermometer", on_thermometers, "linf:0.2", 0.0),
    Animal("k-wta", few_winners, "linf:0.1", 0.59),
    Animal("ripples", around_plain(ripples), "linf:0.1", 0.09),
    Animal("sigmoids", around_plain(many_sigmoids), "linf:0.3", 0.65),
    Animal("single-step", single_step, "linf:0.3", 0.0),
    Animal("resize-pad", around_plain(resized), "linf:0.1", 0.29),
    Animal("noise", around_plain(noisy), "linf:0.1", 0.22),
    Animal("dropout", around_plain(dropping), "linf:0.1", 0.2),
)

CONTROLS = (
    Animal("plain", plain, "linf:0.1", 0.09),
    Animal("robust", robust, "linf:0.3", 0.9),
    Animal("certified", certified, "linf:0.1", 0.93),
    Animal("pooled", pooled, "linf:0.1", 0.08),
    Animal("attentive", attentive, "linf:0.05", 0.03),
)
