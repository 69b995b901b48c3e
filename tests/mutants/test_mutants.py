"""Planted defects: each must break the test that is there for it, and only with the defect planted.

A contract that no defect can break protects nothing (design: rule 10).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, final

import pytest
import torch
from torch import Tensor

import test_attacks
import test_norms
from assay.attacks import PGD, Outcome, Runnable
from assay.attacks import attack as attack_module
from assay.attacks.gradient.pgd import PGDState
from assay.attacks.loop import GradientAttack, ScoreAttack
from assay.attacks.losses import cross_entropy, margin
from assay.attacks.testing import Line, check_attack
from assay.core.random import Draws
from assay.core.types import choose, per_sample
from assay.models import Door, Gradient, Loss, Score
from assay.threats import L2, Problem, Threat
from assay.threats.problem import Goal, exact_size


def check_l2() -> None:
    """Check the L2 projection the way tests/test_norms.py does, points inside and images included."""
    for shape in ((7,), (2, 3, 3)):
        for radius in (0.5, 100.0):
            d, lo, hi = test_norms.room(shape, 0, torch.float64)
            test_norms.check_projection(L2(), d, torch.full((3,), radius, dtype=torch.float64), lo, hi)


def test_an_l2_projection_onto_the_sphere_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    check_l2()

    def onto_the_sphere(self: L2, d: Tensor, radius: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        return (d * per_sample(radius / self.size(d), d)).clamp(lo, hi)

    monkeypatch.setattr(L2, "project", onto_the_sphere)
    with pytest.raises(AssertionError):
        check_l2()


def test_a_write_in_place_that_channels_last_loses_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = L2.project

    def in_place(self: L2, d: Tensor, radius: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        out = d.clone()
        out.flatten(1).copy_(honest(self, d, radius, lo, hi).flatten(1))  # of a channels_last tensor, this is a copy
        return out

    monkeypatch.setattr(L2, "project", in_place)
    with pytest.raises(AssertionError):
        check_l2()


@final
@dataclass(frozen=True, slots=True)
class FlippedTarget:
    """A loss whose sign is right without a target and wrong with one."""

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        return cross_entropy(logits, goal) * (1 if goal.target is None else -1)


class Defective(GradientAttack[PGDState]):
    """Plain gradient ascent, correct until a subclass plants a defect."""

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    steps: int = 20
    loss: Loss = staticmethod(cross_entropy)

    def init(self, p: Problem) -> PGDState:
        return PGDState(p.x0, p.x0)

    def update(self, p: Problem, s: PGDState, e: Gradient, k: int) -> PGDState:
        return PGDState(p.ascend(s.x, e.grad, 0.1 * p.radius), s.x)


class ProjectsTooEarly(Defective):
    """Projects the point from which it steps, and not the one to which it steps."""

    def update(self, p: Problem, s: PGDState, e: Gradient, k: int) -> PGDState:
        step = per_sample(0.1 * p.radius, s.x) * p.norm.steepest(e.grad)
        return PGDState((p.project(s.x) + step).clamp(p.box.lo, p.box.hi), s.x)


class LeavesTheBox(Defective):
    """Keeps to the ball and forgets the box."""

    def init(self, p: Problem) -> PGDState:
        return PGDState(p.x0 * 0 - 0.01, p.x0)


class DrawsByPlace(Defective):
    """Draws by the place in the batch instead of by the sample."""

    def init(self, p: Problem) -> PGDState:
        return PGDState(replace(p, draws=Draws.of(0, torch.arange(len(p)))).start(), p.x0)


class DrawsFromTheWorld(Defective):
    """Draws from the global generator."""

    def init(self, p: Problem) -> PGDState:
        return PGDState(p.project(p.x0 + 0.01 * torch.randn_like(p.x0)), p.x0)


class WritesOverItsInput(Defective):
    """Steps in place, beginning at the clean input."""

    def update(self, p: Problem, s: PGDState, e: Gradient, k: int) -> PGDState:
        s.x.copy_(p.ascend(s.x, e.grad, 0.1 * p.radius))
        return s


class Chance(NamedTuple):
    """The next point."""

    x: Tensor


class Wanders(ScoreAttack[Chance]):
    """Random points of the ball around the last one, with a pull towards where the loss rises; correct."""

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    steps: int = 30
    loss: Loss = staticmethod(margin)

    def init(self, p: Problem) -> Chance:
        return Chance(p.start())

    def update(self, p: Problem, s: Chance, e: Score, k: int) -> Chance:
        sign = 1 if k % 2 else -1  # all up, all down: one of them is the way out of a plane
        return Chance(p.project(p.x0 + per_sample(p.radius, p.x0) * sign))


class WandersInPlace(Wanders):
    """Overwrites its point, and with it the best one so far, which is the same tensor."""

    def update(self, p: Problem, s: Chance, e: Score, k: int) -> Chance:
        s.x.copy_(Wanders.update(self, p, s, e, k).x)
        return s


@final
@dataclass(frozen=True, slots=True)
class Uncounted(Runnable):
    """Takes a look at the model past the door's counters before it begins."""

    norms: ClassVar[tuple[str, ...]] = ("linf",)

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        door.live(p.x0)
        return PGD(steps=20).run(door, p, full=full)


@final
@dataclass(frozen=True, slots=True)
class Boasts(Runnable):
    """Claims every sample."""

    norms: ClassVar[tuple[str, ...]] = ("linf",)

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        out = PGD(steps=20).run(door, p, full=full)
        return replace(out, success=torch.ones_like(out.success))


DEFECTS: list[tuple[Callable[[], Any], str]] = [
    (lambda: PGD(steps=20, loss=FlippedTarget()), "an easy example is found"),
    (ProjectsTooEarly, "an easy example is found"),
    (LeavesTheBox, "inside the box only"),
    (DrawsByPlace, "does not depend on the others in its batch"),
    (DrawsFromTheWorld, "does not depend|same seed"),
    (WandersInPlace, "a point that meets the goal is returned|one that was asked about"),
    (Uncounted, "every forward pass is counted"),
    (Boasts, "claims only successes that are ones"),
]


@pytest.mark.parametrize(("make", "rule"), DEFECTS, ids=lambda v: getattr(v, "__name__", "") if callable(v) else "")
def test_a_defective_attack_breaks_the_rule_that_is_there_for_it(make: Callable[[], Any], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_attack(make(), norms=("linf",))


def test_an_attack_that_writes_over_its_input_is_measured_against_the_users() -> None:
    """It works on a copy; what it then claims about that copy is not believed."""
    x, y, threat = torch.full((4, 6), 0.6), torch.ones(4, dtype=torch.long), Threat("linf", 0.3)
    r = WritesOverItsInput()(Line(), x, y, threat)
    assert torch.equal(x, torch.full((4, 6), 0.6))
    moved = (r.x - x).abs().amax(1)
    assert torch.equal(r.size[r.success], moved[r.success])
    assert (moved[r.success] <= 0.3).all()


@pytest.mark.parametrize("make", [Defective, Wanders])
def test_without_the_defect_every_rule_holds(make: Callable[[], Any]) -> None:
    check_attack(make(), norms=("linf",))


def test_a_success_that_is_not_verified_again_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    test_attacks.a_false_claim_is_not_believed()

    def believe(door: Door, p: Problem, out: Outcome) -> tuple[Tensor, Tensor, Tensor]:
        return out.success, out.x, exact_size(p.norm, out.x, p.x0)

    monkeypatch.setattr(attack_module, "verify", believe)
    with pytest.raises(AssertionError):
        test_attacks.a_false_claim_is_not_believed()


def test_a_best_point_of_a_later_query_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop itself: the last point instead of the best one."""
    from assay.attacks.loop import Best

    def last(self: Best, p: Problem, x: Tensor, success: Tensor, rank: Tensor, *, smallest: bool) -> Best:
        return Best(choose(p.allows(x), x, self.x), success, rank)

    monkeypatch.setattr(Best, "or_better", last)
    with pytest.raises(AssertionError, match=r"a point that meets the goal is returned|one that was asked about"):
        check_attack(Wanders(), norms=("linf",))


def test_a_pass_that_the_door_forgets_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Door._count

    def forget(self: Door, rows: Tensor, *passes: int) -> None:
        honest(self, rows[1:], *passes)

    monkeypatch.setattr(Door, "_count", forget)
    with pytest.raises(AssertionError, match="every forward pass is counted"):
        check_attack(PGD(steps=20), norms=("linf",))


def test_a_reach_of_targets_that_counts_leaving_the_label_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(self: Goal, logits: Tensor) -> Tensor:
        guess, label = logits.argmax(1), self.label if self.label is not None else self.target
        return guess != label

    monkeypatch.setattr(Goal, "reached", reached)
    with pytest.raises(AssertionError):
        check_attack(PGD(steps=20), norms=("linf",))


def test_a_door_that_forgets_the_budget_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Door, "affords", lambda *_: None)
    with pytest.raises(AssertionError, match="no sample costs more than it may"):
        check_attack(PGD(steps=20), norms=("linf",))
