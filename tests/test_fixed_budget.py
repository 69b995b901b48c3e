"""Attacks that fill a given ball: every one of the registry on closed forms, in every shape that it is defined for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minimal_cases as cases
from assay import attacks
from assay.attacks import (
    ACG,
    APGD,
    BIM,
    FGSM,
    PGD,
    RFGSM,
    Bisect,
    Chain,
    OutputDiversified,
    Restarts,
    Runnable,
    Targets,
)
from assay.attacks.gradient.acg import Walk, _beta
from assay.attacks.losses import LOSSES, cross_entropy, dlr, margin
from assay.attacks.testing import Line
from assay.core.random import Draws
from assay.models import Door, Model
from assay.threats import Goal, Problem, Threat

SHAPES = {"vectors": (24,), "sequences": (3, 10), "grey": (1, 6, 6), "colour": (3, 4, 5)}
SPATIAL = ("di-fgsm", "ti-fgsm")
"""Defined for images and sequences only."""

QUICK: dict[str, dict[str, Any]] = {
    "apgd-targeted": {"steps": 15, "targets": 1},
    "di-fgsm": {"smallest": 0.95},
    "ti-fgsm": {"smallest": 0.95, "size": 3},
    "si-ni-fgsm": {"scales": 2},
    "vmi-fgsm": {"count": 2},
    "vni-fgsm": {"count": 2},
    "pgd": {"steps": 60},
    "apgd": {"steps": 40},
    "acg": {"steps": 40},
    "r-fgsm": {"random_step": 0.1},
}
WHOSE = [n for n in attacks.names(kind="budget", access="gradient") if n not in ("patch", "uap", "targeted-ascent")]

SLACK: dict[str, float] = {"linf": 1.5, "l2": 1.6, "l1": 2.5, "l0": 2.0}
"""Times the least size at which every one of these attacks, however crude, breaks a linear model."""


@pytest.mark.parametrize("name", WHOSE)
@pytest.mark.parametrize("kind", SHAPES)
def test_linear_models_of_any_shape_fall_above_the_least_size_and_never_below(name: str, kind: str) -> None:
    shape = SHAPES[kind]
    if name in SPATIAL and len(shape) == 1:
        pytest.skip("not for vectors")
    attack = attacks.get(name, **QUICK.get(name, {}))
    net, x = cases.Planes(shape, 2), cases.inputs(shape, b=2)
    y = cases.labels(net, x)
    for norm in attacks.ATTACKS.traits(name)["norm"]:
        least = cases.least(net, x, y, norm)
        for i in range(2):
            above, below = SLACK[norm] * float(least[i]), 0.99 * float(least[i])
            sizes = (round(above + 0.5), int(least[i]) - 1) if norm == "l0" else (above, below)
            one, label = x[i : i + 1], y[i : i + 1]
            assert attack(net, one, label, Threat(norm, float(sizes[0]))).success.all(), (norm, i)
            if sizes[1]:
                assert not attack(net, one, label, Threat(norm, float(sizes[1]))).success.any(), (norm, i)


@pytest.mark.parametrize("name", WHOSE)
@pytest.mark.parametrize("classes", [2, 3, 5, 10])
def test_any_number_of_classes_in_any_precision_targeted_or_not(name: str, classes: int) -> None:
    attack = attacks.get(name, **QUICK.get(name, {}))
    shape = SHAPES["grey"]
    net = cases.Planes(shape, classes)
    x = cases.inputs(shape, b=2, dtype=torch.float32 if classes % 5 else torch.float64)
    y = cases.labels(net, x)
    wanted = (y + 1) % classes
    for norm in attacks.ATTACKS.traits(name)["norm"]:
        eps = 2.5 * float(cases.least(net, x, y, norm).max())
        size = float(min(round(eps), 36)) if norm == "l0" else eps
        r = attack(net, x, y, Threat(norm, size))
        assert r.success.all(), norm
        assert r.x.dtype == x.dtype
        reached = attack(net, x, wanted, Threat(norm, size, targeted=True))
        assert torch.equal(reached.success, net(reached.x).argmax(1) == wanted)


@pytest.mark.parametrize("name", WHOSE)
def test_models_in_half_precision_are_attacked(name: str) -> None:
    shape = SHAPES["colour"]

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = cases.Planes(shape, 3).to(torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x.to(torch.bfloat16))
            return out

    net, x = Half(), cases.inputs(shape, b=2)
    y = cases.labels(net, x)
    for norm in attacks.ATTACKS.traits(name)["norm"]:
        eps = {"linf": 0.3, "l2": 2.0, "l1": 15.0, "l0": 30.0}[norm]
        r = attacks.get(name, **QUICK.get(name, {}))(net, x, y, Threat(norm, eps))
        assert r.success.all(), norm


@pytest.mark.parametrize("name", LOSSES.names())
def test_every_loss_leads_every_walk_across_the_plane(name: str) -> None:
    net, x = cases.Planes((12,), 4), cases.inputs((12,), b=3)
    y = cases.labels(net, x)
    eps = 1.3 * float(cases.least(net, x, y, "linf").max())
    for attack in (PGD(loss=LOSSES[name]), APGD(steps=40, loss=LOSSES[name]), ACG(steps=40, loss=LOSSES[name])):
        assert Targets(attack, 3)(net, x, y, Threat("linf", eps)).success.all(), attack


# Least sizes, by bisection over the budget.

SHARP: list[tuple[Runnable, str, float]] = [
    (FGSM(), "linf", 1.01),
    (BIM(steps=20), "linf", 1.01),
    (PGD(), "linf", 1.01),
    (APGD(steps=40), "linf", 1.01),
    (ACG(steps=40), "linf", 1.01),
    (FGSM(), "l2", 1.01),
    (BIM(steps=20), "l2", 1.01),
    (PGD(steps=60, decay="cosine", rel_step=1.0), "l2", 1.01),
    (APGD(steps=40), "l2", 1.01),
    (APGD(steps=100), "l1", 1.02),
    (FGSM(), "l0", 1.0),
    (PGD(steps=60, start="clean"), "l0", 1.0),
    (BIM(steps=60), "l0", 1.0),
]


@pytest.mark.parametrize(
    ("attack", "norm", "slack"), SHARP, ids=lambda v: v if isinstance(v, str) else type(v).__name__
)
def test_bisection_over_the_budget_finds_the_least_size(attack: Runnable, norm: str, slack: float) -> None:
    net, x = cases.Planes((2, 5, 4), 2), cases.inputs((2, 5, 4), b=4)
    y = cases.labels(net, x)
    least = cases.least(net, x, y, norm)
    found = Bisect(attack, rounds=14)(net, x, y, Threat(norm))
    assert found.success.all()
    assert (found.size.double() >= least * (1 - 1e-6)).all()
    assert (found.size.double() <= least * slack + 1e-9).all()


# The walks themselves.


def test_the_random_step_of_r_fgsm_is_what_is_taken_from_eps() -> None:
    x, rows = torch.full((3, 6, 6), 0.5)[:, None], torch.arange(3)
    for norm, eps in (("linf", 0.1), ("l2", 0.4)):
        threat = Threat(norm, eps).within(Model(Line()).domain, 36)
        p = Problem.pose(x, torch.ones_like(rows), threat, Draws.of(0, rows))
        attack = RFGSM(random_step=0.25)
        s = attack.init(p)
        assert torch.allclose(p.size(s.x), torch.full((3,), eps / 4), rtol=1e-4)
        assert not torch.equal(s.x[0], s.x[1])


def literal_acg(net: nn.Module, x0: Tensor, y: Tensor, start: Tensor, eps: float, steps: int) -> list[Tensor]:
    """Run algorithm 1 of Yamamura et al. 2022 for one sample in plain words; return all iterates."""

    def ask(x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_()
        value = margin(net(x), Goal(y))
        return value.item(), torch.autograd.grad(value, x)[0]

    def inside(x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, (x0 - eps).clamp_min(0)), (x0 + eps).clamp_max(1))

    x, eta = start, 2 * eps
    f, g = ask(x)
    last_g, s = torch.zeros_like(g), torch.zeros_like(g)
    best = (f, x, g, last_g, s)
    losses, iterates, at_check, halved = [f], [x], f, True
    window = check = max(int(0.22 * steps), 1)
    for k in range(steps):
        y_k = last_g - g
        bottom = float((s * y_k).sum())
        beta = -float((g * y_k).sum()) / bottom if abs(bottom) > 1e-13 * float((s * g).abs().sum()) else 0.0
        s, last_g = g + beta * s, g
        x = inside(x + eta * s.sign())
        f, g = ask(x)
        losses.append(f)
        iterates.append(x)
        if f > best[0]:
            best = (f, x, g, last_g, s)
        if k + 1 == check:
            rises = sum(losses[j] > losses[j - 1] for j in range(check - window + 1, check + 1))
            halved, at_check = rises <= 0.75 * window or (not halved and at_check >= best[0]), best[0]
            if halved:
                eta, (_, x, g, last_g, s) = eta / 2, best
            window = max(window - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
            check += window
    return iterates


@pytest.mark.parametrize("steps", [9, 60])
def test_acg_walks_as_published_step_by_step(steps: int) -> None:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 5)).double()
    x0, rows = torch.rand(4, 20, dtype=torch.float64), torch.arange(4)
    y, attack = net(x0).argmax(1), ACG(steps=steps, loss=margin)
    threat = Threat("linf", 0.25).within(Model(net).domain, 20)
    with Model(net).frozen() as live:
        door, p = Door(live, 4), Problem.pose(x0, y, threat, Draws.of(0, rows))
        s = attack.init(p)
        wanted = [literal_acg(net, x0[i : i + 1], y[i : i + 1], s.x[i : i + 1], 0.25, steps) for i in range(4)]
        for k in range(steps):
            for i in range(4):
                assert torch.allclose(s.x[i], wanted[i][k][0], atol=1e-9), f"sample {i} after {k} updates"
            s = attack.update(p, s, door.gradient(s.x, p, margin), k)
    assert torch.allclose(s.x, torch.cat([w[steps] for w in wanted]), atol=1e-9)


def test_no_curvature_means_plain_ascent() -> None:
    g = torch.ones(2, 3)
    assert _beta(g, Walk(g, g, g)).tolist() == [0, 0]
    assert _beta(torch.zeros(2, 3), Walk(g, g, g)).tolist() == [0, 0]


def test_l1_begins_in_larger_balls_and_ends_in_that_of_eps() -> None:
    x, rows = torch.rand(3, 60, generator=torch.Generator().manual_seed(1)), torch.arange(3)
    net = cases.Planes((60,), 3)
    threat, attack = Threat("l1", 1.0).within(Model(net).domain, 60), APGD(steps=50)
    with Model(net).frozen() as live:
        door, p = Door(live, 3), Problem.pose(x, cases.labels(net, x), threat, Draws.of(0, rows))
        s, most = attack.init(p), []
        for k in range(50):
            most.append(float(p.size(s.x).max()))
            s = attack.update(p, s, door.gradient(s.x, p, cross_entropy), k)
    assert 2 < max(most[:16]) < 3.001
    assert 1.5 < max(most[16:32]) < 2.001
    assert max(most[32:]) < 1.001
    assert attack(net, x, cases.labels(net, x), Threat("l1", 1.0), full=True).backwards.tolist() == [50] * 3


def test_larger_balls_break_more_in_l1() -> None:
    """On a network whose gradients depend on the point, a walk that begins far finds what the other misses."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 4))
    for i, w in enumerate(net.parameters()):
        w.data = Draws.of(i, torch.zeros(1, dtype=torch.int64)).normal(w.shape)[0] / w[0].numel() ** 0.5
    x = Draws.of(9, torch.arange(150)).uniform((100,))
    y = cases.labels(net, x)
    wide, narrow = (APGD(steps=40, wide=v)(net, x, y, Threat("l1", 3.0)).success for v in (True, False))
    assert int(wide.sum()) >= int(narrow.sum())
    assert 20 < int(wide.sum()) < 145


def test_odi_and_chains_are_attacks_like_others() -> None:
    net, x = cases.Planes((12,), 4), cases.inputs((12,), b=3)
    y = cases.labels(net, x)
    threat = Threat("linf", 1.1 * float(cases.least(net, x, y, "linf").max()))
    for attack in (
        Restarts(OutputDiversified(APGD(steps=20, loss=dlr)), 4),
        Chain((PGD(steps=10), APGD(steps=30), Targets(APGD(steps=30, loss=margin), 3))),
    ):
        assert attack(net, x, y, threat).success.all()
