"""What ``assay attack --out`` wrote can be read as a run is: by reports, by comparisons, by the local app."""

import contextlib
import json
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import assay
from assay.cli.app import app
from assay.core.errors import RunError
from assay.data import load_data
from assay.models.fingerprint import fingerprint
from assay.models.loaders import load_model
from assay.reports import write_report
from assay.runs import Run
from assay.runs.attacked import Attacked
from assay.runs.source import opened

N = 40


def run(*args, cwd):
    """Call a command in the folder ``cwd``."""
    words = [str(a) for a in args]
    with contextlib.chdir(cwd), mock.patch.object(sys, "argv", ["assay", *words]):
        return CliRunner().invoke(app, words)


def attack(cwd, *more, out="attacked"):
    done = run("attack", "demo:mnist-plain", "data.npz", "--limit", N, "--out", out, "-q", *more, cwd=cwd)
    assert done.exit_code == 0, done.output
    return cwd / out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An attack on digits of which three have a wrong label, so that the model is wrong on them."""
    folder = tmp_path_factory.mktemp("attacks")
    digits = load_data("demo:mnist", limit=N)
    y = digits.labels.numpy().copy()
    y[[2, 3, 11]] = (y[[2, 3, 11]] + 1) % 10
    np.savez(folder / "data.npz", x=digits.batch(range(N)).numpy(), y=y)
    return attack(folder, "--with", "fgsm", "--threat", "linf:0.1")


@pytest.fixture(scope="module")
def told(folder):
    return json.loads((folder / "attack.json").read_text())


def test_the_file_says_whom_and_on_what_as_the_manifest_of_a_run_does(folder, told):
    model, data = load_model("demo:mnist-plain"), load_data(str(folder.parent / "data.npz"), limit=N)
    how = {"limit": N, "effort": "quick", "out": folder.parent / "run", "progress": False}
    manifest = assay.evaluate(model, data, "linf:0.1", **how).run.manifest
    assert told["model"] == manifest["model"]
    assert told["data"] == manifest["data"] | {"source": "data.npz"}
    assert told["machine"].keys() == manifest["machine"].keys()
    assert told["identity"].items() >= {k: manifest["identity"][k] for k in ("model", "data", "threat", "n")}.items()
    assert told["identity"]["model"] == fingerprint(model)
    assert told["command"].startswith("assay attack demo:mnist-plain data.npz")


def test_every_sample_is_in_the_table_with_its_label_and_what_it_is_taken_for(folder, told):
    model, data = load_model("demo:mnist-plain"), load_data(str(folder.parent / "data.npz"), limit=N)
    table = opened(folder).samples()
    assert table["index"].to_pylist() == [*range(N)]
    assert table["label"].to_pylist() == data.labels.tolist()
    assert table["prediction"].to_pylist() == model(data.batch(range(N))).argmax(1).tolist()
    status = np.array(table["status"].to_pylist())
    assert {2, 3, 11} <= {*np.flatnonzero(status == "misclassified").tolist()}
    assert [(status == s).sum() for s in ("fooled", "robust")] == [told["broken"], told["attacked"] - told["broken"]]
    assert sum(table["forwards"].to_pylist()) == told["passes"]["forwards"]


def test_adversarial_inputs_are_those_that_fooled_and_what_they_are_taken_for_is_asked_anew(folder, told):
    model, source = load_model("demo:mnist-plain"), opened(folder)
    (batch,) = source.adversarials()
    table = source.samples().filter(source.samples()["fooled"])
    assert len(batch["x"]) == told["broken"] > 0
    assert table["index"].to_pylist() == batch["index"].tolist()
    assert table["adversarial_prediction"].to_pylist() == model(torch.from_numpy(batch["x"])).argmax(1).tolist()


def test_a_report_has_names_pictures_and_the_one_attack_as_its_stage(folder, told):
    page = write_report(opened(folder)).read_text()
    assert "mnist-plain" in page
    assert f"still classifies {(told['attacked'] - told['broken']) / N:.1%}"[:-1] in page
    assert page.count('alt="Sample ') >= 3
    assert "fgsm(loss=ce)" in page
    assert "The checks before the attack saw nothing" in page
    assert run("report", folder, cwd=folder).stdout.strip() == str(folder / "report.html")


def test_two_attacks_are_compared_sample_by_sample(folder):
    other = attack(folder.parent, "--with", "pgd", "--threat", "linf:0.1", out="pgd")
    done = run("compare", folder, other, "--json", cwd=folder.parent)
    found, states = json.loads(done.stdout), [np.array(opened(f).samples()["status"]) for f in (folder, other)]
    assert found["n"] == N
    lost = ((states[0] == "robust") & (states[1] != "robust")).sum()
    assert found["robust"]["only_a"] == lost > 0
    assert {c["name"] for c in found["classes"]} <= {*"0123456789"}


def test_what_measures_sizes_has_no_robust_accuracy(folder):
    measured = attack(folder.parent, "--with", "ddn", "--set", "steps=20", "--threat", "l2", out="ddn")
    source = opened(measured)
    assert isinstance(source, Attacked)
    sizes = source.samples()["size"].to_numpy()
    assert (sizes[[2, 3, 11]] == 0).all()
    assert "half of those are fooled by an" in write_report(source).read_text()


def test_of_a_targeted_attack_only_what_it_was_tried_on_is_known(folder):
    source = opened(attack(folder.parent, "--with", "pgd", "--threat", "linf:0.2", "--target", "4", out="fours"))
    data = load_data(str(folder.parent / "data.npz"), limit=N)
    assert 4 not in data.labels[source.samples()["index"].to_pylist()].tolist()
    assert {4, None} >= {*source.samples()["adversarial_prediction"].to_pylist()}


def test_where_the_model_is_always_wrong_there_is_a_run_all_the_same(tmp_path):
    digits = load_data("demo:mnist", limit=N)
    wrong = (load_model("demo:mnist-plain")(digits.batch(range(N))).argmax(1) + 1) % 10
    np.savez(tmp_path / "data.npz", x=digits.batch(range(N)).numpy(), y=wrong.numpy())
    source = opened(attack(tmp_path, "--with", "fgsm", "--threat", "linf:0.1"))
    assert {*source.samples()["status"].to_pylist()} == {"misclassified"}
    assert [len(batch["x"]) for batch in source.adversarials()] == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("attack.json", b"{", "Repeat the attack"),
        ("attack.json", b'{"threat": "linf:0.1", "attack": "fgsm", "n": 40}', "says its model and data"),
        ("adversarials.npz", b"PK\3\4 nothing", "Repeat the attack"),
        ("attack.json", b'{"identity": {"n": 1}, "attack": "fgsm", "n": 40, "misclassified": {"index": 3}}', "Repeat"),
        ("attack.json", b"[" * 10**5, "Repeat the attack"),
    ],
)
def test_what_is_damaged_or_older_is_refused_in_a_sentence(folder, tmp_path, name, content, said):
    for file in ("attack.json", "adversarials.npz"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=said):
        opened(tmp_path)
    assert run("report", tmp_path, cwd=tmp_path).exit_code == 3


def test_a_folder_of_a_run_stays_a_run_whatever_lies_beside_it(folder, tmp_path):
    with pytest.raises(RunError, match=r"manifest\.json"):
        opened(tmp_path)
    how = {"limit": 4, "effort": "quick", "out": tmp_path / "run", "progress": False}
    assay.evaluate("demo:mnist-plain", "demo:mnist", "linf:0.1", **how)
    (tmp_path / "run" / "attack.json").write_bytes((folder / "attack.json").read_bytes())
    assert isinstance(opened(tmp_path / "run"), Run)
