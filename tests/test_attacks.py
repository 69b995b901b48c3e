"""Attacks: the contract, closed forms, brute force, and the published algorithms step by step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

from assay import attacks
from assay.attacks import (
    ACG,
    APGD,
    BIM,
    FGSM,
    PGD,
    Cascade,
    Funnel,
    Outcome,
    Restarts,
    Runnable,
    Square,
    TargetedAscent,
    Targets,
)
from assay.attacks.gradient import apgd
from assay.attacks.loop import ScoreAttack
from assay.attacks.losses import cross_entropy, dlr, margin
from assay.attacks.score import square
from assay.attacks.testing import Line, check_attack
from assay.core.errors import AssayError, DataError, ThreatError
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.models import Door, Model, Score
from assay.threats import Goal, Problem, Threat
from assay.threats.problem import exact_size

SHORT: dict[str, dict[str, Any]] = {
    "acg": {"steps": 15},
    "alma": {"steps": 15},
    "apgd": {"steps": 15},
    "apgd-targeted": {"steps": 8, "targets": 3},
    "bandits": {"steps": 30, "rel_step": 0.2},
    "bim": {},
    "blur": {"rounds": 6},
    "boundary": {"steps": 32},
    "cgba": {"steps": 32, "probes": 4},
    "contrast": {"draws": 4, "rounds": 5},
    "ddn": {"steps": 15},
    "deepfool": {"steps": 10, "rivals": 1},
    "di-fgsm": {"smallest": 0.97},
    "fab": {"steps": 12, "rivals": 1},
    "brendel-bethge": {"steps": 16},
    "cw": {"steps": 6, "rounds": 6},
    "cw-l0": {"steps": 20, "rate": 0.1},
    "cw-linf": {"steps": 40},
    "ead": {"steps": 6, "rounds": 6},
    "fgsm": {},
    "fmn": {"steps": 25},
    "funnel": {"steps": 20},
    "gaussian-noise": {"draws": 12, "rounds": 4, "grain": 6},
    "geoda": {"steps": 32, "turn": 12},
    "hop-skip-jump": {"steps": 32, "probes": 4},
    "inward": {"steps": 35},
    "jsma": {"steps": 30},
    "mi-fgsm": {},
    "nes": {"steps": 6, "rel_step": 0.4, "draws": 3},
    "ni-fgsm": {},
    "odi-pgd": {"steps": 15, "rel_step": 0.2},
    "one-pixel": {"steps": 120, "population": 8},
    "patch": {"epochs": 15},
    "pdgd": {"steps": 15},
    "pdpgd": {"steps": 15},
    "pgd": {"steps": 20},
    "pointwise": {"steps": 40},
    "r-fgsm": {"random_step": 0.02},
    "rays": {"steps": 45, "start": "smooth"},  # the usual start is one point for all samples: nobody could tell whose
    "salt-and-pepper": {"draws": 10, "rounds": 4},
    "si-ni-fgsm": {"scales": 2},
    "sign-opt": {"steps": 30, "probes": 4},
    "sigma-zero": {"steps": 25},
    "simba": {"steps": 40, "rel_step": 0.2},
    "sparse-rs": {"steps": 40},
    "sparse-rs-patch": {"steps": 40},
    "spatial": {"rotations": 3, "shifts": 3, "steps": 3},
    "sparsefool": {"steps": 12, "rivals": 1},
    "spsa": {"steps": 6, "rel_step": 0.4, "draws": 3},
    "square": {"steps": 40},
    "superdeepfool": {"steps": 12, "rivals": 1},
    "surfree": {"steps": 32},
    "targeted-ascent": {"steps": 20, "step": 0.02},
    "trust-region": {"steps": 40, "most": 0.2, "rivals": 1},
    "ti-fgsm": {"smallest": 0.97, "size": 3},
    "uap": {"epochs": 15},
    "uniform-noise": {"draws": 12, "rounds": 4, "grain": 6},
    "vfga": {"steps": 30, "samples": 1},
    "vmi-fgsm": {"count": 2},
    "vni-fgsm": {"count": 2},
    "zoo": {"steps": 30, "coordinates": 4, "rel_step": 0.2},
}
"""Every registered attack with few steps; an attack without a row here is not checked, so a test asks for one."""

VARIANTS: list[Runnable] = [
    APGD(steps=15, loss=dlr),
    PGD(steps=15, decay="cosine", momentum=0.75, rel_step=1.0, start="clean", loss=margin),
]


def test_every_attack_of_the_registry_is_checked() -> None:
    assert set(attacks.names()) == set(SHORT)


def each_norm() -> Iterator[Any]:
    """Yield every attack with each of its norms: all threats in the first one, half of them in the others, all if slow.

    A preset, whose parts are checked too, is slow but in one.
    """
    for name in SHORT:
        preset = not isinstance(attacks.ATTACKS[name], type)
        first, *others = attacks.ATTACKS.traits(name)["norm"]
        yield pytest.param(name, first, False, id=f"{name}-{first}")
        for norm in others:
            yield pytest.param(name, norm, False, id=f"{name}-{norm}", marks=pytest.mark.slow)
            if not preset:
                yield pytest.param(name, norm, True, id=f"{name}-{norm}-quick")


@pytest.mark.parametrize(("name", "norm", "quick"), [*each_norm()])
def test_every_attack_keeps_the_contract(name: str, norm: str, quick: bool) -> None:
    check_attack(attacks.get(name, **SHORT[name]), norms=(norm,), quick=quick)


@pytest.mark.parametrize("attack", VARIANTS, ids=lambda a: type(a).__name__)
def test_variants_keep_the_contract(attack: Runnable) -> None:
    check_attack(attack, norms=("linf", "l2"))


@pytest.mark.parametrize("shape", [(12,), (2, 9), (1, 5, 4)], ids=["vectors", "sequences", "grey images"])
@pytest.mark.parametrize("attack", [APGD(steps=10), Square(steps=30)], ids=lambda a: type(a).__name__)
def test_inputs_of_any_shape_are_attacked(attack: Runnable, shape: tuple[int, ...]) -> None:
    check_attack(attack, shape=shape, norms=("l2",))


# Closed forms: two classes, split where the mean of the input is 1/2.

EXACT: list[tuple[Runnable, str, float]] = [
    (FGSM(), "linf", 1.001),
    (FGSM(), "l2", 1.001),
    (FGSM(), "l1", 2.5),  # one step, whose coordinates run into the box
    (BIM(), "linf", 1.001),
    (BIM(), "l2", 1.001),
    (PGD(), "linf", 1.001),
    (PGD(), "l2", 1.01),
    (PGD(steps=100, support=0.2), "l1", 1.01),
    (APGD(steps=40), "linf", 1.001),
    (APGD(steps=40), "l2", 1.001),
    (APGD(steps=40), "l1", 1.01),
    (Funnel(steps=40), "linf", 1.01),
    (Funnel(steps=40, rel_step=1.0), "l2", 1.02),
    (Funnel(steps=60, rel_step=1.0, support=0.2), "l1", 1.05),
    (Square(steps=300), "linf", 2.0),
    (Square(steps=300), "l2", 3.0),
    (TargetedAscent(), "linf", 1.001),
    (TargetedAscent(), "l2", 1.001),
    (TargetedAscent(), "l1", 1.001),
]


def points(shape: tuple[int, ...], b: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return (0.58 + 0.06 * torch.rand(b, *shape, generator=g)).to(dtype)


@pytest.mark.parametrize(
    ("attack", "norm", "slack"), EXACT, ids=lambda v: v if isinstance(v, str) else type(v).__name__
)
@pytest.mark.parametrize(("shape", "b"), [((3, 6, 6), 3), ((1, 8, 8), 1), ((50,), 2), ((2, 30), 2)])
def test_success_just_above_the_least_distance_and_none_just_below(
    attack: Runnable, norm: str, slack: float, shape: tuple[int, ...], b: int
) -> None:
    for dtype in (torch.float32, torch.float64):
        x = points(shape, b, dtype)
        n = x[0].numel()
        least = (x.flatten(1).mean(1) - 0.5) * {"linf": 1, "l2": n**0.5, "l1": n}[norm]
        y = torch.ones(b, dtype=torch.long)
        for targeted, label in ((False, y), (True, 1 - y)):
            above = attack(Line(), x, label, Threat(norm, float(least.max()) * slack, targeted=targeted))
            below = attack(Line(), x, label, Threat(norm, float(least.min()) * 0.999, targeted=targeted))
            assert above.success.all()
            assert not below.success.any()
            assert below.size.isinf().all()
            assert above.x.dtype == dtype


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_least_distance_where_the_box_binds_is_reached(norm: str) -> None:
    """A plane with uneven weights, close to the corner of the box: a solver knows the distance."""
    g = torch.Generator().manual_seed(4)
    x, w = 0.15 * torch.rand(4, 8, generator=g), 0.2 + torch.rand(8, generator=g)
    b = float(0.1 * (x @ w).mean())

    class Plane(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            z = v @ w.to(v) - b
            return torch.stack([-z, z], 1)

    for i in range(4):
        least = _distance_in_box(x[i].double().numpy(), w.double().numpy(), b, norm)
        attack = APGD(steps=100) if norm != "l1" else PGD(steps=200, support=0.5, rel_step=0.2, decay="cosine")
        one, y = x[i : i + 1], torch.ones(1, dtype=torch.long)
        assert attack(Plane(), one, y, Threat(norm, least * 1.03)).success.all(), i
        assert not attack(Plane(), one, y, Threat(norm, least * 0.995)).success.any(), i


def _distance_in_box(x: np.ndarray, w: np.ndarray, b: float, norm: str) -> float:
    """Return the least size of d >= -x (w > 0, so only falls help) with w @ (x + d) <= b."""
    need = float(w @ x - b)
    if norm == "l1":
        found = scipy.optimize.linprog(np.ones(8), A_ub=-w[None], b_ub=[-need], bounds=[(0, v) for v in x])
        return float(found.fun)
    if norm == "linf":
        return float(scipy.optimize.brentq(lambda r: w @ np.minimum(x, r) - need, 0, x.max()))
    s = scipy.optimize.brentq(lambda s: w @ np.minimum(x, s * w) - need, 0, 100)
    return float(np.linalg.norm(np.minimum(x, s * w)))


class Planes(nn.Module):
    """c classes, each with a mean of its own group of coordinates as logit: class k is left by lowering group k."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).unflatten(1, (self.classes, -1)).mean(2)


@pytest.mark.parametrize("classes", [2, 3, 5, 10])
@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr], ids=lambda f: f.__name__)
def test_the_nearest_of_many_classes_is_reached(classes: int, loss: Any) -> None:
    """Under linf the label's logit falls by eps and that of any rival rises by as much: half of the gap is enough."""
    g = torch.Generator().manual_seed(0)
    x = (0.3 + 0.4 * torch.rand(6, classes * 4, generator=g)).to(torch.float64)
    z = Planes(classes)(x)
    top, order = z.topk(2, 1)
    half = (top[:, 0] - top[:, 1]) / 2
    smooth = loss is cross_entropy  # the others see one rival at a time, and may need another start to see the nearest
    for i in range(6):
        one, y, last = x[i : i + 1], order[i : i + 1, 0], z[i].argmin()[None]
        once = APGD(steps=50, loss=loss)
        for attack in (once if smooth else Restarts(once, 6), Targets(once, 1)):
            assert attack(Planes(classes), one, y, Threat("linf", float(half[i]) * 1.02)).success.all()
            assert not attack(Planes(classes), one, y, Threat("linf", float(half[i]) * 0.999)).success.any()
        far = float(top[i, 0] - z[i, last]) / 2
        attack = APGD(steps=60, loss=loss)
        near = Threat("linf", far * (1.05 if smooth else 1.5), targeted=True)
        assert attack(Planes(classes), one, last, near).success.all()
        assert not attack(Planes(classes), one, last, Threat("linf", far * 0.999, targeted=True)).success.any()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_ascent_without_eps_walks_to_the_first_point_past_the_boundary(norm: str) -> None:
    x = points((3, 4, 4))
    r = TargetedAscent(step=0.01)(Line(), x, torch.zeros(3, dtype=torch.long), Threat(norm, targeted=True))
    fall = x.flatten(1).mean(1) - 0.5
    steps = (fall / 0.01).ceil()
    assert r.success.all()
    assert torch.allclose(r.forwards.float(), steps + 2, atol=1)  # with the start, and the verification
    assert torch.allclose(r.size, steps * 0.01 * {"linf": 1, "l2": 48**0.5, "l1": 48}[norm], rtol=0.2)


# Brute force: where a dense grid over the ball finds an adversarial point, so does an attack.


class Tiny(nn.Module):
    """A ReLU network on the plane whose regions have been bent by random weights."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a, self.b = torch.randn(2, 12, generator=g) * 3, torch.randn(12, generator=g)
        self.c = torch.randn(12, 3, generator=g)

    def forward(self, x: Tensor) -> Tensor:
        return ((x - 0.5) @ self.a.to(x) + self.b.to(x)).relu() @ self.c.to(x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_find_what_a_grid_finds(norm: str) -> None:
    found = {"grid": 0, "apgd": 0, "pgd": 0, "square": 0}
    line = torch.linspace(0, 1, 401)
    grid = torch.cartesian_prod(line, line)
    for seed in range(4):
        net = Tiny(seed)
        x = torch.rand(25, 2, generator=torch.Generator().manual_seed(seed))
        y, threat = net(x).argmax(1), Threat(norm, 0.12)
        other = net(grid).argmax(1)
        inside = torch.stack([exact_size(threat.norm, grid, v.expand_as(grid)) <= 0.12 for v in x])
        truth = (inside & (other[None] != y[:, None])).any(1)
        found["grid"] += int(truth.sum())
        tried = {"apgd": Restarts(APGD(steps=30), 3), "pgd": Restarts(PGD(steps=40), 3), "square": Square(steps=150)}
        for name, attack in tried.items():
            success = attack(net, x, y, threat).success
            found[name] += int((success & truth).sum())
            extra = success & ~truth  # between the lines of the grid
            assert int(extra.sum()) <= 2
    assert 20 < found["grid"] < 90
    assert found["apgd"] >= 0.95 * found["grid"]
    assert found["pgd"] >= 0.95 * found["grid"]
    assert found["square"] >= (0.9 if norm == "linf" else 0.75) * found["grid"]  # in two dimensions, l2 has no windows


# APGD, against a literal transcription of its pseudo-code.


def literal_apgd(
    net: nn.Module, loss: Any, p: Problem, y: Tensor, start: Tensor, eps: float, steps: int
) -> list[Tensor]:
    """Run algorithm 1 of Croce & Hein 2020 for one sample under linf or l2, in plain words; return all iterates."""

    def ask(x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_()
        value = loss(net(x), Goal(y))
        return value.item(), torch.autograd.grad(value, x)[0]

    def inside(x: Tensor) -> Tensor:
        if p.norm.name == "l2":  # the nearest point of ball and box, which other tests check
            return p.project(x)
        return torch.minimum(torch.maximum(x, (p.x0 - eps).clamp_min(0)), (p.x0 + eps).clamp_max(1))

    def unit(g: Tensor) -> Tensor:
        return g / g.norm() if p.norm.name == "l2" else g.sign()

    checkpoint, window = max(int(0.22 * steps), 1), max(int(0.22 * steps), 1)
    x, previous, eta = start, start, 2 * eps
    f, g = ask(x)
    best_x, best_f, best_g = x, f, g
    losses, iterates = [f], [x]
    reduced, best_at_last_check = True, best_f
    for i in range(steps):
        z = inside(x + eta * unit(g))
        a = 0.75 if i else 1.0
        x, previous = inside(x + a * (z - x) + (1 - a) * (x - previous)), x
        f, g = ask(x)
        losses.append(f)
        iterates.append(x)
        if f > best_f:
            best_x, best_f, best_g = x, f, g
        if i + 1 == checkpoint:
            rises = sum(losses[j] > losses[j - 1] for j in range(checkpoint - window + 1, checkpoint + 1))
            halve = rises <= 0.75 * window or (not reduced and best_at_last_check >= best_f)
            reduced, best_at_last_check = halve, best_f
            if halve:
                eta, x, g = eta / 2, best_x, best_g
            shorter, shortest = window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)
            window = max(shorter, shortest)
            checkpoint += window
    return iterates


@pytest.mark.parametrize("steps", [9, 40, 100])
@pytest.mark.parametrize("loss", [cross_entropy, margin], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.25), ("l2", 0.7)])
def test_apgd_walks_as_published_step_by_step(steps: int, loss: Any, norm: str, eps: float) -> None:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5)).double()
    rows = torch.arange(4)
    x0 = torch.rand(4, 20, dtype=torch.float64)
    y = net(x0).argmax(1)
    threat = Threat(norm, eps).within(Model(net).domain, 20)
    attack = APGD(steps=steps, loss=loss)
    with Model(net).frozen() as live:
        door, p = Door(live, 4), Problem.pose(x0, y, threat, Draws.of(0, rows))
        s = attack.init(p)
        one = [rows[i : i + 1] for i in range(4)]
        wanted = [literal_apgd(net, loss, p.take(i), y[i], s.x[i], eps, steps) for i in one]
        for k in range(steps):
            for i in range(4):
                assert torch.allclose(s.x[i], wanted[i][k][0], atol=1e-9), f"sample {i} after {k} updates"
            s = attack.update(p, s, door.gradient(s.x, p, loss), k)
        assert torch.allclose(s.x, torch.cat([w[steps] for w in wanted]), atol=1e-9)
    assert (s.pace.step < 2 * eps).all() or steps == 9  # the reviews did take place


def literal_l1(net: nn.Module, p: Problem, y: Tensor, start: Tensor, stages: list[tuple[float, int]]) -> list[Tensor]:
    """Run algorithm 1 of Croce & Hein 2021 for one sample in ever smaller balls, in plain words; return iterates."""

    def ask(x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_()
        value = margin(net(x), Goal(y))
        return value.item(), torch.autograd.grad(value, x)[0]

    n, best_x, iterates = p.x0.numel(), start, []
    for number, (eps, steps) in enumerate(stages):
        q = p.with_radius(torch.tensor([eps], dtype=torch.float64))
        x = q.project(best_x)
        touched = n if number == 0 else int((x != p.x0).sum())
        k, eta = 0.2 * n if number == 0 else touched / 1.5, eps
        f, g = ask(x)
        iterates.append(x)
        best_f, best_x, best_g = f, x, g
        window = max(int(0.04 * steps), 1)
        for i in range(steps):
            if i and i % window == 0:
                now = int((best_x != p.x0).sum())
                if now < 0.95 * touched:
                    eta, x, g = eps, best_x, best_g
                else:
                    eta = max(eta / 1.5, eps / 10)
                touched, k = now, now / 1.5
            kept = g.abs().flatten().argsort(descending=True, stable=True)[: max(round(k), 1)]
            u = torch.zeros(n, dtype=g.dtype)
            u[kept] = g.flatten()[kept].sign()
            x = q.project(x + eta * u.view_as(x) / u.abs().sum())
            f, g = ask(x)
            iterates.append(x)
            if f > best_f:
                best_f, best_x, best_g = f, x, g
    return iterates


@pytest.mark.parametrize(("wide", "steps"), [(True, 50), (True, 101), (False, 50)])
def test_apgd_walks_as_published_in_l1(wide: bool, steps: int) -> None:
    torch.manual_seed(6)
    net = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 5)).double()
    x0, rows = torch.rand(3, 30, dtype=torch.float64), torch.arange(3)
    y, attack = net(x0).argmax(1), APGD(steps=steps, loss=margin, wide=wide)
    threat = Threat("l1", 1.5).within(Model(net).domain, 30)
    part = math.ceil(0.3 * steps)  # a new ball costs one of the steps
    stages = [(4.5, part), (3.0, part), (1.5, steps - 2 * part - 2)] if wide else [(1.5, steps)]
    with Model(net).frozen() as live:
        door, p = Door(live, 3), Problem.pose(x0, y, threat, Draws.of(0, rows))
        s = attack.init(p)
        wanted = [literal_l1(net, p.take(rows[i : i + 1]), y[i : i + 1], s.x[i : i + 1], stages) for i in range(3)]
        for k in range(steps + 1):
            for i in range(3):
                assert torch.allclose(s.x[i], wanted[i][k][0], atol=1e-9), f"sample {i} after {k} updates"
            s = attack.update(p, s, door.gradient(s.x, p, margin), k) if k < steps else s


def test_reviews_come_ever_closer_as_published() -> None:
    assert list(apgd.reviews(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


# Square.


def image_problem(shape: tuple[int, ...], norm: str, eps: float, b: int = 4) -> Problem:
    x = 0.3 + 0.4 * torch.rand(b, *shape, generator=torch.Generator().manual_seed(2))
    rows = torch.arange(b)
    threat = Threat(norm, eps).within(Model(Line()).domain, x[0].numel())
    return Problem.pose(x, torch.zeros_like(rows), threat, Draws.of(0, rows))


def score(p: Problem, loss: float) -> Score:
    return Score(torch.zeros(len(p), dtype=torch.bool), p.full(loss), torch.zeros(len(p), 2))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 9, 14), (2, 40), (64,), (3, 2, 2), (1, 7, 1)])
def test_square_repaints_one_window_a_sample_and_keeps_the_ball(norm: str, shape: tuple[int, ...]) -> None:
    p = image_problem(shape, norm, 0.05 if norm == "linf" else 0.2)
    attack = Square(steps=1000)
    s = attack.init(p)
    assert p.allows(s.x).all()
    assert (p.size(s.x) > 0.99 * p.radius).all()
    for k in range(12):
        before = s.x
        s = attack.update(p, s, score(p, k), k)  # every candidate is an improvement
        assert torch.equal(s.kept, before)
        assert p.allows(s.x).all()
        assert (p.size(s.x) > 0.99 * p.radius).all(), "the whole budget is used"


def test_square_windows_differ_by_sample_and_shrink_with_time() -> None:
    p = image_problem((3, 20, 20), "linf", 0.05, b=6)
    attack = Square(steps=10_000)
    s = attack.init(p)
    s = attack.update(p, s, score(p, 0.0), 0)
    assert len({tuple(map(tuple, (v != k).any(0).nonzero().tolist())) for v, k in zip(s.x, s.kept, strict=True)}) > 3
    for k, share in ((0, 0.8), (10, 0.8), (11, 0.4), (51, 0.2), (201, 0.1), (8001, 0.8 / 512)):
        assert attack.share(k) == pytest.approx(share)
        s = attack.update(p, s, score(p, k + 1.0), k)
        changed = (s.x != s.kept).any(1)
        high, wide = changed.any(2).sum(1).max().item(), changed.any(1).sum(1).max().item()
        side = max(round((share * 400) ** 0.5), 1)
        assert high <= side
        assert wide <= side


def test_square_goes_back_when_a_candidate_is_no_better() -> None:
    p = image_problem((1, 6, 6), "linf", 0.05)
    attack = Square(steps=100)
    first = attack.init(p)
    second = attack.update(p, first, score(p, 1.0), 0)
    third = attack.update(p, second, score(p, 1.0), 1)
    assert torch.equal(third.kept, first.x)
    assert torch.equal(attack.update(p, third, score(p, 2.0), 2).kept, third.x)


def literal_eta(s: int) -> np.ndarray:
    """Pile up two pyramids the way the paper draws them: one rectangle after the other, from the centre outwards."""

    def pyramid(rows: int, columns: int) -> np.ndarray:
        pile = np.zeros((rows, columns))
        top, left = rows // 2, columns // 2
        for k in range(max(top, left) + 1):
            pile[max(top - k, 0) : top + k + 1, max(left - k, 0) : left + k + 1] += 1 / (k + 1) ** 2
        return pile / np.linalg.norm(pile)

    both = np.concatenate([pyramid(s // 2, s), -pyramid(s - s // 2, s)])
    return both / np.linalg.norm(both)


@pytest.mark.parametrize("side", [3, 5, 8, 25])
def test_pyramids_are_those_of_the_paper(side: int) -> None:
    assert np.allclose(square._pair(side, side).numpy(), literal_eta(side))


def test_pyramids_fit_windows_of_any_shape() -> None:
    for h, w in ((1, 1), (1, 2), (1, 9), (9, 1), (2, 7), (7, 2)):
        pair = square._pair(h, w)
        assert pair.shape == (h, w)
        assert pair.norm().item() == pytest.approx(1)
        assert (pair.min() < 0 < pair.max()) or h * w == 1


def test_l2_mass_moves_from_the_second_window_to_the_first() -> None:
    """Outside both windows nothing changes, the second is emptied, and the norm stays that of the ball."""
    p = image_problem((3, 24, 24), "l2", 0.3)
    attack = Square(steps=10_000)
    s = attack.init(p)
    for k in range(210, 220):
        s = attack.update(p, s, score(p, float(k)), k)
        before, after = s.kept - p.x0, s.x - p.x0
        share = attack.share(k)
        side = square._odd_sides(share, 24, 24)[0]
        touched = ((before - after).abs() > 1e-6).any(1).flatten(1).sum(1)
        assert (touched <= 2 * side * side).all()
        emptied = ((after == 0) & (before != 0)).any(1).flatten(1).sum(1)
        assert (emptied > 0).any()
        assert torch.allclose(after.flatten(1).norm(dim=1), p.radius, rtol=1e-4)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.2)])
def test_square_breaks_more_than_random_noise_of_the_same_size(norm: str, eps: float) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 64, 6))
    x = 0.25 + 0.5 * torch.rand(40, 1, 16, 16)
    y = net(x).argmax(1)

    @final
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Noise(ScoreAttack[NoiseState]):
        norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
        steps: int = 150
        loss: Any = margin

        def init(self, p: Problem) -> NoiseState:
            return NoiseState(p.start())

        def update(self, p: Problem, s: NoiseState, e: Score, k: int) -> NoiseState:
            return NoiseState(p.stage(k).start())

    rates = {}
    for name, attack in {"square": Square(steps=150), "noise": Noise()}.items():
        rates[name] = attack(net, x, y, Threat(norm, eps)).success.float().mean().item()
    assert rates["square"] > 0.55
    assert rates["noise"] < 0.5 * rates["square"]


class NoiseState(NamedTuple):
    x: Tensor


# The call: verification, errors, names.


@final
@dataclass(frozen=True, slots=True)
class Liar(Runnable):
    """Claims success for a point of its choice."""

    shift: float = 0.0

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        door.logits(p.x0, p.rows)
        return Outcome(p.x0 + self.shift, torch.ones(len(p), dtype=torch.bool), torch.zeros_like(p.rows))


def a_false_claim_is_not_believed() -> None:
    x, y = points((1, 3, 3)), torch.ones(3, dtype=torch.long)
    for shift, why in ((0.0, "the model is right there"), (-0.3, "outside the ball"), (-0.7, "outside the box")):
        for norm, eps in (("linf", 0.2), ("l2", 0.6), ("l1", 1.8)):
            r = Liar(shift)(Line(), x, y, Threat(norm, eps))
            assert not r.success.any(), why
            assert r.size.isinf().all()
            assert (exact_size(Threat(norm).norm, r.x, x) <= eps).all(), "a point that is not allowed is not returned"
    assert Liar(-0.3)(Line(), x, y, Threat("linf", 0.31)).success.all()


def test_a_false_claim_is_not_believed() -> None:
    a_false_claim_is_not_believed()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_point_that_rounding_carried_out_of_the_ball_is_drawn_back_in(norm: str) -> None:
    x, y = points((1, 3, 3)), torch.ones(3, dtype=torch.long)
    eps = 0.3 * {"l2": 3, "l1": 9}[norm]
    r = Liar(-0.3 * (1 + 1e-5))(Line(), x, y, Threat(norm, eps))
    assert r.success.all()
    assert (exact_size(Threat(norm).norm, r.x, x) <= eps).all()
    assert not Liar(-0.3 * (1 + 1e-3))(Line(), x, y, Threat(norm, eps)).success.any()


def test_a_sample_that_is_wrong_already_falls_at_the_clean_input() -> None:
    x = points((3, 4, 4))
    r = BIM()(Line(), x, torch.zeros(3, dtype=torch.long), Threat("linf", 0.01))
    assert r.success.all()
    assert torch.equal(r.x, x)
    assert r.size.tolist() == [0, 0, 0]
    assert r.forwards.tolist() == [2, 2, 2]


def test_full_runs_take_every_step_and_end_at_the_strongest_point() -> None:
    x, y, threat = points((3, 4, 4)), torch.ones(3, dtype=torch.long), Threat("linf", 0.2)
    first = PGD(steps=30)(Line(), x, y, threat)
    strongest = PGD(steps=30)(Line(), x, y, threat, full=True)
    assert (first.forwards < 30).all()
    assert strongest.forwards.tolist() == [32] * 3
    assert strongest.backwards.tolist() == [30] * 3
    assert first.success.all()
    assert (Line()(strongest.x)[:, 0] > Line()(first.x)[:, 0]).all()


def test_attacks_work_inside_the_callers_inference_mode() -> None:
    with torch.inference_mode():
        x, y, threat = points((1, 4, 4)), torch.ones(3, dtype=torch.long), Threat("linf", 0.2)
        for attack in (PGD(steps=20), BIM(), APGD(steps=5), Targets(APGD(steps=5), 1)):
            assert attack(Line(), x, y, threat).success.all()


def test_seeds_change_what_is_drawn_and_nothing_else() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.rand(4, 3, 4, 4)
    y = net(x).argmax(1)
    for attack in (PGD(steps=3), Square(steps=5)):
        one, same, other = (attack(net, x, y, Threat("linf", 0.003), seed=s, full=True) for s in (1, 1, 2))
        assert torch.equal(one.x, same.x)
        assert not torch.equal(one.x, other.x)
    for steady in (FGSM(), BIM()):
        one, other = (steady(net, x, y, Threat("linf", 0.003), seed=s, full=True) for s in (1, 2))
        assert torch.equal(one.x, other.x)


@pytest.mark.parametrize(
    ("x", "y", "says", "code"),
    [
        (torch.zeros(0, 3), torch.zeros(0).long(), "b >= 1", "empty-data"),
        (torch.zeros(2, 3), torch.zeros(3).long(), r"\(2, 3\) and \(3,\)", None),
        (torch.zeros(2), torch.zeros(2).long(), r"\(2,\) and", None),
        (torch.zeros(2, 3).long(), torch.zeros(2).long(), "floating-point inputs", None),
        (torch.zeros(2, 3), torch.zeros(2), "integer labels", None),
        (torch.full((2, 3), 1.5), torch.zeros(2).long(), "2 of 2 samples outside", "input-outside-box"),
        (torch.tensor([[0.0], [math.nan]]), torch.zeros(2).long(), "sample 1", "non-finite-input"),
        (torch.zeros(2, 3), torch.tensor([0, 2]), "from 0 to 1", "bad-logits"),
    ],
)
def test_data_that_do_not_fit_are_refused(x: Tensor, y: Tensor, says: str, code: str | None) -> None:
    with pytest.raises(DataError, match=says) as caught:
        PGD()(Line(), x, y, Threat("linf", 0.1))
    assert caught.value.code == code


def test_threats_that_an_attack_is_not_made_for_are_refused() -> None:
    x, y = points((3, 4, 4)), torch.ones(3, dtype=torch.long)
    for attack, threat, says in (
        (PGD(), Threat("linf"), "an eps for PGD"),
        (ACG(), Threat("l1", 1.0), "one of linf for ACG"),
        (Square(), Threat("l0", 3), "for Square"),
        (PGD(), Threat("linf", 8), "8/255"),
    ):
        with pytest.raises(ThreatError, match=says):
            attack(Line(), x, y, threat)
    with pytest.raises(AssayError, match="steps >= 1"):
        PGD(steps=0)(Line(), x, y, Threat("linf", 0.1))


def test_attacks_are_found_by_what_they_need_and_built_from_text() -> None:
    found = attacks.names(norm="l1", access="gradient", kind="budget")
    assert {"apgd", "bim", "fgsm", "pgd", "targeted-ascent"} <= set(found)
    assert not {"acg", "mi-fgsm", "square", "ddn"} & set(found)
    assert attacks.names(access="score", norm="l1") == ("square",)
    assert {"rays", "hop-skip-jump", "uniform-noise"} <= set(attacks.names(access="decision", norm="linf"))
    assert attacks.get("pgd", steps="7", rel_step="0.5", start="clean") == PGD(steps=7, rel_step=0.5, start="clean")
    assert attacks.get("apgd", loss="dlr") == APGD(loss=dlr)
    for name, params, says in (
        ("fgms", {}, "Did you mean 'fgsm'"),
        ("pgd", {"step": 3}, "Did you mean 'steps'"),
        ("pgd", {"steps": "many"}, "int for pgd steps"),
        ("pgd", {"loss": "hinge"}, "registered loss"),
    ):
        with pytest.raises(UsageError, match=says):
            attacks.get(name, **params)


def test_an_attack_is_written_as_plain_data() -> None:
    attack = Cascade((APGD(steps=5), Targets(APGD(loss=dlr), 3)))
    assert attacks.describe_attack(attack) == {
        "name": "Cascade",
        "attacks": [
            {"name": "apgd", "steps": 5, "rho": 0.75, "momentum": 0.75, "wide": True, "loss": "ce"},
            {
                "name": "Targets",
                "count": 3,
                "among": 0,
                "attack": {"name": "apgd", "steps": 100, "rho": 0.75, "momentum": 0.75, "wide": True, "loss": "dlr"},
            },
        ],
    }
