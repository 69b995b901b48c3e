"""Architectures: the published sizes, the beginning, what their parts compute, and proofs about them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import assay
from assay import nets
from assay.certification.lipschitz import lipschitz_bound, lipschitz_radius, spectral_bound
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.models.demo.nets import mnist_cnn

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> Any:
    """Build a network without touching the global random state."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make()


def images(*shape: int, n: int = 3, seed: int = 0) -> Tensor:
    return Draws.of(seed, torch.arange(n)).uniform(shape)


def settled(net: nn.Module, shape: tuple[int, ...]) -> Any:
    """Give batch normalisation the statistics of a batch, and return the network in eval mode."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.momentum = 1.0
    net.train()(images(*shape, n=8, seed=5))
    return net.eval()


# ---------------------------------------------------------------------------------------------------- named nets


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("mnist_small", MNIST, 166_406),
        ("mnist_wide", MNIST, 3_274_634),
        ("mnist_trades", MNIST, 312_202),
        ("cnn7", MNIST, 13_259_338),
        ("cifar_cnn7", CIFAR, 17_192_650),
        ("preact_resnet18", CIFAR, 11_172_170),
        ("wide_resnet28_10", CIFAR, 36_479_194),
        ("wide_resnet34_10", CIFAR, 46_160_474),
    ],
)
def test_a_named_net_has_its_published_size(name: str, shape: tuple[int, ...], parameters: int) -> None:
    with torch.device("meta"):  # shapes without numbers
        net = getattr(nets, name)().eval()
        assert net(torch.empty(2, *shape)).shape == (2, 10)
    assert sum(p.numel() for p in net.parameters()) == parameters


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mnist_small": (nets.mnist_small, MNIST),
    "mnist_small smooth": (lambda: nets.mnist_small(1, 17, 3, "softplus:5"), (1, 17, 17)),
    "mnist_wide": (lambda: nets.mnist_wide(2, 9, 4, "silu"), (2, 9, 9)),
    "cnn7": (lambda: nets.cnn7(1, 3, 5), (1, 3, 3)),
    "cifar_cnn7": (lambda: nets.cifar_cnn7(3, 8, 5, "gelu"), (3, 8, 8)),
    "preact_resnet18": (lambda: nets.preact_resnet18(width=2), (3, 8, 8)),
    "preact_resnet18 denoised": (lambda: nets.preact_resnet18(2, width=4, denoise=True, blur=True), (2, 16, 16)),
    "mnist_lipschitz": (lambda: nets.mnist_lipschitz(2, 8, 4), (2, 8, 8)),
    "mnist_lipschitz sorted": (lambda: nets.mnist_lipschitz(2, 8, 4, nets.MaxMin), (2, 8, 8)),
}


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_the_input_and_every_parameter(name: str) -> None:
    make, shape = SMALL[name]
    net, x = seeded(make).train(), images(*shape).requires_grad_()
    if "denoised" in name:
        for m in net.modules():
            if isinstance(m, nets.Denoise):  # it begins as the identity
                nn.init.ones_(m.mix[1].weight)
    (net(x) * torch.arange(1, 1 + net(x).shape[1])).pow(2).sum().backward()
    assert float(x.grad.abs().sum()) > 0  # type: ignore[union-attr]
    still = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@pytest.mark.parametrize("name", SMALL)
def test_in_eval_mode_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    make, shape = SMALL[name]
    net, x = settled(seeded(make), shape), images(*shape)
    assert torch.allclose(net(x)[1:2], net(x[1:2]), atol=1e-5, rtol=1e-5)


def test_the_demo_networks_are_mnist_small() -> None:
    small, demo = nets.mnist_small(), mnist_cnn()
    assert [*small.state_dict()] == [*demo.state_dict()]
    assert str(small) == str(demo)


def test_weights_begin_as_published() -> None:
    wide, trades, seven = (seeded(make) for make in (nets.mnist_wide, nets.mnist_trades, lambda: nets.cnn7(1, 8, 10)))
    assert float(wide[7].weight.detach().abs().max()) <= 0.2
    assert wide[7].weight.std().item() == pytest.approx(0.088, abs=0.001)  # 0.1, cut at 0.2
    assert (wide[7].bias == 0.1).all()
    assert trades[5].weight.std().item() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.05)
    assert not trades(images(*MNIST)).any()
    assert seven[4].weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / (64 * 9), rel=0.05)
    conv = seeded(lambda: nets.preact_resnet18(width=16))[1]
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.1)


def test_the_command_line_builds_them_by_name() -> None:
    assert isinstance(assay.load_model("py:assay.nets:mnist_small").module, nn.Module)


@pytest.mark.parametrize("name", ["mnist_small", "cnn7", "preact_resnet18", "mnist_lipschitz sorted"])
def test_bounds_follow_them_and_are_true(name: str) -> None:
    """A margin that interval arithmetic proves is no larger than any that is found."""
    make, shape = SMALL[name]
    net, x, eps = settled(seeded(make), shape), images(*shape, n=2), 1e-4
    y = net(x).argmax(1)
    proof = assay.certify(net, x, y, f"linf:{eps}", method="ibp")
    for seed in range(5):
        z = net((x + eps * Draws.of(seed, torch.arange(2)).signs(shape)).clamp(0, 1)).detach()
        margins = z.gather(1, y[:, None]) - z
        others = torch.ones_like(z).scatter(1, y[:, None], 0).bool()
        assert (proof.margins[others] <= margins[others] + 1e-6).all()
    assert proof.margins[others].isfinite().all()
    assert assay.certify(net, x, y, "linf:1e-7", method="crown", arithmetic="real").certified.all()


# --------------------------------------------------------------------------------------------------------- parts


def test_normalisation_is_by_channel() -> None:
    x = torch.tensor([0.5, 0.25]).view(1, 2, 1, 1)
    assert nets.Normalise((0.5, 0.5), (0.5, 0.25))(x).flatten().tolist() == [0.0, -1.0]
    assert nets.Normalise.usual(5)(torch.tensor([[[[0.0, 1.0]]]])).flatten().tolist() == [-1.0, 1.0]
    assert {"0.mean", "0.std"} <= nets.preact_resnet18(width=1).state_dict().keys(), "it is stored with the weights"


@pytest.mark.parametrize("wrong", ["rleu", "softplus:0", "softplus:x", "silu:3"])
def test_an_activation_that_does_not_exist_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match=r"softplus|Known"):
        nets.activation_of(wrong)


def test_activations_by_name() -> None:
    v = torch.tensor([-2.0, 0.0, 3.0])
    assert nets.activation_of("abs")(v).tolist() == [2.0, 0.0, 3.0]
    assert nets.activation_of("softplus:4")(v)[1].item() == pytest.approx(math.log(2) / 4)
    assert isinstance(nets.activation_of(nn.Tanh), nn.Tanh)


def test_blur_pool_is_a_binomial_mean_of_neighbours() -> None:
    row = torch.tensor([0.0, 4.0, 8.0, 0.0, 0.0])
    x = row.expand(1, 2, 5, 5)
    assert nets.BlurPool(2)(x)[0, 1].tolist() == [[2.0, 5.0, 0.0]] * 3  # (4 + 0 + 4) / 4, (4 + 16 + 0) / 4
    constant = torch.full((1, 2, 7, 4), 0.7)
    assert torch.allclose(nets.BlurPool(2, stride=3, taps=4)(constant), torch.full((1, 2, 3, 2), 0.7))
    with pytest.raises(UsageError, match="one tap"):
        nets.BlurPool(2, taps=0)


def test_blur_pool_forgives_shifts_of_a_pixel() -> None:
    """The checkerboard that plain subsampling turns white or black becomes grey wherever it lies."""
    board = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).tile(4, 4)[None, None]
    assert torch.allclose(nets.BlurPool(1)(board), nets.BlurPool(1)(board.roll(1, 3)))


def denoiser(kind: str) -> nets.Denoise:
    """Return a block of one channel that is x + non-local mean."""
    block = nets.Denoise(1, kind, embedding=0).eval()
    for weight in (block.mix[0].weight, block.mix[1].weight):
        nn.init.ones_(weight)
    block.mix[1].eps = 0.0  # type: ignore[assignment]
    return block


def test_feature_denoising_adds_the_mean_over_all_places_that_are_alike() -> None:
    x = torch.tensor([[[[0.0, 2.0]]]])
    weight = math.exp(4) / (1 + math.exp(4))
    gaussian = denoiser("gaussian")(x).flatten()  # place 0 is alike to all: the plain mean, 1
    assert gaussian.tolist() == pytest.approx([0 + 1, 2 + 2 * weight])
    assert denoiser("dot")(x).flatten().tolist() == pytest.approx([0, 2 + 4 * 2 / 2])
    with pytest.raises(UsageError, match="gaussian, dot"):
        nets.Denoise(1, "median")


@pytest.mark.parametrize("kind", ["gaussian", "dot"])
def test_feature_denoising_begins_as_the_identity(kind: str) -> None:
    x = images(6, 3, 4)
    assert torch.equal(seeded(lambda: nets.Denoise(6, kind))(x), x)


# ----------------------------------------------------------------------------------------------------- 1-Lipschitz


@torch.no_grad()
def norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Return the spectral norm of an affine layer on inputs of a shape, from its matrix in float64."""
    n = math.prod(shape)
    columns = layer(torch.eye(n, dtype=torch.float64).view(n, *shape)) - layer(
        torch.zeros(1, *shape, dtype=torch.float64)
    )
    return float(torch.linalg.matrix_norm(columns.flatten(1), 2))


def shaken(layer: nn.Module, seed: int, size: float) -> nn.Module:
    """Move the free weights: what training does, and more."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(seed)
        for p in layer.parameters():
            p.add_(size * torch.randn_like(p))
    return layer


@settings(max_examples=40)
@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2),
    st.sampled_from([0.0, 0.1, 10.0]), st.integers(0, 10**6),
)  # fmt: skip
def test_an_almost_orthogonal_convolution_is_1_lipschitz(
    inputs: int, outputs: int, taps: int, stride: int, padding: int, size: float, seed: int
) -> None:
    kernel = max(taps, stride)
    conv = seeded(lambda: nets.AOLConv2d(inputs, outputs, kernel, stride, padding).double(), seed)
    assert norm(shaken(conv, seed, size), (inputs, 5, 6)) <= 1 + 1e-12


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 0.1, 10.0]), st.integers(0, 10**6))
def test_an_almost_orthogonal_linear_layer_is_1_lipschitz(inputs: int, outputs: int, size: float, seed: int) -> None:
    layer = seeded(lambda: nets.AOLLinear(inputs, outputs).double(), seed)
    assert norm(layer, (inputs,)) == pytest.approx(1), "orthogonal at the beginning"
    assert norm(shaken(layer, seed, size), (inputs,)) <= 1 + 1e-12


def test_weights_without_any_size_stay_finite() -> None:
    layer = nets.AOLLinear(3, 2)
    nn.init.zeros_(layer.parametrizations.weight.original)
    assert layer(torch.ones(1, 3)).tolist() == [[0.0, 0.0]]


def test_a_convolution_begins_as_an_isometry() -> None:
    conv = seeded(lambda: nets.AOLConv2d(2, 8, 4, stride=2, padding=1))
    x = images(2, 6, 6)
    assert torch.allclose(conv(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    with pytest.raises(UsageError, match="skip inputs"):
        nets.AOLConv2d(1, 1, 2, stride=3)


def test_an_orthogonal_layer_has_orthonormal_rows() -> None:
    w = shaken(seeded(lambda: nets.orthogonal_linear(7, 4)), 0, 0.3).weight
    assert torch.allclose(w @ w.T, torch.eye(4), atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_group_sort_sorts_neighbouring_channels(size: int) -> None:
    x = torch.tensor([[1.0, 5.0, 3.0, 2.0, 2.5, 0.0]])
    wanted = {2: [5.0, 1.0, 3.0, 2.0, 2.5, 0.0], 3: [5.0, 3.0, 1.0, 2.5, 2.0, 0.0]}[size]
    assert nets.GroupSort(size)(x).tolist() == [wanted]
    assert nets.GroupSort(size)(x.view(1, 6, 1, 1).expand(1, 6, 2, 3))[0, :, 1, 2].tolist() == wanted
    images = x.view(1, 6, 1, 1).repeat(2, 1, 2, 3).contiguous(memory_format=torch.channels_last)
    assert nets.GroupSort(size)(images)[1, :, 0, 1].tolist() == wanted, "in any memory format"


@pytest.mark.parametrize("size", [0.0, 0.02])
@pytest.mark.parametrize("name", ["mnist_lipschitz", "mnist_lipschitz sorted"])
def test_no_pair_of_inputs_violates_the_certificate(name: str, size: float) -> None:
    """Logits move no more than inputs, so margins no more than sqrt(2) of it: near and far, and along gradients."""
    make, shape = SMALL[name]
    net, x = shaken(seeded(make), 3, size), images(*shape, n=64)
    for length in (1.0, 0.01):
        moved = x + length * Draws.of(7, torch.arange(64)).normal(shape)
        change, distance = (net(moved) - net(x)).detach(), (moved - x).flatten(1).norm(dim=1)
        margins = change[:, :, None] - change[:, None, :]
        assert (change.norm(dim=1) <= distance * (1 + 1e-4)).all()
        assert (margins.abs().amax((1, 2)) <= math.sqrt(2) * distance * (1 + 1e-4)).all()
    steepest = torch.linalg.matrix_norm(torch.func.vmap(torch.func.jacrev(lambda v: net(v[None])[0]))(x).flatten(2), 2)
    assert (steepest <= 1 + 1e-5).all()
    assert size or (steepest > 0.3).all(), "it begins near an isometry, where the bound has something to say"


def test_the_bound_of_lipschitz_layers_agrees() -> None:
    """It reads both forms. Its grid of frequencies makes it up to 2 % too large for each convolution."""
    net = seeded(lambda: chain(2, 8, 4))
    bound = lipschitz_bound(assay.Model(nets.fused(net)), (2, 6, 6))
    assert bound <= 1.05
    assert lipschitz_bound(assay.Model(net), (2, 6, 6)) == pytest.approx(bound, rel=1e-5)
    x = images(2, 6, 6)
    z = net(x).detach()
    top = z.topk(2).values
    radius = lipschitz_radius(assay.Model(nets.fused(net)), x, z.argmax(1))
    assert torch.allclose(radius, (top[:, 0] - top[:, 1]).double() / math.sqrt(2), rtol=0.05, atol=1e-5)


def chain(channels: int, width: int, classes: int) -> nn.Sequential:
    """Build a small network in the manner of ``mnist_lipschitz``, for 6 x 6 places."""
    return nn.Sequential(
        nets.AOLConv2d(channels, width, 4, stride=2, padding=1),
        nets.activation_of("abs"),
        nets.AOLConv2d(width, width, 3, padding=1),
        nets.activation_of("relu"),
        nn.Flatten(),
        nets.AOLLinear(width * 9, 16),
        nets.activation_of("abs"),
        nets.orthogonal_linear(16, classes),
    )


@pytest.mark.slow
def test_the_bound_of_mnist_lipschitz() -> None:
    assert lipschitz_bound(assay.Model(nets.fused(seeded(nets.mnist_lipschitz))), MNIST) <= 1.08


def test_lipschitz_layers_are_stored_and_loaded(tmp_path: Path) -> None:
    net, x = shaken(seeded(nets.mnist_lipschitz), 1, 0.01), images(*MNIST)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    loaded = assay.load_model(tmp_path / "net.safetensors", arch="assay.nets:mnist_lipschitz").module
    assert loaded is not None
    assert torch.allclose(loaded(x), net(x), atol=1e-6)


def test_fused_layers_are_plain_and_the_network_is_left_as_it_was() -> None:
    net, x = shaken(seeded(SMALL["mnist_lipschitz"][0]), 1, 0.1), images(2, 8, 8)
    before = net(x)
    plain = nets.fused(net)
    assert not any("parametrizations" in name for name in plain.state_dict())
    assert torch.allclose(plain(x), before, atol=1e-5)
    assert torch.equal(net(x), before)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert spectral_bound(plain[-1]) == pytest.approx(1, abs=1e-3)
