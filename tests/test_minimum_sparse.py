"""Greedy and penalty attacks on few coordinates, and Carlini and Wagner's linf, against exact least sizes."""

import pytest
import torch
from torch import Tensor, nn

from assay import Threat
from assay.attacks import JSMA, VFGA, BrendelBethge, CarliniWagnerL0, CarliniWagnerLinf, Inward, Runnable
from assay.attacks.minimum.refining import End
from assay.core.errors import AssayError
from assay.core.random import Draws
from assay.models import Model
from assay.models.door import Gradient, Slopes
from assay.threats import Problem
from minimal_cases import Planes, inputs, labels, least

# The attack, its norm, and by what factor and by how many coordinates it may miss the least size.
CASES: list[tuple[Runnable, str, float, int]] = [
    (VFGA(samples=1), "l0", 1.0, 0),
    (VFGA(steps=30, samples=3), "l0", 1.0, 0),
    (JSMA(), "l0", 1.0, 0),
    (JSMA(at_once=2), "l0", 1.0, 1),
    (CarliniWagnerL0(), "l0", 1.0, 1),
    (CarliniWagnerLinf(), "linf", 1.01, 0),
    (Inward(steps=3, closing=0), "l0", 1.0, 0),  # its way out from the clean input arrives at once
]


@pytest.mark.parametrize(("attack", "norm", "slack", "more"), CASES)
@pytest.mark.parametrize(
    ("shape", "b", "dtype"),
    [
        ((12,), 1, torch.float64),
        ((2, 9), 3, torch.float32),
        ((1, 5, 4), 3, torch.float32),
        ((3, 4, 4), 3, torch.float32),
    ],
    ids=["vector", "sequences", "grey images", "images"],
)
def test_the_least_size_of_a_linear_model_is_reached(
    attack: Runnable, norm: str, slack: float, more: int, shape: tuple[int, ...], b: int, dtype: torch.dtype
) -> None:
    net = Planes(shape, 2, seed=2)
    x = inputs(shape, b, dtype=dtype)
    y = labels(net, x)
    exact = least(net, x, y, norm)
    for targeted, label in ((False, y), (True, 1 - y)):
        size = attack(net, x, label, Threat(norm, targeted=targeted)).size.double()
        assert (size <= slack * exact + more).all()
        assert (size >= 0.9999 * exact).all()


@pytest.mark.parametrize("c", [3, 5, 10])
@pytest.mark.parametrize(
    ("attack", "norm", "slack", "more"),
    [
        (VFGA(samples=1), "l0", 1.0, 1),
        (JSMA(), "l0", 1.0, 1),
        (CarliniWagnerL0(), "l0", 1.0, 1),
        (CarliniWagnerLinf(), "linf", 1.02, 0),
    ],
)
def test_of_many_classes_the_nearest_or_one_about_as_near_is_reached(
    attack: Runnable, norm: str, slack: float, more: int, c: int
) -> None:
    net = Planes((3, 4, 4), c, seed=c)
    x = inputs((3, 4, 4))
    y = labels(net, x)
    assert (attack(net, x, y, Threat(norm)).size <= slack * least(net, x, y, norm) + more).all()


def test_a_pair_of_logits_is_chosen_as_the_saliency_map_says() -> None:
    """Every pair is tried: no other one has a larger product of the two sums."""
    x = inputs((12,), dtype=torch.float64)
    p = Problem.pose(
        x, torch.ones(4).long(), Threat("l0", targeted=True).within(Model(nn.Identity()).domain, 12), _draws()
    )
    slopes = Draws.of(9, torch.arange(4)).normal((2, 12), torch.float64)
    attack = JSMA(at_once=2, outputs="logits")
    no = torch.zeros(4, dtype=torch.bool)
    moved = attack.update(p, attack.init(p), Slopes(no, slopes[:, 0], slopes[:, :, 0], slopes), 0).x != x
    assert (moved.sum(1) == 2).all()
    way = torch.where(slopes[:, 0] > slopes[:, 1], 1 - x, -x)
    a, b = slopes[:, 0] * way, -slopes[:, 1] * way
    best = torch.stack([_saliency(a, b, i, j) for i in range(12) for j in range(i)], 1).amax(1)
    chosen = (a * moved).sum(1) * (b * moved).sum(1)
    assert torch.allclose(chosen, best)


def _draws() -> Draws:
    return Draws.of(0, torch.arange(4))


def _saliency(a: Tensor, b: Tensor, i: int, j: int) -> Tensor:
    rise, fall = a[:, i] + a[:, j], b[:, i] + b[:, j]
    return torch.where((rise > 0) & (fall > 0), rise * fall, -torch.inf)


def test_pairs_are_all_that_jsma_moves_at_once() -> None:
    with pytest.raises(AssayError, match="1 or 2"):
        JSMA(at_once=3)


class Window(nn.Module):
    """Two classes; the second one wins where the first value lies between 0.6 and 0.8."""

    def forward(self, x: Tensor) -> Tensor:
        z = 0.1 - (x[:, 0] - 0.7).abs() + 0 * x.sum(1)
        return torch.stack([-z, z], 1)


def test_trials_find_what_lies_before_the_end_of_the_box() -> None:
    x, y = torch.full((8, 5), 0.4), torch.zeros(8, dtype=torch.long)
    assert VFGA(steps=1, samples=30)(Window(), x, y, Threat("l0")).size.tolist() == [1.0] * 8
    assert not VFGA(steps=1, samples=1)(Window(), x, y, Threat("l0")).success.any()


def test_the_least_change_is_undone_first_and_the_others_go_to_the_edge() -> None:
    p = Problem.pose(
        torch.full((1, 4), 0.5),
        torch.zeros(1).long(),
        Threat("l0").within(Model(nn.Identity()).domain, 4),
        Draws.of(0, torch.arange(1)),
    )
    x, grad = torch.tensor([[0.6, 0.4, 0.7, 0.5]]), torch.tensor([[1.0, -3.0, 0.2, 5.0]])  # worth 0.1, 0.3, 0.04
    won = Gradient(torch.tensor([True]), torch.tensor([0.1]), torch.zeros(1, 2), grad)
    asked, left = End.none(p).seen(p, x, won).undone(p)
    assert asked.tolist() == [[1.0, 0.0, 0.5, 0.5]]
    asked, _ = left.undone(p)
    assert asked.tolist() == [[0.5, 0.0, 1.0, 0.5]]


class Either(nn.Module):
    """The second class wins where the first two values are large, or the third is at its end, beyond a flat."""

    def forward(self, x: Tensor) -> Tensor:
        z = x[:, :2].sum(1) + 0.9 * x[:, 2].clamp_max(0.6) + 10 * (x[:, 2] - 0.95).clamp_min(0) - 1
        return torch.stack([-z, z], 1)


def test_walks_that_undo_find_that_one_change_to_the_edge_is_enough() -> None:
    x, y = torch.full((6, 6), 0.1), torch.zeros(6, dtype=torch.long)
    size = {n: BrendelBethge(steps=40, undo=n)(Either(), x, y, Threat("l0")).size.mean() for n in (0, 10)}
    assert size[10] == 1
    assert size[0] > 1


def test_walks_undo_changes_without_gradients() -> None:
    x, y = torch.full((2, 6), 0.1), torch.zeros(2, dtype=torch.long)
    attack = BrendelBethge(steps=60, walk=60, starts=10, undo=10)
    spent = {norm: attack(Either(), x, y, Threat(norm)).backwards.tolist() for norm in ("l1", "l0")}
    assert spent == {"l1": [50, 50], "l0": [41, 41]}  # nine changes are undone
