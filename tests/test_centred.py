"""Bounds with coefficients in float32: sound for the network as deployed, near those in float64; defects are caught."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import assay
from assay.certification import centred
from assay.certification.bounds import FLOAT32, REAL, Arithmetic, Bounds
from assay.certification.centred import Centred
from assay.certification.graph import Program
from assay.certification.methods import refine
from assay.certification.prover import differences
from assay.certification.region import Region
from assay.certification.rules import Affine, Band, Lines
from bound_cases import CLASSES, ball, check_margins, draw, points, recorded, rough, rounded, seeded
from test_bounds import NORMS, redrawn

seeds = st.integers(0, 10**6)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few the neurons are."""
    monkeypatch.setattr(centred, "_PAYS", 0)


class Deep(nn.Module):
    """Residual blocks of convolutions with BatchNorm; the second halves the map, its shortcut is padded with zeros."""

    def __init__(self, width: int = 3, blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2 * blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2 * blocks))
        self.down, self.last = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first((x - 0.4) / 0.3))
        layers = [lambda t, c=c, n=n: n(c(t)) for c, n in zip(self.convs, self.norms, strict=True)]
        for one, other in zip(layers[::2], layers[1::2], strict=True):
            x = F.relu(x + other(F.relu(one(x))))
        pad = x.shape[1] // 2
        short = F.pad(x[..., ::2, ::2], (0, 0, 0, 0, pad, x.shape[1] - pad))
        return self.last(F.relu(short + self.down(x)).mean((2, 3)))


class Curved(nn.Module):
    """Functions between lines of two slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.sigmoid(self.b(F.hardtanh(self.a(x))) + torch.tanh(self.a(x))))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "deep": (Deep, (1, 6, 6)),
    "curved": (Curved, (6,)),
}


def program(name: str, seed: int) -> Program:
    if name not in NETS:
        return redrawn(name, seed)
    make, shape = NETS[name]
    return recorded(draw(make(), seed), shape)


def in_float32(program: Program, region: Region, arithmetic: Arithmetic) -> Bounds:
    bounds = Bounds.by_intervals(program.graph(), region, arithmetic)
    refine(bounds, quick=program.graph(torch.float32))
    return bounds


@torch.no_grad()
def check(program: Program, region: Region, seed: int) -> None:
    """Check all steps and margins, with real numbers and as deployed in float32, at sampled and attacked points."""
    some = [*points(region, program.graph(), seed)]
    for arithmetic, dtype in ((REAL, torch.float64), (FLOAT32, torch.float32)):
        graph = program.graph(dtype)
        inside = [z if dtype == torch.float64 else rounded(z, region) for z in some]
        found = [[value.double() for value in graph.values(z)] for z in inside]
        bounds = in_float32(program, region, arithmetic)
        for v, (low, high) in enumerate(bounds.pairs):
            if v in rough(graph) and arithmetic is FLOAT32:
                continue
            values = torch.stack([f[v] for f in found])
            name = f"{graph.steps[v].name} ({v}) in {arithmetic.name} arithmetic"
            assert (values >= low).all(), f"{name}: below by {float((low - values).max())}"
            assert (values <= high).all(), f"{name}: above by {float((values - high).max())}"
        check_margins(program.graph(), bounds, torch.stack([f[-1].view(len(region), -1) for f in found]))


# ----------------------------------------------------------------------------------------------------- soundness


@pytest.mark.parametrize("name", ["mlp", "residual", "deep", "curved"])
@settings(max_examples=2)
@given(seed=seeds, norm=st.sampled_from(NORMS))
def test_no_value_of_a_random_network_leaves_its_bounds(name: str, seed: int, norm: str) -> None:
    net = program(name, seed)
    check(net, ball(net.shape, norm, n=3, seed=seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "residual", "deep", "curved", "pooled", "smooth"])
def test_hundreds_of_random_networks_are_sound(name: str) -> None:
    for seed, norm in itertools.product(range(60), NORMS):
        net = program(name, seed)
        check(net, ball(net.shape, norm, n=4, seed=seed), seed)


@pytest.mark.parametrize("scale", [1e-12, 1e2, 1e12])
def test_what_float32_cannot_hold_is_sound(scale: float) -> None:
    net = draw(Deep(), 1)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    region = ball((1, 6, 6), "linf", n=2)
    program = recorded(net, region.x.shape[1:])
    if scale < 1e12:
        check(program, region, 0)
    else:  # the network itself overflows; bounds must not claim anything finite about that
        bounds = in_float32(program, region, REAL)
        logits = program.graph().logits(region.x)
        assert not (bounds.pairs[-1][0].flatten(1) > logits).any()


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(seed=seeds, width=st.integers(2, 4), blocks=st.integers(1, 3), norm=st.sampled_from(NORMS))
def test_every_method_is_sound_on_residual_networks(seed: int, width: int, blocks: int, norm: str) -> None:
    """What any method certifies, no attack of an evaluation breaks, and no sampled or attacked margin lies below."""
    net, shape = draw(Deep(width, blocks), seed), (1, 6, 6)
    x = torch.rand(4, *shape, generator=seeded(seed))
    with torch.no_grad():
        y = net(x).argmax(1)
    eps = {"linf": 0.02, "l2": 0.08, "l1": 0.2, "l0": 1}[norm]
    e = assay.evaluate(net, (x, y), f"{norm}:{eps}", effort="quick", progress=False)
    standing = torch.tensor([s == "robust" for s in e.samples["status"].to_pylist()])
    region = Region.ball(x, torch.full((4,), eps), norm, 0.0, 1.0)
    graph = recorded(net, shape).graph()
    logits = torch.stack([graph.logits(z) for z in points(region, graph, seed)])
    margins = logits.gather(2, y.expand(len(logits), -1)[..., None]) - logits
    before = torch.full((4, CLASSES), -torch.inf, dtype=torch.float64)
    for method in ("ibp", "crown-ibp", "crown", "alpha", "complete"):
        c = assay.certify(net, x, y, f"{norm}:{eps}", method, seconds=2.0)
        own = torch.arange(CLASSES) == y[:, None]
        assert ((margins >= c.margins - 1e-9) | own | ~(c.margins > -torch.inf)).all(), method
        assert not (c.certified & ~standing).any(), f"{method} certifies what is fooled"
        if method != "complete":  # whose time is limited
            assert (c.margins >= before).all(), f"{method} is looser than the one before"
            before = c.margins


# --------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("name", ["residual", "deep", "curved"])
@pytest.mark.parametrize("arithmetic", [REAL, FLOAT32])
def test_margins_are_near_those_in_float64(name: str, arithmetic: Arithmetic) -> None:
    net = program(name, 5)
    x, c = torch.rand(3, *net.shape, generator=seeded(5)), differences(torch.zeros(3, dtype=torch.long), CLASSES)
    region = Region.ball(x, torch.full((3,), 0.01), "linf", 0.0, 1.0)
    exact = Bounds.by_intervals(net.graph(), region, arithmetic)
    refine(exact)
    found, told = (b.lower(net.graph().out, c) for b in (in_float32(net, region, arithmetic), exact))
    assert torch.allclose(found, told, rtol=1e-3, atol=1e-3)


def test_where_nothing_is_open_both_sides_at_once_are_exact() -> None:
    net = program("deep", 2)
    region = Region.ball(torch.rand(2, *net.shape, generator=seeded(0)), torch.full((2,), 1e-5), "linf", 0.0, 1.0)
    bounds = in_float32(net, region, REAL)
    around, last = Centred.of(bounds, net.graph(torch.float32)), net.graph().out
    assert around.pays(last, torch.ones(2, 1, CLASSES, dtype=torch.bool)).all()
    rows, at = torch.arange(2), torch.arange(CLASSES).expand(2, -1)
    exact = bounds.lower(
        last, torch.cat([torch.eye(CLASSES), -torch.eye(CLASSES)])[None, :, None].expand(2, -1, 1, -1).double()
    )
    for low, high in (around.by_bands(last, rows, at), around.by_lines(last, rows, at)):
        wide = float((high - low).amax())
        assert torch.allclose(low, exact[:, :CLASSES], rtol=0, atol=1e-3 * wide)
        assert torch.allclose(high, -exact[:, CLASSES:], rtol=0, atol=1e-3 * wide)


def test_a_region_has_the_same_bounds_in_any_batch() -> None:
    net = program("deep", 4)
    region, c = ball(net.shape, "linf", n=4, seed=4), differences(torch.zeros(4, dtype=torch.long), CLASSES)
    whole = in_float32(net, region, FLOAT32).lower(net.graph().out, c)
    for k in range(4):
        alone = in_float32(net, region.take(slice(k, k + 1)), FLOAT32)
        assert torch.allclose(alone.lower(net.graph().out, c[:1])[0], whole[k], rtol=1e-5, atol=1e-5)


def test_what_is_not_between_lines_stays_in_float64() -> None:
    net = program("pooled", 0)
    bounds = Bounds.by_intervals(net.graph(), ball(net.shape, "linf", n=1), REAL)
    around = Centred.of(bounds, net.graph(torch.float32))
    assert not around.pays(net.graph().out, torch.ones(1, 1, CLASSES, dtype=torch.bool)).any()


@pytest.mark.parametrize("coarse", ["high", "medium"])
def test_a_coarser_float32_is_not_trusted(coarse: str) -> None:
    net = program("deep", 0)
    bounds = Bounds.by_intervals(net.graph(), ball(net.shape, "linf", n=1), REAL)
    around, wanted = Centred.of(bounds, net.graph(torch.float32)), torch.ones(1, 1, CLASSES, dtype=torch.bool)
    assert around.pays(net.graph().out, wanted).all()
    torch.set_float32_matmul_precision(coarse)
    try:
        assert not around.pays(net.graph().out, wanted).any()
    finally:
        torch.set_float32_matmul_precision("highest")


# ----------------------------------------------------------------------------------------------- planted defects


class Cancelling(nn.Module):
    """Two affine layers whose products nearly cancel, then a ReLU: coefficients in float32 are off by a large share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 64), nn.Linear(64, 8), nn.Linear(8, CLASSES)
        near = torch.randn(1, 4, generator=seeded(1)).expand(64, 4) + 1e-4 * torch.randn(64, 4, generator=seeded(2))
        signs = torch.tensor([1.0, -1.0]).repeat(32) * torch.rand(8, 1, generator=seeded(3))
        self.a.weight.data, self.b.weight.data, self.b.bias.data = near, signs, torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.a(x))))


def sampled(net: Program) -> None:
    check(net, ball(net.shape, "linf", n=4), 0)


def affine(net: Program) -> None:
    """Compare bounds of affine functions with their extremes, which float64 has nearly exactly."""
    region, graph = ball(net.shape, "linf", n=4), net.graph()
    v = next(i for i, step in enumerate(graph.steps) if step.name == "relu") - 1
    corners = torch.cartesian_prod(*torch.tensor([[0.0, 1.0]] * 4)).double()
    values = torch.stack([graph.values(region.low + (region.high - region.low) * c)[v] for c in corners])
    around = Centred.of(Bounds.by_intervals(graph, region, REAL), net.graph(torch.float32))
    assert around.pays(v, torch.ones(4, 1, 8, dtype=torch.bool)).all()
    low, high = around.by_bands(v, torch.arange(4), torch.arange(8).expand(4, -1))
    assert (low <= values.amin(0).view(4, 8)).all()
    assert (high >= values.amax(0).view(4, 8)).all()


class Coarse(nn.Module):
    """Adds a large number and takes it off again, which in float32 rounds its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu((x + 4096.0) - 4096.0)


def deployed(net: Program) -> None:
    """Compare bounds with what float32 makes of a network."""
    region = Region.ball(torch.full((1, 1), 1.5e-4), torch.full((1,), 1e-6), "linf", 0, 1)
    around = Centred.of(Bounds.by_intervals(net.graph(), region), net.graph(torch.float32))
    v = next(i for i, step in enumerate(net.graph().steps) if step.name == "relu") - 1
    assert around.pays(v, torch.ones(1, 1, 1, dtype=torch.bool)).all()
    low, high = around.by_bands(v, torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
    value = net.graph(torch.float32).values(region.x)[v]
    assert low <= value <= high


def through_the_origin(self: Centred, w: int, lines: Lines) -> None:
    honest_lines(self, w, lines._replace(high0=0 * lines.high0))


honest_lines = Centred._lines


def without_middle(self: Band, a: Tensor) -> Any:
    return honest_pull(self._replace(middle=0 * self.middle), a)


honest_pull = Band.pull

PLACES: dict[Any, Callable[[], Program]] = {
    sampled: lambda: program("deep", 1),
    affine: lambda: recorded(Cancelling().eval(), (4,)),
    deployed: lambda: recorded(Coarse().eval(), (1,)),
}

DEFECTS: dict[str, tuple[Callable[[Program], None], Any, str, Any]] = {
    "a chord through 0": (sampled, Centred, "_lines", through_the_origin),
    "bands without their constant": (sampled, Band, "pull", without_middle),
    "steps that keep their constants": (sampled, Affine, "linear", lambda self: self),
    "no allowance for the network": (deployed, Centred, "_affine", lambda self, w, _: 0 * self.values[w]),
    "coefficients without their rounding": (affine, centred, "gamma", lambda *_: 0.0),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    holds, owner, name, wrong = DEFECTS[defect]
    net = PLACES[holds]()
    holds(net)
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        holds(net)
