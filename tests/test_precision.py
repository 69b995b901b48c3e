"""Searching in bfloat16: what is found is checked in the precision of the network before it counts."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import assay
from assay.cli.app import app
from assay.core.registry import UsageError
from assay.models import Door
from assay.models.fingerprint import fingerprint
from assay.threats import Goal


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
