"""What an evaluation will cost: measured on this machine, in a moment, and without an attack."""

import json
import time

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import assay
from assay.cli.app import app
from assay.core.errors import DataError, ThreatError
from assay.core.registry import UsageError
from assay.evaluation.cost import Cost, estimate

BUDGET = (20, 80)


def blobs(n=40, shape=(1, 6, 6)):
    draw = torch.Generator().manual_seed(0)
    return assay.load_data((torch.rand(n, *shape, generator=draw), torch.arange(n) % 3))


def small(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 3))


class Slow(nn.Module):
    """A network that takes this long for any batch, and remembers how many rows it was asked about."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.inner, self.seconds, self.rows = small(), seconds, 0

    def forward(self, x):
        self.rows += len(x)
        time.sleep(self.seconds)
        return self.inner(x)


def cost(net=None, threat="linf:0.1", data=None, budget=BUDGET, **options):
    data = blobs() if data is None else data
    return estimate(assay.Model(net or small()), data, assay.Threat.parse(threat), budget=budget, **options)


def test_it_says_samples_batch_device_passes_and_a_range_of_seconds():
    c = cost(batch_size=16)
    assert (c.samples, c.batch, c.device, c.passes) == (40, 16, "cpu", BUDGET)
    assert 0 < c.seconds[0] < c.seconds[1]
    assert c.forward > 0
    assert json.loads(json.dumps(c.to_json(), allow_nan=False))["passes"] == [*BUDGET]


def test_the_time_is_that_of_the_network_where_the_network_is_slow():
    """A call of 10 ms is two passes where it brings a gradient, and one where it does not; 40 samples are 5 batches."""
    call, batches = 0.01, 5
    c = cost(Slow(call), batch_size=8)
    slow = max(c.forward, c.gradient)  # on a machine that does other work, slower than the call
    assert call <= min(c.forward, c.gradient)
    assert call / 2 <= c.seconds[0] / (BUDGET[0] * batches) < slow
    assert call <= c.seconds[1] / (BUDGET[1] * batches) < 3 * slow


def test_it_asks_little_and_only_about_the_first_batch():
    asked = Slow()
    cost(asked, data=blobs(1000), batch_size=8)
    assert asked.rows < 1000 * BUDGET[0] / 5


def test_the_network_is_left_as_it_was():
    net = small().train()
    before = [p.clone() for p in net.parameters()]
    cost(net)
    assert net.training
    assert all(p.requires_grad and torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_memory_is_what_a_gradient_keeps_and_grows_with_the_batch():
    """At least the 8 x 4 x 4 values that ReLU keeps of a sample, and not the parameters."""
    one, two = (cost(batch_size=b).memory for b in (16, 32))
    assert 16 * 8 * 16 * 4 <= one < 16 * 8 * 16 * 4 * 8
    assert two == pytest.approx(2 * one, rel=0.05)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(36, 5_000), nn.Linear(5_000, 3))
    assert cost(wide, batch_size=8).memory < 5_000 * 36 * 4


@pytest.mark.parametrize("threat", ["linf", "l2:1", "l2", "l1:2", "l1", "l0:4", "l0"])
def test_every_norm_has_a_cost_with_and_without_an_eps(threat):
    assert cost(threat=threat).seconds[1] > 0


def test_a_random_network_costs_as_many_passes_as_are_averaged():
    class Noisy(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] + torch.randn(len(x), 3)

    averaged = cost(Noisy(), batch_size=8).passes[0] / BUDGET[0]
    assert averaged == int(averaged)
    assert averaged > 1


def test_limits_bound_the_estimate():
    c = Cost(100, 50, "cpu", (100, 400), 0.1, 0.3, 0, (10.0, 60.0))
    assert c.within() == c
    assert c.within(max_passes=200).passes == (100, 200)
    assert c.within(max_passes=200).seconds == (10, 30)
    assert c.within(max_passes=50).seconds == (5, 7.5)
    assert c.within(max_seconds=20).seconds == (10, 20)
    assert c.within(max_passes=200, max_seconds=20).seconds == (10, 20)


def test_what_an_evaluation_would_refuse_is_refused():
    with pytest.raises(DataError, match="input-outside-box"):
        cost(data=assay.load_data((torch.full((4, 1, 6, 6), 3.0), torch.zeros(4, dtype=torch.int64))))
    with pytest.raises(ThreatError, match="8/255"):
        cost(threat="linf:8")
    with pytest.raises(UsageError, match="Did you mean 'quick'"):
        cost(budget=None, effort="quik")


# the command


DRY = ("evaluate", "demo:mnist-robust", "demo:mnist", "--threat", "linf:0.3", "--limit", "64", "--dry-run")


def test_dry_run_prints_the_cost_and_stores_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, DRY)
    assert done.exit_code == 0, done.output
    for said in ("Nothing is attacked", "samples", "64", "passes per sample", "time", " to ", "cpu", "forward"):
        assert said in done.stdout, said
    assert not [*tmp_path.iterdir()]


def test_dry_run_keeps_to_the_limits_that_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*DRY, "--json", "--max-passes", "7", "--max-seconds", "0.001"])
    found = json.loads(done.stdout)
    assert found["passes"] == [7, 7]
    assert found["seconds"] == [0.001, 0.001]
    assert (found["samples"], found["batch"]) == (64, 64)
