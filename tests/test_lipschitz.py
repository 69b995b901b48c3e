"""Lipschitz bounds: never below the exact norm, close to it, and no attack gets inside the radius they prove."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import assay
from assay.attacks import DDN
from assay.certification.lipschitz import gram_bound, lipschitz_bound, lipschitz_radius, spectral_bound
from assay.core.errors import DataError, ModelError
from assay.models import Model
from assay.threats import Threat

seeds = st.integers(0, 10**6)
Bound = Callable[[nn.Module], float]


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a module with random weights in float64, without touching the global random state."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make().double().eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def matrix(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Return the linear part of an affine layer as a matrix (outputs, inputs)."""
    n = math.prod(shape)
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    return (layer(torch.eye(n, dtype=torch.float64).view(n, *shape)) - layer(zero)).flatten(1).T


def exact(layer: nn.Module, shape: tuple[int, ...]) -> float:
    return float(torch.linalg.matrix_norm(matrix(layer, shape), 2))


# ---------------------------------------------------------------------------------------------------- matrices


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 1e-150, 1e-9, 1.0, 1e9, 1e150]), seeds)
def test_gram_iteration_bounds_the_norm_of_any_matrix(m: int, n: int, size: float, seed: int) -> None:
    a = size * normal(3, m, n, seed=seed)
    norms = torch.linalg.matrix_norm(a, 2)
    bound = gram_bound(a)
    assert (bound >= norms * (1 - 1e-14)).all()
    assert (bound <= norms * 9 ** (1 / 2**11) * (1 + 1e-12)).all(), "rank^(1 / 2^(K + 1)) is the most it may add"


@given(seeds)
def test_gram_iteration_bounds_norms_that_are_attained_exactly(seed: int) -> None:
    """Powers of two times a permutation: the norm is known without any rounding."""
    g = torch.Generator().manual_seed(seed)
    size = 2.0 ** torch.randint(-40, 40, (8,), generator=g).double()
    a = torch.diag(size)[torch.randperm(8, generator=g)]
    assert float(gram_bound(a[None])) >= float(size.max())


def test_rounding_is_made_up_for() -> None:
    """Judged in rational numbers; a product in float64 without the slack falls below some of these norms."""
    rows = [torch.full((1, 1, n), 1 / n, dtype=torch.float64) for n in range(20_000, 20_040)]
    for row in rows:
        squared = row.shape[2] * Fraction(float(row[0, 0, 0])) ** 2
        assert Fraction(float(gram_bound(row, iterations=1))) ** 2 >= squared
    assert any(
        Fraction(float((row @ row.mT).sqrt())) ** 2 < row.shape[2] * Fraction(float(row[0, 0, 0])) ** 2 for row in rows
    )


@given(st.integers(1, 40), st.integers(1, 40), seeds)
def test_a_linear_layer(rows: int, columns: int, seed: int) -> None:
    layer = seeded(lambda: nn.Linear(columns, rows), seed)
    norm = exact(layer, (columns,))
    assert norm * (1 - 1e-13) <= spectral_bound(layer) <= norm * 1.01


# ------------------------------------------------------------------------------------------------- convolutions


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """Draw a convolution of one or two axes, and the shape of an input that it takes."""
    axes = draw(st.sampled_from([1, 2]))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    groups, kernel, dilation = draw(st.sampled_from([1, 1, 2])), each(1, 4), each(1, 3)
    size = each(3, 7)
    mode = draw(st.sampled_from(["zeros", "circular"]))
    padding = tuple(draw(st.integers(0, min(n, 4))) for n in size)
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    kind: Any = nn.Conv1d if axes == 1 else nn.Conv2d
    channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]
    make = lambda: kind(*channels, kernel, each(1, 3), padding, dilation, groups, True, mode)  # noqa: E731
    return seeded(make, draw(seeds)), (channels[0], *size)


def check_never_below(bound: Bound, case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    assert bound(layer) >= exact(layer, shape) * (1 - 1e-12), f"{layer} at {shape}"


@given(convolutions())
def test_a_convolution_with_any_setting(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    check_never_below(spectral_bound, case)


@given(convolutions(), st.integers(3, 6))
def test_few_frequencies_are_made_up_for(case: tuple[nn.Module, tuple[int, ...]], fineness: int) -> None:
    check_never_below(lambda layer: spectral_bound(layer, fineness=fineness), case)


@pytest.mark.parametrize("fineness", [3, 4, 7])
def test_a_maximum_between_the_points(fineness: int) -> None:
    step = math.pi / (3 * fineness)  # half of the way from one point to the next
    for odd in range(2 * fineness // 3 | 1, 3 * fineness, 2):
        layer = nn.Conv1d(1, 1, 4).double()
        layer.weight.data[:] = torch.cos(odd * step * torch.arange(4, dtype=torch.float64))
        check_never_below(lambda layer: spectral_bound(layer, fineness=fineness), (layer, (1, 300)))


SETTINGS = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 2, 2), (2, 2, 2, 1), (3, 0, 2, 2)]


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), SETTINGS)
def test_a_convolution_of_a_large_input_comes_close(stride: int, padding: int, dilation: int, groups: int) -> None:
    layer = seeded(lambda: nn.Conv1d(2, 4, 4, stride, padding, dilation, groups), 3)
    assert 1 <= spectral_bound(layer) / exact(layer, (2, 240)) <= 1.02


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_of_a_large_image_comes_close(stride: int) -> None:
    layer = seeded(lambda: nn.Conv2d(2, 4, 3, stride, 1), 3)
    assert 1 <= spectral_bound(layer) / exact(layer, (2, 20, 20)) <= 1.05


def test_a_circular_convolution_is_exact_up_to_the_frequencies_between_the_points() -> None:
    """All frequencies of a 16 x 16 image are among those asked about, so nothing but the factor can be on top."""
    layer = seeded(lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), 4)
    assert 1 <= spectral_bound(layer) / exact(layer, (3, 16, 16)) <= 1.05 / math.cos(math.pi / 16)


@pytest.mark.parametrize("make", [nn.ConvTranspose1d, nn.ConvTranspose2d])
@pytest.mark.parametrize(("stride", "padding", "extra", "groups"), [(1, 0, 0, 1), (2, 1, 1, 2), (3, 1, 2, 1)])
def test_a_transposed_convolution(make: Any, stride: int, padding: int, extra: int, groups: int) -> None:
    layer = seeded(lambda: make(2, 4, 3, stride, padding, extra, groups), 5)
    shape = (2, 6) if make is nn.ConvTranspose1d else (2, 6, 6)
    norm = exact(layer, shape)
    assert norm <= spectral_bound(layer) <= 1.3 * norm


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_same_padding_of_an_even_kernel() -> None:
    for mode in ("zeros", "circular"):
        layer = seeded(lambda mode=mode: nn.Conv2d(1, 2, 4, padding="same", padding_mode=mode), 6)
        check_never_below(spectral_bound, (layer, (1, 5, 6)))


def one_step_of_power_iteration(layer: nn.Module) -> float:
    """The usual estimate, which approaches the norm from below."""
    w = layer.weight.detach().flatten(1)
    v = w.T @ (w @ torch.ones(w.shape[1], dtype=w.dtype))
    return float((w @ (v / v.norm())).norm())


def points_without_what_lies_between(layer: nn.Module) -> float:
    """The largest norm of the symbol at four frequencies an axis, which misses the maximum."""
    w = layer.weight.detach().flatten(2)
    at = torch.cartesian_prod(*(torch.arange(k).double() for k in layer.kernel_size)).view(w.shape[2], -1)
    angles = itertools.product(*[[0, math.pi / 2, math.pi, 3 * math.pi / 2]] * at.shape[1])
    phases = (torch.exp(-1j * (at @ torch.tensor(a, dtype=torch.float64))) for a in angles)
    return max(float(torch.linalg.matrix_norm(w.to(p.dtype) @ p, 2)) for p in phases)


@pytest.mark.parametrize("unsound", [one_step_of_power_iteration, points_without_what_lies_between])
def test_unsound_estimates_are_caught(unsound: Bound) -> None:
    layer = nn.Conv1d(1, 1, 4, padding=3).double()
    layer.weight.data[:] = torch.cos(math.pi / 4 * torch.arange(4))  # loudest between the points
    case = layer, (1, 60)
    check_never_below(spectral_bound, case)
    with pytest.raises(AssertionError, match="Conv1d"):
        check_never_below(unsound, case)


def test_power_iteration_fails_on_a_linear_layer_too() -> None:
    case = seeded(lambda: nn.Linear(6, 4), 8), (6,)
    check_never_below(spectral_bound, case)
    with pytest.raises(AssertionError, match="Linear"):
        check_never_below(one_step_of_power_iteration, case)


# ------------------------------------------------------------------------------------------------------- chains


AFFINE = {
    "batch norm": (lambda: moved(nn.BatchNorm2d(3)), (3, 4, 4)),
    "average pooling": (lambda: nn.AvgPool2d(2), (2, 6, 6)),
    "with overlaps": (lambda: nn.AvgPool2d(3, 1, 1), (2, 5, 5)),
    "with cut windows": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (1, 6, 6)),
    "along one axis": (lambda: nn.AvgPool1d(3, 2), (2, 9)),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d((1, 3)), (2, 4, 6)),
}

OTHERS = {
    "max pooling": (lambda: nn.MaxPool2d(2), (2, 6, 6)),
    "max pooling with overlaps": (lambda: nn.MaxPool2d(3, 1), (1, 6, 6)),
    "max pooling with dilation": (lambda: nn.MaxPool1d(3, 2, dilation=2), (1, 11)),
    "max pooling without channels": (lambda: nn.MaxPool2d(3, 1), (6, 6)),
    **{
        type(f).__name__: (lambda f=f: f, (40,))
        for f in (nn.ReLU(True), nn.ReLU6(), nn.Hardtanh(), nn.Tanh(), nn.Softsign(), nn.Sigmoid(), nn.SiLU())
    },
    "GELU": (nn.GELU, (40,)),
    "GELU with tanh": (lambda: nn.GELU("tanh"), (40,)),
    "LeakyReLU": (lambda: nn.LeakyReLU(1.7), (40,)),
    "PReLU": (lambda: nn.PReLU(init=-1.5), (40,)),
    "ELU": (lambda: nn.ELU(2.0), (40,)),
}


def moved(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Give a batch normalisation statistics and weights of its own."""
    g = torch.Generator().manual_seed(9)
    for v in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
        v.copy_(torch.rand(v.shape, generator=g) * 2 + 0.1)
    return layer


def bound_of(layer: nn.Module, shape: tuple[int, ...]) -> float:
    return lipschitz_bound(Model(layer), shape)


@pytest.mark.parametrize("name", AFFINE)
def test_an_affine_layer_against_its_matrix(name: str) -> None:
    make, shape = AFFINE[name]
    layer = seeded(make, 0)
    norm = exact(layer, shape)
    assert norm * (1 - 1e-12) <= bound_of(layer, shape) <= (3 if "cut" in name else 1.3) * norm


@pytest.mark.parametrize("name", OTHERS)
def test_no_two_points_change_a_layer_by_more_than_its_bound(name: str) -> None:
    """Steps of many sizes; the steepest of them comes close to the bound of each function of single numbers."""
    make, shape = OTHERS[name]
    layer, bound = seeded(make, 0), bound_of(seeded(make, 0), shape)
    x = 3 * normal(3000, *shape, seed=1)
    d = normal(3000, *shape, seed=2)
    x[::2, ..., 0], d[::2, ..., 1:] = torch.linspace(-4, 4, 1500).view(-1, *[1] * (x.ndim - 2)), 0  # one number alone
    steps = 10.0 ** torch.linspace(-5, 0.5, 50, dtype=torch.float64).repeat(60)
    d *= (steps / d.flatten(1).norm(dim=1)).view(-1, *[1] * len(shape))
    ratio = (layer(x + d) - layer(x)).flatten(1).norm(dim=1) / steps
    assert ratio.max() <= bound * (1 + 1e-9)
    assert len(shape) > 1 or ratio.max() >= 0.97 * bound


@pytest.mark.parametrize("settings", [(3, 1), (3, 2), (3, 2, 0, 2), (2, 3, 0, 3)])
def test_max_pooling_with_overlaps_attains_its_bound(settings: tuple[int, ...]) -> None:
    """One bright number is the maximum of all windows that it is in."""
    layer, x = nn.MaxPool1d(*settings), torch.eye(20, dtype=torch.float64)[6::6, None]
    assert float(layer(x).flatten(1).norm(dim=1).max()) == pytest.approx(bound_of(layer, (1, 20)))


def test_a_chain_multiplies_and_the_normalisation_counts() -> None:
    net = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.Linear(3, 2)), 10)
    plain, scaled = Model(net), Model(net, mean=[0.5], std=[0.2])
    product = spectral_bound(net[1][0]) * spectral_bound(net[2])
    assert lipschitz_bound(plain, (1, 2, 2)) == pytest.approx(product)
    assert lipschitz_bound(scaled, (1, 2, 2)) == pytest.approx(product / 0.2)
    channels = Model(nn.Flatten(), mean=[0.1, 0.2], std=[0.5, 0.25])
    assert lipschitz_bound(channels, (2, 2, 2)) == pytest.approx(4)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * super().forward(x)


def hooked() -> nn.Module:
    layer = nn.ReLU()
    layer.register_forward_hook(lambda _, __, out: 5 * out)
    return layer


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Twice, "1: Twice"),
        (lambda: Louder(4, 4), "1: Louder"),
        (hooked, "1: ReLU with hooks"),
        (lambda: nn.LayerNorm(4), "1: LayerNorm"),
        (lambda: nn.BatchNorm1d(4, track_running_stats=False), "statistics of the batch"),
        (lambda: nn.Flatten(0), "mixes samples"),
        (lambda: nn.Linear(5, 5), "inputs that fit 1"),
        (lambda: nn.Linear(4, 4).requires_grad_(False).apply(lambda m: m.weight.fill_(math.nan)), "finite weights"),
    ],
)
def test_what_is_not_known_is_refused_by_name(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        lipschitz_bound(Model(nn.Sequential(nn.Linear(4, 4), make())), (4,))


def test_other_refusals() -> None:
    with pytest.raises(ModelError, match="Conv2d with padding 'reflect'"):
        spectral_bound(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ModelError, match="a callable"):
        lipschitz_bound(Model(lambda x: x), (4,))
    with pytest.raises(ModelError, match="ReLU at the end"):
        lipschitz_radius(Model(nn.Sequential(nn.Linear(4, 2), nn.ReLU())), torch.zeros(1, 4), torch.zeros(1).long())
    with pytest.raises(DataError, match="labels from 0 to 1"):
        lipschitz_radius(Model(nn.Linear(4, 2)), torch.zeros(1, 4), torch.tensor([2]))
    with pytest.raises(ModelError, match="windows that overlap"):
        lipschitz_bound(Model(nn.AdaptiveAvgPool2d(2)), (1, 5, 5))
    with pytest.raises(ValueError, match="at least 3"):
        spectral_bound(nn.Conv2d(1, 1, 3), fineness=2)


# -------------------------------------------------------------------------------------------------------- radii


@given(seeds, st.sampled_from([None, 0.3]))
def test_the_radius_of_a_linear_model_of_two_classes_is_the_distance_to_its_boundary(
    seed: int, std: float | None
) -> None:
    net = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), seed)
    x = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model = Model(net, mean=None if std is None else 0.4, std=std)
    z = model(x)
    y = z.argmax(1)
    w = net[1].weight.detach()
    distance = (z[:, 0] - z[:, 1]).abs().detach() / (w[0] - w[1]).norm() * (std or 1)
    radius = lipschitz_radius(model, x, y)
    assert radius.shape == (5,)
    assert (radius <= distance).all()
    torch.testing.assert_close(radius, distance, rtol=1e-9, atol=1e-12)
    assert (lipschitz_radius(model, x, 1 - y) == 0).all(), "no radius where the model is wrong"


def test_classes_with_the_same_weights_are_told_apart_by_their_bias_alone() -> None:
    net = nn.Linear(2, 2)
    nn.init.ones_(net.weight)
    net.bias.data = torch.tensor([1.0, 0.0])
    radius = lipschitz_radius(Model(net), torch.zeros(2, 2), torch.tensor([0, 1]))
    assert radius.tolist() == [math.inf, 0.0]


def test_a_margin_that_rounding_made_proves_nothing() -> None:
    """In exact arithmetic the hidden number is 1 and class 1 wins; in float64 it is 0 where 2^53 + 1 comes first."""
    found = []
    for w in itertools.permutations([2.0**53, 1.0, -(2.0**53)]):
        net = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 2)).double()
        net[0].weight.data[:] = torch.tensor(w)
        net[1].weight.data, net[1].bias.data = torch.tensor([[-1.0], [0.0]]).double(), torch.tensor([0.5, 0.0]).double()
        x = torch.ones(1, 3, dtype=torch.float64)
        found.append(int(net(x).argmax()))
        assert lipschitz_radius(Model(net), x, torch.tensor([0])) == 0
    assert 0 in found, "no order of the terms goes wrong"


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(4 * 9, 3),
    )


def test_no_attack_gets_inside_the_radius() -> None:
    model = Model(seeded(small_net, 11).float(), mean=0.3, std=0.5)
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(11))
    before = x.clone()
    y = model(x).argmax(1)
    radius = lipschitz_radius(model, x, y)
    assert torch.equal(x, before)
    assert not model.module.training
    assert (radius > 0).all()
    r = DDN(steps=200)(model, x, y, Threat("l2"), seed=0)
    assert r.success.any()
    assert (r.size[r.success] > radius[r.success]).all()
    assert (r.size[r.success] < 20 * radius[r.success]).any(), "a radius that says something"


def test_the_radius_does_not_depend_on_the_batch() -> None:
    model = Model(seeded(small_net, 12))
    x = normal(300, 1, 8, 8, seed=12).sigmoid()
    y = model(x).argmax(1)
    torch.testing.assert_close(lipschitz_radius(model, x, y)[:7], lipschitz_radius(model, x[:7], y[:7]))


def test_the_demo_model_of_plain_training() -> None:
    model, data = assay.load_model("demo:mnist-plain"), assay.load_data("demo:mnist", limit=32)
    x, y = next(iter(data))
    radius = lipschitz_radius(model, x, y)
    r = DDN(steps=50)(model, x, y, Threat("l2"), seed=0)
    right = model(x).argmax(1) == y
    assert ((radius > 0) == right).all()
    assert (r.size[r.success & right] > radius[r.success & right]).all()
