"""The pure parts of benchmarks/certify.py: what is asked about whom, and tables of what is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import assay


@pytest.fixture
def bench(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("certify")


@pytest.fixture
def case(bench: ModuleType, tmp_path: Path) -> Any:
    """Five samples, of which a network that compares its two inputs gets the first four right."""
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.eye(2))
    x = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.1, 0.9]])
    return bench.Case("line", "line", assay.Model(net), x, torch.zeros(5, dtype=torch.long), tmp_path, 30.0)


def keep(bench: ModuleType, case: Any, task: Any, values: dict[int, float]) -> None:
    case.folder.mkdir(exist_ok=True)
    lines = [json.dumps({"index": i, "value": v, "seconds": 1.0, "wall": 2.0}) for i, v in values.items()]
    (case.folder / task.file).write_text("".join(line + "\n" for line in lines))


def test_slow_proofs_are_asked_only_about_what_no_attack_fooled(bench: ModuleType, case: Any) -> None:
    keep(bench, case, bench.Task("attack", "standard", 0.3), {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0, 4: 0.0})
    assert case.wanted(bench.Task("attack", "standard", 0.3)) == [0, 1, 2, 3, 4]
    assert case.wanted(case.proof("share", "crown", 0.3)) == [0, 1, 2, 3]
    assert case.wanted(case.proof("share", "complete", 0.3)) == [0, 1]
    assert case.wanted(case.proof("lower", "complete")) == [0, 1, 2, 3]


def test_what_is_found_is_kept_and_asked_once(bench: ModuleType, case: Any) -> None:
    task = case.proof("share", "crown", 0.25)
    assert case.reach(task) == 0
    bench.fill(case, task, 10)
    assert case.reach(task) == 5
    kept = case.known(task)
    assert sorted(kept) == [0, 1, 2, 3]
    assert kept[0].value == pytest.approx(0.3, abs=1e-5)  # 0.8, less 0.25 at both inputs
    assert [i for i, f in kept.items() if f.value > 0] == [0, 1]
    bench.fill(case, task, 10)
    assert case.known(task) == kept


def test_shares_are_of_the_first_samples_of_which_all_is_known(bench: ModuleType, case: Any) -> None:
    keep(bench, case, bench.Task("attack", "standard", 0.3), {0: 1.0, 1: 1.0, 2: 0.0, 3: 1.0, 4: 0.0})
    keep(bench, case, case.proof("share", "crown", 0.3), {0: 0.5, 1: -0.5, 2: -1.0, 3: -1.0})
    keep(bench, case, case.proof("share", "complete", 0.3), {0: 0.5, 1: 0.1})
    assert [*bench.shares(case, [0.3])] == [
        ("0.3", "crown", "5", "20.0%", "60.0%", "40.0%", "1", "4.0", "8.0"),
        ("0.3", "complete, 30 s", "3", "66.7%", "66.7%", "0.0%", "1", "2.0", "4.0"),
    ]


def test_the_ratio_is_that_of_the_means(bench: ModuleType, case: Any) -> None:
    keep(bench, case, bench.Task("upper", "inward"), {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1, 4: 0.0})
    keep(bench, case, case.proof("lower", "crown"), {0: 0.2, 1: 0.15, 2: 0.1, 3: 0.05})
    assert [line[:5] for line in bench.brackets(case)] == [("crown", "5", "0.1000", "0.2000", "0.500")]


def test_proven_and_fooled_is_no_figure(bench: ModuleType, case: Any) -> None:
    keep(bench, case, bench.Task("attack", "standard", 0.3), {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0})
    keep(bench, case, case.proof("share", "ibp", 0.3), {0: 0.5, 1: 0.5, 2: -1.0, 3: -1.0})
    with pytest.raises(SystemExit, match=r"proven and fooled: \[1\]"):
        [*bench.shares(case, [0.3])]
    keep(bench, case, bench.Task("upper", "inward"), {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1, 4: 0.0})
    keep(bench, case, case.proof("lower", "ibp"), {0: 0.2, 1: 0.3, 2: 0.1, 3: 0.05})
    with pytest.raises(SystemExit, match=r"proven beyond what fools: \[1\]"):
        [*bench.brackets(case)]
