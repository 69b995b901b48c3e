"""Landscapes: what they measure where the answer is known, that they leave no trace, and what tells a masked model."""

import copy
import html as markup
import json
import re

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from assay import DataError, Model, ModelError, RunError, ThreatError
from assay.cli.study_pictures import landscape as landscape_command
from assay.core.registry import UsageError
from assay.data import load_data
from assay.models.loaders import load_model
from assay.reports.landscape import isoline, isolines, mesh, ramp, render_landscape, short
from assay.reports.text import DASH
from assay.study.curvature import curvature, linearity
from assay.study.landscape import landscape
from assay.study.plane import Landscape, Surface
from assay.study.weights import filter_direction, weight_landscape

WIDE = (-10.0, 10.0)
"""A box that no plane here leaves."""


class Linear(nn.Module):
    """Logits W x + b."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor(weight)), nn.Parameter(torch.tensor(bias))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


class Bowl(nn.Module):
    """Two logits that differ by x' A x / 2: the margin of class 0 has the Hessian -A, that of class 1 A."""

    def __init__(self, eigenvalues):
        super().__init__()
        n = len(eigenvalues)
        turn = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
        self.register_buffer("a", (turn * torch.tensor(eigenvalues, dtype=torch.float64)) @ turn.T)

    def forward(self, x):
        x = x.double()
        rise = 0.5 * (x @ self.a * x).sum(1)
        return torch.stack([torch.zeros_like(rise), rise], 1)


def rival_ahead(z, goal):
    """The second logit minus the first."""
    return z[:, 1] - z[:, 0]


def small_net(scale=1.0):
    """A small network with some curvature; its logits may be scaled up until the softmax is saturated."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return scale * self.net(x)

    return Scaled()


SAMPLE = torch.linspace(0.2, 0.8, 12).view(3, 4)
LABEL = int(small_net()(SAMPLE[None]).argmax())


# curvature and local linearity


@pytest.mark.parametrize("size", [6, 60], ids=["whole Hessian", "Lanczos"])
def test_the_largest_eigenvalues_of_a_quadratic_are_those_it_was_made_of(size):
    """Also where the largest in size is negative: it is the most upward curvature that is asked for."""
    values = [5.0, 3.0, 1.0, *np.linspace(-8.0, 0.5, size - 3).tolist()]
    found = curvature(Model(Bowl(values), box=WIDE), torch.linspace(-0.5, 0.5, size), 0, loss=rival_ahead)
    assert found.converged
    assert found.eigenvalues == pytest.approx((5.0, 3.0, 1.0), rel=1e-3)
    assert found.forwards == found.backwards > 0


def test_the_curvature_of_cross_entropy_is_the_one_in_closed_form():
    """Of logits W x it is W' (diag(p) - p p') W, p the probabilities."""
    weight = torch.tensor([[1.0, 2.0, 0.0, -1.0], [0.5, -1.0, 1.0, 0.0], [0.0, 0.0, -2.0, 1.0]])
    x = torch.tensor([0.1, 0.4, 0.3, 0.2])
    p = (weight @ x).softmax(0).double()
    hessian = weight.double().T @ (p.diag() - p[:, None] * p) @ weight.double()
    wanted = torch.linalg.eigvalsh(hessian).flip(0)[:2].tolist()
    found = curvature(Linear(weight.tolist(), [0.0, 0.0, 0.0]), x, 1, count=2)
    assert found.eigenvalues == pytest.approx(wanted, abs=1e-6)


def test_kinks_of_relus_do_not_spoil_the_curvature():
    """What is found from any start is an eigenvalue of the Hessian that autograd gives between the kinks."""
    data, model = load_data("demo:mnist", limit=4), load_model("demo:mnist-plain")
    x, y = data.batch([3])[0], int(data.labels[3])
    net = copy.deepcopy(model.net).double()

    def slope(v):
        loss = nn.functional.cross_entropy(net(v[None]), torch.tensor([y]))
        return torch.autograd.grad(loss, v, create_graph=True)[0]

    for index in range(3):
        found = curvature(model, x, y, count=1, index=index)
        assert found.eigenvalues == pytest.approx((float(_power(slope, x.double())),), rel=1e-3)


def _power(slope, x, steps=60):
    """The largest eigenvalue of a Hessian without large negative ones, by power iteration on exact products."""
    v = torch.ones_like(x)
    for _ in range(steps):
        at = x.clone().requires_grad_()
        product = torch.autograd.grad((slope(at) * v).sum(), at)[0]
        size, v = product.norm(), product / product.norm()
    return size


def test_a_network_that_cannot_compute_in_float64_is_measured_in_float32():
    class Stubborn(torch.autograd.Function):
        """Half the square of the first coordinate, of float32 only."""

        @staticmethod
        def forward(ctx, x):
            if x.dtype != torch.float32:
                raise RuntimeError("float32 only")
            ctx.save_for_backward(x)
            return x.square() / 2

        @staticmethod
        def backward(ctx, slope):
            return slope * ctx.saved_tensors[0]

    bowl = Model(lambda x: torch.cat([0 * x[:, :1], Stubborn.apply(x)[:, :1]], 1), box=WIDE)
    found = curvature(bowl, torch.tensor([0.3, 0.1]), 0, count=2, loss=rival_ahead)
    assert found.eigenvalues == pytest.approx((1.0, 0.0), abs=1e-3)


def test_without_a_gradient_there_is_no_curvature_to_tell():
    steps = Model(lambda x: torch.stack([x.detach().sum(1), -x.detach().sum(1)], 1))
    assert curvature(steps, torch.tensor([0.3, 0.1]), 0).eigenvalues == ()


def test_a_linear_margin_has_no_curvature_and_is_its_own_tangent():
    line = Model(Linear([[1.0] * 30, [0.0] * 30], [0.0, 0.0]), box=WIDE)
    x = torch.linspace(-1, 1, 30)
    assert curvature(line, x, 0, loss=rival_ahead).eigenvalues == (0.0, 0.0, 0.0)
    assert linearity(line, x, 0, "linf:0.5", loss=rival_ahead).error < 1e-4


def test_local_linearity_of_a_quadratic_is_half_the_largest_eigenvalue_times_the_radius_squared():
    bowl = Model(Bowl([4.0, 1.0, 0.5, -1.0]), box=WIDE)
    found = linearity(bowl, torch.tensor([0.3, -0.2, 0.1, 0.4]), 0, "l2:0.5", steps=60, loss=rival_ahead)
    assert found.error == pytest.approx(0.5 * 4.0 * 0.5**2, rel=1e-2)
    assert found.error <= 0.5 * 4.0 * 0.5**2 * (1 + 1e-4)


def test_local_linearity_needs_a_ball():
    line = Linear([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0])
    with pytest.raises(ThreatError, match="eps"):
        linearity(line, torch.tensor([0.5, 0.5]), 0, "l2")
    with pytest.raises(ThreatError, match="l0"):
        linearity(line, torch.tensor([0.5, 0.5]), 0, "l0:1")


# the plane


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_along_the_gradient_step_a_linear_margin_falls_by_the_dual_norm(norm):
    """And along the other direction, orthogonal to it, it changes linearly too."""
    slope = torch.tensor([3.0, -1.0, 0.5, 2.0])
    line = Model(Linear([slope.tolist(), [0.0] * 4], [0.0, 0.0]), box=WIDE)
    found = landscape(line, torch.tensor([1.0, 0.5, 0.2, 0.4]), 0, f"{norm}:0.4", span=0.8, steps=9, eigenvalues=0)
    s, middle = found.surfaces[0], 4
    dual = {"linf": slope.abs().sum(), "l2": slope.norm(), "l1": slope.abs().max()}[norm]
    assert np.diff(s.margin[middle]) == pytest.approx(-float(dual) * 0.2, rel=1e-4)
    assert np.diff(s.margin, 2, axis=0) == pytest.approx(0, abs=1e-4)
    assert s.loss == pytest.approx(np.log1p(np.exp(-s.margin)), rel=1e-3)
    assert s.centre[1] == pytest.approx(float(slope @ torch.tensor([1.0, 0.5, 0.2, 0.4])), rel=1e-5)
    assert found.size is not None
    assert found.size[middle] == pytest.approx(np.abs(found.along), abs=1e-5)
    assert found.size[:, middle] == pytest.approx(np.abs(found.along), abs=1e-5)


def test_points_outside_the_box_are_drawn_back():
    line = Linear([[1.0, 0.0], [0.0, 0.0]], [0.0, 0.0])
    found = landscape(line, torch.tensor([0.9, 0.5]), 1, "l2:0.4", span=0.4, steps=5, eigenvalues=0)
    assert found.surfaces[0].margin.min() == pytest.approx(-1.0, abs=1e-6)


def test_the_second_direction_leads_to_the_point_that_pgd_found():
    model = Model(small_net())
    found = landscape(model, SAMPLE, LABEL, "linf:0.3", "gradient-adversarial", steps=5)
    [(name, a, b)] = found.marks
    assert name in ("adversarial", "strongest tried")
    assert b != 0
    assert found.axes == ("the gradient step", "the adversarial perturbation")
    assert abs(a) <= 0.3 * 1.5


def test_where_the_adversarial_point_lies_on_the_gradient_step_the_other_direction_is_random():
    line = Linear([[1.0, -2.0], [0.0, 0.0]], [0.5, 0.0])
    found = landscape(line, torch.tensor([0.5, 0.5]), 1, "linf:0.1", "gradient-adversarial", steps=3)
    assert found.axes[1] == "a random direction"
    assert found.marks == ()


def test_the_same_seed_draws_the_same_plane_and_another_another():
    first, again, other = (landscape(small_net(), SAMPLE, LABEL, "l2:0.5", steps=5, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.surfaces[0].loss, again.surfaces[0].loss)
    assert not np.array_equal(first.surfaces[0].loss, other.surfaces[0].loss)


def test_a_plane_that_makes_no_sense_is_refused():
    net = small_net()
    with pytest.raises(UsageError, match="odd number of steps"):
        landscape(net, SAMPLE, LABEL, "l2:1", steps=10)
    with pytest.raises(UsageError, match="gradient-random"):
        landscape(net, SAMPLE, LABEL, "l2:1", "gradient-rnd")
    with pytest.raises(UsageError, match="span"):
        landscape(net, SAMPLE, LABEL, "l2:1", span=0.0)
    with pytest.raises(ThreatError, match="l0"):
        landscape(net, SAMPLE, LABEL, "l0:3")
    with pytest.raises(DataError, match="inside the box"):
        landscape(net, SAMPLE + 1, LABEL, "l2:1")
    with pytest.raises(UsageError, match="at least one model"):
        landscape([], SAMPLE, LABEL, "l2:1")


# masked and healthy


def test_saturated_logits_are_flagged_by_the_share_of_points_without_a_gradient():
    """The same network, right and wrong at the same points; only its logits are a thousand times as large."""
    healthy, saturated = landscape(
        [Model(small_net(), name="healthy"), Model(small_net(1e5), name="saturated")],
        SAMPLE,
        LABEL,
        "linf:0.3",
        steps=21,
    ).surfaces
    assert healthy.blind == 0
    assert not healthy.masked
    assert saturated.blind > 0.5
    assert saturated.masked
    assert saturated.saturated >= saturated.blind
    assert np.array_equal(healthy.margin > 0, saturated.margin > 0)
    assert saturated.eigenvalues == (0.0, 0.0, 0.0)
    assert saturated.nonlinearity > 1000 * healthy.nonlinearity  # ascent is blind, but the plane shows it
    assert healthy.eigenvalues[0] > 0
    page = words(render_landscape(landscape(small_net(1e5), SAMPLE, LABEL, "linf:0.3", steps=5)))
    assert "the gradient of cross-entropy is exactly zero. Attacks that follow it are blind there" in page


def test_a_shipped_network_is_healthy_and_a_hardened_one_is_flatter():
    data = load_data("demo:mnist", limit=4)
    nets = [load_model(f"demo:{n}") for n in ("mnist-plain", "mnist-robust")]
    plain, robust = landscape(nets, data.batch([3])[0], int(data.labels[3]), "linf:0.3", steps=11).surfaces
    assert not plain.masked
    assert not robust.masked
    assert plain.loss.max() > 2 * robust.loss.max()
    assert plain.eigenvalues[0] > 2 * robust.eigenvalues[0]
    assert plain.nonlinearity > 100 * robust.nonlinearity
    blunt = Model(lambda x: 1e3 * nets[0].net(x), name="saturated")
    assert (
        landscape(blunt, data.batch([3])[0], int(data.labels[3]), "linf:0.3", steps=11, eigenvalues=0)
        .surfaces[0]
        .masked
    )


# weights


def test_every_filter_of_a_direction_is_as_long_as_that_of_the_weights():
    w = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    w[2] = 0
    d = filter_direction(w, seed=0, number=1, which=0)
    assert d.flatten(1).norm(dim=1) == pytest.approx(w.flatten(1).norm(dim=1), rel=1e-5)
    assert not filter_direction(torch.ones(7), 0, 0, 0).any()
    assert not torch.equal(d, filter_direction(w, 0, 1, 1))


def test_weights_are_the_same_bits_afterwards_even_if_the_network_fails():
    class Fussy(nn.Module):
        """Fails at the third question."""

        def __init__(self, net, calls):
            super().__init__()
            self.net, self.calls = net, calls

        def forward(self, x):
            self.calls -= 1
            if self.calls < 0:
                raise ValueError("no more")
            return self.net(x)

    for calls in (10**6, 3):
        net = Fussy(small_net(), calls).train()
        before = {k: (v.data_ptr(), v.clone()) for k, v in net.state_dict().items()}
        x, y = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(6, dtype=torch.long)
        if calls == 3:
            with pytest.raises(ModelError):
                weight_landscape(net, x, y, steps=5)
        else:
            weight_landscape(net, x, y, steps=5)
        assert net.training
        for name, value in net.state_dict().items():
            assert value.data_ptr() == before[name][0]
            assert torch.equal(value, before[name][1])


def test_the_weight_landscape_of_a_linear_network_is_that_of_its_moved_weights():
    """In the middle the loss as it is; elsewhere what a copy with moved weights gives."""
    net = Linear([[1.0, -2.0, 0.5], [0.3, 0.2, -1.0]], [0.1, 0.0])
    x, y = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 4)
    found = weight_landscape(net, x, y, span=0.5, steps=5, seed=4)
    w = net.weight.detach()
    moved = w + 0.5 * filter_direction(w, 4, 0, 0) - 0.25 * filter_direction(w, 4, 0, 1)
    loss = nn.functional.cross_entropy(x @ moved.T + net.bias.detach(), y)
    s = found.surfaces[0]
    assert s.loss[1, 4] == pytest.approx(float(loss), rel=1e-5)
    assert s.centre[0] == pytest.approx(float(nn.functional.cross_entropy(net(x).detach(), y)), rel=1e-5)
    assert s.forwards == 8 * 25
    assert np.isnan(s.blind)
    assert not s.masked


def test_a_callable_without_weights_has_no_weight_landscape():
    with pytest.raises(ModelError, match="parameters"):
        weight_landscape(lambda x: x[:, :2], torch.rand(2, 3), torch.tensor([0, 1]))


# drawings


def test_a_contour_line_of_a_plane_is_where_the_plane_takes_the_level():
    ramped = np.tile(np.arange(5.0), (5, 1))  # value = column
    numbers = np.array(re.findall(r"[-\d.]+", isoline(ramped, 1.5)), float).reshape(-1, 2)
    assert numbers[:, 0] == pytest.approx(1000 * (1.5 + 0.5) / 5)
    assert (numbers[:, 1].min(), numbers[:, 1].max()) == (100, 900)
    assert isoline(ramped, 9.0) == ""
    assert [name for name, _ in isolines(ramped, (-1.0, 0.5, 2.5, 7.0))] == ["0.5", "2.5"]


def test_a_saddle_gets_two_segments():
    assert isoline(np.array([[1.0, -1.0], [-1.0, 1.0]]), 0.0).count("M") == 2


def test_a_surface_is_drawn_from_the_back_and_high_tiles_are_high():
    tiles = mesh(np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    heights = [min(float(y) for y in re.findall(r" ([\d.]+)", path)) for path, _ in tiles]
    assert len(tiles) == 4
    assert ramp(np.array([0.5]), ((0, 0, 0), (200, 100, 0)))[0].tolist() == [100, 50, 0]
    flat = mesh(np.zeros((3, 3)))
    assert min(heights) < min(float(y) for path, _ in flat for y in re.findall(r" ([\d.]+)", path)) + 400


def words(page):
    """What is to be read on a page."""
    body = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", markup.unescape(re.sub(r"<[^>]+>", "", body)))


def test_the_page_is_complete_in_itself_and_safe(tmp_path):
    net = Model(small_net(), name="<b>net</b>")
    found = landscape([net, net], SAMPLE, LABEL, "linf:0.3", steps=5)
    page = found.report(tmp_path / "page.html", "assay study landscape ...").read_text(encoding="utf-8")
    assert "<b>net" not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    text = words(page)
    for said in ("Around sample 0, within an l-infinity ball of 0.3", "eigenvalue 1", "nonlinearity", "<b>net</b> (2)"):
        assert said in text
    with pytest.raises(RunError, match="can be written"):
        found.report(tmp_path / "not" / "there" / "page.html")
    weights = weight_landscape(small_net(), SAMPLE[None], torch.tensor([LABEL]), steps=3)
    assert "Away from the weights, the mean loss over 1 sample rises to" in words(render_landscape(weights))


def test_a_surface_without_any_loss_can_be_drawn():
    flat = Surface("flat", np.zeros((3, 3)), np.ones((3, 3)), np.ones((3, 3), bool))
    found = Landscape("input", np.linspace(-1, 1, 3), ("a", "b"), (flat,), threat="l2:1", eps=1.0, size=np.ones((3, 3)))
    assert "100.0 %" in words(render_landscape(found))


def test_numbers_are_short():
    assert [short(v) for v in (0.0, 0.12345, 1e-7, 123456.0, float("nan"))] == [
        "0",
        "0.123",
        "1.0e-07",
        "1.2e+05",
        DASH,
    ]


# the command


@pytest.fixture
def run():
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(landscape_command)
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])


def test_the_command_writes_a_page_and_says_the_numbers(run, tmp_path):
    page = tmp_path / "new" / "page.html"
    common = ["demo:mnist-plain", "demo:mnist", "--threat", "linf:0.3", "--index", 3, "--steps", 5, "--out", page]
    done = run(*common, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["models"][0]["masked"] is False
    assert len(said["models"][0]["eigenvalues"]) == 3
    assert said["page"] == str(page)
    assert page.exists()
    told = run(*common).stdout
    assert "Around sample 3, within an l-infinity ball of 0.3" in told
    assert "mnist-plain" in told


def test_the_command_over_weights(run):
    done = run("demo:mnist-plain", "demo:mnist", "--weights", "--samples", 8, "--steps", 3, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["of"] == "weights"
    assert said["samples"] == 8
    assert said["models"][0]["blind"] is None


def test_the_command_says_what_is_missing(run):
    assert run("demo:mnist-plain", "demo:mnist").exit_code == 2
    assert run("demo:mnist-plain", "demo:mnist", "--threat", "linf:0.3", "--index", 10_000).exit_code == 2
