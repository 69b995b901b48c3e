"""Proofs within an evaluation, and ``assay certify``: certified <= robust, sample by sample, in any pieces."""

import contextlib
import json
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import final
from unittest import mock

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import assay
from assay.attacks import PGD, Runnable, Targets
from assay.certification import Smoothed
from assay.certification.prover import Prover
from assay.cli.app import app
from assay.core.errors import AssayError, ContradictionError, ModelError, ThreatError
from assay.evaluation import Plan, Round, engine, journal, proving
from assay.evaluation.block import run_block
from assay.evaluation.smoothed import certify_smoothed
from assay.reports import verdict, write_report
from assay.reports.brackets import brackets
from assay.reports.live import Board
from assay.reports.summary import points, read, summarize
from assay.runs import Run

HONEST, N = Prover.margins, 12


@pytest.fixture(scope="module")
def digits():
    """Some images and the hardened demo model: at eps 0.2 some are proven, some open, and some fall at 0.3."""
    return assay.load_model("demo:mnist-robust"), assay.load_data("demo:mnist", limit=N)


def prove(digits, out=None, *, threat="linf:0.2", effort="quick", method="crown", **options):
    model, data = digits
    return assay.evaluate(model, data, threat, effort, method, out=out, progress=False, **options)


@pytest.fixture(scope="module")
def proven(digits, tmp_path_factory):
    return prove(digits, tmp_path_factory.mktemp("proven") / "run")


@pytest.fixture(scope="module")
def radii(digits, tmp_path_factory):
    """Brackets of six images, of which the first has a wrong label."""
    model, data = digits
    x, y = data.batch(range(6)), data.labels[:6].clone()
    y[0] = (y[0] + 1) % 10
    out = tmp_path_factory.mktemp("radii") / "run"
    return prove((model, (x, y)), out, threat="linf", eps_list=[0.05, 0.15])


# evaluate(prove=...)


def test_the_proven_share_is_below_the_robust_one_sample_by_sample(proven):
    rows = proven.samples.to_pylist()
    assert 0 < proven.certified_accuracy < proven.robust_accuracy
    assert proven.certified_accuracy == sum(r["certified"] for r in rows) / N
    for r in rows:
        assert (r["lower"], r["upper"]) == ((0.2, np.inf) if r["certified"] else (0.0, r["size"]))
        assert not (r["certified"] and r["status"] != "robust")
    low, high = proven.interval("certified", confidence=0.9)
    assert low < proven.certified_accuracy < high


def test_what_is_proven_is_not_attacked_but_for_one_step(proven):
    stages = {s["name"]: s for s in proven.stages()}
    certified = round(proven.certified_accuracy * N)
    assert stages["proof: crown"]["entered"] == N
    assert stages["proof: crown"]["proven"] == stages["challenge"]["entered"] == certified
    assert stages["ce-15"]["entered"] <= N - certified
    spent = [r["forwards"] + r["backwards"] for r in proven.samples.to_pylist() if r["certified"]]
    assert max(spent) <= 5
    others = [r["forwards"] + r["backwards"] for r in proven.samples.to_pylist() if not r["certified"]]
    assert max(others) > 20


def test_what_is_proven_is_not_fooled_by_a_strong_attack(proven, digits):
    model, data = digits
    rows = [r["index"] for r in proven.samples.to_pylist() if r["certified"]]
    r = assay.attacks.APGD(steps=60)(model, data.batch(rows), data.labels[rows], "linf:0.2")
    assert not r.success.any()


@final
@dataclass(frozen=True, slots=True)
class Noted(Runnable):
    """Notes which sample is attacked toward which class."""

    attack: Runnable
    seen: list[tuple[int, int]]

    def run(self, door, p, *, full=False):
        self.seen.extend(zip(p.rows.tolist(), p.goal.target.tolist(), strict=True))
        return self.attack.run(door, p, full=full)


@pytest.fixture
def toward_all(monkeypatch):
    """Evaluations of one round, toward every class, of three steps that break nothing; and what they attacked."""
    seen = []
    attack = Targets(Noted(PGD(steps=3, rel_step=0.01), seen), 9)
    plan = Plan((Round("targets", "targets", attack),))
    monkeypatch.setattr(engine, "plan_for", lambda *_, **__: plan)
    return seen


def test_no_attack_is_spent_on_a_class_that_is_proven_out_of_reach(digits, toward_all):
    model, data = digits[0], digits[1].head(6)
    open_ = assay.certify(model, data.batch(range(6)), data.labels, "linf:0.2").margins <= 0
    assert 0 < open_.any(1).sum() < 6  # some samples are proven,
    assert (open_.sum(1)[open_.any(1)] < 9).any()  # and of others some classes
    attack = prove((model, data), method=None)
    assert len(toward_all) == 9 * 6
    toward_all.clear()
    both = prove((model, data))
    assert sorted(map(list, toward_all)) == open_.nonzero().tolist()
    spent = [r["forwards"] + r["backwards"] for r in both.samples.to_pylist()]
    classes = open_.sum(1).tolist()
    assert all(s == 2 + 7 * k for s, k in zip(spent, classes, strict=True) if k)  # before and after, a look at it
    assert both.robust_accuracy == attack.robust_accuracy == 1
    assert prove((model, data), batch_size=1).samples.equals(both.samples)


def test_a_point_in_a_class_that_is_proven_out_of_reach_stops_the_run(digits, tmp_path, monkeypatch):
    """The proof says that one class is possible, and is right about no sample that is broken in another one."""
    model, data = assay.load_model("demo:mnist-plain"), digits[1]

    def all_but_one(self, x, y, radius, norm, tell=None):
        wanted = (y + 1) % 10
        return everything(self, x, y, radius, norm).scatter(1, wanted[:, None], -1.0)

    monkeypatch.setattr(Prover, "margins", all_but_one)
    with pytest.raises(ContradictionError, match=r"contradiction-0000\d+\.npz"):
        prove((model, data.head(4)), tmp_path / "run")
    (file,) = (tmp_path / "run").glob("contradiction-*.npz")
    with np.load(file) as kept:
        reached = int(model(torch.from_numpy(kept["adversarial"])[None]).argmax(1))
        assert kept["margins"][reached] > 0
        assert (kept["margins"] > 0).sum() == 9


def test_proofs_cost_time_and_no_passes(proven):
    (stage,) = (s for s in proven.stages() if s["kind"] == "proof")
    assert stage["forwards"] == stage["backwards"] == 0
    assert 0 < stage["seconds"] < proven.seconds
    assert proven.run.manifest["identity"]["prove"] == {"method": "crown", "seconds": 30.0, "arithmetic": "float32"}


def test_any_batch_size_gives_the_same_table(proven, digits):
    assert prove(digits, batch_size=3).samples.equals(proven.samples)


def test_other_processes_prove_the_same(proven, digits):
    """An executor gets no prover: it makes its own, from the job."""

    def afresh(work, blocks):
        assert work.func is run_block
        assert not work.keywords
        return map(work, blocks)

    assert prove(digits, executor=afresh).samples.equals(proven.samples)


@pytest.mark.parametrize("kind", ["eps", "radius"])
def test_an_interrupted_proof_goes_on_where_it_was(digits, tmp_path, monkeypatch, kind):
    model, data = digits
    request = {"threat": "linf:0.1"} if kind == "eps" else {"threat": "linf", "effort": "none", "method": "ibp"}
    data = data.head(6)
    monkeypatch.setattr(proving, "TOGETHER", 2)
    monkeypatch.setattr(proving, "STEPS", 2)
    monkeypatch.setattr(journal, "_SECONDS", 0.0)
    whole, calls = prove((model, data), **request), []

    def interrupted(self, x, *rest):
        calls.append(len(x))
        if len(calls) == (3 if kind == "eps" else 4):
            raise KeyboardInterrupt
        return HONEST(self, x, *rest)

    monkeypatch.setattr(Prover, "margins", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prove((model, data), tmp_path / "run", **request)
    before = len(calls)
    again = prove((model, data), tmp_path / "run", **request)
    assert again.samples.equals(whole.samples)
    assert len(calls) - before == (1 if kind == "eps" else 4)  # groups of two: only those that were not done
    proofs = [sum(s["entered"] for s in e.stages() if s["kind"] == "proof") for e in (again, whole)]
    assert proofs == [6, 6]


def test_other_methods_are_other_runs(proven, digits):
    with pytest.raises(assay.RunError, match=r"prove.method was .crown. and is .ibp"):
        prove(digits, proven.run.path, method="ibp")


def test_what_cannot_be_bounded_is_refused_before_any_work(digits, tmp_path):
    _, data = digits
    strange = assay.Model(lambda x: torch.fft.fft(x.flatten(1)).real[:, :10])
    with pytest.raises(ModelError, match="fft"):
        prove((strange, data), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(AssayError, match="neither proof nor attack"):
        prove(digits, method=None, effort="none")
    with pytest.raises(ThreatError, match="untargeted"):
        prove(digits, threat=assay.Threat("linf", 0.1, targeted=True))


def everything(self, x, y, radius, norm, tell=None):
    """The margins of a prover that proves whatever it is asked."""
    return torch.ones(len(x), self.exact.classes, dtype=torch.float64).scatter(1, y[:, None], torch.inf)


@pytest.mark.parametrize(("model", "threat"), [("demo:mnist-plain", "linf:0.2"), ("demo:mnist-robust", "linf")])
def test_a_proof_of_everything_stops_the_run_and_leaves_its_evidence(digits, tmp_path, monkeypatch, model, threat):
    _, data = digits
    monkeypatch.setattr(Prover, "margins", everything)
    net = assay.load_model(model)
    with pytest.raises(ContradictionError, match=r"contradiction-0000\d+\.npz"):
        prove((net, data.head(4)), tmp_path / "run", threat=threat)
    (file,) = (tmp_path / "run").glob("contradiction-*.npz")
    with np.load(file) as kept:
        assert kept["size"] <= kept["proven"]
        index, adversarial = int(kept["index"]), torch.from_numpy(kept["adversarial"])
        assert np.array_equal(kept["x"], data.batch([index])[0])
        assert net(adversarial[None]).argmax(1) != int(kept["label"]) == data.labels[index]
        assert kept["margins"].shape == (10,)


def test_evidence_outlives_a_run_without_a_folder(digits, monkeypatch):
    _, data = digits
    monkeypatch.setattr(Prover, "margins", everything)
    with pytest.raises(ContradictionError) as caught:
        prove((assay.load_model("demo:mnist-plain"), data.head(4)))
    path = caught.value.remedy.split(" It is in ")[1].removesuffix(".")
    with np.load(path) as kept:
        assert "adversarial" in kept


def test_a_contradiction_comes_back_from_another_process_with_its_evidence():
    error = ContradictionError("a", "b", "c")
    error.evidence = {"index": np.asarray(3)}
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.evidence["index"] == 3


def test_search_is_kept_for_what_attacks_left_standing(digits, monkeypatch):
    """``complete`` gets neither what a cheap method proves nor what has fallen."""
    model, data = digits
    data, asked = data.head(10), []

    def searching(self, x, y, radius, norm, tell):
        method, self.method = self.method, "crown"
        asked.append((method, len(x)))
        found = HONEST(self, x, y, radius, norm, tell)
        return torch.where(torch.isinf(found), found, 0.01) if method == "complete" else found

    monkeypatch.setattr(Prover, "margins", searching)
    e = prove((model, data), threat="linf:0.35", method="complete")
    stages = {s["name"]: s for s in e.stages()}
    fallen = e.samples["status"].to_pylist().count("fooled")
    assert fallen > 0
    cheap = stages["proof: alpha"]["proven"]
    assert asked == [("alpha", 10), ("complete", 10 - cheap - fallen)]
    assert e.certified_accuracy == e.robust_accuracy == (10 - fallen) / 10


# radii and brackets


def test_brackets_hold_and_the_wrong_sample_has_none(radii):
    lower, upper = (radii.samples[c].to_numpy() for c in ("lower", "upper"))
    assert (lower[0], upper[0]) == (0, 0)
    assert (lower[1:] > 0.05).all()
    assert (lower <= upper).all()
    assert np.isfinite(upper).all()
    assert radii.certified_accuracy is radii.robust_accuracy is None
    assert radii.samples["certified"].null_count == 6


def test_radii_say_what_is_certified_at_every_eps(radii):
    found = points(*read(radii.run))
    lower, upper = (radii.samples[c].to_numpy() for c in ("lower", "upper"))
    assert [p.eps for p in found] == [0.05, 0.15]
    for p in found:
        assert p.certified.value == (lower >= p.eps).mean()
        assert p.rate.value == (upper > p.eps).mean()
        assert p.certified.low <= p.certified.value <= p.rate.value


def test_the_picture_shows_each_sample_and_the_shares(radii, proven):
    s = summarize(radii.run.manifest)
    drawn = brackets(s, radii.samples, (0.15,))
    assert (drawn.n, drawn.drawn) == (5, 5)
    assert drawn.proven.count("M") == drawn.open.count("M") == drawn.ends.count("M") == 5
    lower, upper = (radii.samples[c].to_numpy() for c in ("lower", "upper"))
    assert drawn.ratio == pytest.approx(lower.sum() / upper.sum())
    row = {r[0]: r[1:] for r in drawn.readings}["0.15"]
    shares = [float(v.removesuffix(" %")) for v in row]
    assert shares[0] == pytest.approx(100 * (lower >= 0.15).mean(), abs=0.06)
    assert shares[2] == pytest.approx(100 * (upper <= 0.15).mean(), abs=0.06)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert brackets(summarize(proven.run.manifest), proven.samples) is None  # a run of one eps has no radii


def test_reports_say_what_is_proven_and_how(radii, proven, tmp_path):
    page = write_report(radii.run, tmp_path / "radii.html").read_text()
    assert "Between proof and attack" in page
    assert "Median proven radius" in page
    assert "radius: crown" in page
    assert "half of those are proven up to an l-infinity change of" in verdict(radii.run)
    page = write_report(proven.run, tmp_path / "proven.html").read_text()
    assert "A lower bound as well" in page
    assert 'id="brackets"' not in page
    assert f"{100 * proven.certified_accuracy:.1f} % is proven" in verdict(proven.run)


def test_progress_shows_both_bounds(digits):
    model, data = digits
    told = []
    assay.evaluate(model, data.head(6), "linf:0.1", "quick", "crown", progress=told.append)
    assert any("proof: crown, 6 open" in s.stage for s in told)
    last = told[-1]
    assert last.proven == 6 - last.fooled - (6 - last.right)
    board = Board()
    board(last)
    console = Console(width=100, file=sys.stdout)
    with console.capture() as shown:
        console.print(board)
    assert "100.0 % proven" in shown.get()


# the command


def run(*args, cwd, check=0):
    with contextlib.chdir(cwd), mock.patch.object(sys, "argv", ["assay", *map(str, args)]):
        done = CliRunner().invoke(app, [*map(str, args)], catch_exceptions=False)
    assert done.exit_code == check, done.stdout + done.stderr
    return done


ROBUST = ("demo:mnist-robust", "demo:mnist", "--limit", 6)


def test_certify_writes_a_run_with_proofs_alone(tmp_path):
    done = run("certify", *ROBUST, "--threat", "linf:0.1", "--json", "--out", "run", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["robust_accuracy"] is None
    assert found["proven"] + found["open"] + found["wrong"] == found["n"] == 6
    assert found["certified_accuracy"] == found["proven"] / 6 > 0
    assert found["prove"]["method"] == "crown"
    assert found["interval"]["certified"][0] < found["certified_accuracy"] <= found["interval"]["certified"][1]
    kept = Run.read(tmp_path / "run")
    assert kept.manifest["complete"]
    assert "robust" not in kept.manifest["totals"]["interval"]
    assert (tmp_path / "run" / "report.html").exists()
    again = run("certify", *ROBUST, "--threat", "linf:0.1", "--out", "run", cwd=tmp_path)
    assert "is proven to classify" in again.stdout
    assert "open" in again.stdout
    with pytest.raises(AssertionError, match="was"):
        run("certify", *ROBUST, "--threat", "linf:0.05", "--out", "run", cwd=tmp_path)


def test_certify_measures_brackets(tmp_path):
    done = run("certify", *ROBUST[:3], 2, "--threat", "linf:0.1", "--radius", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert 0.5 < found["bracket_ratio"] < 1
    assert found["bracket_ratio"] == pytest.approx(found["mean_lower"] / found["mean_upper"])
    assert found["curve"][0]["certified_accuracy"] <= found["curve"][0]["robust_accuracy"]
    alone = ("certify", *ROBUST[:3], 2, "--threat", "linf", "--radius", "--no-attack", "--method", "ibp")
    done = run(*alone, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["passes"]["backwards"] <= 2 * 2  # two gradients of each, by the checks before
    assert 0 < found["mean_lower"] < 0.1
    assert "mean_upper" not in found
    assert "are proven up to" in run(*alone, "--quiet", cwd=tmp_path).stdout


def test_certify_by_smoothing_says_whom_it_is_about(tmp_path):
    about = ("--method", "smoothing", "--sigma", 0.25, "--n", 200, "--n0", 20)
    done = run("certify", *ROBUST, "--threat", "l2:0.2", *about, "--json", "--out", "run", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["prove"] == {
        "method": "smoothing",
        "noise": "gaussian",
        "sigma": 0.25,
        "kept": None,
        "null": None,
        "n0": 20,
        "n": 200,
        "alpha": 0.001,
    }
    assert found["passes"] == {"forwards": 6 * 220, "backwards": 0}
    assert found["certified_accuracy"] > 0.5
    page = (tmp_path / "run" / "report.html").read_text()
    assert "about the network itself it says nothing" in page
    assert "99.9 %" in page
    done = run("certify", *ROBUST, "--threat", "linf:0.2", *about, cwd=tmp_path, check=3)
    assert "a threat in l2" in done.stderr


def test_interrupted_votes_are_kept(digits, tmp_path, monkeypatch):
    model, data = digits
    smoothed, threat = Smoothed(model, sigma=0.25), assay.Threat("l2", 0.2)
    how = {"n0": 10, "n": 100, "progress": False, "batch_size": 64}
    whole = certify_smoothed(smoothed, data.head(4), threat, **how)
    calls = []

    def stop(snapshot):
        calls.append(snapshot.passes)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certify_smoothed(smoothed, data.head(4), threat, out=tmp_path / "run", **how | {"progress": stop})
    assert [*(tmp_path / "run" / "race").glob("votes-*.npz")]
    seen = []
    again = certify_smoothed(smoothed, data.head(4), threat, out=tmp_path / "run", **how | {"progress": seen.append})
    assert again.samples.equals(whole.samples)
    assert max(s.passes for s in seen) < 4 * 110  # the others were asked before


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ((*ROBUST,), 2, "--threat"),
        ((*ROBUST, "--threat", "linf"), 3, "--radius"),
        ((*ROBUST, "--threat", "linf:0.1", "--method", "crwn"), 2, "Did you mean 'crown'"),
        ((*ROBUST, "--threat", "linf:0.1", "--no-attack"), 2, "--no-attack alone"),
        ((*ROBUST, "--threat", "l2:0.1", "--method", "smoothing"), 2, "sigma"),
        ((*ROBUST, "--threat", "l2:0.1", "--method", "smoothing", "--radius"), 2, "leave it out"),
        ((*ROBUST, "--threat", "linf:0.1", "--arithmetic", "float8"), 2, "arithmetic"),
        ((*ROBUST, "--threat", "linf:8"), 3, "8/255"),
    ],
)
def test_wrong_commands_end_with_a_sentence(tmp_path, args, code, says):
    done = run("certify", *args, cwd=tmp_path, check=code)
    assert says in done.stderr
    assert not (tmp_path / "runs").exists()


def test_evaluate_takes_a_method_of_proof(tmp_path):
    done = run(
        "evaluate", *ROBUST, "--threat", "linf:0.15", "--effort", "quick", "--prove", "ibp", "--json", cwd=tmp_path
    )
    found = json.loads(done.stdout)
    assert found["certified_accuracy"] <= found["robust_accuracy"]
    assert found["interval"]["certified"][0] == 0
    done = run("evaluate", *ROBUST, "--threat", "linf:0.1", "--prove", "magic", cwd=tmp_path, check=2)
    assert "a method of proof" in done.stderr


def test_a_dry_run_says_what_proofs_will_cost(tmp_path):
    dry = ("evaluate", *ROBUST, "--threat", "linf:0.01", "--effort", "quick", "--dry-run")
    low, high = json.loads(run(*dry, "--prove", "crown", "--json", cwd=tmp_path).stdout)["proofs"]
    assert 0 < low == high < 60
    assert json.loads(run(*dry, "--json", cwd=tmp_path).stdout)["proofs"] == [0, 0]
    assert "time for proofs" in run(*dry, "--prove", "ibp", cwd=tmp_path).stdout


@pytest.mark.slow
def test_a_killed_proof_ends_in_the_same_table(tmp_path):
    """kill -9 in the middle, the same command again."""
    command = [sys.executable, "-m", "assay", "certify", "demo:mnist-robust", "demo:mnist", "--threat", "linf:0.2"]
    command += ["--limit", "130", "--quiet", "--out"]
    subprocess.run([*command, "whole"], cwd=tmp_path, check=True, capture_output=True)
    killed = subprocess.Popen([*command, "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    journal_file = tmp_path / "killed" / "race" / "block-00000000.npz"
    while not journal_file.exists():
        assert killed.poll() is None, "it was over before it could be killed"
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert not Run.read(tmp_path / "killed").done()
    subprocess.run([*command, "killed"], cwd=tmp_path, check=True, capture_output=True)
    assert Run.read(tmp_path / "killed").samples().equals(Run.read(tmp_path / "whole").samples())
