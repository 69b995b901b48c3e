"""benchmarks/verdict.py on a network of two inputs: what is run, kept, and said of it."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import assay

THREAT = "linf:0.25"


@pytest.fixture
def bench(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("verdict")


@pytest.fixture
def case(bench: ModuleType) -> Any:
    """Six samples of a network that compares its inputs: one is wrong, three are nearer to the boundary than eps."""
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.55, 0.45], [0.1, 0.9]])
    data = assay.load_data((x, torch.zeros(6, dtype=torch.long)))
    return bench.Case("line", assay.Model(net), data, [THREAT])


def arguments(**others: Any) -> argparse.Namespace:
    usual = {"efforts": ["quick"], "seeds": [0], "precisions": ["float32", "bf16"], "device": "cpu"}
    return argparse.Namespace(**usual, original=False, redo=(), **others)


def test_each_precision_is_a_row_of_its_own_that_is_run_once(bench: ModuleType, case: Any, tmp_path: Path) -> None:
    bench.fill(case, tmp_path, arguments())
    rows = bench.kept(tmp_path)
    assert [(r.label, r.robust) for r in rows] == [("quick", 2 / 6), ("quick bf16", 2 / 6)]
    assert all(r.bare > 0 and r.passes > 0 for r in rows)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}
    bench.fill(case, tmp_path, arguments())
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")} == before


def row(bench: ModuleType, effort: str, stages: list[tuple[int, int]], **others: Any) -> Any:
    """Return a row of ten samples, one wrong; of each stage what fell, and the passes of all samples."""
    trail = [{"name": "s", "entered": 9, "broken": b, "forwards": p, "backwards": 0} for b, p in stages]
    left, passes = 9 - sum(b for b, _ in stages), sum(p for _, p in stages)
    head = ("line", 10, THREAT, effort, 0, bench.plan_digest(THREAT, effort))
    # The sample that is wrong falls to a stage as well: the clean one.
    clean = {"name": "clean", "entered": 10, "broken": 1, "forwards": 10, "backwards": 0}
    return bench.Row(*head, 0.9, left / 10, passes + 10, 0, 3.0, [clean, *trail], **others)


def test_tables_set_passes_against_reference_and_seconds_against_a_bare_loop(bench: ModuleType) -> None:
    reference = row(bench, "reference", [(3, 500), (1, 490)])
    quick = row(bench, "quick", [(2, 40), (3, 50)], bare=2.0)
    assert (reference.robust, quick.robust) == (0.5, 0.4)
    ((title, head, body),) = bench.tables([quick, reference])
    assert title == "line, linf:0.25, 10 samples, 90.0% right"
    first = dict(zip(head, body[0], strict=True))
    assert first["passes"] == "10"
    assert first["share"] == "1/10"
    assert first["bare"] == "1.50"
    assert first["there after"] == "10"


def test_a_row_that_never_gets_there_says_so(bench: ModuleType) -> None:
    rows = [row(bench, "quick", [(1, 90)]), row(bench, "reference", [(4, 990)])]
    ((_, head, body),) = bench.tables(rows)
    assert body[0][head.index("there after")] == "never"
