"""The pure parts of benchmarks/minimal_norm.py: verification, areas, optimality, the counter of passes."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

INF = math.inf


@pytest.fixture
def measures(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("_minimal_area")


@pytest.fixture
def peers(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("_minimal_peers")


class Halves(nn.Module):
    """Class 1 where the first value is above one half."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.full_like(x[:, 0], 0.5), x[:, 0]], 1)


def sizes(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sizes_count_only_points_that_are_wrong_and_inside(measures: ModuleType) -> None:
    x, y = torch.zeros(6, 2), torch.zeros(6, dtype=torch.long)
    points = torch.tensor([[0.6, 0.8], [0.4, 0.0], [1.1, 0.0], [1 + 5e-7, 0.0], [math.nan, 0.0], [0.6, -5e-7]])
    found = measures.verified_sizes(Halves(), x, y, points, "l2")
    torch.testing.assert_close(found, sizes(1.0, INF, INF, 1.0, INF, 0.6), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("norm", "expected"), [("linf", 0.8), ("l1", 1.4), ("l0", 2.0)])
def test_size_in_every_norm(measures: ModuleType, norm: str, expected: float) -> None:
    d = torch.tensor([[0.6, -0.8, 0.0]])
    assert float(measures.size(d, norm)) == pytest.approx(expected)


def test_rounding_is_no_change_in_l0(measures: ModuleType) -> None:
    x, y = torch.full((1, 2), 0.25), torch.zeros(1, dtype=torch.long)
    found = measures.verified_sizes(Halves(), x, y, torch.tensor([[0.9, 0.25 + 1e-7]]), "l0")
    assert found.tolist() == [1.0]


def test_area_is_the_integral_of_the_curve(measures: ModuleType) -> None:
    s, d_max, steps = sizes(0.0, 0.3, 0.7, INF), 0.9, 9000
    eps = (torch.arange(steps).double() + 0.5) * d_max / steps
    curve = (s[:, None] > eps).double().mean(0)
    assert measures.area(s, d_max) == pytest.approx(float(curve.mean()) * d_max, abs=1e-4)


def test_optimality_is_one_for_the_best_and_zero_for_nothing(measures: ModuleType) -> None:
    a, b = sizes(0.0, 0.2, 0.9, INF), sizes(0.0, 0.4, 0.5, INF)
    best = measures.best_of([a, b])
    assert best.sizes.tolist() == [0.0, 0.2, 0.5, INF]
    assert (best.d_max, best.unknown) == (0.5, 1)
    assert best.optimality(best.sizes) == pytest.approx(1)
    assert best.optimality(sizes(0.0, INF, INF, INF)) == pytest.approx(0)
    assert best.optimality(a) == pytest.approx(1)  # above d_max, larger is no worse
    assert best.optimality(b) == pytest.approx(1 - 0.2 / 0.3)


def test_optimality_without_any_success(measures: ModuleType) -> None:
    best = measures.best_of([sizes(0.0, INF)])
    assert (best.d_max, best.unknown, best.optimality(sizes(0.0, INF))) == (0.0, 1, 1.0)


def test_rows_are_counted_forward_and_backward(peers: ModuleType) -> None:
    net = peers.Counted(nn.Linear(3, 2).requires_grad_(False), seconds=60)
    net(torch.zeros(5, 3))
    x = torch.zeros(4, 3, requires_grad=True)
    z = net(x)
    torch.autograd.grad(z[:, 0].sum(), x, retain_graph=True)
    torch.autograd.grad(z[:, 1].sum(), x)
    assert (net.forwards, net.backwards) == (9, 8)


def test_a_row_ends_when_its_seconds_are_over(peers: ModuleType) -> None:
    net = peers.Counted(nn.Identity(), seconds=-1)
    with pytest.raises(peers.TimeUpError, match="stopped after"):
        net(torch.zeros(1, 2))


def test_steps_fit_the_budget(peers: ModuleType) -> None:
    task = peers.Task(nn.Identity(), torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), "l2", 200)
    assert (task.steps(), task.steps(3, 9), task.steps(1000), task.rounds) == (100, 7, 1, 3)


def test_starts_are_of_another_class(peers: ModuleType) -> None:
    x, y = torch.tensor([[0.0], [0.1], [0.5], [1.0]]), torch.tensor([0, 0, 1, 1])
    assert peers.nearest_other(x, y).flatten().tolist() == [0.5, 0.5, pytest.approx(0.1), pytest.approx(0.1)]


@pytest.fixture
def bench(benchmark_module: Callable[[str], ModuleType], measures: ModuleType, peers: ModuleType) -> ModuleType:
    return benchmark_module("minimal_norm")


def test_on_small_budgets_rounds_are_fewer_and_not_shorter(bench: ModuleType) -> None:
    few, many = bench.sized("cw", "l2", 200), bench.sized("cw", "l2", 1000)
    assert (few.steps, few.rounds) == (8, 12)
    assert (many.steps, many.rounds) == (19, 25)


@pytest.mark.parametrize("budget", [200, 1000])
@pytest.mark.parametrize("name", [("cw", ""), ("fab", "targets"), ("bisect(apgd)", ""), ("brendel-bethge", "")])
def test_no_attack_of_ours_takes_more_passes_than_its_budget(
    bench: ModuleType, name: tuple[str, str], budget: int
) -> None:
    net, x = nn.Linear(6, 10), torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    case = bench.Case("linear", net.requires_grad_(False), x, net(x).argmax(1), torch.ones(3, dtype=torch.bool))
    _, forwards, backwards = bench.run_ours(case, bench.Row("l2", budget, "assay", *name))
    assert 0 < forwards + backwards <= budget


def test_a_table_compares_with_what_is_as_cheap_and_with_everything(bench: ModuleType, tmp_path: Path) -> None:
    cheap = bench.Row("l2", 200, "assay", "fmn"), sizes(0.0, 0.4, 0.4)
    dear = bench.Row("l2", 1000, "assay", "fmn"), sizes(0.0, 0.2, 0.4)
    for found in (cheap, dear):
        bench.save(tmp_path, found)
    case = bench.Case("none", nn.Identity(), torch.zeros(3, 1), torch.zeros(3), torch.tensor([False, True, True]))
    tables = dict(bench.report(case, tmp_path, {("l2", 200): [cheap], ("l2", 1000): [dear]}))
    (first,), (second,) = tables.values()
    assert (first.optimality, first.overall) == (1, 0)
    assert (second.optimality, second.overall) == (1, 1)


def test_others_leave_out_the_rows_of_the_same_attack(bench: ModuleType, tmp_path: Path) -> None:
    mine = bench.Row("l2", 200, "assay", "inward"), sizes(0.0, 0.1, 0.4)
    pair = bench.Row("l2", 200, "assay", "inward", "fmn"), sizes(0.0, 0.1, 0.2)
    other = bench.Row("l2", 200, "adv-lib", "fmn"), sizes(0.0, 0.2, 0.4)
    for found in (mine, pair, other):
        bench.save(tmp_path, found)
    case = bench.Case("none", nn.Identity(), torch.zeros(3, 1), torch.zeros(3), torch.tensor([False, True, True]))
    ((_, lines),) = bench.report(case, tmp_path, {("l2", 200): [mine, pair, other]})
    others = {line.row: line.others for line in lines}
    assert others[other[0]] < 1, "both rows of inward are ahead of it"
    assert others[pair[0]] > others[mine[0]] > 1, "their rival is fmn alone"
