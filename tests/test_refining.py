"""Which ends of walks are kept, and in what order they are refined."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import assay
from assay import Threat
from assay.attacks import Inward
from assay.attacks.minimum import inward
from assay.attacks.minimum.refining import End, Ends, Round, turns
from assay.core.random import Draws
from assay.models.door import Gradient
from assay.threats.problem import Problem


def problem(x: Tensor) -> Problem:
    rows = torch.arange(len(x))
    return Problem.pose(x, torch.zeros_like(rows), Threat("l2"), Draws.of(0, rows))


def end(x: Tensor, size: Tensor) -> End:
    return End(x, size, torch.empty(len(x), 0))


@given(sizes=st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1, max_size=8), n=st.integers(0, 4))
def test_the_smallest_ends_of_each_sample_are_kept_in_order(sizes: list[list[int]], n: int) -> None:
    ends = Ends.none(problem(torch.zeros(3, 2)), n)
    for walk in torch.tensor(sizes, dtype=torch.float32):
        late = torch.arange(3)[walk > 2]  # the walks of the other samples go on
        ends = ends.joined(late, end(walk[late, None] * torch.ones(2), walk[late]))
    for i, row in enumerate(zip(*sizes, strict=True)):
        wanted = sorted(v for v in row if v > 2)[:n]
        assert ends.size[i].tolist() == wanted + [torch.inf] * (n - len(wanted))
        assert ends.x[i, : len(wanted), 0].tolist() == wanted


def test_a_refined_end_takes_its_new_place_and_one_that_was_lost_the_last() -> None:
    p = problem(torch.zeros(2, 1))
    ends = Ends.none(p, 3)
    for size in (5.0, 3.0, 4.0):
        ends = ends.joined(torch.arange(2), end(torch.full((2, 1), size), torch.full((2,), size)))
    ends = ends.refined(2, end(torch.tensor([[1.0], [9.0]]), torch.tensor([1.0, torch.inf])))
    assert ends.size.tolist() == [[1, 3, 4], [3, 4, torch.inf]]
    assert ends.at(2, torch.full((2, 1), 7.0)).x.tolist() == [[4], [7]]
    assert ends.at(torch.tensor([0, 1]), torch.full((2, 1), 7.0)).size.tolist() == [1, 4]


def test_in_l0_ends_of_the_same_changes_are_kept_once() -> None:
    x = torch.zeros(1, 4)
    p = Problem.pose(x, torch.zeros(1).long(), Threat("l0"), Draws.of(0, torch.arange(1)))
    ends = Ends.none(p, 3)
    for changed, much in (([0, 1], 0.5), ([0, 1], 0.9), ([1, 2], 0.5), ([0, 1, 2], 0.5)):
        new = x.index_fill(1, torch.tensor(changed), much)
        worth = torch.where(new > 0, 1.0, torch.inf)
        ends = ends.joined(torch.arange(1), End(new, torch.tensor([float(len(changed))]), worth))
    assert ends.size.tolist() == [[2, 2, 3]]
    assert ends.x[0].tolist() == [[0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0], [0.5, 0.5, 0.5, 0]]


@given(steps=st.integers(1, 3000), share=st.floats(0.01, 0.4), fewest=st.integers(1, 60), most=st.integers(1, 9))
def test_rounds_keep_to_their_share_and_give_each_end_as_many_steps(
    steps: int, share: float, fewest: int, most: int
) -> None:
    plan = turns((Round(share, fewest, most),), steps)
    ends = max((turn.end + 1 for turn in plan), default=0)
    assert len(plan) <= share * steps
    assert ends == min(most, int(share * steps / fewest))
    assert all(len([turn for turn in plan if turn.end == end]) >= fewest for end in range(ends))
    assert sum(turn.last for turn in plan) == ends


@pytest.mark.parametrize("norm", ["l1", "l0"])
def test_refining_the_ends_of_walks_makes_them_smaller(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = assay.load_model("demo:mnist-robust")
    x, y = next(iter(assay.load_data("demo:mnist", limit=16)))
    attack = Inward(steps=150, closing=0)
    refined = attack(model, x, y, Threat(norm)).size
    monkeypatch.setitem(inward._ROUNDS, norm, ())
    monkeypatch.setattr(inward, "_UNDOING", 0.0)
    assert refined.mean() < 0.95 * attack(model, x, y, Threat(norm)).size.mean()


def test_changes_are_undone_without_gradients_of_one_end_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = assay.load_model("demo:mnist-robust")
    x, y = next(iter(assay.load_data("demo:mnist", limit=16)))
    attack = Inward(steps=150, closing=0)
    seen, slopes = End.seen, []

    def watched(self: End, p: Problem, at: Tensor, e: Gradient) -> End:
        slopes.append(bool(e.grad.any()))
        return seen(self, p, at, e)

    monkeypatch.setattr(End, "seen", watched)
    r = attack(model, x, y, Threat("l0"))
    assert slopes == [True] * 120  # what changes are worth is known from the walks alone
    assert (r.forwards == 150 + 2).all()
    assert (r.backwards == 120).all()  # a fifth of the steps asks for none
    monkeypatch.setattr(inward, "_KEPT", 1)
    monkeypatch.setattr(inward, "_AROUND", 1)
    assert r.size.mean() < attack(model, x, y, Threat("l0")).size.mean()


@pytest.mark.parametrize(("norm", "several"), [("l2", False), ("l0", True)])
def test_later_walks_start_around_the_best_end_and_in_l0_around_the_best_few(
    norm: str, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = assay.load_model("demo:mnist-robust")
    x, y = next(iter(assay.load_data("demo:mnist", limit=4)))
    others: list[bool] = []
    start = Inward._start

    def watched(self: Inward, p: Problem, around: Tensor, least: Tensor, *, near: bool) -> tuple[Tensor, Tensor]:
        if near:
            others.append(bool((p.size(around) > least * (1 + 1e-5)).any()))
        return start(self, p, around, least, near=near)

    monkeypatch.setattr(Inward, "_start", watched)
    Inward(steps=150)(model, x, y, Threat(norm))
    assert any(others) == several
