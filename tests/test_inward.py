"""Inward walks: exact where the least perturbation is known, and past what stops walks from the clean input."""

import pytest
import torch
from torch import Tensor, nn

from assay import Threat
from assay.attacks import FAB, FMN, Cascade, Inward, Restarts, Runnable, Targets
from assay.attacks.minimum import inward
from assay.attacks.outside import blended
from assay.threats.problem import Problem
from minimal_cases import Planes, TinyNet, by_search, inputs, labels, least

NORMS = ("linf", "l2", "l1", "l0")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shape", "c"),
    [((12,), 2), ((2, 9), 3), ((1, 5, 4), 5), ((3, 4, 4), 10)],
    ids=["vectors", "series", "grey", "colour"],
)
def test_linear_models_are_left_at_the_exact_least_distance(norm: str, shape: tuple[int, ...], c: int) -> None:
    net, x = Planes(shape, c), inputs(shape)
    y = labels(net, x)
    exact = least(net, x, y, norm)
    size = Inward(steps=300)(net, x, y, Threat(norm)).size.double()
    assert (size >= exact * (1 - 1e-6)).all()
    # Of ten classes, one sample in four may be left at the second nearest plane.
    assert (size <= exact * 1.01).sum() >= (4 if c < 10 else 3), size / exact
    assert (size <= exact * 1.1).all(), size / exact


@pytest.mark.parametrize("norm", NORMS)
def test_a_wanted_class_is_reached_at_the_exact_least_distance(norm: str) -> None:
    net, x = Planes((10,), 2), inputs((10,), dtype=torch.float64)
    target = 1 - labels(net, x)
    exact = least(net, x, target, norm, target)
    size = Inward(steps=300)(net, x, target, Threat(norm, targeted=True)).size
    assert (size <= exact * 1.01).all(), size / exact


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_networks_of_two_inputs_are_left_where_a_grid_says(norm: str) -> None:
    x = inputs((2,), b=12)
    for seed in range(4):
        net = TinyNet(seed=seed)
        y = labels(net, x)
        grid = by_search(net, x, y, norm, points=401)
        size = Inward(steps=300)(net, x, y, Threat(norm)).size.double()
        assert torch.equal(size.isinf(), grid.isinf())
        found = grid.isfinite()
        assert (size[found] <= grid[found] * 1.01 + 1e-4).all(), size / grid


def test_a_network_in_bfloat16_is_attacked() -> None:
    net, x = Planes((12,), 3).bfloat16(), inputs((12,))
    y = labels(net, x.bfloat16())
    r = Inward(steps=200)(net, x, y, Threat("l2"))
    assert r.success.all()
    assert (r.size.double() < 1.5 * least(net, x, y, "l2") + 0.02).all()


class Plateau(nn.Module):
    """Flat around the clean inputs, where its gradient is zero, with the boundary in view only from outside."""

    def forward(self, x: Tensor) -> Tensor:
        far = (x.flatten(1) - 0.5).norm(dim=1)
        z = (far - 0.3).clamp_min(0) - 0.2
        return torch.stack([-z, z], 1)


@pytest.mark.parametrize("attack", [Inward(steps=200), FAB(steps=160)], ids=lambda a: type(a).__name__)
def test_walks_from_outside_come_down_to_a_boundary_that_the_clean_input_does_not_see(attack: Runnable) -> None:
    x = 0.5 + 0.1 * (inputs((1, 8, 8), b=6) - 0.5)
    y = labels(Plateau(), x)
    exact = 0.5 - (x.flatten(1) - 0.5).norm(dim=1)
    r = attack(Plateau(), x, y, Threat("l2"))
    assert (r.size <= exact * 1.02).all(), r.size / exact


def test_walks_that_cannot_become_the_best_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = TinyNet(), inputs((2,), b=12)
    y, steps = labels(net, x), 200
    starts: list[int] = []

    def counted(p: Problem, share: float) -> Tensor:
        starts.append(len(p))
        return blended(p, share)

    monkeypatch.setattr(inward, "blended", counted)
    Inward(steps=steps)(net, x, y, Threat("l2"))
    walks = 0.9 * steps / inward._WALK["l2"] * len(x)
    assert walks < sum(starts) < 4 * walks
    assert len(starts) > walks / len(x)  # each sample starts again when its own walk is over


def test_without_an_eps_combinations_keep_the_smallest_of_all_parts() -> None:
    net, x = Planes((3, 4, 4), 5), inputs((3, 4, 4))
    y, parts = labels(net, x), (FMN(steps=10), Inward(steps=40))
    both = Cascade(parts)(net, x, y, "l2")
    alone = torch.stack([a(net, x, y, "l2").size for a in parts])
    assert (both.size <= alone.amin(0) * 1.02).all()
    assert (both.size <= alone[0]).all()
    for more in (Restarts(FMN(steps=10), 3), Targets(FMN(steps=10), 4)):
        assert (more(net, x, y, "l2").size <= alone[0] * 1.05).all()
