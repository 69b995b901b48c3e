"""The evaluation, end to end on small problems: honest figures, the same numbers however the work is cut."""

import itertools
import json
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

import assay
from assay.attacks import Outcome, Runnable
from assay.certification import Proof
from assay.core.errors import AssayError, RunError, ThreatError
from assay.core.executor import serial
from assay.core.registry import UsageError
from assay.evaluation import Plan, Round, course, plan_for, team
from assay.evaluation.block import Job, run_block
from assay.evaluation.course import Course
from assay.runs import SAMPLES, Run


@pytest.fixture(scope="module")
def digits():
    """Forty MNIST test images and the hardened demo model: some stand, some fall at eps 0.3."""
    data = assay.load_data("demo:mnist", limit=40)
    return assay.load_model("demo:mnist-robust"), data


class Counting(nn.Module):
    """Counts the rows that go through a net, forth and back."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.forwards = self.backwards = 0

    def forward(self, x):
        self.forwards += len(x)
        if x.requires_grad:
            x = x * 1
            x.register_hook(lambda g: setattr(self, "backwards", self.backwards + len(g)))
        return self.net(x)


def run(digits, out=None, *, effort="quick", **options):
    model, data = digits
    return assay.evaluate(model, data, "linf:0.35", effort, out=out, progress=False, **options)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """The evaluation that others are compared with."""
    return run(digits, tmp_path_factory.mktemp("whole") / "run")


def test_the_figures_are_the_counts_of_the_table(whole):
    status = whole.samples["status"].to_pylist()
    assert whole.n == 40
    assert whole.clean_accuracy == 1 - status.count("misclassified") / 40
    assert whole.robust_accuracy == status.count("robust") / 40
    assert 0 < status.count("fooled") < 40  # else the test below would show nothing
    low, high = whole.interval("robust", confidence=0.99)
    assert low < whole.robust_accuracy < high
    assert whole.certified_accuracy is None
    with pytest.raises(UsageError, match="this run measured"):
        whole.interval("certified")


def test_the_table_has_the_columns_of_the_contract(whole):
    assert whole.samples.schema.equals(SAMPLES)
    assert whole.samples["index"].to_pylist() == [*range(40)]


def test_every_stored_adversarial_fools_in_a_pass_of_our_own_and_is_in_the_ball(whole, digits):
    model, data = digits
    rows = {r["index"]: r for r in whole.samples.to_pylist()}
    seen = []
    for part in whole.run.adversarials():
        logits = model(torch.from_numpy(part["x"]))
        for i, x, clean, guess, z in zip(
            part["index"], part["x"], part["clean"], part["prediction"], logits, strict=True
        ):
            row = rows[int(i)]
            size = np.abs(x.astype(np.float64) - clean.astype(np.float64)).max()
            assert z.argmax() == guess == row["adversarial_prediction"] != row["label"]
            assert size == row["size"] == row["upper"] <= 0.35
            assert x.min() >= 0
            assert x.max() <= 1
            assert np.array_equal(clean, data.batch([int(i)])[0].numpy())
            seen.append(int(i))
    assert sorted(seen) == [i for i, r in rows.items() if r["fooled"]]


def test_the_passes_in_the_table_are_the_passes_of_the_net(whole, digits):
    """Counted by a net of our own; alone in its batch a sample is asked together with 7 copies of itself."""
    model, data = digits
    threat = assay.Threat("linf", 0.35)
    job = Job(assay.Model(Counting(model.net)), data, threat, plan_for("quick", threat), 0, None)
    status = whole.samples["status"].to_pylist()
    for row in (status.index("robust"), status.index("fooled"), 7):
        job.model.net.forwards = job.model.net.backwards = 0
        part = run_block(job, [row])
        assert part.rows["forwards"][0] * 8 == job.model.net.forwards
        assert part.rows["backwards"][0] * 8 == job.model.net.backwards
        assert part.rows["forwards"][0] == sum(stage["forwards"] for stage in part.tally["stages"])
        assert part.rows["backwards"][0] == sum(stage["backwards"] for stage in part.tally["stages"])


class Boast(Runnable):
    """Claims every sample: as it is, or changed by more than is allowed."""

    def __init__(self, far):
        self.far = far

    def run(self, door, p, *, full=False):
        return Outcome(1 - p.x0 if self.far else p.x0, torch.ones_like(p.rows, dtype=torch.bool), p.rows * 0)


@pytest.mark.parametrize("far", [False, True], ids=["nothing changed", "outside the ball"])
def test_only_what_verification_confirms_is_counted(digits, far):
    """Attacks that boast: every claim is refused, by the pass of the model or by the measured size."""
    model, data = digits
    plan = Plan((Round("boast", "ce", Boast(far)),))
    part = run_block(Job(model, data, assay.Threat("linf", 0.1), plan, 0, None), [*range(16)])
    right = sum(s != "misclassified" for s in part.rows["status"])
    assert right > 0
    assert not any(part.rows["fooled"])
    assert part.tally["claimed"] == part.tally["rejected"] == right


@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
def test_the_batch_size_changes_nothing(whole, digits, batch_size, tmp_path):
    assert run(digits, tmp_path / "run", batch_size=batch_size).samples.equals(whole.samples)


def test_another_seed_is_another_run(whole, digits, tmp_path):
    other = run(digits, tmp_path / "run", seed=1)
    assert not other.samples.equals(whole.samples)


class StopAfter:
    """Progress that interrupts, as Ctrl-C would, at the n-th report with at least one stored block."""

    def __init__(self, n):
        self.left = n

    def __call__(self, snapshot):
        self.left -= bool(snapshot.done)
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def small(monkeypatch):
    """Blocks of eight, so that forty samples are several."""
    monkeypatch.setattr(course, "BLOCK", 8)


def test_blocks_that_race_side_by_side_end_as_one_by_one_with_fewer_calls(small, digits, monkeypatch):
    model, data = digits
    calls, sizes = [], []

    def net(x):
        sizes.append(len(x))
        return model(x)

    def evaluated(most):
        monkeypatch.setattr(team, "_MOST", most)
        sizes.clear()
        done = assay.evaluate(net, data, "linf:0.35", progress=False)
        calls.append(len(sizes))
        return done

    alone, beside = evaluated(1), evaluated(8)
    assert beside.samples.equals(alone.samples)
    counts = [sorted([*s.items()][:-1] for s in e.stages()) for e in (alone, beside)]
    assert counts[0] == counts[1]
    assert calls[1] < 0.6 * calls[0]


def test_blocks_are_done_one_by_one_where_they_must_not_meet(small, digits):
    model, data = digits
    job = Job(model, data, assay.Threat("linf", 0.1), plan_for("quick", assay.Threat("linf", 0.1)), 0, None)
    assert team.team_for(job, Course()) is not serial
    assert team.team_for(job, Course(width=0.1)) is serial
    for changed in ({"model": replace(model, samples=2)}, {"proof": Proof("crown")}, {"plan": Plan(())}):
        assert team.team_for(replace(job, **changed), Course()) is serial


def test_what_was_seen_of_blocks_under_way_is_told(small, digits):
    told = []
    model, data = digits
    result = assay.evaluate(model, data, "linf:0.35", "quick", progress=told.append)
    first = next(s for s in told if s.seen)
    assert first.done == 0
    assert first.right <= first.seen == 8
    assert max(s.seen for s in told if not s.done) == 40
    assert all(s.fooled <= s.right <= s.seen for s in told if s.stage != "checks")
    assert [(s.done, s.seen, s.right - s.fooled) for s in told[-1:]] == [(40, 40, round(40 * result.robust_accuracy))]


def test_an_interrupted_run_is_a_valid_result_and_goes_on(small, digits, tmp_path):
    model, data = digits
    whole = run(digits, tmp_path / "whole")
    first = assay.evaluate(model, data, "linf:0.35", "quick", out=tmp_path / "run", progress=StopAfter(3))
    assert not first.complete
    assert 0 < first.n < 40
    assert first.samples.equals(whole.samples.slice(0, first.n))
    rest = run(digits, tmp_path / "run", batch_size=3)
    assert rest.complete
    assert rest.samples.equals(whole.samples)


def test_an_interruption_right_after_a_block_was_stored_keeps_that_block(small, digits, tmp_path, monkeypatch):
    add = Run.add

    def interrupted(self, *args):
        add(self, *args)
        raise KeyboardInterrupt

    whole = run(digits, tmp_path / "whole")
    monkeypatch.setattr(Run, "add", interrupted)
    first = run(digits, tmp_path / "run")
    assert not first.complete
    assert first.samples.equals(whole.samples.slice(0, 8))
    assert Run.read(tmp_path / "run").manifest["totals"]["n"] == 8


def test_an_interruption_before_anything_is_stored_is_passed_on(digits, tmp_path):
    def stop(snapshot):
        raise KeyboardInterrupt

    model, data = digits
    with pytest.raises(KeyboardInterrupt):
        assay.evaluate(model, data, "linf:0.35", "quick", out=tmp_path / "run", progress=stop)
    assert run(digits, tmp_path / "run").complete


def test_progress_is_told_from_the_checks_to_the_store(digits):
    told = []
    model, data = digits
    result = assay.evaluate(model, data, "linf:0.35", "quick", progress=told.append)
    checks = [s for s in told if s.stage == "checks"]
    assert told[: len(checks)] == checks
    asked = result.run.manifest["probe"]
    assert checks[0].passes == 0  # the data were read
    assert checks[-1].passes == asked["forwards"] + asked["backwards"] > 0
    assert list(dict.fromkeys(s.stage for s in told))[1] == "clean"
    assert [s.done for s in told if s.stage == "store"][-1] == len(data)
    assert next(s.done for s in told if s.stage == "store") == 0  # packing takes long where samples are large


def test_a_finished_run_is_not_done_again(whole, digits):
    part = whole.run.path / "samples" / "00000000-00000039.parquet"
    before = part.stat().st_mtime_ns
    assert run(digits, whole.run.path).samples.equals(whole.samples)
    assert [p.name for p in part.parent.iterdir()] == [part.name]
    assert part.stat().st_mtime_ns == before


def test_a_run_of_other_settings_is_refused_and_says_what_differs(whole, digits):
    with pytest.raises(RunError, match="seed was 0 and is 5"):
        run(digits, whole.run.path, seed=5)
    with pytest.raises(RunError, match="--no-resume"):
        run(digits, whole.run.path, resume=False)
    _, data = digits
    with pytest.raises(RunError, match="model was"):
        assay.evaluate(
            assay.load_model("demo:mnist-plain"), data, "linf:0.35", "quick", out=whole.run.path, progress=False
        )
    assert Run.read(whole.run.path).samples().equals(whole.samples)


def test_blocks_may_come_back_in_any_order_from_an_executor(small, digits, tmp_path):
    def backwards(work, tasks):
        return map(work, reversed([*tasks]))

    whole = run(digits, tmp_path / "whole")
    assert run(digits, tmp_path / "run", executor=backwards).samples.equals(whole.samples)


def test_the_curve_is_a_falling_step_function_that_ends_at_the_robust_accuracy(whole):
    curve = whole.curve()
    values = [curve(e) for e in np.linspace(0, 0.35, 50)]
    assert values[0] == whole.clean_accuracy
    assert values[-1] == whole.robust_accuracy
    assert all(a >= b for a, b in itertools.pairwise(values))
    with pytest.raises(ValueError, match="known up to"):
        curve(0.4)


def test_the_manifest_says_all_that_decides_the_numbers(whole):
    manifest = json.loads((whole.run.path / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["identity"].keys() == {
        "threat",
        "effort",
        "plan",
        "max_passes",
        "levels",
        "until_interval",
        "block",
        "n",
        "seed",
        "prove",
        "model",
        "data",
        "assay",
        "samples",
        "probabilities",
    }
    assert manifest["totals"]["robust_accuracy"] == whole.robust_accuracy
    names = [r["name"] for r in manifest["identity"]["plan"]["rounds"]]
    assert names == ["ce-15", "margin-15", "funnel-15", "ce-30", "funnel-30"]
    assert sum(c["n"] for c in manifest["totals"]["per_class"]) == 40


def test_without_an_eps_the_smallest_sizes_are_searched(digits):
    model, data = digits
    result = assay.evaluate(model, data.head(8), "l2", "quick", progress=False)
    assert result.robust_accuracy is None
    sizes = result.samples["size"].to_numpy()
    assert np.isfinite(sizes).all()
    assert result.curve()(0.0) == result.clean_accuracy
    assert result.curve()(float(sizes.max())) == 0.0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_sizes_of_a_linear_model_are_at_least_the_closed_form(norm):
    """Two classes split by w.x = 0: nothing smaller than |w.x| / ||w||_dual exists, and the search comes close."""
    torch.manual_seed(0)
    w = torch.randn(12)
    x = 0.5 + 0.1 * torch.randn(6, 12)
    net = nn.Linear(12, 2, bias=True)
    with torch.no_grad():
        net.weight.copy_(torch.stack([-w, w]))
        net.bias.copy_(torch.tensor([1.0, -1.0]) * (w.sum() * 0.5))
    y = net(x).argmax(1)
    gap = ((x - 0.5) @ w).abs()
    dual = {"linf": w.abs().sum(), "l2": w.norm(), "l1": w.abs().max()}[norm]
    result = assay.evaluate(net, (x.clamp(0, 1), y), norm, "standard", progress=False)
    sizes = torch.tensor(result.samples["size"].to_pylist())
    assert (sizes >= gap / dual * (1 - 1e-4)).all()
    assert (sizes <= gap / dual * 1.25).all(), sizes / (gap / dual)


def test_wrong_requests_are_refused_before_any_work(digits):
    model, data = digits
    with pytest.raises(AssayError, match="Did you mean 'quick'"):
        assay.evaluate(model, data, "linf:0.1", "quik", progress=False)
    with pytest.raises(AssayError, match="Did you mean 'crown'"):
        assay.evaluate(model, data, "linf:0.1", prove="crwn", progress=False)
    with pytest.raises(AssayError, match="neither proof nor attack"):
        assay.evaluate(model, data, "linf:0.1", "none", progress=False)
    with pytest.raises(ThreatError, match="untargeted"):
        assay.evaluate(model, data, assay.Threat("linf", 0.1, targeted=True), progress=False)


def test_the_result_is_readable_at_a_glance(whole):
    assert f"robust_accuracy={whole.robust_accuracy:.4f}" in repr(whole)
    assert isinstance(whole.samples, pa.Table)


@pytest.mark.parametrize(("natural", "said"), [("common", r"assay\[corruptions\]"), ("fgo", "fog")])
def test_corruptions_that_cannot_be_made_are_refused_before_the_model_is_asked(natural, said, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    net = Counting(nn.Flatten())
    with pytest.raises(AssayError, match=said):
        assay.evaluate(net, (torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)), "linf:0.1", natural=natural)
    assert net.forwards == 0
