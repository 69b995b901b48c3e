"""Objectives: closed forms on linear networks, formulas worked out again, and what every one of them has to hold."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay import Threat
from assay.attacks import FGSM, PGD
from assay.attacks.attack import Runnable
from assay.core.random import Draws
from assay.core.registry import UsageError, build, describe
from assay.hardening.awp import perturbed
from assay.hardening.inner import around
from assay.hardening.objective import OBJECTIVES, Objective, Step
from assay.hardening.objectives import (
    Adversarial,
    Consistency,
    Distillation,
    Ensemble,
    Fast,
    Free,
    GaussianNoise,
    GradAlign,
    InputGradient,
    Jacobian,
    Macer,
    Mart,
    Mixed,
    Pairing,
    Plain,
    SmoothAdv,
    Tempered,
    Trades,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "mixed": {"steps": 5, "rel_step": 0.4},
    "free": {"replays": 3},
    "gradalign": {"weight": 3.0},
    "ensemble": {"sources": 2},
    "gaussian": {"sigma": 0.1},
    "smoothadv": {"sigma": 0.1, "noises": 4},
    "consistency": {"sigma": 0.1},
    "macer": {"sigma": 0.1, "noises": 8},
}
"""Hyper-parameters for tiny data, by name of the objective; for all others the defaults will do."""

ADVERSARIAL = ("alp", "ensemble", "fast", "free", "gradalign", "mart", "mixed", "pgd", "smoothadv", "trades")
"""Objectives that learn from points which an attack found inside the ball."""

EPS = {"linf": 0.1, "l2": 0.2, "l1": 0.3, "l0": 2.0}
CASES = [(name, norm) for name in OBJECTIVES.names() for norm in OBJECTIVES[name].norms]


def objective(name: str) -> Objective:
    return OBJECTIVES[name](**SETTINGS.get(name, {}))


def mlp(c: int = 3, features: int = 8, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, c))


def sharp(c: int = 3) -> nn.Sequential:
    """Return a network whose answers are far from even, and far from the same all over the ball."""
    net = mlp(c)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)
    return net


def normalised(c: int = 3, features: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, c))


def batch(n: int = 12, features: int = 8, c: int = 3) -> tuple[Tensor, Tensor]:
    """Return samples (n, features) far enough from the ends of the box for every ball in ``EPS`` but l0, and labels."""
    d = Draws.of(7, torch.arange(n))
    return 0.35 + 0.3 * d.uniform((features,)), d.fold(1).integers(c)


def pose(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str = "linf",
    *,
    of: Objective | None = None,
    eps: float | None = None,
    seed: int = 0,
    rows: Tensor | None = None,
    c: int = 3,
    **more: Any,
) -> Step:
    """Return the step for a batch; with ``rows``, for these of its samples, which keep their random numbers."""
    rows = torch.arange(len(x)) if rows is None else rows
    threat = Threat(norm, EPS[norm] if eps is None else eps, box=(0, 1))
    helpers = tuple(
        mlp(c, x.shape[1], seed=i + 1).eval().requires_grad_(False) for i, _ in enumerate(of.helpers if of else ())
    )
    p = around(x[rows], y[rows], threat, 1.0, Draws.of(seed, rows))
    return Step(net, x[rows], y[rows], p, helpers=helpers, **more)


def learn(o: Objective, s: Step) -> Tensor:
    """Return the loss of one step after its backward pass."""
    x = o.find(s)
    terms = o.loss(s, x)
    terms.loss.backward()
    o.learned(s, x)
    return terms.loss.detach()


def slopes(net: nn.Module) -> list[Tensor]:
    """Return the gradients of all parameters, and forget them."""
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    return grads


# ---------------------------------------------------------------------- what all of them have to hold


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_every_objective_gives_a_finite_loss_and_a_gradient_to_every_parameter(name: str, norm: str) -> None:
    net, (x, y), o = mlp(), batch(), objective(name)
    s = pose(net, x, y, norm, of=o)
    found = o.find(s)
    assert all(p.grad is None for p in net.parameters())
    assert found.shape == x.shape
    if name in ADVERSARIAL:
        assert s.problem.allows(found.detach()).all()
    terms = o.loss(s, found)
    terms.loss.backward()
    assert terms.loss.shape == ()
    assert terms.loss.isfinite()
    assert terms.logits.shape == (12, 3)
    assert not terms.logits.requires_grad
    assert all(v.shape == () and v.isfinite() and not v.requires_grad for v in terms.parts.values())
    assert all(g.isfinite().all() and g.any() for g in slopes(net))
    assert all(p.grad is None for h in s.helpers for p in h.parameters())


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_two_classes_with_mixed_and_smoothed_labels_will_do(name: str) -> None:
    net, (x, y), o = mlp(2), batch(c=2), objective(name)
    soft = 0.7 * F.one_hot(y, 2).to(x.dtype) + 0.3 * F.one_hot(1 - y, 2).to(x.dtype)
    for more in ({"soft": soft}, {"label_smoothing": 0.1}, {"soft": soft, "label_smoothing": 0.1}):
        loss = learn(o, pose(net, x, y, o.norms[0], of=o, c=2, **more))
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in slopes(net))


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_the_search_for_points_leaves_no_trace_on_the_network(name: str) -> None:
    net, (x, y), o = normalised(), batch(), objective(name)
    net.train()
    net[1].eval()  # a part that its owner froze
    before = {n: v.clone() for n, v in net.state_dict().items()}
    o.find(pose(net, x, y, o.norms[0], of=o))
    assert [m.training for m in net] == [True, False, True, True, True]
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_a_loss_does_not_depend_on_the_order_of_the_batch_nor_on_the_global_generator(name: str) -> None:
    net, (x, y), o = mlp(), batch(), objective(name)
    there, back = torch.arange(12), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    seen = []
    for seed, rows in enumerate((there, back)):
        torch.manual_seed(seed)
        seen.append((learn(o, pose(net, x, y, o.norms[0], of=o, rows=rows)), slopes(net)))
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_an_objective_survives_as_plain_data(name: str) -> None:
    o = objective(name)
    plain = describe(o, OBJECTIVES.name_of)
    assert plain.pop("name") == name
    assert build(OBJECTIVES[name], {n: str(v) if not isinstance(v, tuple) else v for n, v in plain.items()}, name) == o
    assert {f.name for f in fields(o)} == set(plain)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- a short training


def temptation(n: int = 128) -> tuple[Tensor, Tensor]:
    """Return samples (n, 31) of two classes: one coordinate is right nine times in ten, and takes 0.25 to overturn.

    The thirty others together are always right, and 0.05 a coordinate overturns them all: what is robust to 0.1 is
    not always right, and what is always right is not robust.
    """
    d = Draws.of(11, torch.arange(n))
    y = d.integers(2)
    side = (2 * y - 1).float()[:, None]
    lies = (d.fold(1).uniform((1,)) < 0.1).float()
    strong = 0.5 + 0.25 * side * (1 - 2 * lies)
    weak = 0.5 + 0.05 * side + 0.02 * d.fold(2).normal((30,))
    return torch.cat([strong, weak], 1), y


class Centred(nn.Module):
    """A small network that sees its inputs around 0, as normalisation would give them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = mlp(2, 31, seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(4 * (x - 0.5))


@cache
def trained(o: Objective, norm: str, steps: int = 60, seed: int = 0) -> tuple[nn.Module, list[float]]:
    """Train on all of the data at every step; return the network, and its own loss at each."""
    x, y = temptation()
    helpers = tuple(trained(h, norm, steps, seed=i + 1)[0].requires_grad_(False) for i, h in enumerate(o.helpers))
    net, memory, losses = Centred(seed), dict[str, Tensor](), []
    optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
    for k in range(steps // o.replays):
        s = pose(net, x, y, norm, c=2, seed=k, share=k * o.replays / steps)
        s = replace(s, helpers=helpers, memory=memory)
        for _ in range(o.replays):
            optimiser.zero_grad()
            losses.append(float(learn(o, s)))
            optimiser.step()
    return net.eval(), losses


def robust_error(net: nn.Module, norm: str, attack: Runnable = PGD(steps=20)) -> float:  # noqa: B008 (plain data)
    x, y = temptation()
    fallen = attack(net, x, y, Threat(norm, EPS[norm])).success
    return float((fallen | (net(x).argmax(1) != y)).float().mean())


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_a_short_training_lowers_the_objective(name: str) -> None:
    o = objective(name)
    losses = trained(o, o.norms[0])[1]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.fixture(scope="module")
def plain_error() -> float:
    return robust_error(trained(Plain(), "linf")[0], "linf")


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_what_is_learned_from_adversarial_points_is_robust(name: str, plain_error: float) -> None:
    o = objective(name)
    norm = o.norms[0]
    error = robust_error(trained(o, norm)[0], norm)
    assert error < robust_error(Centred(0).eval(), norm) - 0.2
    if norm == "linf":
        assert error < plain_error - 0.2


def test_single_steps_from_the_clean_sample_teach_to_look_robust_and_gradient_alignment_mends_it() -> None:
    tutorial = trained(Mixed(), "linf")[0]
    assert robust_error(tutorial, "linf", FGSM()) < 0.2
    assert robust_error(tutorial, "linf") > 0.8
    errors = [robust_error(trained(GradAlign(weight=w), "linf", steps=120)[0], "linf") for w in (0.0, 3.0)]
    assert errors[0] > 0.8
    assert errors[1] < 0.2


# ---------------------------------------------------------------------- linear models


def line(features: int = 8, seed: int = 0) -> nn.Linear:
    """Return a linear network of two classes."""
    torch.manual_seed(seed)
    return nn.Linear(features, 2)


def lead(net: nn.Linear, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return by how much the label leads (b,), and the direction (b, f) in which it leads more."""
    w = net.weight[y] - net.weight[1 - y]
    return (w * x).sum(1) + net.bias[y] - net.bias[1 - y], w


DUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "linf": lambda w: w.abs().sum(1),
    "l2": lambda w: w.square().sum(1).sqrt(),
    "l1": lambda w: w.abs().amax(1),
}


@pytest.mark.parametrize("norm", DUAL)
def test_adversarial_training_of_a_linear_model_is_a_penalty_inside_the_softplus(norm: str) -> None:
    net, (x, y) = line(), batch(c=2)
    m, w = lead(net, x, y)
    exact = F.softplus(EPS[norm] * DUAL[norm](w) - m)
    one_step = Mixed(clean=0)
    loss = learn(one_step, pose(net, x, y, norm))
    torch.testing.assert_close(loss, exact.mean().detach(), rtol=1e-4, atol=1e-6)
    mine = slopes(net)
    exact.mean().backward()
    torch.testing.assert_close(mine, slopes(net), rtol=1e-3, atol=1e-5)
    both = learn(replace(one_step, clean=0.25), pose(net, x, y, norm))
    torch.testing.assert_close(both, (0.25 * F.softplus(-m) + 0.75 * exact).mean().detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_steps_from_any_start_find_the_same_worst_point_of_a_linear_model(norm: str) -> None:
    net, (x, y) = line(), batch(c=2)
    m, w = lead(net, x, y)
    exact = F.softplus(EPS[norm] * DUAL[norm](w) - m).mean().detach()
    for start in ("uniform", "sphere", "clean"):
        o = Adversarial(steps=60, rel_step=0.25, start=start)
        torch.testing.assert_close(learn(o, pose(net, x, y, norm)), exact, rtol=1e-3, atol=1e-5)


def test_a_step_longer_than_the_ball_is_cut_off_at_its_corners() -> None:
    net, (x, y) = line(), batch(c=2)
    _, w = lead(net, x, y)
    found = Fast(rel_step=2).find(pose(net, x, y))
    torch.testing.assert_close(found, x - 0.1 * w.sign())
    short = Fast(rel_step=0.5).find(pose(net, x, y))
    moved = (short - x) / (-0.1 * w.sign())  # uniform in [-1, 1], then half of eps further, then cut off
    assert moved.min() < -0.4
    assert moved.max() <= 1 + 1e-5
    assert ((moved > 0.99).float().mean() - 0.25).abs() < 0.15


def test_where_labels_are_mixed_the_attack_ascends_the_mixture() -> None:
    net, (x, y) = line(), batch(c=2)
    other = pose(net, x, y, soft=F.one_hot(1 - y, 2).to(x.dtype))
    for o in (Mixed(), Mart(), Pairing()):
        torch.testing.assert_close(o.find(other), o.find(pose(net, x, 1 - y)))


def test_gradients_of_a_linear_model_are_aligned_everywhere() -> None:
    net, (x, y) = line(), batch(c=2)
    s, o = pose(net, x, y), GradAlign(weight=100.0)
    terms = o.loss(s, o.find(s))
    torch.testing.assert_close(terms.parts["misalignment"], torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(terms.loss.detach(), learn(Mixed(clean=0), s), rtol=1e-3, atol=1e-4)


def test_input_gradients_of_a_linear_model_have_a_closed_form() -> None:
    net, (x, y) = line(), batch(c=2)
    m, w = lead(net, x, y)
    exact = (F.softplus(-m) + 3 * torch.sigmoid(-m) ** 2 * w.square().sum(1)).mean()
    torch.testing.assert_close(learn(InputGradient(weight=3.0), pose(net, x, y)), exact.detach())
    mine = slopes(net)
    exact.backward()
    torch.testing.assert_close(mine, slopes(net))


def test_random_projections_estimate_the_norm_of_the_jacobian() -> None:
    torch.manual_seed(0)
    net = nn.Linear(8, 5)
    exact = net.weight.detach().square().sum()
    for n, projections in ((4000, 1), (2, 800)):
        x, y = batch(n, c=5)
        terms = Jacobian(weight=2.0, projections=projections).loss(pose(net, x, y, c=5), x)
        torch.testing.assert_close(terms.parts["penalty"], exact, rtol=0.05, atol=0)
        torch.testing.assert_close(terms.loss.detach(), terms.parts["clean"] + terms.parts["penalty"])


# ---------------------------------------------------------------------- formulas, worked out again


def probabilities(net: nn.Module, x: Tensor) -> list[list[float]]:
    """Return the softmax of each sample, in float64 and as plain numbers."""
    return net(x).detach().double().softmax(1).tolist()


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_trades_is_cross_entropy_plus_divergence() -> None:
    net, (x, y) = sharp(), batch()
    s, o = pose(net, x, y), Trades(beta=4.0)
    found = o.find(s)
    clean, hard = probabilities(net, x), probabilities(net, found)
    rows = list(zip(clean, hard, y.tolist(), strict=True))
    exact = sum(-math.log(p[k]) + 4 * divergence(p, q) for p, q, k in rows) / 12
    assert float(o.loss(s, found).loss.detach()) == pytest.approx(exact, rel=1e-5)


def test_trades_without_robustness_is_plain_training() -> None:
    net, (x, y) = mlp(), batch()
    a = learn(Trades(beta=0.0), pose(net, x, y)), slopes(net)
    b = learn(Plain(), pose(net, x, y)), slopes(net)
    torch.testing.assert_close(a, b)


def test_trades_goes_where_the_divergence_of_a_linear_model_is_largest() -> None:
    net, (x, y) = line(), batch(c=2)
    s = pose(net, x, y)
    found = Trades(steps=40).find(s)
    _, w = lead(net, x, y)
    z = net(x)
    ends = [
        torch.stack([F.kl_div(net(v).log_softmax(1), z.softmax(1), reduction="none").sum(1)])
        for v in (x - 0.1 * w.sign(), x + 0.1 * w.sign())
    ]
    reached = F.kl_div(net(found).log_softmax(1), z.softmax(1), reduction="none").sum(1)
    # Both corners are local maxima: the noise at the start decides which one is found.
    torch.testing.assert_close(
        torch.minimum((reached - ends[0]).abs(), (reached - ends[1]).abs())[0], torch.zeros(12), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("c", [2, 3])
def test_mart_is_boosted_cross_entropy_plus_weighted_divergence(c: int) -> None:
    net, (x, y) = sharp(c), batch(c=c)
    s, o = pose(net, x, y, c=c), Mart(beta=4.0)
    found = o.find(s)
    total = 0.0
    for p, q, k in zip(probabilities(net, x), probabilities(net, found), y.tolist(), strict=True):
        rival = max(v for i, v in enumerate(q) if i != k)
        total += -math.log(q[k]) - math.log(1 - rival) + 4 * divergence(p, q) * (1 - p[k])
    assert float(o.loss(s, found).loss.detach()) == pytest.approx(total / 12, rel=1e-5)


def test_pairing_adds_the_squared_distance_of_logits() -> None:
    net, (x, y) = mlp(), batch()
    s, o = pose(net, x, y), Pairing(weight=3.0)
    found = o.find(s)
    z, hard = net(x), net(found)
    exact = (F.cross_entropy(z, y) + F.cross_entropy(hard, y)) / 2 + 3 * F.mse_loss(z, hard)
    torch.testing.assert_close(o.loss(s, found).loss, exact)


def test_gradient_alignment_is_one_minus_the_cosine() -> None:
    net, (x, y) = mlp(), batch()
    s, o = pose(net, x, y), GradAlign(weight=2.0)
    terms = o.loss(s, o.find(s))
    noise = s.problem.stage(21).start("uniform")
    assert s.problem.allows(noise).all()
    grads = [
        torch.func.vmap(torch.func.grad(lambda v, k: F.cross_entropy(net(v)[None], k[None])))(v, y).double()
        for v in (x, noise)
    ]
    apart = 1 - (grads[0] * grads[1]).sum(1) / (grads[0].norm(dim=1) * grads[1].norm(dim=1))
    assert apart.mean() > 1e-3
    torch.testing.assert_close(terms.parts["misalignment"].double(), apart.mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms.loss.detach(), terms.parts["adversarial"] + 2 * terms.parts["misalignment"])


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_saturated_networks_give_finite_gradients(name: str, scale: float) -> None:
    net, (x, y), o = mlp(), batch(), objective(name)
    with torch.no_grad():
        net[2].weight *= scale
        net[2].bias *= scale
    loss = learn(o, pose(net, x, y, o.norms[0], of=o))
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in slopes(net))


# ---------------------------------------------------------------------- free


def test_free_training_takes_its_ascent_step_from_the_gradient_that_also_trains() -> None:
    net, (x, y) = line(), batch(c=2)
    _, w = lead(net, x, y)
    s, o = pose(net, x, y), Free(replays=1)
    torch.testing.assert_close(o.find(s).detach(), x)  # nothing is known yet
    alone = learn(Plain(), s), slopes(net)
    torch.testing.assert_close((learn(o, s), slopes(net)), alone)
    torch.testing.assert_close(o.find(s).detach(), x - 0.1 * w.sign())


def test_the_free_perturbation_goes_on_to_the_next_batch_by_position() -> None:
    net, (x, y), memory = line(), batch(c=2), dict[str, Tensor]()
    o = Free(rel_step=0.5)
    learn(o, pose(net, x, y, memory=memory))
    first = memory["delta"]
    torch.testing.assert_close(first.abs(), torch.full_like(first, 0.05))
    last = pose(net, x, y, rows=torch.arange(7, 12), memory=memory)  # a smaller batch
    torch.testing.assert_close(o.find(last).detach(), x[7:] + first[:5])
    learn(o, last)
    assert torch.equal(memory["delta"][5:], first[5:])
    assert not torch.equal(memory["delta"][:5], first[:5])
    more, z = batch(20, c=2)
    torch.testing.assert_close(o.find(pose(net, more, z, memory=memory)).detach()[12:], more[12:])
    less = o.find(pose(net, x, y, eps=0.01, memory=memory)).detach()  # eps may grow from batch to batch, or fall
    assert (less - x).abs().max() <= 0.01 + 1e-6


# ---------------------------------------------------------------------- helpers: the other networks


def test_ensemble_training_draws_its_source_among_all_networks() -> None:
    net, (x, y) = line(), batch(c=2)
    others = [line(seed=i).eval().requires_grad_(False) for i in (1, 2)]
    corners = [x - 0.1 * lead(n, x, y)[1].detach().sign() for n in (net, *others)]
    seen = []
    for seed in range(60):
        s = replace(pose(net, x, y, seed=seed), helpers=tuple(others))
        found = Ensemble(sources=2).find(s)
        (which,) = [i for i, v in enumerate(corners) if torch.allclose(v, found)]
        seen.append(which)
    assert all(8 <= seen.count(i) <= 35 for i in range(3)), seen
    assert Ensemble(sources=2).helpers == (Plain(), Plain())


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    net, (x, y) = mlp(), batch()
    o = Distillation(temperature=5.0)
    same = replace(pose(net, x, y), helpers=(mlp().requires_grad_(False),))
    loss = learn(o, same)
    rows = [[v / 5 for v in row] for row in net(x).detach().double().tolist()]
    soft = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in rows]
    assert float(loss) == pytest.approx(-sum(p * math.log(p) for row in soft for p in row) / 12, rel=1e-5)
    assert all(g.abs().max() < 1e-6 for g in slopes(net))
    assert o.helpers == (Tempered(temperature=5.0),)


def test_a_temperature_divides_the_logits() -> None:
    net, (x, y) = mlp(), batch()
    torch.testing.assert_close(
        learn(Tempered(temperature=4.0), pose(net, x, y)), F.cross_entropy(net(x) / 4, y).detach()
    )


def test_broken_defences_say_so() -> None:
    for o in (Pairing(), Distillation()):
        assert "broke" in getattr(o, "warning", "") or "break" in getattr(o, "warning", "")
    assert not getattr(Adversarial(), "warning", "")


# ---------------------------------------------------------------------- randomized smoothing


def test_gaussian_noise_has_its_standard_deviation_and_is_not_clipped() -> None:
    net, (x, y) = mlp(), batch(2000)
    s = pose(net, x, y, "l2")
    noise = GaussianNoise(sigma=0.5).find(s) - x
    assert float(noise.std()) == pytest.approx(0.5, rel=0.02)
    assert abs(float(noise.mean())) < 0.02
    assert (x + noise).min() < 0
    assert torch.equal(GaussianNoise(sigma=0.5).find(s) - x, noise)


def test_the_worst_point_for_a_smoothed_linear_model_is_straight_against_it() -> None:
    net, (x, y) = line(), batch(c=2)
    _, w = lead(net, x, y)
    found = SmoothAdv(sigma=0.2, noises=8, steps=8).find(pose(net, x, y, "l2"))
    torch.testing.assert_close(found, x - 0.2 * w / w.norm(dim=1, keepdim=True), rtol=0, atol=1e-4)


def test_next_to_no_noise_smoothing_is_training_on_the_sample_itself() -> None:
    net, (x, y) = mlp(), batch()
    s = pose(net, x, y, "l2")
    plain, p = learn(Plain(), s), net(x).softmax(1)
    entropy = -(p * p.log()).sum(1).mean().detach()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(learn(GaussianNoise(sigma=1e-6), s), plain, **close)
    torch.testing.assert_close(learn(Consistency(sigma=1e-6, entropy=0.7), s), plain + 0.7 * entropy, **close)
    torch.testing.assert_close(learn(Macer(sigma=1e-6), s), plain, **close)
    adversarial = Adversarial(steps=4, rel_step=0.5, start="clean")
    torch.testing.assert_close(learn(SmoothAdv(sigma=1e-6), s), learn(adversarial, s), **close)


def test_consistency_and_radius_follow_their_formulas() -> None:
    net, (x, y) = mlp(), batch()
    s = pose(net, x, y, "l2")
    alone = [GaussianNoise(sigma=0.3).find(s)]  # the first of the copies comes from the same numbers only if m is 1
    one = Consistency(sigma=0.3, noises=1, entropy=0.0)
    torch.testing.assert_close(learn(one, s), F.cross_entropy(net(alone[0]), y).detach())

    from assay.hardening.objectives.smoothing import noise

    copies = [x + d for d in noise(s, 0.3, 4).unbind(1)]
    each = torch.stack([net(v).double().softmax(1) for v in copies]).detach()
    mean, right = each.mean(0), each.gather(2, y[None, :, None].expand(4, -1, 1))
    spread = (mean * (mean.log() - each.log())).sum(2).mean()
    entropy = -(mean * mean.log()).sum(1).mean()
    exact = -right.log().mean() + 10 * spread + 0.5 * entropy
    torch.testing.assert_close(learn(Consistency(sigma=0.3, noises=4), s).double(), exact, rtol=1e-4, atol=1e-6)

    votes = torch.stack([(5 * net(v).double()).softmax(1) for v in copies]).mean(0).detach()
    normal, total = torch.distributions.Normal(0.0, 1.0), 0.0
    for row, m, k in zip(votes, mean, y.tolist(), strict=True):
        rival = max(float(v) for i, v in enumerate(row) if i != k)
        xi = float(normal.icdf(row[k]) - normal.icdf(torch.tensor(rival)))
        total += -math.log(m[k]) + (12 * 0.3 / 2 * max(0.0, 1.0 - xi) if float(row[k]) >= rival else 0.0)
    assert (votes.argmax(1) == y).any()
    loss = learn(Macer(sigma=0.3, noises=4, sharpness=5.0, gap=1.0), s)
    assert float(loss) == pytest.approx(total / 12, rel=1e-4)


# ---------------------------------------------------------------------- adversarial weight perturbation


def test_weights_climb_the_loss_and_come_back_to_the_last_bit() -> None:
    net, (x, y), gamma = mlp(), batch(), 1e-3
    before = [p.detach().clone() for p in net.parameters()]
    F.cross_entropy(net(x), y).backward()
    grads = slopes(net)
    first_order = sum(gamma * float(w.norm() * g.norm()) for w, g in zip(before, grads, strict=True) if w.ndim > 1)
    start = F.cross_entropy(net(x), y).item()
    with perturbed(net, lambda: F.cross_entropy(net(x), y), gamma):
        rise = F.cross_entropy(net(x), y).item() - start
        for p, old in zip(net.parameters(), before, strict=True):
            size = float((p.detach() - old).norm())
            assert size == pytest.approx(gamma * float(old.norm()) if p.ndim > 1 else 0.0, rel=1e-3)
        F.cross_entropy(net(x), y).backward()
    assert rise == pytest.approx(first_order, rel=0.02)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    inside = slopes(net)
    assert any(not torch.equal(a, b) for a, b in zip(inside, grads, strict=True))
    torch.testing.assert_close(inside, grads, rtol=0.1, atol=0.01)


def test_weights_come_back_after_an_error_too() -> None:
    net, (x, y) = mlp(), batch()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(KeyboardInterrupt), perturbed(net, lambda: F.cross_entropy(net(x), y), 0.1):
        raise KeyboardInterrupt
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def test_the_extra_pass_of_weight_perturbation_leaves_buffers_and_gradients_alone() -> None:
    net, (x, y) = normalised(), batch()
    before = {n: b.clone() for n, b in net.named_buffers()}
    with perturbed(net, lambda: F.cross_entropy(net(x), y), 0.01):
        assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
        net(x)
    assert int(net[1].num_batches_tracked) == 1  # the pass inside the context counts
    assert all(p.grad is None for p in net.parameters())


def test_no_perturbation_costs_no_pass() -> None:
    net = mlp()

    def never() -> Tensor:
        raise AssertionError

    with perturbed(net, never, 0.0):
        pass
    with perturbed(net.requires_grad_(False), never, 0.1):
        pass


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_weights_can_be_perturbed_under_any_objective(name: str) -> None:
    net, (x, y), o = mlp(), batch(), objective(name)
    s = pose(net, x, y, o.norms[0], of=o)
    found = o.find(s)
    before = [p.detach().clone() for p in net.parameters()]
    with perturbed(net, lambda: o.loss(s, found).loss, 0.01):
        terms = o.loss(s, found)
        terms.loss.backward()
    o.learned(s, found)
    assert terms.loss > o.loss(s, found).loss
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("mixed", {"clean": 1.5}),
        ("free", {"replays": 0}),
        ("ensemble", {"sources": 0}),
        ("trades", {"beta": -1.0}),
        ("trades", {"near": 0.0}),
        ("gradalign", {"weight": math.nan}),
        ("jacobian", {"projections": 0}),
        ("distillation", {"temperature": 0.0}),
        ("gaussian", {"sigma": 0.0}),
        ("macer", {"noises": 0}),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(name: str, wrong: dict[str, Any]) -> None:
    (what,) = wrong
    with pytest.raises(UsageError, match=what):
        OBJECTIVES[name](**wrong)
