"""Random models: every answer, score, and gradient is the mean over as many random passes as the model asks for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay import BPDA, attacks
from assay.attacks import APGD, FGSM, PGD, Bisect, Restarts, Runnable, Spatial, Square, Targets, Universal
from assay.attacks.losses import cross_entropy, margin
from assay.core.random import Draws
from assay.evaluation.health import Bench, averaged, gradient_spread
from assay.models import Door, Model
from assay.threats import Box, Goal, Problem, Threat
from test_attacks import SHORT

FEATURES, CLASSES = 12, 3


class Shaky(nn.Module):
    """A linear classifier whose weights get fresh noise in every pass; it remembers the weights that it used."""

    def __init__(self, noise: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(Draws.of(2, torch.arange(CLASSES)).normal((FEATURES,)))
        self.noise = noise
        self.used: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.used.append(self.weight.detach() + self.noise * torch.randn(CLASSES, FEATURES))
        return x.flatten(1) @ self.used[-1].T


X = Draws.of(1, torch.arange(4)).uniform((FEATURES,))
Y = torch.tensor([0, 1, 2, 0])


def asked(samples: int, question: Callable[[Door, Problem], Any]) -> tuple[Shaky, Door, Any]:
    net = Shaky()
    with Model(net, samples=samples).frozen("cpu") as live:
        door = Door(live, len(X))
        p = Problem.pose(X, Y, Threat("linf", 0.1, Box()), Draws.of(0, torch.arange(len(X))))
        return net, door, question(door, p)


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_scores_and_decisions_are_about_the_mean_of_the_logits(samples: int) -> None:
    for question in (lambda d, p: d.score(X, p, margin), lambda d, p: d.gradient(X, p, margin)):
        net, door, e = asked(samples, question)
        assert len(net.used) == samples
        assert torch.allclose(e.logits, X @ torch.stack(net.used).mean(0).T, atol=1e-5)
        assert torch.allclose(e.loss, margin(e.logits, Goal(Y)))
        assert (door.forwards == samples).all()
    net, door, e = asked(samples, lambda d, p: d.decide(X, p))
    assert torch.equal(e.label, (X @ torch.stack(net.used).mean(0).T).argmax(1))


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_the_gradient_is_the_mean_over_the_randomness(samples: int) -> None:
    """The margin is linear in the logits, so that its gradient is the mean of the passes' own, exactly."""
    net, door, e = asked(samples, lambda d, p: d.gradient(X, p, margin))
    z, w = e.logits, torch.stack(net.used)
    rival = z.scatter(1, Y[:, None], -torch.inf).argmax(1)
    own = torch.stack([one[rival] - one[Y] for one in w])
    assert torch.allclose(e.grad, own.mean(0), atol=1e-5)
    assert (door.backwards == samples).all()


def test_slopes_are_means_too_and_count_one_backward_pass_a_function() -> None:
    net, door, e = asked(5, lambda d, p: d.slopes(X, p, lambda z, goal: z[:, :2], 2))  # noqa: ARG005
    mean = torch.stack(net.used).mean(0)
    assert torch.allclose(e.slopes, mean[:2].expand(4, 2, FEATURES), atol=1e-5)
    assert torch.allclose(e.values, X @ mean[:2].T, atol=1e-5)
    assert (door.forwards == 5).all()
    assert (door.backwards == 10).all()


def test_losses_that_bend_are_those_of_the_mean_logits() -> None:
    net, _, e = asked(6, lambda d, p: d.gradient(X, p, cross_entropy))
    mean = torch.stack(net.used).mean(0)
    x = X.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(cross_entropy(x @ mean.T, Goal(Y)).sum(), x)
    assert torch.allclose(e.grad, wanted, atol=1e-5)


def test_a_step_before_the_model_is_averaged_through() -> None:
    def question(d: Door, p: Problem) -> Any:
        return d.gradient(X, p, margin, through=lambda v, rows: 2 * v * (rows[:, None] + 1))

    net, _, e = asked(4, question)
    z, w = e.logits, torch.stack(net.used).mean(0)
    rival = z.scatter(1, Y[:, None], -torch.inf).argmax(1)
    assert torch.allclose(e.grad, 2 * (torch.arange(4.0)[:, None] + 1) * (w[rival] - w[Y]), atol=1e-4)


@pytest.mark.parametrize("name", SHORT)
def test_every_attack_counts_all_passes_of_a_random_model(name: str) -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Shaky(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x[:, :, :2, :2])

    attack, net = attacks.get(name, **SHORT[name]), Image()
    norm = attacks.ATTACKS.traits(name)["norm"][0]
    eps = None if getattr(attack, "sizeless", False) else {"l0": 3.0, "linf": 0.02}.get(norm, 0.1)
    x = Draws.of(5, torch.arange(3)).uniform((3, 4, 4))
    r = attack(Model(net, samples=4), x, torch.tensor([0, 1, 2]), Threat(norm, eps))
    assert (r.forwards % 4 == 0).all()
    assert (r.backwards % 4 == 0).all()
    assert len(net.net.used) >= int(r.forwards.max())


class Drowned(nn.Module):
    """Class 0 where the mean is below a half, seen through noise in the weights that drowns them in a single pass."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1) - 0.5
        z = flat.mean(1) + flat @ (torch.randn(flat.shape[1]) * 3 / flat.shape[1])
        return torch.stack([-z, z], 1)


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(),
        PGD(steps=20),
        APGD(steps=20),
        Square(steps=200),
        Restarts(PGD(steps=10), 2),
        Targets(PGD(steps=20), 1),
        Bisect(PGD(steps=10), rounds=3, first=0.3),
        Universal(epochs=20),
    ],
    ids=lambda a: type(a).__name__,
)
def test_with_enough_passes_the_distance_of_the_mean_model_is_reached(attack: Runnable) -> None:
    """Without noise it is 0.1. All steps are taken, for the first success may be one of a lucky pass."""
    torch.manual_seed(0)
    x, y = torch.full((3, 1, 5, 5), 0.6), torch.ones(3, dtype=torch.long)
    model = Model(Drowned(), samples=64)
    assert attack(model, x, y, Threat("linf", 0.25), full=True).success.all()
    assert not attack(model, x, y, Threat("linf", 0.05)).success.any()


def test_one_pass_at_a_time_points_anywhere() -> None:
    """The gradient of one pass agrees in sign with the mean's for few more than half of the values."""
    torch.manual_seed(0)
    x, y = torch.full((1, 1, 20, 20), 0.6), torch.ones(1, dtype=torch.long)

    def agreement(samples: int) -> float:
        with Model(Drowned(), samples=samples).frozen("cpu") as live:
            p = Problem.pose(x, y, Threat("linf", 0.1, Box()), Draws.of(0, torch.arange(1)))
            return float((Door(live, 1).gradient(x, p, margin).grad < 0).float().mean())

    assert agreement(1) < 0.75
    assert agreement(400) > 0.99


def test_randomness_and_a_step_without_gradient_together() -> None:
    """Noise that is added and then rounded away: BPDA gives each pass a gradient, and their mean breaks the model."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = BPDA(lambda v: (v * 10).round() / 10)

        def forward(self, x: Tensor) -> Tensor:
            return Drowned()(self.step(x + 0.05 * torch.randn_like(x)))

    torch.manual_seed(0)
    x, y = torch.full((2, 1, 5, 5), 0.6), torch.ones(2, dtype=torch.long)
    assert PGD(steps=10)(Model(Noisy(), samples=64), x, y, Threat("linf", 0.2), full=True).success.all()


def test_poses_are_searched_on_random_models_too() -> None:
    torch.manual_seed(0)
    x, y = torch.full((2, 1, 8, 8), 0.6), torch.ones(2, dtype=torch.long)
    r = Spatial(max_shift=0.5, rotations=1)(Model(Drowned(), samples=64), x, y, Threat("l2"))
    assert r.success.all()  # half of the image goes dark


def test_what_a_random_model_drew_is_put_back() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = PGD(steps=3)(Model(Drowned(), samples=3), torch.full((2, 9), 0.6), torch.ones(2).long(), "linf:0.1")
    assert torch.equal(state, torch.get_rng_state())
    again = PGD(steps=3)(Model(Drowned(), samples=3), torch.full((2, 9), 0.6), torch.ones(2).long(), "linf:0.1")
    assert torch.equal(first.x, again.x)


@pytest.mark.parametrize("spread", [0.6, 1.2, 2.4])
def test_the_number_of_random_passes_follows_from_the_spread(spread: float) -> None:
    """A gradient of length 2 in 16 coordinates, with noise in each: its spread s asks for (s / 0.3)^2 passes."""

    def net(x: Tensor) -> Tensor:
        w = (2 + spread * 2 * torch.randn(16)) / 16**0.5
        flat = (x.flatten(1) * w).sum(1)
        return torch.stack([0 * flat, -flat], 1)

    x = torch.rand(16, 16) + 1
    bench = Bench(x, torch.zeros(16).long(), Threat("linf", 0.1, Box(0, 3)), None)
    torch.manual_seed(0)
    found = [gradient_spread(Model(net), bench) for _ in range(20)]
    assert sum(found) / 20 == pytest.approx(spread, rel=0.35)
    assert averaged(Model(net), spread).samples == max(10, round((spread / 0.3) ** 2))


def test_random_passes_are_ten_at_least_and_a_hundred_at_most() -> None:
    assert [averaged(Model(Shaky()), s).samples for s in (0.0, 0.01, 50.0)] == [10, 10, 100]
    assert [averaged(Model(Shaky()), s).judged for s in (0.01, 50.0)] == [50, 100]


def test_passes_that_the_user_has_set_are_kept() -> None:
    kept = Model(Shaky(), samples=7, judged=9)
    assert averaged(kept, 50.0) == kept


def test_what_decides_is_the_mean_of_more_passes_than_a_search_takes() -> None:
    net = Shaky()
    with Model(net, samples=3, judged=50).frozen("cpu") as live:
        door = Door(live, len(X))
        p = Problem.pose(X, Y, Threat("linf", 0.1, Box()), Draws.of(0, torch.arange(len(X))))
        decision = door.decide(X, p)
        assert len(net.used) == 50
        assert torch.equal(decision.label, (X @ torch.stack(net.used).mean(0).T).argmax(1))
        door.score(X, p, margin)
        assert len(net.used) == 53
    assert (door.forwards == 53).all()


def test_a_decision_that_is_too_dear_is_not_asked_for() -> None:
    with Model(Shaky(), samples=3, judged=50).frozen("cpu") as live:
        door = Door(live, len(X))
        p = Problem.pose(X, Y, Threat("linf", 0.1, Box()), Draws.of(0, torch.arange(len(X))))
        with door.limited(52):
            door.score(X, p, margin)
            assert not door.decide(X, p).success.any()
    assert (door.forwards == 3).all()
