"""Trackers: what is sent to MLflow, TensorBoard and Weights & Biases is read back with their own readers."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from needs import framework
from torch import nn
from typer.testing import CliRunner

import assay
from assay.cli.app import app
from assay.core.errors import RunError
from assay.core.trackers import TrackerWarning, tracking
from assay.reports.tracking import track
from test_reports import fabricate

mlflow = framework("mlflow")
events = framework("tensorboard.backend.event_processing.event_accumulator")
wandb = framework("wandb")

PAGE = (Path(__file__).parents[2] / "docs" / "trackers.md").read_text(encoding="utf-8")

FINDING = {"code": "zero-gradient", "severity": "warning", "message": "The gradient is zero.", "evidence": {}}


@pytest.fixture
def run(tmp_path):
    return fabricate(tmp_path / "run", findings=[FINDING])


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of its own, and no address: what a user has who has set nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_SILENT", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield tmp_path
    mlflow.set_tracking_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)


def newest():
    client = mlflow.MlflowClient()
    return client, client.search_runs(["0"])[0]


def scalars(folder: Path):
    found = events.EventAccumulator(str(folder), size_guidance={events.TENSORS: 0, events.SCALARS: 0})
    return found.Reload()


# --- runs


def test_mlflow_has_figures_settings_findings_and_files(run):
    where = track(["mlflow"], run)
    client, kept = newest()
    assert where == (f"MLflow run {kept.info.run_id} in {mlflow.get_tracking_uri()}",)
    assert (kept.info.status, kept.info.run_name) == ("FINISHED", "run")
    assert kept.data.metrics["robust_accuracy"] == 0.6
    assert kept.data.metrics["robust_accuracy_low"] == 0.43
    assert kept.data.metrics["forwards"] == 8000
    assert kept.data.params["threat.norm"] == "linf"
    assert kept.data.params["model_name"] == "toynet"
    assert kept.data.tags["assay.finding.zero-gradient"] == "warning: The gradient is zero."
    assert {f.path for f in client.list_artifacts(kept.info.run_id)} == {"report.html", "manifest.json"}
    curve = {m.step: m.value for m in client.get_metric_history(kept.info.run_id, "curve/robust_accuracy")}
    assert len(curve) == 21
    assert curve[0] == 0.9
    assert curve[20] == 0.6


def test_a_run_of_mlflow_that_a_user_has_begun_is_used_and_goes_on(run):
    with mlflow.start_run() as mine:
        track(["mlflow"], run)
        assert mlflow.active_run().info.run_id == mine.info.run_id
    _, kept = newest()
    assert kept.info.run_id == mine.info.run_id
    assert kept.data.metrics["clean_accuracy"] == 0.9


def test_without_an_address_and_a_database_mlflow_writes_a_folder(run, place, monkeypatch):
    mlflow.set_tracking_uri(None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    try:
        import sqlalchemy  # noqa: F401
    except ImportError:
        (where,) = track(["mlflow"], run)
        assert where.endswith((place / "mlruns").as_uri())
        assert newest()[1].data.metrics["n"] == 40


def test_a_run_that_fails_is_marked_so():
    with pytest.raises(ZeroDivisionError), tracking(["mlflow"], Path(), "broken", {}) as send:
        send.log({"loss": 1 / 0}, 0)
    assert newest()[1].info.status == "FAILED"


def test_a_tracker_that_cannot_be_reached_is_said_before_the_work(place):
    (place / "taken").write_text("a file")
    mlflow.set_tracking_uri((place / "taken").as_uri())
    refused = pytest.raises(RunError, match=r"a run of mlflow that can be written.*leave this tracker out")
    with refused, tracking(["mlflow"], place, "never", {}):
        pytest.fail("began")


def test_work_goes_on_without_a_tracker_that_fails(place):
    with tracking(["mlflow"], place, "work", {}) as send:
        with pytest.warns(TrackerWarning, match="a tracker failed"):
            send.artifact(place / "missing.html")
        send.log({"loss": 0.5}, 1)
    assert newest()[1].data.metrics["loss"] == 0.5


def test_tensorboard_has_figures_the_curve_and_a_table_of_settings(run):
    track(["tensorboard"], run)
    kept = scalars(run.path / "tensorboard")
    (robust,) = kept.Scalars("robust_accuracy")
    assert robust.value == pytest.approx(0.6)
    assert [e.step for e in kept.Scalars("curve/robust_accuracy")] == [*range(21)]
    assert kept.Scalars("curve/eps")[-1].value == pytest.approx(0.3)
    text = kept.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| threat.norm | linf |" in text
    assert "| assay.finding.zero-gradient | warning: The gradient is zero. |" in text


def test_weights_and_biases_stay_on_the_machine(run, place):
    (where,) = track(["wandb"], run)
    (folder,) = (place / "wandb").glob("offline-run-*")
    assert f"offline in {folder}; wandb sync" in where
    assert wandb.run is None
    wandb.teardown()  # its process writes in the background
    (file,) = folder.glob("*.wandb")
    records = file.read_bytes()
    for said in (b"robust_accuracy", b"threat.norm", b"curve/eps", b"report.html"):
        assert said in records
    for name in ("report.html", "manifest.json"):
        assert (folder / "files" / name).read_bytes() == (run.path / name).read_bytes()


def test_a_list_with_commas_names_several_once(run, place):
    assert len(track(["mlflow,tensorboard", "mlflow"], run)) == 2
    assert (run.path / "tensorboard").exists()
    assert not (place / "wandb").exists()


def test_eps_that_were_asked_for_are_the_steps_of_the_curve(tmp_path):
    run = fabricate(tmp_path / "asked", eps_list=[0.1, 0.2])
    track(["tensorboard"], run)
    kept = scalars(run.path / "tensorboard").Scalars("curve/eps")
    assert [e.value for e in kept] == pytest.approx([0.1, 0.2])


# --- training


def test_training_sends_its_history_to_the_same_trackers(tmp_path):
    x = torch.rand(96, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    data = x, (x.mean((1, 2, 3)) > 0.5).long()
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    done = assay.harden(
        net, data, "linf:0.05", "pgd", epochs=2, out=tmp_path / "net.safetensors", log=["mlflow,tensorboard"],
        device="cpu", progress=False, batch_size=32,
    )  # fmt: skip
    last = done.history.to_pylist()[-1]
    kept = scalars(tmp_path / "net.training" / "tensorboard").Scalars("loss")
    assert kept[-1].value == pytest.approx(last["loss"])
    assert kept[-1].step == last["steps"]
    _, tracked = newest()
    assert tracked.info.run_name == "pgd linf:0.05"
    assert tracked.data.metrics["loss"] == pytest.approx(last["loss"])
    assert tracked.data.params["method.name"] == "pgd"


# --- the page about all this


def test_every_command_of_the_page_runs(place):
    blocks = re.findall(r"(?ms)^```(sh|python)\n(.*?)^```$", PAGE)
    if "--track" not in CliRunner().invoke(app, ["evaluate", "--help"]).output:
        pytest.skip("evaluate has no --track yet")
    for language, code in blocks:
        for line in code.splitlines() if language == "sh" else ():
            done = CliRunner().invoke(app, shlex.split(line)[1:])
            assert done.exit_code == 0, done.output
        if language == "python":
            exec(compile(code, "trackers.md", "exec"), {})
    assert [*(place / "wandb").glob("offline-run-*")]
    assert (place / "small.training" / "tensorboard").exists()
