"""Bounds of whole networks: sound on random ones, exact where known, in order of strength; defects are caught."""

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from assay.certification import rules, windows
from assay.certification.bounds import FLOAT32, REAL, Arithmetic, Bounds
from assay.certification.graph import Builder, Graph, Program
from assay.certification.methods import Ascent, refine
from assay.certification.prover import Prover, differences
from assay.certification.region import Region
from assay.certification.rules import Affine, Lines, MaxPool, Pair, ReLU
from assay.models import Model
from bound_cases import CLASSES, Net, ball, check_margins, check_sound, draw, points, recorded, seeded

NORMS = ("linf", "l2", "l1", "l0")
seeds = st.integers(0, 10**6)


class Residual(nn.Module):
    """Convolutions with BatchNorm around a shortcut, and a second block whose shortcut has a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.again = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.down, self.short = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1, 2)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(x + self.again(self.second(x)))
        x = F.relu(self.down(x) + self.short(x))
        return self.last(x.mean((2, 3)))


class Pooled(nn.Module):
    """Overlapping maxima, means, kinks of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 2)
        self.slopes, self.last = nn.PReLU(4), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.leaky_relu(self.first(x), 0.1), 3, 2, 1)
        x = F.avg_pool2d(F.hardtanh(self.second(self.slopes(x))), 2, 1, 1)
        x = F.adaptive_avg_pool2d(torch.maximum(x, -2 * x).abs(), 2)
        return self.last(x.flatten(1).clamp(max=0.9))


class Smooth(nn.Module):
    """Smooth activations, gates, and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.last = nn.LayerNorm(6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.a(x)) * torch.sigmoid(self.b(x)) + torch.tanh(x)
        y = self.norm(x + F.silu(self.c(y)))
        return self.last(F.softplus(y) - F.elu(y.flip(1)))


class Attention(nn.Module):
    """One head over three tokens of four features, and a softmax over the features."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = x + F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.last(F.softmax(y.mean(1), 1) + y[:, 0])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "residual": (Residual, (2, 6, 6)),
    "pooled": (Pooled, (2, 6, 5)),
    "smooth": (Smooth, (6,)),
    "attention": (Attention, (3, 4)),
}


@cache
def captured(name: str) -> tuple[nn.Module, Program]:
    make, shape = NETS[name]
    net = draw(make(), 0)
    return net, recorded(net, shape)


def redrawn(name: str, seed: int) -> Program:
    """Return the recorded network with new weights."""
    net, program = captured(name)
    draw(net, seed)
    return Program(program.exported, program.shape)


# ----------------------------------------------------------------------------------------------------- soundness


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=4)
@given(seed=seeds, norm=st.sampled_from(NORMS))
def test_no_value_of_a_random_network_leaves_its_bounds(name: str, seed: int, norm: str) -> None:
    program = redrawn(name, seed)
    x = torch.rand(2, *program.shape, generator=seeded(seed))
    with torch.no_grad():
        told = captured(name)[0](x[:1])
    assert torch.allclose(program.graph().logits(x[:1]), told.double(), rtol=1e-3, atol=1e-4), (
        "weights are the new ones"
    )
    check_sound(program, ball(program.shape, norm, n=3, seed=seed), seed)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in ("pooled", "smooth", "attention") else []) for n in NETS]
)
@settings(max_examples=2)
@given(seed=seeds, norm=st.sampled_from(NORMS))
def test_optimised_slopes_are_sound(name: str, seed: int, norm: str) -> None:
    check_ascent(redrawn(name, seed), ball(NETS[name][1], norm, n=2, seed=seed), seed)


@torch.no_grad()
def check_ascent(program: Program, region: Region, seed: int) -> None:
    graph = program.graph()
    ascent = Ascent(program.graph(torch.float32), steps=4)
    bounds = Bounds.by_intervals(graph, region, REAL)
    refine(bounds, ascent)
    logits = torch.stack([graph.logits(z) for z in points(region, graph, seed)])
    check_margins(graph, bounds, logits)
    for label in range(CLASSES):
        low, _ = ascent(bounds, graph.out, differences(torch.full((len(region),), label), CLASSES))
        assert (logits[..., label, None] - logits >= low - 1e-12 * (1 + logits.abs().amax())).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_hundreds_of_random_networks_are_sound(name: str) -> None:
    for seed in range(400):
        program = redrawn(name, seed)
        for norm in NORMS:
            check_sound(program, ball(program.shape, norm, n=4, seed=seed), seed)
        if seed < 20:
            check_ascent(program, ball(program.shape, NORMS[seed % 4], n=2, seed=seed), seed)


@pytest.mark.parametrize("scale", [1e-6, 1e3])
@pytest.mark.parametrize("name", ["mlp", "residual", "pooled"])
def test_tiny_and_huge_weights_are_sound(name: str, scale: float) -> None:
    net, program = captured(name)
    draw(net, 3)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    check_sound(Program(program.exported, program.shape), ball(program.shape, "linf"))


# ----------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("norm", NORMS)
@given(seed=seeds)
@settings(max_examples=20)
def test_margins_of_a_linear_model_are_exact(norm: str, seed: int) -> None:
    net = linear(seed)
    region = ball((4,), norm, n=3, seed=seed)
    c = differences(torch.zeros(3, dtype=torch.long), CLASSES)
    graph = Program(_linear()[1].exported, (4,)).graph()
    bounds = Bounds.by_intervals(graph, region, REAL)
    weight, bias = net.weight.double(), net.bias.double()
    exact = region.least((weight[0] - weight).expand(3, -1, -1)) + bias[0] - bias
    assert torch.allclose(bounds.lower(graph.out, c), exact, rtol=0, atol=1e-12)


@cache
def _linear() -> tuple[nn.Linear, Program]:
    net = nn.Linear(4, CLASSES)
    return net, recorded(net, (4,))


def linear(seed: int) -> nn.Linear:
    draw(_linear()[0], seed)
    return _linear()[0]


def test_bounds_of_one_neuron_are_the_triangle() -> None:
    graph = chain(lambda build, x: build.apply("relu", ReLU(), x), 1)
    bounds = Bounds.by_intervals(graph, box([-1.0], [3.0]), REAL)
    lines = bounds.relaxed(1)
    assert isinstance(lines, Lines)
    assert (float(lines.high), float(lines.high0), float(lines.low)) == (0.75, 0.75, 1.0)
    assert torch.allclose(
        bounds.lower(1, torch.tensor([[[[1.0]], [[-1.0]]]]).double()), torch.tensor([[-1.0, -3.0]]).double()
    )


def test_a_network_that_is_affine_on_the_region_is_bounded_exactly_by_crown() -> None:
    """All neurons on: the margins are those of a linear model, however deep; intervals do not see that."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, CLASSES))
    draw(net, 0)
    with torch.no_grad():
        net[0].bias += 10
        net[2].weight.abs_()
    graph, region = recorded(net, (3,)).graph(), ball((3,), "linf", n=1)
    bounds = Bounds.by_intervals(graph, region, REAL)
    refine(bounds)
    c = differences(torch.zeros(1, dtype=torch.long), CLASSES)
    corners = torch.cartesian_prod(*[torch.stack(p) for p in zip(region.low[0], region.high[0], strict=True)])
    logits = graph.logits(corners)
    exact = (logits[:, :1] - logits).amin(0)
    assert torch.allclose(bounds.lower(graph.out, c)[0], exact, atol=1e-10)
    assert (bounds.lower(graph.out, c, since=graph.out + 1)[0][1:] < exact[1:] - 1e-3).all()


# --------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        *(("mlp", norm) for norm in NORMS),
        ("pooled", "linf"),
        pytest.param("smooth", "linf", marks=pytest.mark.slow),
        *(pytest.param(name, norm, marks=pytest.mark.slow) for name in ("pooled", "smooth") for norm in NORMS[1:]),
    ],
)
def test_methods_are_refinements_of_one_another(name: str, norm: str) -> None:
    make, shape = NETS[name]
    net = draw(make(), 1)
    x = torch.rand(3, *shape, generator=seeded(2))
    with torch.no_grad():
        y = net(x).argmax(1)
    radius = {"linf": 0.15, "l2": 0.4, "l1": 0.8, "l0": 1.0}[norm] * torch.tensor([1.0, 2.0, 3.0])
    found = [
        Prover(Model(net), shape, method=method).margins(x, y, radius, norm)
        for method in ("ibp", "crown-ibp", "crown", "alpha")
    ]
    for looser, tighter in itertools.pairwise(found):
        assert (tighter >= looser).all()
    assert (found[0] < found[2]).any(), "and not all the same"


# ------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("name", ["residual", "pooled"])
@settings(max_examples=3)
@given(seed=seeds)
def test_windows_give_the_numbers_of_whole_maps(name: str, seed: int) -> None:
    program = redrawn(name, seed)
    region = ball(program.shape, "linf", n=2, seed=seed)
    found = []
    for local in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not local:
                patch.setattr(windows.Windows, "passes", lambda _, __: False)
            bounds = Bounds.by_intervals(program.graph(), region, FLOAT32)
            refine(bounds)
            found.append(bounds.pairs)
    for ours, whole in zip(*found, strict=True):
        for a, b in zip(ours, whole, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


class Apart(nn.Module):
    """Two paths to maps of one size by different strides: their windows lie at no fixed distance."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 2, 9), nn.Conv2d(1, 2, 1, 2, 1), nn.Conv2d(2, 2, 1)
        self.last = nn.Linear(2 * 8 * 8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x[..., 1:15, 1:15])
        return self.last(F.relu(self.c(y)).flatten(1))


class Broadcast(nn.Module):
    """A map times a constant that has more channels, and a map whose batch axis is used for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(1, 1, 2), nn.Conv2d(3, 2, 2)
        self.last = nn.Linear(2 * 64, CLASSES)
        self.register_buffer("scale", torch.randn(1, 3, 1, 1, generator=seeded(0)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.c(F.relu(self.a(x)) * self.scale))
        return self.last(y.flatten(1))


@pytest.mark.parametrize(("net", "shape"), [(Apart(), (1, 16, 16)), (Broadcast(), (1, 10, 10))])
def test_windows_that_cannot_be_kept_are_spread(net: nn.Module, shape: tuple[int, ...]) -> None:
    check_sound(recorded(draw(net, 0), shape), ball(shape, "linf", n=2))


# ------------------------------------------------------------------------------------------- rounding, as deployed


def chain(step: Callable[[Builder, Any], Any], size: int) -> Graph:
    build = Builder(torch.float64, torch.device("cpu"))
    step(build, build.input((1, size)))
    return Graph(tuple(build.steps), torch.float64)


def box(low: list[float], high: list[float]) -> Region:
    return Region.between(torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64))


class Cancels(nn.Module):
    """Adds a large number and takes it off again: in real arithmetic the first logit leads by x, in float32 not."""

    def forward(self, x: Tensor) -> Tensor:
        y = (x + 4096.0) - 4096.0
        return torch.cat([y, 0 * y + 1e-4, 0 * y - 1], 1)


def test_a_network_that_float32_changes_is_proven_in_real_arithmetic_only() -> None:
    net, x = Cancels().eval(), torch.full((1, 1), 1.5e-4)
    assert net(x).argmax() == 1, "deployed, x is rounded away"
    radius, y = torch.full((1,), 1e-6), torch.zeros(1, dtype=torch.long)
    real = Prover(Model(net), (1,), "crown", arithmetic=REAL).margins(x, y, radius, "linf")
    assert (real > 0).all()
    deployed = Prover(Model(net), (1,), "crown", arithmetic=FLOAT32).margins(x, y, radius, "linf")
    assert (deployed <= 0).any()
    check_sound(recorded(net, (1,)), Region.ball(x, radius, "linf", 0, 1))


def test_without_the_allowance_float32_leaves_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    region = Region.ball(torch.full((1, 1), 1.5e-4), torch.full((1,), 1e-6), "linf", 0, 1)
    program = recorded(Cancels().eval(), (1,))
    check_sound(program, region)
    monkeypatch.setattr(Arithmetic, "gamma", lambda _, __: 0.0)
    with pytest.raises(AssertionError, match="float32 arithmetic"):
        check_sound(program, region)


# ----------------------------------------------------------------------------------------------- planted defects


def relu_without_lift(self: ReLU, x: Pair) -> Lines:
    lines = honest_relu(self, x)
    return lines._replace(high0=torch.zeros_like(lines.high0))


def relu_above_one(self: ReLU, x: Pair) -> Lines:
    lines = honest_relu(self, x)
    return lines._replace(low=torch.where((x[0] < 0) & (x[1] > 0), 1.2, lines.low))


def pool_of_the_wrong_entry(self: MaxPool, x: Pair) -> Any:
    largest = honest_pool(self, x)
    return largest._replace(sure=torch.ones_like(largest.sure))


def pool_without_the_rest(self: MaxPool, x: Pair) -> Any:
    largest = honest_pool(self, x)
    return largest._replace(most=largest.most - (x[1] - x[0]).flatten(1).amax(1)[:, None])


def monotone(self: Affine, *pairs: Pair) -> Pair:
    return self.value(*(p[0] for p in pairs)), self.value(*(p[1] for p in pairs))


honest_relu, honest_pool = ReLU.relax, MaxPool.relax

DEFECTS: dict[str, tuple[str, type, str, Callable[..., Any]]] = {
    "a chord through 0": ("mlp", ReLU, "relax", relu_without_lift),
    "a slope above 1": ("mlp", ReLU, "relax", relu_above_one),
    "any entry for the largest": ("pooled", MaxPool, "relax", pool_of_the_wrong_entry),
    "a largest that is too small": ("pooled", MaxPool, "relax", pool_without_the_rest),
    "intervals of a difference as of a sum": ("mlp", Affine, "interval", monotone),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, owner, attribute, wrong = DEFECTS[defect]

    def check() -> None:
        for seed in range(3):
            program = redrawn(name, seed)
            check_sound(program, ball(program.shape, "linf", n=4, seed=seed), seed)

    check()
    monkeypatch.setattr(owner, attribute, wrong)
    with pytest.raises(AssertionError):
        check()


CURVED = {
    "touching where it crosses": lambda side, low, _: (side.df(low), side.f(low) - side.df(low) * low),
    "the chord on the wrong side": lambda side, low, high: (
        (side.f(high) - side.f(low)) / (high - low),
        side.f(low) - (side.f(high) - side.f(low)) / (high - low) * low,
    ),
}


@pytest.mark.parametrize("defect", CURVED)
def test_a_planted_line_that_cuts_a_curve_is_caught(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = recorded(Net(torch.square, (5,)).eval(), (5,))
    check_sound(program, ball((5,), "linf"))
    monkeypatch.setattr("assay.certification.smooth._below", CURVED[defect])
    with pytest.raises(AssertionError):
        check_sound(program, ball((5,), "linf"))


def test_a_planted_product_without_its_constant_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    program = recorded(Net(lambda x: x * x.flip(1), (4,)).eval(), (4,))
    check_sound(program, ball((4,), "linf"))
    honest = rules.Planes.pull
    monkeypatch.setattr(rules.Planes, "pull", lambda self, a: (honest(self, a)[0], 0 * honest(self, a)[1]))
    with pytest.raises(AssertionError):
        check_sound(program, ball((4,), "linf"))
