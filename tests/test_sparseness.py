"""Population sparseness: the index in closed form, the stream, the hooks, and what is said about layers."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from typer import Typer
from typer.testing import CliRunner

import assay
from assay.attacks import FGSM
from assay.cli.study_sparseness import sparseness as command
from assay.core.errors import AssayError, ModelError, ThreatError
from assay.core.registry import UsageError
from assay.models import Model
from assay.reports.sparseness import render_sparseness
from assay.study import sparseness
from assay.study.layers import find_layers, responses, tapped
from assay.study.measures import Relation, Shift, histogram, mode, separation
from assay.study.moments import Moments, by_class, population_sparseness

RNG = np.random.default_rng(0)


def numpy_psi(r):
    """The formula, written down once more."""
    r = np.asarray(r, dtype=np.float64)
    n = r.shape[-1]
    with np.errstate(invalid="ignore"):  # nothing but 0 has no index
        a = (r.sum(-1) / n) ** 2 / ((r**2).sum(-1) / n)
    return (1 - a) / (1 - 1 / n)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 6), nn.ReLU(), nn.Linear(6, 3)
    )


def data(n=30, classes=3):
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 7, 7, generator=g), torch.arange(n) % classes


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(75, 3)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).flatten(1))


class Twice(nn.Module):
    """One activation module, used behind two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act, self.head = nn.Linear(4, 5), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.act(self.b(self.act(self.a(x)))))


# ----------------------------------------------------------------------------------------------------------- the index


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_closed_forms(n):
    assert population_sparseness(torch.full((n,), 0.3)) == pytest.approx(0, abs=1e-12)
    assert population_sparseness(7 * F.one_hot(torch.tensor(1), n)) == pytest.approx(1)
    half = torch.arange(n) % 2
    assert population_sparseness(half) == pytest.approx((1 - 1 / 2) / (1 - 1 / n))


def test_what_does_not_answer_has_no_index_and_neither_has_one_unit_alone():
    assert population_sparseness(torch.tensor([[0.0, 0.0], [0.0, 2.0]])).tolist() == [
        pytest.approx(np.nan, nan_ok=True),
        1,
    ]
    assert population_sparseness(torch.ones(3, 1)).isnan().all()


some_responses = st.lists(st.integers(0, 1000), min_size=2, max_size=20).filter(any)


@given(some_responses, st.floats(1e-30, 1e30), st.randoms(use_true_random=False))
def test_scale_and_order_of_units_do_not_matter(r, scale, random):
    values = torch.tensor(r, dtype=torch.float64)
    index = float(population_sparseness(values))
    assert -1e-12 <= index <= 1 + 1e-12
    assert index == pytest.approx(float(numpy_psi(r)), abs=1e-12)
    assert float(population_sparseness(values * scale)) == pytest.approx(index, abs=1e-12)
    random.shuffle(r)
    assert float(population_sparseness(torch.tensor(r))) == pytest.approx(index, abs=1e-12)


def test_the_gradient_is_that_of_the_formula_and_a_silent_sample_does_not_spoil_the_others():
    r = (torch.rand(3, 8, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(population_sparseness, r)
    r = torch.tensor([[0.0, 0.0], [1.0, 3.0]], requires_grad=True)
    index = population_sparseness(r)
    (grad,) = torch.autograd.grad(index[1], r)
    assert grad.isfinite().all()
    assert grad[1].abs().min() > 0


# ---------------------------------------------------------------------------------------------------------- the stream


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**16))
def test_any_split_of_the_stream_gives_what_the_whole_gives(sizes, seed):
    g, n = torch.Generator().manual_seed(seed), sum(sizes)
    r = torch.randn(n, 7, generator=g).relu()
    y = torch.randint(4, (n,), generator=g)
    whole, parts = Moments(7, 4), Moments(7, 4)
    whole.add(r, y)
    for part, labels in zip(r.split(sizes), y.split(sizes), strict=True):
        parts.add(part, labels)
    for name in ("psi", "active", "class_psi", "lifetime"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert torch.equal(parts.ever, whole.ever)


def test_the_sums_are_those_of_numpy():
    r, y = RNG.random((20, 6)) * (RNG.random((20, 6)) < 0.6), np.arange(20) % 3
    r[:, 5] = 0
    m = Moments(6, 4)
    m.add(torch.from_numpy(r), torch.from_numpy(y))
    np.testing.assert_allclose(m.psi, numpy_psi(r))
    np.testing.assert_allclose(m.class_psi[:3], [numpy_psi(r[y == c].mean(0)) for c in range(3)])
    np.testing.assert_allclose(
        by_class(m.psi, torch.from_numpy(y), 4)[:3], [np.nanmean(numpy_psi(r[y == c])) for c in range(3)]
    )
    np.testing.assert_allclose(m.lifetime[:5], numpy_psi(r[:, :5].T))
    assert m.lifetime[5].isnan()  # never answers
    assert m.class_psi[3].isnan()  # has no sample
    np.testing.assert_allclose(m.active, (r > 0).mean(1))


# ----------------------------------------------------------------------------------------------------------- the layers


def test_layers_are_named_after_the_weighted_layer_before_them():
    with Model(net()).frozen() as live:
        found = find_layers(live, data()[0])
        assert [(s.name, s.module, s.shape) for s in found] == [("conv1", "1", (3, 3, 3)), ("fc1", "4", (6,))]
        assert [s.name for s in find_layers(live, data()[0], ["fc*"])] == ["fc1"]
        assert [s.name for s in find_layers(live, data()[0], ["1", "4"])] == ["conv1", "fc1"]
        assert [s.name for s in find_layers(live, data()[0], ["0"])] == ["0"]  # a convolution, as it is
        with pytest.raises(UsageError, match="conv1, fc1"):
            find_layers(live, data()[0], ["pool*"])


def test_an_activation_that_is_used_twice_is_two_layers():
    twice, x = Twice().eval(), torch.rand(9, 4)
    with Model(twice).frozen() as live:
        layers = find_layers(live, x)
        assert [(s.name, s.call, s.units) for s in layers] == [("fc1", 0, 5), ("fc2", 1, 6)]
        _, (first, second), _ = responses(live, layers, x)
    torch.testing.assert_close(first, twice.a(x).relu())
    torch.testing.assert_close(second, twice.b(first).relu())


def test_activations_that_are_functions_are_asked_for_by_name():
    x, y = data()
    with pytest.raises(ModelError, match=r"--layers.*conv, head"):
        sparseness(Functional(), (x, y), "linf:0.1", progress=False)
    found = sparseness(Functional(), (x, y), "linf:0.1", layers="conv", progress=False, adaptive=False)
    assert found["conv"].sides["clean"].signed
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        sparseness(lambda v: v.flatten(1)[:, :3], (x, y), "linf:0.1", progress=False)


def hooks(module):
    names = [name for name in vars(module) if "hook" in name]
    return [{name: dict(vars(m)[name]) for name in names if isinstance(vars(m)[name], dict)} for m in module.modules()]


class Fails(nn.Module):
    """Raises, once it is told to."""

    armed = False

    def forward(self, x):
        if self.armed:
            raise ValueError("as told")
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_left_as_it_was(fails):
    model, trap = net(), Fails()
    model.append(trap).train()
    model[3].weight.requires_grad_(False)
    model[0].register_forward_hook(lambda *_: None)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = hooks(model), [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    trap.armed = fails
    if fails:
        with pytest.raises(AssayError, match="as told"):
            sparseness(model, data(), "linf:0.1", progress=False)
    else:
        sparseness(model, data(), "linf:0.1", progress=False)
    after = hooks(model), [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    assert after == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_pass_that_fails_leaves_no_responses():
    model = net().append(Fails())
    with Model(model).frozen() as live, torch.no_grad():
        layers = find_layers(live, data()[0])
        with tapped(model, layers, lambda r: r.clone()) as tap:
            model[-1].armed = True
            with pytest.raises(ValueError, match="as told"):
                model(data()[0][:2])
            model[-1].armed = False
            model(data()[0][:5])
            assert [[len(r) for r in one] for one in tap.taken()] == [[5, 5]]
            assert tap.taken() == []


# --------------------------------------------------------------------------------------------------------- the measures


def test_areas_under_the_roc():
    same, up = RNG.random(50), RNG.random(50) + 2
    assert separation(same, same) == pytest.approx(0.5)
    assert separation(same, up) == 1
    assert separation(up, same) == 0
    assert separation(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == pytest.approx(0.75)
    assert separation(same, same[:0]) is None


def test_the_shift_of_pairs():
    a = RNG.random(40)
    up = Shift.of(a, a + RNG.random(40))
    assert up is not None
    assert up.rank_biserial == 1
    assert up.p < 1e-6
    back = Shift.of(a + 1, a)
    assert back is not None
    assert (back.rank_biserial, round(back.median, 9), back.n) == (-1, -1, 40)
    assert Shift.of(a, a) == Shift(0.0, 0.0, 0.0, 1.0, 0)
    assert Shift.of(a[:0], a[:0]) is None
    # by hand: changes 3, 1, -2 have ranks 3, 1, 2, so (3 + 1 - 2) / 6
    mixed = Shift.of(np.zeros(4), np.array([3.0, 1.0, -2.0, 0.0]))
    assert mixed is not None
    assert (mixed.rank_biserial, mixed.n) == (pytest.approx(1 / 3), 3)


def test_relations_of_classes():
    x = np.arange(10.0)
    up = Relation.of(x, x**3)
    assert up is not None
    assert (up.rho, up.classes) == (pytest.approx(1), 10)
    assert up.low == pytest.approx(1)
    none = Relation.of(x, np.array([3.0, 9, 1, 7, 5, 5, 7, 1, 9, 3]))
    assert none is not None
    assert none.low < -0.3 < 0.3 < none.high
    assert Relation.of(x, np.ones(10)) is None
    one = Relation.of(x, np.array([0.9, *[1.0] * 9]))  # a single class that differs proves nothing
    assert one is not None
    assert one.rho > 0.4
    assert one.low <= 0 <= one.high
    assert Relation.of(x[:2], x[:2]) is None


def test_the_mode_is_the_middle_of_the_fullest_bin():
    counts = histogram(np.array([0.11, 0.19, 0.5, np.nan, 1.0, -1e-17]), 10)
    assert counts.tolist() == [1, 2, 0, 0, 0, 1, 0, 0, 0, 1]
    assert mode(counts) == pytest.approx(0.15)
    assert np.isnan(mode(histogram(np.array([np.nan]), 10)))


# --------------------------------------------------------------------------------------------------------- all together


def test_figures_of_a_small_net_are_those_computed_by_hand():
    model, (x, y) = net().eval(), data()
    found = sparseness(model, (x, y), "linf:0.1", progress=False)
    moved = FGSM()(model, x, y, "linf:0.1", full=True).x
    assert not torch.equal(moved, x)
    for name, points in (("clean", x), ("attacked", moved)):
        with torch.no_grad():
            r = [model[:2](points).flatten(1), model[:5](points)]
            right = (model(points).argmax(1) == y) & (model(x).argmax(1) == y)
        for layer, values in zip(found.layers, (v.double().numpy() for v in r), strict=True):
            side = layer.sides[name]
            np.testing.assert_allclose(side.psi, numpy_psi(values), atol=1e-6)
            means = np.stack([values[y.numpy() == c].mean(0) for c in range(3)])
            np.testing.assert_allclose(side.of_means, numpy_psi(means), atol=1e-6)
            np.testing.assert_allclose(
                side.mean_of, [np.nanmean(numpy_psi(values[y.numpy() == c])) for c in range(3)], atol=1e-6
            )
            assert sum(side.counts) + side.silent == 30
            assert side.silent == (values == 0).all(1).sum()
        assert found.accuracy(name) == pytest.approx(right.double().mean())
        np.testing.assert_allclose(found.class_accuracy(name), [right[y == c].double().mean() for c in range(3)])
    # 1 pass to find the layers, 30 to see the scale, 3 x 30 to listen; FGSM takes 2 and 1, hidden PGD 41 and 41
    verified = found.forwards - (1 + 30 + 90 + 60 + 41 * 30)
    assert 0 <= verified <= 60
    assert found.backwards == 30 + 41 * 30


def test_batches_and_layers_asked_for_change_no_figure():
    whole = sparseness(net(), data(), "linf:0.1", progress=False)
    parts = sparseness(net(), data(), "linf:0.1", progress=False, batch_size=7, layers="fc*", adaptive=False)
    for name in ("clean", "attacked"):
        a, b = whole["fc1"].sides[name], parts["fc1"].sides[name]
        np.testing.assert_allclose(a.psi, b.psi, atol=1e-5)
        np.testing.assert_allclose(a.lifetime, b.lifetime, atol=1e-5)
    assert [s.layer.name for s in parts.layers] == ["fc1"]
    with pytest.raises(UsageError, match="There are: fc1"):
        parts["conv1"]


@pytest.fixture(scope="module")
def digits():
    return sparseness("demo:mnist-plain", "demo:mnist", "linf:0.1", limit=60, progress=False)


def test_the_attack_that_knows_of_the_index_hides_and_still_fools(digits):
    conv = digits["conv1"]
    assert conv.auc_fooled < 0.1  # told apart almost always
    assert abs(conv.auc_adaptive - 0.5) < 0.2
    assert digits.accuracy("adaptive") < digits.accuracy("clean") - 0.5
    drift = {name: np.abs(conv.sides[name].psi - conv.sides["clean"].psi).mean() for name in ("attacked", "adaptive")}
    assert drift["adaptive"] < drift["attacked"] / 3


def test_what_makes_no_sense_is_refused():
    for threat in ("linf", assay.Threat("linf", 0.1, targeted=True)):
        with pytest.raises(ThreatError, match="eps"):
            sparseness(net(), data(), threat, progress=False)
    with pytest.raises(UsageError, match="bins"):
        sparseness(net(), data(), "linf:0.1", bins=0, progress=False)


def test_the_page_needs_nothing_else_and_says_what_was_found(digits):
    page = render_sparseness(digits.to_json())
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)
    assert "FGSM within an l-infinity ball of 0.1 takes accuracy from" in page
    assert f"of every layer fools {digits.fooled('adaptive')}, and on those" in page
    assert [name for name in ("conv1", "conv2", "fc1") if f"<h3>{name}</h3>" in page] == ["conv1", "conv2", "fc1"]
    for layer in digits.layers:
        assert f"{100 * layer.sides['clean'].mode:.1f}" in page
    plain = json.loads(json.dumps(digits.to_json() | {"adaptive": None, "model": "<b>"}, allow_nan=False))
    assert "No attack that knows of the index was tried" in render_sparseness(plain)
    assert "<b> ·" not in render_sparseness(plain)


def test_the_command_writes_page_table_and_arrays(tmp_path):
    app = Typer()
    app.command()(command)
    args = ["demo:mnist-plain", "demo:mnist", "--eps", "0.1", "--limit", "20", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*args, "--no-adaptive", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["n"] == 20
    assert [s["name"] for s in told["layers"]] == ["conv1", "conv2", "fc1"]
    stored = json.loads((tmp_path / "run" / "sparseness.json").read_text())
    assert stored["layers"] == told["layers"]
    with np.load(tmp_path / "run" / "sparseness.npz") as arrays:
        assert arrays["conv1/clean/psi"].shape == (20,)
        assert arrays["fc1/attacked/lifetime"].shape == (100,)
    assert CliRunner().invoke(app, [*args, "--threat", "l2:1"]).exit_code == 2
