"""Searching in bfloat16: what is found is checked in the precision of the network before it counts."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import assay
from assay.attacks import FMN, LOSSES, PGD, Square
from assay.cli.app import app
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.models import Door
from assay.models.fingerprint import fingerprint
from assay.threats import Goal, Problem, Threat


@pytest.fixture(scope="module")
def model():
    return assay.load_model("demo:mnist-plain")


@pytest.fixture(scope="module")
def digits():
    return assay.load_data("demo:mnist", limit=24)


def test_scores_and_gradients_are_rounded_and_what_decides_is_not(model, digits):
    x, rows = digits.batch(range(8)), torch.arange(8)
    with replace(model, precision="bf16").frozen("cpu") as live, model.frozen("cpu") as plain:
        rough, fine = Door(live, 8), Door(plain, 8)
        assert torch.equal(rough.logits(x, rows), fine.logits(x, rows))
        told, true = rough.searched(x, rows), fine.searched(x, rows)
    assert told.dtype == torch.float32
    away = (told - true).abs().amax(1) / true.abs().amax(1)
    assert 1e-4 < away.max() < 0.02


def test_a_search_in_bfloat16_ends_where_one_in_float32_does(model, digits):
    how = {"effort": "quick", "progress": False}
    rough, fine = (assay.evaluate(replace(model, precision=p), digits, "linf:0.1", **how) for p in ("bf16", "float32"))
    assert abs(rough.robust_accuracy - fine.robust_accuracy) <= 1 / 24
    assert not [f for f in rough.findings if f.severity != "info"]


def test_smallest_perturbations_found_in_bfloat16_are_those_of_float32(model, digits):
    how = {"effort": "quick", "progress": False}
    rough, fine = (assay.evaluate(replace(model, precision=p), digits, "l2", **how) for p in ("bf16", "float32"))
    assert rough.run.manifest["totals"]["rejected"] == 0
    sizes, true = (torch.tensor(e.samples["size"].to_pylist()) for e in (rough, fine))
    assert sizes.median() <= 1.05 * true.median()


@pytest.fixture
def cancelling():
    """A network that subtracts two numbers near 100, of which bfloat16 keeps no digit after the point."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
        net[0].bias.fill_(100)
        net[1].weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        net[1].bias.copy_(torch.tensor([0.0, 0.05]))
    return assay.Model(net, precision="bf16")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", [PGD(), FMN(), Square()], ids=["pgd", "fmn", "square"])
def test_no_search_ends_with_a_success_that_is_rounding(cancelling, attack, norm):
    x, y = torch.tensor([[0.2, 0.1], [0.25, 0.1]]), torch.tensor([0, 0])
    p = Problem.pose(x, y, Threat(norm, 0.01, box=cancelling.domain), Draws.of(0, torch.arange(2)))
    with cancelling.frozen() as live:
        door = Door(live, 2)
        assert door.score(x, p, LOSSES["margin"]).success.all()  # bfloat16 is wrong about both
        assert not attack.run(door, p).success.any()


def test_a_goal_that_is_met_within_the_rounding_is_not_met_clearly():
    goal, z = Goal(label=torch.tensor([0, 0])), torch.tensor([[1.0, 1.01], [1.0, 1.1]])
    assert goal.clearly_reached(z).tolist() == [True, True]
    assert goal.clearly_reached(z, 0.02).tolist() == [False, True]


def test_a_run_in_another_precision_is_another_run(model):
    assert fingerprint(model) != fingerprint(replace(model, precision="bf16"))


def test_an_unknown_precision_is_refused(model):
    with pytest.raises(UsageError, match="float32, bf16"):
        replace(model, precision="fp8")
    command = ["evaluate", "demo:mnist-plain", "demo:mnist", "--threat", "linf:0.1", "--precision", "half"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code != 0
    assert "bf16" in done.output
