"""Attacks made of attacks: what they run, on what, under whose number, and that they keep the contract too."""

from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn

from assay.attacks import (
    ACG,
    APGD,
    BIM,
    FGSM,
    PGD,
    RFGSM,
    Bisect,
    Cascade,
    Chain,
    Outcome,
    OutputDiversified,
    Restarts,
    Runnable,
    Square,
    TargetedAscent,
    Targets,
    Transformed,
)
from assay.attacks.attack import verify
from assay.attacks.losses import dlr, margin
from assay.attacks.testing import Line, check_attack
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.models import Door, Model
from assay.threats import Problem, Threat

COMBINED: list[Runnable] = [
    Cascade((FGSM(), APGD(steps=8), Square(steps=30))),
    Restarts(PGD(steps=20), 2),
    Targets(APGD(steps=8, loss=dlr), 3),
    Restarts(Cascade((BIM(), Targets(PGD(steps=12, loss=margin), 2))), 2),
    Bisect(PGD(steps=12), rounds=6),
    Chain((PGD(steps=6), APGD(steps=8, loss=margin), BIM(steps=4))),
    Restarts(OutputDiversified(PGD(steps=20)), 2),
]


@pytest.mark.parametrize("attack", COMBINED, ids=["cascade", "restarts", "targets", "nested", "bisect", "chain", "odi"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_combinations_keep_the_contract_of_attacks(attack: Runnable, norm: str) -> None:
    check_attack(attack, norms=(norm,))


def test_ascent_in_a_cascade_works_without_eps() -> None:
    x, y = torch.full((2, 1, 3, 3), 0.6), torch.ones(2, dtype=torch.long)
    r = Cascade((TargetedAscent(steps=2), TargetedAscent(steps=30)))(Line(), x, y, Threat("l2"))
    assert r.success.all()
    assert torch.allclose(r.size, torch.full((2,), 0.36), atol=0.01)


@final
@dataclass(frozen=True, slots=True)
class Breaks(Runnable):
    """Claims the samples with these positions, and remembers on which it was run, with what random numbers."""

    whom: tuple[int, ...]
    seen: list[list[int]]
    drawn: list[Tensor]

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        self.seen.append(p.rows.tolist())
        self.drawn.append(p.draws.uniform())
        success = torch.isin(p.rows, torch.tensor(self.whom, dtype=torch.long))
        # Its own number says 0 for every success: the combination knows better.
        return Outcome(p.x0 - 0.01 * (1 + len(self.seen)), success, torch.where(success, 0, -1))


def breaks(*whom: int) -> Breaks:
    return Breaks(whom, [], [])


def run(
    attack: Runnable, b: int = 5, y: Tensor | None = None, net: Any = None, targeted: bool = False
) -> tuple[Outcome, Door]:
    x, rows = torch.full((b, 8), 0.6), torch.arange(b)
    with Model(net or Line()).frozen() as live:
        door = Door(live, b)
        threat = Threat("linf", 0.3, targeted=targeted).within(live.model.domain, 8)
        out = attack.run(door, Problem.pose(x, torch.ones_like(rows) if y is None else y, threat, Draws.of(0, rows)))
    return out, door


def test_a_cascade_runs_each_part_on_what_is_left_and_credits_the_part_that_broke_it() -> None:
    parts = breaks(1), breaks(0, 3), breaks(), breaks(4)
    out, _ = run(Cascade(parts))
    assert [p.seen for p in parts] == [[[0, 1, 2, 3, 4]], [[0, 2, 3, 4]], [[2, 4]], [[2, 4]]]
    assert out.success.tolist() == [True, True, False, True, True]
    assert out.by.tolist() == [1, 0, -1, 1, 3]


def test_a_cascade_stops_asking_when_nothing_is_left() -> None:
    last = breaks(0)
    out, _ = run(Cascade((breaks(0, 1, 2, 3, 4), last)))
    assert not last.seen
    assert out.by.tolist() == [0] * 5


def test_numbers_count_the_outermost_combination() -> None:
    out, _ = run(Cascade((breaks(2), Cascade((breaks(), breaks(0), Restarts(breaks(1), 2))))))
    assert out.by.tolist() == [1, 1, 0, -1, -1]


def test_what_a_part_found_is_not_touched_by_later_parts() -> None:
    out, _ = run(Cascade((breaks(1), breaks(0))))
    alone, _ = run(breaks(1))
    assert torch.equal(out.x[1], alone.x[1])


def test_restarts_draw_anew_each_time_and_count_their_rounds() -> None:
    part = breaks()
    out, _ = run(Restarts(part, 3))
    assert part.seen == [[0, 1, 2, 3, 4]] * 3
    assert len({tuple(d.tolist()) for d in part.drawn}) == 3
    assert out.by.tolist() == [-1] * 5

    @final
    @dataclass(frozen=True, slots=True)
    class Lucky(Runnable):
        """Breaks a sample when its dice say so."""

        def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
            success = p.draws.uniform() < 0.3
            return Outcome(p.x0, success, torch.where(success, 0, -1))

    out, _ = run(Restarts(Lucky(), 50), b=40)
    assert out.success.all()
    assert out.by[:1] >= 0
    assert len(out.by.unique()) > 3


def test_parts_of_a_combination_draw_independent_numbers() -> None:
    first, second = breaks(), breaks()
    run(Restarts(Cascade((first, Restarts(second, 2))), 2))
    drawn = [tuple(d.tolist()) for d in (*first.drawn, *second.drawn)]
    assert len(set(drawn)) == len(drawn) == 6


class Fixed(nn.Module):
    """Answers the same logits whatever is asked."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.z = torch.tensor(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.z.expand(len(x), -1) + 0 * x.flatten(1).sum(1, keepdim=True)


@final
@dataclass(frozen=True, slots=True)
class Notes(Runnable):
    """Notes toward which class it was sent."""

    targets: list[list[int] | None]

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        self.targets.append(None if p.goal.target is None else p.goal.target.tolist())
        return Outcome.nothing(p)


@pytest.mark.parametrize(("count", "rounds"), [(1, 1), (3, 3), (9, 3)])
def test_targets_are_the_nearest_classes_by_clean_logit_never_the_label(count: int, rounds: int) -> None:
    notes = Notes([])
    out, door = run(Targets(notes, count), b=2, y=torch.tensor([1, 3]), net=Fixed(1.0, 4.0, 3.0, 2.0))
    assert notes.targets == [[2, 1], [3, 2], [0, 0]][:rounds]
    assert door.forwards.tolist() == [1, 1]  # the clean logits
    assert not out.success.any()


def test_targets_use_the_clean_logits_where_they_are_known() -> None:
    notes, x = Notes([]), torch.full((1, 4), 0.5)
    threat = Threat("linf", 0.1).within(Model(Line()).domain, 4)
    p = Problem.pose(x, torch.tensor([0]), threat, Draws.of(0, torch.arange(1)))
    with Model(Fixed(3.0, 2.0, 1.0)).frozen() as live:
        door = Door(live, 1)
        Targets(notes, 2).run(door, replace(p, clean_logits=torch.tensor([[0.0, 1.0, 2.0]])))
    assert notes.targets == [[2], [1]]
    assert door.forwards.tolist() == [0]


def test_nothing_is_spent_on_classes_that_are_out_of_reach() -> None:
    """The second sample has one class left, and the third none; only of the first are there more than are tried."""
    order = torch.tensor([[1, 2, 3, -1], [3, -1, -1, -1], [-1, -1, -1, -1]])
    first, second = breaks(), breaks()
    x, rows = torch.full((3, 8), 0.6), torch.arange(3)
    with Model(Fixed(4.0, 1.0, 2.0, 3.0)).frozen() as live:
        door = Door(live, 3)
        threat = Threat("linf", 0.3).within(live.model.domain, 8)
        p = replace(Problem.pose(x, torch.zeros_like(rows), threat, Draws.of(0, rows)), order=order)
        Targets(first, 3).run(door, p)
        Targets(second, 2, among=3).run(door, p)
    assert first.seen == [[0, 1], [0], [0]]
    assert second.seen == [[0, 1], [0]]
    assert door.backwards.tolist() == [3, 0, 0]  # to compare classes by their distance


def test_under_a_targeted_threat_the_target_is_given() -> None:
    notes = Notes([])
    run(Targets(notes, 3), b=2, y=torch.tensor([1, 3]), net=Fixed(1.0, 4.0, 3.0, 2.0), targeted=True)
    assert notes.targets == [[1, 3]]


def test_by_way_of_a_target_any_other_class_is_a_success() -> None:
    """The way to class 2 leads through class 1."""

    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            m = x.flatten(1).mean(1)
            return torch.stack([torch.zeros_like(m), 1 - 20 * (m - 0.5).abs(), 2 * (m - 0.7)], 1)

    x, y = torch.full((1, 4), 0.2), torch.zeros(1, dtype=torch.long)
    r = Targets(PGD(steps=30, loss=margin), 2)(Steps(), x, y, Threat("linf", 0.4))
    assert r.success.all()


def test_the_published_ensemble_is_a_value_and_nests() -> None:
    ensemble = Cascade((APGD(steps=5), Targets(APGD(steps=5, loss=dlr), 9), Square(steps=10)))
    assert ensemble == Cascade((APGD(steps=5), Targets(APGD(steps=5, loss=dlr), 9), Square(steps=10)))
    assert hash(Restarts(ensemble, 2)) == hash(Restarts(ensemble, 2))


def test_claims_of_all_parts_are_verified_once_more_at_the_end() -> None:
    x, rows = torch.full((3, 8), 0.6), torch.arange(3)
    with Model(Line()).frozen() as live:
        door = Door(live, 3)
        threat = Threat("linf", 0.3).within(live.model.domain, 8)
        p = Problem.pose(x, torch.ones_like(rows), threat, Draws.of(0, rows))
        held, points, size = verify(door, p, Cascade((breaks(0), BIM())).run(door, p))
    assert held.tolist() == [False, True, True]  # 0.02 lower, as the first part claims, is not enough
    assert door.forwards.tolist()[0] == 1
    assert (size[1:] > 0.1).all()
    assert torch.equal(points[0], x[0] - 0.02)


@pytest.mark.parametrize("make", [lambda: Restarts(PGD(), 0), lambda: Targets(PGD(), 0), lambda: Bisect(PGD(), 0)])
def test_a_combination_that_runs_nothing_is_refused(make) -> None:
    with pytest.raises(UsageError, match="finds nothing"):
        make()


def test_a_misspelt_decay_is_refused() -> None:
    with pytest.raises(UsageError, match="cosine"):
        PGD(decay="cosin")


@final
@dataclass(frozen=True, slots=True)
class Stays(Runnable):
    """Remembers where it starts and stops ``by`` further on, as far as ball and box let it; breaks some samples."""

    by: float
    breaks: tuple[int, ...]
    seen: list[Tensor]

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        x = p.start("clean")
        self.seen.append(x)
        success = torch.isin(p.rows, torch.tensor(self.breaks, dtype=torch.long))
        return Outcome(p.project(x + self.by), success, torch.where(success, 0, -1))


def test_a_chain_goes_on_from_where_the_last_attack_stopped() -> None:
    parts = (Stays(-0.05, (1,), []), Stays(-0.4, (0, 3), []), Stays(0.0, (), []))
    out, _ = run(Chain(parts))
    assert [len(part.seen[0]) for part in parts] == [5, 4, 2]
    starts = [part.seen[0][0, 0].item() for part in parts]
    assert starts == pytest.approx([0.6, 0.55, 0.3])  # 0.15, drawn into the ball of 0.3
    assert out.by.tolist() == [1, 0, -1, 1, -1]


def test_output_diversified_starts_lie_up_a_direction_of_their_own() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    first, other = Stays(0.0, (), []), Stays(0.0, (), [])
    x, rows = torch.full((4, 8), 0.6), torch.arange(4)
    threat = Threat("linf", 1e-3).within(Model(net).domain, 8)
    with Model(net).frozen() as live:
        door = Door(live, 4)
        y = net(x).argmax(1)
        p = Problem.pose(x, y, threat, Draws.of(0, rows))
        OutputDiversified(first, steps=2).run(door, p)
        assert door.forwards.tolist() == [4] * 4  # the clean logits, two steps, and the point they end at
        assert door.backwards.tolist() == [2] * 4
        OutputDiversified(other, steps=2).run(door, p.stage(1))
    start = first.seen[0]
    assert (start - x).abs().amax(1).tolist() == pytest.approx([1e-3] * 4, rel=1e-3)
    assert len({tuple(v.tolist()) for v in start}) == 4
    assert not torch.equal(start, other.seen[0])
    w = 2 * p.stage(2).draws.uniform((5,)) - 1
    with torch.no_grad():
        assert ((w * (net(start) - net(x))).sum(1) > 0).all()


def test_warm_starts_are_used_by_every_gradient_attack_of_fixed_budget() -> None:
    x, rows = torch.full((2, 8), 0.6), torch.arange(2)
    threat = Threat("linf", 0.1).within(Model(Line()).domain, 8)
    p = Problem.pose(x, torch.ones_like(rows), threat, Draws.of(0, rows)).starting(x - 0.03)
    for attack in (FGSM(), BIM(), RFGSM(), PGD(), PGD(start="clean"), APGD(), ACG(), Transformed(BIM(), ())):
        assert torch.allclose(attack.init(p).x, x - 0.03), attack
