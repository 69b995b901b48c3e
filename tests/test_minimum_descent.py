"""Minimal-norm attacks by gradient descent: linear models in closed form, and the published algorithms step by step."""

import math
from dataclasses import dataclass, replace
from typing import final

import pytest
import torch
from torch import Tensor, nn

from assay.attacks import ALMA, DDN, FMN, PDGD, PDPGD, Outcome, Runnable, SigmaZero
from assay.attacks.minimum import pdpgd
from assay.core.random import Draws
from assay.core.types import Inputs
from assay.models import Door, Model
from assay.threats import Problem, Threat
from assay.threats.problem import exact_size
from minimal_cases import Planes, TinyNet, by_search, inputs, labels, least

SHAPES = [(12,), (2, 9), (1, 6, 6), (3, 6, 6)]
"""Vectors, sequences, grey and colour images."""

EXACT: list[tuple[Runnable, str]] = [
    (FMN(steps=40), "linf"),
    (FMN(steps=40), "l2"),
    (FMN(steps=40), "l1"),
    (FMN(steps=40), "l0"),
    (DDN(steps=40), "l2"),
    (PDGD(steps=60), "l2"),
    (PDPGD(steps=60), "linf"),
    (PDPGD(steps=60), "l1"),
    (PDPGD(steps=60), "l0"),
    (ALMA(steps=60), "l2"),
    (ALMA(steps=150), "l1"),
    (SigmaZero(steps=60), "l0"),
]
"""Attacks that find the least perturbation of a linear model, to one in a hundred."""


@final
@dataclass(frozen=True, slots=True)
class ByEveryRival(Runnable):
    """The smallest of what an attack finds by way of each class.

    Alone, an attack stays with the rival that it meets first, even where another one's plane is nearer.
    """

    attack: Runnable
    classes: int

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        rivals = torch.arange(self.classes).repeat_interleave(len(p))
        out = self.attack.run(door, p.take(torch.arange(len(p)).repeat(self.classes)).toward(rivals), full=full)
        size = torch.where(out.success, exact_size(p.norm, out.x, p.x0.repeat(self.classes, 1)), torch.inf)
        first = size.view(self.classes, -1).argmin(0) * len(p) + torch.arange(len(p))
        return Outcome(out.x[first], out.success[first], out.by[first])


def name(v: object) -> str:
    return v if isinstance(v, str) else type(v).__name__


@pytest.mark.parametrize(("attack", "norm"), EXACT, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_least_perturbation_of_a_linear_model_is_found(attack: Runnable, norm: str, shape: tuple[int, ...]) -> None:
    net, x = Planes(shape, 2), inputs(shape)
    y = labels(net, x)
    assert_least(attack(net, x, y, Threat(norm)).size, least(net, x, y, norm), norm)


@pytest.mark.parametrize(("attack", "norm"), EXACT, ids=name)
@pytest.mark.parametrize("c", [3, 5, 10])
def test_of_many_planes_the_nearest_is_found_when_each_is_tried(attack: Runnable, norm: str, c: int) -> None:
    net, x = Planes((12,), c), inputs((12,), b=2)
    y = labels(net, x)
    found = ByEveryRival(attack, c)(net, x, y, Threat(norm)).size
    assert_least(found, least(net, x, y, norm), norm)


@pytest.mark.parametrize(("attack", "norm"), EXACT, ids=name)
def test_of_many_planes_mostly_the_nearest_is_found_at_once(attack: Runnable, norm: str) -> None:
    net, x = Planes((1, 6, 6), 10), inputs((1, 6, 6), b=10)
    y = labels(net, x)
    found, exact = attack(net, x, y, Threat(norm)).size.double(), least(net, x, y, norm)
    assert (found >= exact * (1 - 1e-5)).all()
    assert (found <= exact * 1.01).double().mean() >= 0.8


@pytest.mark.parametrize(("attack", "norm"), EXACT, ids=name)
@pytest.mark.parametrize("scale", [0.05, 100.0])
def test_the_scale_of_the_logits_does_not_matter(attack: Runnable, norm: str, scale: float) -> None:
    net, x = Planes((1, 6, 6), 2, scale=scale), inputs((1, 6, 6))
    net.bias.data = -net.weight.detach().sum(1) / 2 + scale * net.bias.new_tensor([0.0, 0.02])
    y = labels(net, x)
    assert_least(attack(net, x, y, Threat(norm)).size, least(net, x, y, norm), norm)


@pytest.mark.parametrize(("attack", "norm"), EXACT, ids=name)
def test_a_target_is_reached_as_cheaply(attack: Runnable, norm: str) -> None:
    net, x = Planes((12,), 2), inputs((12,))
    target = 1 - labels(net, x)
    found = attack(net, x, target, Threat(norm, targeted=True)).size
    assert_least(found, least(net, x, 1 - target, norm, target), norm)


@pytest.mark.parametrize(("attack", "norm"), EXACT, ids=name)
def test_one_sample_of_float64_is_enough(attack: Runnable, norm: str) -> None:
    net, x = Planes((12,), 3), inputs((12,), b=1, dtype=torch.float64)
    y = labels(net, x)
    r = attack(net, x, y, Threat(norm))
    assert r.x.dtype == torch.float64
    assert_least(r.size, least(net, x, y, norm), norm)


class Half(nn.Module):
    """A network that computes in bfloat16, with eight bits of mantissa."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x.bfloat16()).float()
        return out


@pytest.mark.parametrize(("attack", "norm"), EXACT, ids=name)
def test_a_coarse_model_costs_no_more_than_its_rounding(attack: Runnable, norm: str) -> None:
    net, x = Planes((12,), 2, scale=4.0), inputs((12,))
    net.requires_grad_(False)
    y = labels(net, x)
    found, exact = attack(Half(net), x, y, Threat(norm)).size.double(), least(net, x, y, norm)
    slope = (net.weight[0] - net.weight[1]).flatten().double()
    dual = {"linf": slope.abs().sum(), "l2": slope.norm(), "l1": slope.abs().max(), "l0": slope.abs().max()}[norm]
    size = net(x).abs().amax() + net.bias.abs().amax() + x.flatten(1).double().abs() @ net.weight.abs().sum(0)
    rounding = 2**-7 * size.amax().double() / dual  # of inputs, weights and sums, there and back
    assert (found <= 1.01 * exact + (1 if norm == "l0" else rounding)).all()


def assert_least(found: Tensor, exact: Tensor, norm: str) -> None:
    if norm == "l0":
        assert torch.equal(found.double(), exact), (found, exact)
        return
    assert (found.double() >= exact * (1 - 1e-5)).all()
    assert (found.double() <= exact * 1.01).all(), found / exact


@pytest.mark.parametrize(("norm", "share"), [("linf", 0.9), ("l2", 0.9), ("l1", 0.75)])
def test_tiny_networks_against_exhaustive_search(norm: str, share: float) -> None:
    """Descent may end in another local minimum, so most samples count, not all."""
    x = Draws.of(5, torch.arange(24)).uniform((2,))
    near = []
    for seed in (0, 1, 2):
        net = TinyNet(seed=seed)
        y = labels(net, x)
        exact = by_search(net, x, y, norm, points=301)
        found = FMN(steps=100)(net, x, y, Threat(norm)).size.double()
        there = exact.isfinite()
        assert (found >= exact - 2 / 300 * 2)[there].all()
        near.append((found <= 1.15 * exact + 0.01)[there])
    assert torch.cat(near).double().mean() > share


@pytest.mark.parametrize(("attack", "norm"), EXACT, ids=name)
def test_closing_in_makes_perturbations_smaller(attack: Runnable, norm: str) -> None:
    net, x = TinyNet(), Draws.of(5, torch.arange(24)).uniform((2,))
    y = labels(net, x)
    near, far = (replace(attack, closing=n)(net, x, y, Threat(norm)) for n in (10, 0))  # type: ignore[type-var]
    assert near.success[far.success].all()
    larger = near.size > 1.01 * far.size  # it takes the place of the descent's last point
    assert larger.sum() <= (norm == "l1")
    assert (near.size <= 1.1 * far.size).all()
    assert near.size[far.success].sum() <= far.size[far.success].sum()


# Step by step: what is asked, against the papers' pseudo-code for one sample, written plainly.


class Asked(nn.Module):
    """A smooth network that remembers the points it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        draws = Draws.of(3, torch.arange(8))
        self.a, self.b = draws.normal((6,)).double(), draws.fold(1).normal((4,)).double()[:8].T
        self.points: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.points.append(x.detach()[:1].clone())
        return torch.tanh((x - 0.5) @ self.a.T) @ self.b.T * 2


def asked(attack: Runnable, norm: str) -> tuple[list[Tensor], Tensor, Tensor, Asked]:
    net, x = Asked(), inputs((6,), b=1, seed=9, dtype=torch.float64)
    with torch.no_grad():
        y = net(x).argmax(1)
    net.points.clear()
    attack(Model(net), x, y, Threat(norm))
    return [v[0] for v in net.points], x[0], y, net


def slope(net: Asked, x: Tensor, y: Tensor, loss: str) -> tuple[bool, Tensor, Tensor]:
    """Return whether x is adversarial, the loss that is ascended, and its gradient."""
    v = x.clone().requires_grad_()
    z = net(v[None])
    other = z.scatter(1, y[:, None], -torch.inf).amax()
    value = other - z[0, y[0]] if loss == "margin" else nn.functional.cross_entropy(z, y)
    (grad,) = torch.autograd.grad(value, v)
    return bool(other > z[0, y[0]]), value.detach(), grad


def test_ddn_is_the_published_algorithm() -> None:
    """Rony et al. 2019, arXiv:1811.09600, algorithm 1."""
    points, x0, y, net = asked(DDN(steps=40, closing=0), "l2")
    delta, radius = torch.zeros_like(x0), 1.0
    most = float(torch.maximum(x0, 1 - x0).norm())
    for k in range(40):
        torch.testing.assert_close(points[k], x0 + delta)
        adversarial, _, grad = slope(net, x0 + delta, y, "ce")
        delta = delta + (0.01 + 0.99 * (1 + math.cos(math.pi * k / 40)) / 2) * grad / grad.norm()
        radius = min(most, radius * (0.95 if adversarial else 1.05))
        delta = (x0 + radius * delta / delta.norm()).clamp(0, 1) - x0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_fmn_is_the_published_algorithm(norm: str) -> None:
    """Pintor et al. 2021, arXiv:2102.12827, algorithm 1, with the differences that the docstring names."""
    steps = 40
    points, x0, y, net = asked(FMN(steps=steps, closing=0), norm)
    delta, best = torch.zeros_like(x0), math.inf
    radius, most = (1.0 if norm == "l0" else math.inf), size(torch.maximum(x0, 1 - x0), norm)
    for k in range(steps):
        torch.testing.assert_close(points[k], x0 + delta, atol=3e-6, rtol=0)
        delta = points[k] - x0  # so that rounding does not add up
        adversarial, loss, grad = slope(net, x0 + delta, y, "margin")
        fade = (1 + math.cos(math.pi * k / steps)) / 2
        a, c = 0.01 + 0.99 * fade, 0.001 + 0.049 * fade
        best = min(best, size(delta, norm)) if adversarial else best
        radius = min(most, next_radius(norm, adversarial, radius, best, c, size(delta, norm), loss, grad))
        step = radius * grad.sign() if norm == "linf" else grad / grad.norm()
        step = math.sqrt(radius) * step if norm == "l0" else step
        delta = into_ball(x0, delta + a * step, radius, norm, stretch=math.isinf(best))


def next_radius(
    norm: str, adversarial: bool, radius: float, best: float, c: float, now: float, loss: Tensor, grad: Tensor
) -> float:
    if norm == "l0":
        c = 2 * c
        fewer, more = min(radius - 1, math.floor(radius * (1 - c)), best), max(radius + 1, math.floor(radius * (1 + c)))
        return max(1, fewer if adversarial else more)
    if adversarial:
        return min(radius * (1 - c), best)
    dual = {"linf": grad.abs().sum(), "l2": grad.norm(), "l1": grad.abs().max()}[norm]
    if math.isfinite(best):
        return radius * (1 + c)
    linear = now + abs(float(loss)) / float(dual)
    return (1 + c) * (linear if math.isinf(radius) else max(linear, radius))


def size(d: Tensor, norm: str) -> float:
    orders = {"linf": math.inf, "l2": 2, "l1": 1, "l0": 0}
    return float(torch.linalg.vector_norm(d, ord=orders[norm]))


def into_ball(x0: Tensor, d: Tensor, radius: float, norm: str, *, stretch: bool) -> Tensor:
    """Return the point of ball and box that is nearest to d, by bisection over its multiplier; stretched if asked."""
    low, high = -x0, 1 - x0
    if stretch and norm != "l0":
        d = into_ball(x0, d, radius, norm, stretch=False)
        return torch.maximum(torch.minimum(d * max(1.0, radius / size(d, norm)), high), low)
    inside = torch.maximum(torch.minimum(d, high), low)
    if size(inside, norm) <= radius:
        return inside
    if norm == "l0":
        kept = (inside * (2 * d - inside)).argsort(descending=True)[: int(radius)]
        return torch.zeros_like(d).scatter(0, kept, inside[kept])
    shrink = {"linf": lambda t: d.clamp(-t, t), "l2": lambda t: d * t, "l1": lambda t: d.sign() * (d.abs() - t).relu()}
    few, many = (0.0, 1.0) if norm == "l2" else (0.0, float(d.abs().max()))
    for _ in range(100):
        t = (few + many) / 2
        small = size(torch.maximum(torch.minimum(shrink[norm](t), high), low), norm) <= radius
        few, many = (t, many) if small != (norm == "l1") else (few, t)
    return torch.maximum(torch.minimum(shrink[norm](t), high), low)


@pytest.mark.parametrize(("norm", "slack"), [("l2", 1.2), ("l1", 4)])
@pytest.mark.parametrize("gap", [0.001, 0.1])
def test_alma_needs_no_step_tuned_to_the_distance(norm: str, slack: float, gap: float) -> None:
    """Its first rate follows from the linear model; one that suits the far boundary misses the near one by 3 and 7."""
    net, x = Planes((1, 6, 6), 2), inputs((1, 6, 6))
    y = torch.zeros(len(x), dtype=torch.long)
    ahead = -net(x).diff(dim=1).detach()
    net.bias.data += net.bias.new_tensor([0.0, 1.0]) * (ahead.amin() - gap)
    exact, found = least(net, x, y, norm), ALMA(steps=60, closing=0)(net, x, y, Threat(norm)).size
    nearest = exact.argmin()
    assert found[nearest] < slack * exact[nearest]


# The proximal operators, against a grid.


@pytest.mark.parametrize(
    ("operator", "penalty"),
    [
        (pdpgd.proximal_l1, lambda z: z.abs()),
        (pdpgd.proximal_l0, lambda z: (z != 0).double()),
        (pdpgd.proximal_two_thirds, lambda z: z.abs() ** (2 / 3)),
    ],
    ids=["l1", "l0", "l2/3"],
)
def test_proximal_operators_are_minimisers(operator: object, penalty: object) -> None:
    d = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    grid = torch.linspace(-2, 2, 8001, dtype=torch.float64)
    grid = torch.where(grid.abs() < 1e-9, 0, grid)
    for weight in (1e-3, 0.1, 0.7):
        z: Inputs = operator(d, torch.full((41,), weight, dtype=torch.float64))  # type: ignore[operator]
        value = (z - d)[:, 0] ** 2 / 2 + weight * penalty(z)[:, 0]  # type: ignore[operator]
        best = ((grid - d) ** 2 / 2 + weight * penalty(grid)).amin(1)  # type: ignore[operator]
        assert (value <= best + 1e-9).all()


def test_the_proximal_operator_of_the_largest_value() -> None:
    d = Draws.of(1, torch.arange(20)).normal((7,)).double()
    weight = torch.full((20,), 0.8, dtype=torch.float64)
    z = pdpgd.proximal_linf(d, weight)
    levels = torch.linspace(0, 4, 4001, dtype=torch.float64)[:, None, None]
    values = ((d.clamp(-levels, levels) - d) ** 2).sum(2) / 2 + 0.8 * levels[:, :, 0]
    found = ((z - d) ** 2).sum(1) / 2 + 0.8 * z.abs().amax(1)
    assert (found <= values.amin(0) + 1e-9).all()


@pytest.mark.parametrize("attack", [FMN(steps=20), DDN(steps=20), PDGD(steps=20), ALMA(steps=20)], ids=name)
def test_a_model_without_gradients_makes_no_nan(attack: Runnable) -> None:
    class Step(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = (x.mean(1) > 0.5).to(x) + 0 * x.mean(1)
            return torch.stack([1 - z, z], 1)

    x = inputs((6,))
    r = attack(Step(), x, labels(Step(), x), Threat("l2"))
    assert r.x.isfinite().all()


def test_samples_that_are_wrong_already_cost_one_step() -> None:
    net, x = Planes((12,), 3), inputs((12,))
    wrong = (labels(net, x) + 1) % 3
    for attack in (FMN(steps=50), DDN(steps=50), PDGD(steps=50), ALMA(steps=50)):
        r = attack(net, x, wrong, Threat("l2"))
        assert (r.size == 0).all()
        assert (r.forwards <= 3).all()
