"""No sample costs more passes than its caller allows, and what was found before they were spent is returned."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.attacks import APGD, FGSM, PGD, Bisect, Cascade, Restarts, Runnable, Square, Targets
from assay.attacks.losses import margin
from assay.attacks.testing import Line, _small_net
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.models import Door, Model
from assay.threats import Box, Problem, Threat

SHAPE = (3, 6, 6)
NET = _small_net(SHAPE)
X = 0.2 + 0.6 * Draws.of(3, torch.arange(6)).uniform(SHAPE)
Y = NET(X).argmax(1)
THREAT = Threat("linf", 0.03)

COMBINATIONS: list[Runnable] = [
    Restarts(PGD(steps=4), 3),
    Targets(APGD(steps=6), 3),
    Cascade((FGSM(), PGD(steps=4), Targets(PGD(steps=3), 2), Square(steps=10))),
    Bisect(PGD(steps=5), rounds=4),
    Restarts(Cascade((Targets(FGSM(), 2), Bisect(FGSM(), rounds=2))), 2),
]


def passes(r: Any) -> Tensor:
    return r.forwards + r.backwards


@pytest.mark.parametrize("attack", COMBINATIONS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("samples", [1, 3], ids=["once", "mean of three"])
@pytest.mark.parametrize("targeted", [False, True])
def test_combinations_keep_to_a_budget_too(attack: Runnable, samples: int, targeted: bool) -> None:
    model, threat = Model(NET, samples=samples), Threat("linf", 0.03, targeted=targeted)
    y = (Y + 1) % 4 if targeted else Y
    free = attack(model, X, y, threat)
    enough = int(passes(free).max()) + samples
    before = torch.zeros_like(Y, dtype=torch.bool)
    for limit in (1, 2, 3, 4, 5, 7, 11, 20, enough):
        r = attack(model, X, y, threat, max_passes=limit)
        assert (passes(r) <= limit).all()
        guess = NET(r.x).argmax(1)
        assert not (r.success & ((guess != y) if targeted else (guess == y))).any()
        if not isinstance(attack, Bisect) and limit < enough:
            assert (r.success | ~before).all(), "more passes never find less, for the search is the same"
            before = r.success
    assert torch.equal(r.x, free.x)
    assert torch.equal(passes(r), passes(free))


def test_a_success_within_the_budget_is_the_one_of_the_unlimited_run() -> None:
    free = PGD(steps=20)(NET, X, Y, Threat("linf", 0.06))
    for limit in range(2, int(passes(free).max()) + 2):
        r = PGD(steps=20)(NET, X, Y, Threat("linf", 0.06), max_passes=limit)
        done = free.success & (passes(free) < limit)
        assert r.success[done].all()
        assert torch.equal(r.x[done], free.x[done])
        assert torch.equal(passes(r)[done], passes(free)[done])


def test_the_best_point_so_far_is_returned_where_nothing_fell() -> None:
    x, y = torch.full((2, 1, 4, 4), 0.7), torch.ones(2, dtype=torch.long)
    falls = []
    for limit in (3, 5, 9, 15):
        r = PGD(steps=20, start="clean")(Line(), x, y, Threat("linf", 0.1), max_passes=limit)
        assert not r.success.any()
        falls.append(float(Line()(r.x)[:, 1].max()))
    assert falls == sorted(falls, reverse=True)
    assert falls[-1] < falls[0]


def test_one_pass_buys_nothing_but_no_error_either() -> None:
    for attack in (PGD(steps=3), Square(steps=3), Targets(PGD(steps=3), 3), *COMBINATIONS):
        for samples, limit in ((1, 1), (4, 4), (4, 7)):
            r = attack(Model(NET, samples=samples), X, Y, THREAT, max_passes=limit)
            assert not r.success.any()
            assert passes(r).tolist() == [0] * 6
            assert torch.equal(r.x, X)


@pytest.mark.parametrize("limit", [0, -3])
def test_a_budget_of_nothing_is_refused(limit: int) -> None:
    with pytest.raises(UsageError, match="max_passes >= 1"):
        PGD()(NET, X, Y, THREAT, max_passes=limit)


def test_budgets_belong_to_samples() -> None:
    """A sample that spent more than its neighbours stops alone, and gets the answer that nothing was asked."""
    rows = torch.arange(3)
    with Model(Line()).frozen("cpu") as live:
        door = Door(live, 3)
        p = Problem.pose(torch.full((3, 8), 0.9), torch.zeros_like(rows), Threat("linf", 0.1, Box()), Draws.of(0, rows))
        with door.limited(3):
            door.gradient(p.x0[1:2], p.take(rows[1:2]), margin)
            assert door.affords(p.rows, 2).tolist() == [True, False, True]
            e = door.gradient(p.x0, p, margin)
            assert e.success.tolist() == [True, False, True]
            assert (e.grad.flatten(1).abs().sum(1) > 0).tolist() == [True, False, True]
            assert door.score(p.x0, p, margin).success.tolist() == [True, True, True]
            assert not door.decide(p.x0, p).success.any()
            assert (door.forwards + door.backwards).tolist() == [3, 3, 3]
        assert door.affords(p.rows, 1000) is None
        assert door.decide(p.x0, p).success.all()


def test_points_are_changed_before_the_model_for_the_samples_that_can_pay() -> None:
    """``through`` gets the positions of samples in the batch, also where some of the batch stay out."""
    rows, shift = torch.arange(3), torch.tensor([0.0, 0.2, 0.4])
    seen: list[Tensor] = []

    class Remember(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return Line()(x)

    with Model(Remember(), rows=3).frozen("cpu") as live:
        door = Door(live, 3)
        p = Problem.pose(torch.full((3, 8), 0.5), torch.zeros_like(rows), Threat("linf", 0.1, Box()), Draws.of(0, rows))
        with door.limited(2):
            door.gradient(p.x0[:1], p.take(rows[:1]), margin)
            door.gradient(p.x0, p, margin, through=lambda v, at: v + shift[at][:, None])
    assert torch.allclose(seen[-1][:2, 0], torch.tensor([0.7, 0.9]))
