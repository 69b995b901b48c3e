"""Gradient transforms: each equals nothing where it does nothing, and its published recurrence where it does."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay import attacks
from assay.attacks import BIM, PGD, Diversity, Momentum, Scales, Smoothing, Transform, Transformed, Variance
from assay.attacks.losses import cross_entropy, margin
from assay.attacks.testing import Line, check_attack
from assay.core.errors import DataError
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.models import Door, Model
from assay.threats import Problem, Threat
from assay.threats.problem import Goal

EPS = 0.1


class Smooth(nn.Module):
    """A network without corners, so that nearby points give nearby gradients."""

    def __init__(self, shape: tuple[int, ...] = (2, 6, 7), classes: int = 4) -> None:
        super().__init__()
        n = math.prod(shape)
        self.a = nn.Parameter(Draws.of(0, torch.arange(16)).normal((n,)).double() / n**0.5)
        self.b = nn.Parameter(Draws.of(1, torch.arange(classes)).normal((16,)).double())

    def forward(self, x: Tensor) -> Tensor:
        return (4 * x.flatten(1) @ self.a.T.to(x)).tanh() @ self.b.T.to(x)


def problem(shape: tuple[int, ...] = (2, 6, 7), b: int = 4, norm: str = "linf", net: Any = None) -> Problem:
    rows = torch.arange(b)
    x = 0.2 + 0.6 * Draws.of(5, rows).uniform(shape, torch.float64)
    y = (net or Smooth(shape))(x).argmax(1)
    threat = Threat(norm, EPS).within(Model(Line()).domain, x[0].numel())
    return Problem.pose(x, y, threat, Draws.of(0, rows))


def path(attack: Any, p: Problem, net: nn.Module) -> list[Tensor]:
    """Return every point that an attack asks about itself, the copies left out."""
    points, state = [], attack.init(p)
    with Model(net).frozen() as live:
        door = Door(live, len(p))
        for k in range(attack.questions):
            if k % (attack.questions // attack.steps) == 0:
                points.append(state.x)
            state = attack.update(p, state, attack.query(door, state.x, p, k), k)
    return [*points, state.x]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.allclose(u, v, atol=1e-12) for u, v in zip(a, b, strict=True))


def gradient(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    grad: Tensor = torch.autograd.grad(cross_entropy(net(x), Goal(y)).sum(), x)[0]
    return grad


def normalised(g: Tensor) -> Tensor:
    return g / g.abs().mean(dim=tuple(range(1, g.ndim)), keepdim=True)


# A transform that does nothing leaves the attack as it is.


@pytest.mark.parametrize(
    "idle",
    [
        (),
        (Diversity(chance=0.0),),
        (Smoothing(size=1),),
        (Scales(count=1),),
        (Variance(count=2, radius=0.0),),
        (Diversity(smallest=1.0, chance=1.0),),
        (Diversity(chance=0.0), Scales(count=1), Smoothing(size=1), Variance(count=1, radius=0.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("attack", [BIM(steps=6), PGD(steps=5, momentum=0.75)], ids=lambda a: type(a).__name__)
def test_idle_transforms_change_nothing(attack: Any, idle: tuple[Transform[Any], ...]) -> None:
    p = problem()
    assert same(path(Transformed(attack, idle), p, Smooth()), path(attack, p, Smooth()))


def test_momentum_without_decay_takes_the_same_signs() -> None:
    p = problem()
    assert same(path(Transformed(BIM(steps=6), (Momentum(decay=0.0),)), p, Smooth()), path(BIM(steps=6), p, Smooth()))


# Each transform against its recurrence, written down plainly.


def ball(p: Problem, x: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, p.x0 - EPS), p.x0 + EPS).clamp(0, 1)


@pytest.mark.parametrize("look_ahead", [0.0, 0.1])
def test_momentum_is_the_published_recurrence(look_ahead: float) -> None:
    p, net = problem(), Smooth()
    assert p.goal.label is not None
    x, g, wanted, decay = p.x0, torch.zeros_like(p.x0), [], 0.9
    for _ in range(8):
        near = ball(p, x + look_ahead * EPS * decay * g)
        wanted.append(near)
        g = decay * g + normalised(gradient(net, near, p.goal.label))
        x = ball(p, x + 0.1 * EPS * g.sign())
    attack = Transformed(BIM(steps=8, rel_step=0.1), (Momentum(decay=decay, look_ahead=look_ahead),))
    assert same(path(attack, p, net), [*wanted, x])


def test_scales_average_the_gradients_of_the_copies() -> None:
    p, net = problem(), Smooth()
    assert p.goal.label is not None
    x, wanted = p.x0, []
    for _ in range(5):
        wanted.append(x)
        mean = sum(gradient(net, x / 2**i, p.goal.label) / 2**i for i in range(3)) / 3  # by the chain rule
        x = ball(p, x + 0.2 * EPS * torch.as_tensor(mean).sign())
    assert same(path(Transformed(BIM(steps=5), (Scales(count=3),)), p, net), [*wanted, x])


def test_variance_tuning_is_the_published_recurrence() -> None:
    p, net, count = problem(), Smooth(), 3
    assert p.goal.label is not None
    attack = Transformed(BIM(steps=5), (Variance(count=count, radius=1.5), Momentum()))
    x, g, v, wanted = p.x0, torch.zeros_like(p.x0), torch.zeros_like(p.x0), []
    for step in range(5):
        wanted.append(x)
        here = gradient(net, x, p.goal.label)
        near = [attack._version(p, x, step * (count + 1) + i, i).detach() for i in range(1, count + 1)]
        assert all(((n - x).abs().flatten(1).amax(1) > EPS).all() for n in near)  # they fill 1.5 eps
        around = sum(gradient(net, n, p.goal.label) for n in near) / count
        g = g + normalised(here + v)
        v = torch.as_tensor(around) - here
        x = ball(p, x + 0.2 * EPS * g.sign())
    assert same(path(attack, p, net), [*wanted, x])


@pytest.mark.parametrize("kernel", ["gaussian", "uniform", "linear"])
@pytest.mark.parametrize("shape", [(2, 6, 7), (3, 11)], ids=["images", "sequences"])
def test_smoothing_is_a_convolution_with_the_outer_product_of_the_kernel(kernel: str, shape: tuple[int, ...]) -> None:
    p, smooth = problem(shape), Smoothing(size=5, kernel=kernel)
    grad = Draws.of(9, torch.arange(4)).normal(shape, torch.float64)
    w = torch.tensor(smooth.weights(), dtype=torch.float64)
    assert w.sum().item() == pytest.approx(1)
    assert torch.allclose(w, w.flip(0))
    stack = grad.flatten(0, 1)[:, None]
    if len(shape) == 3:
        wanted = F.conv2d(stack, (w[:, None] * w)[None, None], padding=2)
    else:
        wanted = F.conv1d(stack, w[None, None], padding=2)
    _, found = smooth.absorb(p, smooth.start(p), grad, 0)
    assert torch.allclose(found, wanted[:, 0].view_as(grad))


def test_diversity_shrinks_and_places_each_sample_in_its_own_way() -> None:
    p = problem((2, 20, 30), b=40)
    ones = torch.ones_like(p.x0)
    y = Diversity(chance=0.6, smallest=0.5).copy(p, ones, 0)
    moved = (y != 1).flatten(1).any(1)
    assert 14 < int(moved.sum()) < 34  # 24 expected
    rows, columns = (y > 0.5).any(3)[:, 0].sum(1), (y > 0.5).any(2)[:, 0].sum(1)
    assert (rows[moved] >= 9).all()
    assert len(set(rows[moved].tolist())) > 4
    assert (rows / 20 - columns / 30).abs().max() < 0.1  # one factor for all axes
    first = (y[:, 0, :, :] > 0.5).any(2).to(torch.int64).argmax(1)
    assert len(set(first[moved].tolist())) > 4
    assert torch.equal(y, Diversity(chance=0.6, smallest=0.5).copy(p, ones, 0))
    alone = p.take(torch.tensor([7]))
    assert torch.allclose(Diversity(chance=0.6, smallest=0.5).copy(alone, ones[:1], 0), y[7:8])


def test_diversity_is_linear_and_its_gradient_is_that_of_the_shrunk_input() -> None:
    p, net, diverse = problem(), Smooth(), Diversity(chance=1.0, smallest=0.6)
    assert p.goal.label is not None
    x = p.x0.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(cross_entropy(net(diverse.copy(p, x, 0)), p.goal).sum(), x)
    step = 1e-5 * Draws.of(3, torch.arange(4)).normal(p.x0.shape[1:], torch.float64)
    ends = [cross_entropy(net(diverse.copy(p, p.x0 + s * step, 0)), p.goal) for s in (1, -1)]
    assert torch.allclose((ends[0] - ends[1]) / 2, (wanted * step).flatten(1).sum(1), rtol=1e-4)
    part = diverse.copy(p, 0.3 * p.x0, 0)
    assert torch.allclose(part, 0.3 * diverse.copy(p, p.x0, 0))


# What the attack learns.


@pytest.mark.parametrize(
    ("transforms", "forwards", "backwards"),
    [
        ((Momentum(),), 1, 1),
        ((Diversity(), Momentum()), 2, 1),
        ((Scales(count=3),), 3, 3),
        ((Scales(count=3), Variance(count=2)), 9, 9),
        ((Diversity(), Scales(count=3), Variance(count=2)), 10, 9),
    ],
    ids=str,
)
def test_every_copy_costs_what_it_says(transforms: Any, forwards: int, backwards: int) -> None:
    x = 0.2 + 0.6 * Draws.of(5, torch.arange(3)).uniform((2, 6, 7))
    net, attack = Smooth(), Transformed(BIM(steps=4), transforms)
    r = attack(net, x, net(x).argmax(1), Threat("linf", 1e-4), full=True)
    assert r.backwards.tolist() == [4 * backwards] * 3
    assert r.forwards.tolist() == [4 * forwards + 1 + int(s) for s in r.success]


def test_success_of_a_copy_is_no_success() -> None:
    """Halving the input crosses the plane; the input itself stays far from it."""
    x, y = torch.full((2, 1, 4, 4), 0.9), torch.ones(2, dtype=torch.long)
    for transforms in ((Scales(count=2),), (Diversity(chance=1.0, smallest=0.3),), (Variance(radius=50.0),)):
        r = Transformed(BIM(steps=3), transforms)(Line(), x, y, Threat("linf", 0.01))
        assert not r.success.any()


def test_order_is_that_in_which_the_gradient_meets_the_transforms() -> None:
    p, net = problem(), Smooth()
    tuned, speed = Variance(count=2), Momentum()
    a, b = (path(Transformed(BIM(steps=6), t), p, net) for t in ((tuned, speed), (speed, tuned)))
    assert not same(a, b)


def test_transforms_of_images_refuse_vectors() -> None:
    x, y = torch.full((2, 8), 0.6), torch.ones(2, dtype=torch.long)
    for transform in (Diversity(), Smoothing()):
        with pytest.raises(DataError, match="images"):
            Transformed(BIM(), (transform,))(Line(), x, y, Threat("linf", 0.1))


def test_values_that_make_no_sense_are_refused() -> None:
    for make in (lambda: Smoothing(size=4), lambda: Scales(count=0), lambda: Variance(count=0)):
        with pytest.raises(UsageError):
            make()
    with pytest.raises(UsageError, match="gaussian"):
        Smoothing(kernel="gausian")


# They are attacks.


@pytest.mark.parametrize(
    "attack",
    [
        Transformed(attacks.APGD(steps=10, loss=margin), (Smoothing(size=3), Momentum(decay=0.3))),
        Transformed(PGD(steps=10, rel_step=0.2), (Scales(count=2), Variance(count=1))),
    ],
    ids=["apgd", "pgd"],
)
def test_transformed_attacks_keep_the_contract(attack: Any) -> None:
    check_attack(attack, norms=("linf",))


def test_presets_are_found_built_from_text_and_written_as_plain_data() -> None:
    attack = attacks.get("si-ni-fgsm", steps="20", scales="3", loss="margin")
    nesterov = Momentum(decay=1.0, look_ahead=0.1)
    assert attack == Transformed(BIM(steps=20, rel_step=0.1, loss=margin), (Scales(count=3), nesterov))
    assert attacks.describe_attack(attack) == {
        "name": "Transformed",
        "attack": {"name": "bim", "steps": 20, "rel_step": 0.1, "support": 0.02, "loss": "margin"},
        "transforms": [{"name": "Scales", "count": 3}, {"name": "Momentum", "decay": 1.0, "look_ahead": 0.1}],
    }
    with pytest.raises(UsageError, match="Did you mean 'steps'"):
        attacks.get("mi-fgsm", step=3)
