"""Losses: their formulas by hand, their signs, and what their gradients do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.attacks.losses import (
    LOSSES,
    along,
    cross_entropy,
    dlr,
    margin,
    probability_margin,
    rescaled_cross_entropy,
)
from assay.models import Loss
from assay.threats import Goal

Z = torch.tensor([[5.0, 1.0, 3.0, 2.0]])


def one(v: int | None) -> Tensor | None:
    return None if v is None else torch.tensor([v])


@pytest.mark.parametrize(
    ("label", "target", "want"),
    [(0, None, 3 - 5), (2, None, 5 - 3), (0, 1, 1 - 5), (3, 0, 5 - 2), (None, 0, 5 - 3), (None, 1, 1 - 5)],
)
def test_margin_by_hand(label: int | None, target: int | None, want: float) -> None:
    assert margin(Z, Goal(one(label), one(target))).item() == want


@pytest.mark.parametrize(
    ("logits", "label", "target", "want"),
    [
        ([5.0, 1.0, 3.0, 2.0], 0, None, (3 - 5) / (5 - 2)),
        ([5.0, 1.0, 3.0, 2.0], 1, None, (5 - 1) / (5 - 2)),
        ([5.0, 1.0, 3.0, 2.0], 0, 1, (1 - 5) / (5 - (2 + 1) / 2)),
        ([5.0, 1.0, 3.0, 2.0], None, 2, (3 - 5) / (5 - (2 + 1) / 2)),
        ([9.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 0, None, (8 - 9) / (9 - 7)),
        ([9.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 0, 1, (0 - 9) / (9 - (7 + 6) / 2)),
        ([5.0, 1.0, 3.0], 0, None, (3 - 5) / (5 - 1)),
        ([5.0, 1.0, 3.0], 0, 2, 3 - 5),
        ([5.0, 1.0, 3.0], None, 1, 1 - 5),
        ([5.0, 1.0], 0, None, 1 - 5),
        ([5.0, 1.0], 0, 1, 1 - 5),
        ([5.0, 1.0], None, 1, 1 - 5),
    ],
)
def test_dlr_by_hand(logits: list[float], label: int | None, target: int | None, want: float) -> None:
    assert dlr(torch.tensor([logits]), Goal(one(label), one(target))).item() == pytest.approx(want)


def test_cross_entropy_by_hand() -> None:
    logs = Z.log_softmax(1)[0]
    assert cross_entropy(Z, Goal(one(2))).item() == pytest.approx(-logs[2].item())
    assert cross_entropy(Z, Goal(None, one(1))).item() == pytest.approx(logs[1].item())
    assert cross_entropy(Z, Goal(one(0), one(1))).item() == pytest.approx(logs[1].item())


@pytest.mark.parametrize(
    ("label", "target", "first", "second"), [(0, None, 2, 0), (2, None, 0, 2), (0, 1, 1, 0), (None, 0, 0, 2)]
)
def test_probability_margin_by_hand(label: int | None, target: int | None, first: int, second: int) -> None:
    shares = Z.exp()[0] / Z.exp().sum()
    found = probability_margin(Z, Goal(one(label), one(target))).item()
    assert found == pytest.approx((shares[first] - shares[second]).item(), rel=1e-5)


@pytest.mark.parametrize(("label", "target"), [(0, None), (1, None), (0, 1), (None, 3)])
def test_rescaled_cross_entropy_is_that_of_logits_whose_largest_gap_is_one(
    label: int | None, target: int | None
) -> None:
    goal = Goal(one(label), one(target))
    assert torch.equal(rescaled_cross_entropy(Z, goal), cross_entropy(Z / 2, goal))
    z = (1000 * Z).requires_grad_()  # where the gradient of cross-entropy itself is zero for the first class
    (grad,) = torch.autograd.grad(rescaled_cross_entropy(z, goal).sum(), z)
    assert grad.abs().max() > 1e-5


def test_along_is_the_weighted_sum_whatever_the_label() -> None:
    w = torch.tensor([[1.0, -1.0, 0.5, 0.0]])
    for goal in (Goal(one(0), None, w), Goal(None, one(1), w), Goal(one(0), one(1), w)):
        assert along(Z, goal).item() == 5 - 1 + 1.5


@pytest.mark.parametrize("name", LOSSES.names())
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_loss_is_one_value_a_sample_that_no_other_sample_moves(name: str, classes: int) -> None:
    z = torch.randn(6, classes, generator=torch.Generator().manual_seed(1))
    label, target = torch.arange(6) % classes, (torch.arange(6) + 1) % classes
    for goal in (Goal(label), Goal(None, target), Goal(label, target)):
        together = LOSSES[name](z, goal)
        alone = torch.cat([LOSSES[name](z[i : i + 1], goal.take(torch.tensor([i]))) for i in range(6)])
        assert together.shape == (6,)
        assert torch.allclose(together, alone)


goals = st.sampled_from(["label", "target", "both"])


@given(st.integers(0, 10**6), st.integers(2, 10), goals)
def test_margin_is_positive_exactly_when_the_goal_is_met(seed: int, classes: int, kind: str) -> None:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(50, classes, generator=g)
    label = torch.randint(classes, (50,), generator=g)
    target = (label + 1 + torch.randint(classes - 1, (50,), generator=g)) % classes
    goal = Goal(None if kind == "target" else label, None if kind == "label" else target)
    for loss in (margin, dlr):
        if kind == "both":  # by way of the target: a positive margin is a success, but not the only one
            assert goal.reached(z)[loss(z, goal) > 0].all()
        else:
            assert torch.equal(loss(z, goal) > 0, goal.reached(z))


@pytest.mark.parametrize("name", LOSSES.names())
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 10), kind=goals)
def test_a_step_up_the_gradient_brings_the_goal_nearer(name: str, seed: int, classes: int, kind: str) -> None:
    loss: Loss = LOSSES[name]
    z = torch.randn(20, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    label = torch.zeros(20, dtype=torch.long)
    goal = Goal(None if kind == "target" else label, None if kind == "label" else label + 1)
    value = loss(z, goal)
    assert value.shape == (20,)
    (grad,) = torch.autograd.grad(value.sum(), z)
    step = 1e-6 * grad / grad.norm(dim=1, keepdim=True).clamp_min(1e-30)
    done = goal.reached(z) if loss is dlr and kind == "label" else torch.zeros(20, dtype=torch.bool)
    # The gap that rescales cross-entropy is a constant to its gradient only.
    seen = cross_entropy if loss is rescaled_cross_entropy else loss
    assert ((seen(z + step, goal) > seen(z, goal)) | done).all()  # DLR is 1 for every label in third place


@pytest.mark.parametrize("name", LOSSES.names())
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_ties_and_huge_logits_give_finite_losses_and_gradients(name: str, classes: int) -> None:
    rows = [
        torch.zeros(classes),
        torch.ones(classes).index_fill(0, torch.tensor([0]), 0.0),
        1e4 * torch.arange(classes),
    ]
    z = torch.stack(rows).requires_grad_()
    zeros = torch.zeros(3, dtype=torch.long)
    for goal in (Goal(zeros), Goal(None, zeros), Goal(zeros, zeros + 1)):
        value = LOSSES[name](z, goal)
        (grad,) = torch.autograd.grad(value.sum(), z)
        assert torch.isfinite(value).all()
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("classes", [3, 4, 10])
def test_dlr_does_not_change_with_scale_and_shift_of_the_logits(classes: int) -> None:
    z = torch.randn(20, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zeros = torch.zeros(20, dtype=torch.long)
    for goal in (Goal(zeros), Goal(None, zeros)) if classes > 3 else (Goal(zeros),):
        assert torch.allclose(dlr(100 * z + 7, goal), dlr(z, goal))
