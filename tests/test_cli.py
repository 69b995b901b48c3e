"""The command line as its users meet it: what it prints, where, and with which exit code."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import assay
from assay.cli import main
from assay.cli.app import app
from assay.runs import Run


def run(*args, cwd, check):
    """Call the command in this process (a new one costs seconds of imports), in the folder ``cwd``."""
    with contextlib.chdir(cwd), mock.patch.object(sys, "argv", ["assay", *map(str, args)]):
        done = CliRunner().invoke(app, [*map(str, args)], catch_exceptions=False)
    assert done.exit_code == check, done.stdout + done.stderr
    return done


def test_the_command_is_installed_and_runs_as_a_module(tmp_path):
    for command in (["assay"], [sys.executable, "-m", "assay"]):
        found = shutil.which(command[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        done = subprocess.run([found, *command[1:], "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"assay {assay.__version__}\n"


EVALUATE = ("evaluate", "demo:mnist-robust", "demo:mnist", "--threat", "linf:0.3", "--effort", "quick", "--limit", 24)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One evaluation through the command line, with --json."""
    folder = tmp_path_factory.mktemp("cli")
    return run(*EVALUATE, "--json", "--out", "run", cwd=folder, check=0), folder / "run"


def test_json_is_one_object_and_nothing_else_on_stdout(finished):
    done, folder = finished
    result = json.loads(done.stdout)
    assert {
        "n",
        "clean_accuracy",
        "robust_accuracy",
        "certified_accuracy",
        "interval",
        "passes",
        "seconds",
        "findings",
        "run",
    } <= result.keys()
    assert result["n"] == 24
    assert result["passes"].keys() == {"forwards", "backwards"}
    assert len(Run.read(folder).samples()) == 24


def test_an_evaluation_leaves_the_folder_of_the_contract(finished):
    _, folder = finished
    assert {p.name for p in folder.iterdir()} >= {"manifest.json", "samples", "adversarials", "report.html"}


def test_report_writes_one_page(finished, tmp_path):
    _, folder = finished
    done = run("report", folder, "--out", tmp_path / "page.html", cwd=tmp_path, check=0)
    assert done.stdout.strip().endswith("page.html")
    assert "<html" in (tmp_path / "page.html").read_text()


def test_the_same_command_goes_on_with_its_run_and_a_changed_one_gets_its_own(tmp_path):
    run(*EVALUATE, "--quiet", cwd=tmp_path, check=0)
    run(*EVALUATE, "--quiet", cwd=tmp_path, check=0)
    assert len([*(tmp_path / "runs").iterdir()]) == 1
    run(*EVALUATE, "--quiet", "--seed", 1, cwd=tmp_path, check=0)
    assert len([*(tmp_path / "runs").iterdir()]) == 2
    refused = run(*EVALUATE, "--quiet", "--no-resume", cwd=tmp_path, check=3)
    assert "--no-resume" in refused.stderr


def test_quiet_prints_the_verdict_only(finished, tmp_path):
    _, folder = finished
    done = run(*EVALUATE, "--quiet", "--out", folder, cwd=folder.parent, check=0)
    assert len(done.stdout.strip().splitlines()) == 1
    assert "%" in done.stdout


def test_help_teaches(tmp_path):
    text = run("--help", cwd=tmp_path, check=0).stdout
    for word in ("evaluate", "demo", "MODEL", "DATA", "linf:8/255", "Exit codes"):
        assert word in text
    assert "--threat" in run("evaluate", "--help", cwd=tmp_path, check=0).stdout


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["evaluate"], 2, "MODEL"),
        (["evaluate", "demo:mnist-plain", "demo:mnist", "--threat", "linf:0.3", "--effort", "huge"], 2, "quick"),
        (["evaluate", "demo:mnist-plain", "demo:mnist", "--threat", "l7:1"], 3, "linf"),
        (["evaluate", "demo:mnist-plain", "demo:mnist", "--threat", "linf:8"], 3, "linf:8/255"),
        (["evaluate", "demo:nothing", "demo:mnist", "--threat", "linf:0.3"], 3, "mnist-plain"),
        (["evaluate", "nowhere.pth", "demo:mnist", "--threat", "linf:0.3"], 3, "nowhere.pth"),
        (["evaluate", "demo:mnist-plain", "nowhere", "--threat", "linf:0.3"], 3, "nowhere"),
        (["evaluate", "demo:mnist-plain", "demo:mnist", "--threat", "linf:0.3", "--device", "cuda:99"], 2, "cuda:99"),
        (["attack", "demo:mnist-plain", "demo:mnist", "--with", "pgdd"], 2, "Did you mean 'pgd'"),
        (["attack", "demo:mnist-plain", "demo:mnist", "--with", "pgd", "--set", "stepz=3"], 2, "steps"),
        (["attack", "demo:mnist-plain", "demo:mnist", "--with", "pgd", "--set", "steps=many"], 2, "steps"),
        (["report", "nowhere"], 3, "manifest.json"),
        (["evaluate", "demo:mnist-plain", "demo:mnist", "--threat", "linf:0.3", "--eps-list", ","], 2, "--eps-list"),
        (["evaluate", "demo:mnist-plain", "demo:mnist", "--threat", "linf:0.3", "--prove-seconds", 9], 2, "--prove"),
        (["evaluate", "demo:mnist-plain", "demo:mnist", "--threat", "linf:0.3", "--size", 0], 3, "a side of 0"),
        (["certify", "demo:mnist-plain", "demo:mnist", "--threat", "l2:1", "--sigma", 0.25], 2, "--method smoothing"),
        (
            ["certify", "demo:mnist-plain", "demo:mnist", "--threat=l2:1", "--method=smoothing", "--arithmetic=real"],
            2,
            "--arithmetic only with a proof about the network",
        ),
        (
            ["certify", "demo:mnist-plain", "demo:mnist", "--threat", "l2:1", "--n", 10_000, "--alpha", 0.1],
            2,
            "--alpha",
        ),
        (["certify", "demo:mnist-plain", "demo:mnist", "--threat", "l2:1", "--seconds", 9], 2, "--method complete"),
        (["certify", "demo:mnist-plain", "demo:mnist", "--threat", "l2:1", "--timeout", 9], 2, "--vnnlib"),
    ],
)
def test_mistakes_end_with_a_sentence_and_the_right_code(args, code, says, tmp_path):
    done = run(*args, cwd=tmp_path, check=code)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--effort", "fast"], "--effort out of"),
        (["--prove", "crwn"], "Did you mean 'crown'"),
        (["--batch-size", 8, "--set", "batch_size=9"], "Leave one of them out"),
    ],
)
def test_a_verdict_that_there_is_none_of_is_refused_before_any_training(wrong, says, tmp_path):
    pytest.importorskip("lightning_fabric")
    command = ("harden", "demo:mnist-plain", "demo:mnist", "--threat", "linf:0.1", "--epochs", 1, "--limit", 400)
    assert says in run(*command, "--out", "net.safetensors", *wrong, cwd=tmp_path, check=2).stderr
    assert not [*tmp_path.iterdir()]


def test_the_size_of_batches_is_an_option_of_harden(tmp_path):
    pytest.importorskip("lightning_fabric")
    command = ("harden", "demo:mnist-plain", "demo:mnist", "--threat", "linf:0.1", "--epochs", 1, "--limit", 400)
    how = ("--method", "plain", "--effort", "none", "--batch-size", 80, "--set", "valid_steps=1", "-q")
    run(*command, *how, "--out", "net.safetensors", cwd=tmp_path, check=0)
    manifest = json.loads((tmp_path / "net.training" / "manifest.json").read_text())
    assert manifest["identity"]["settings"]["batch_size"] == 80


@pytest.mark.parametrize(
    ("sources", "trusted"),
    [(("demo:mnist-plain", "own.npz"), "own.npz"), (("net.pth", "demo:mnist"), "net.pth")],
    ids=["data", "model"],
)
def test_what_is_trusted_is_said_of_files_that_can_hold_a_pickle(sources, trusted, tmp_path):
    digits = assay.load_data("demo:mnist", limit=4)
    np.savez(tmp_path / "own.npz", x=digits.batch(range(4)).numpy(), y=digits.labels.numpy())
    torch.save(assay.load_model("demo:mnist-plain").net, tmp_path / "net.pth")
    how = ("--threat", "linf:0.1", "--effort", "quick", "--limit", 4, "--trust-pickle", "-q")
    said = run("evaluate", *sources, *how, cwd=tmp_path, check=0).stderr
    assert [line.split(":")[0] for line in said.splitlines() if "trusting" in line] == [f"trusting {trusted}"]


def test_no_output_takes_the_place_of_what_a_run_is_read_from(finished, tmp_path):
    _, folder = finished
    (tmp_path / "link.html").symlink_to(folder / "manifest.json")
    before = (folder / "manifest.json").read_bytes()
    for command in (
        ("report", folder, "--out", folder / "manifest.json"),
        ("gate", folder, "--min-robust", 0, "--junit", folder / "manifest.json"),
        ("gate", folder, "--min-robust", 0, "--markdown", tmp_path / "link.html"),
        ("compare", folder, folder, "--out", folder / "manifest.json"),
        ("study", "walk", "demo:mnist-plain", "demo:mnist", "--gif", folder / "manifest.json"),
        ("study", "landscape", "demo:mnist-plain", "demo:mnist", "--weights", "--out", folder / "manifest.json"),
    ):
        assert "Choose another name" in run(*command, cwd=tmp_path, check=2).stderr
    assert (folder / "manifest.json").read_bytes() == before
    assert not run("report", folder, "--out", tmp_path / "manifest.json", "--quiet", cwd=tmp_path, check=0).stdout
    assert "<html" in (tmp_path / "manifest.json").read_text(), "in a folder of one's own it is a name like others"


def test_ctrl_c_while_commands_are_still_imported_ends_with_130(monkeypatch):
    class Pressed:
        """Presses Ctrl-C when the command line is looked for."""

        def find_spec(self, name, *_):
            if name == "assay.cli.app":
                signal.raise_signal(signal.SIGINT)

    monkeypatch.delitem(sys.modules, "assay.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Pressed(), *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130


def test_a_model_that_misbehaves_ends_with_code_4(tmp_path):
    (tmp_path / "mine.py").write_text("def net():\n    return lambda x: x.flatten(1)[:, :10] * float('nan')\n")
    done = run("evaluate", "py:mine:net", "demo:mnist", "--threat", "linf:0.1", "--limit", 8, cwd=tmp_path, check=4)
    assert "NaN" in done.stderr


def test_attack_by_name_with_parameters(tmp_path):
    args = ("attack", "demo:mnist-plain", "demo:mnist", "--threat", "linf:0.2", "--limit", 32, "--json")
    one = json.loads(run(*args, "--with", "fgsm", cwd=tmp_path, check=0).stdout)
    many = json.loads(
        run(*args, "--with", "pgd", "--set", "steps=10", "--set", "loss=margin", cwd=tmp_path, check=0).stdout
    )
    assert 0 < one["broken"] <= many["broken"] <= many["attacked"] <= 32


@pytest.mark.parametrize(
    "args",
    [
        ("--with", "pgd", "--threat", "linf:0.2"),
        ("--with", "targeted-ascent", "--threat", "linf", "--target", "4"),
        ("--with", "apgd", "--threat", "l2:2", "--set", "steps=20", "--target", "4"),
    ],
    ids=["untargeted", "targeted, smallest", "targeted, l2"],
)
def test_every_image_that_is_saved_fools_when_it_is_read_back(args, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000-label-9.png").write_bytes(b"of an earlier attack")
    (tmp_path / "out" / "holiday.png").write_bytes(b"mine")
    command = ("attack", "demo:mnist-plain", "demo:mnist", *args, "--limit", 12, "--save-images", "out", "--json")
    result = json.loads(run(*command, cwd=tmp_path, check=0).stdout)
    files = {p for p in (tmp_path / "out").iterdir() if p.name != "holiday.png"}
    assert result["quantize"] == 8
    assert len(files) == result["images"]["written"] == result["images"]["proved"] == result["broken"] > 0
    model = assay.load_model("demo:mnist-plain")
    clean = assay.load_data("demo:mnist", limit=12)
    for file in files:
        x = torch.from_numpy(np.array(Image.open(file)))[None, None] / 255
        index, label = int(file.name[:6]), int(file.stem.rsplit("-", 1)[1])
        guess = int(model(x).argmax())
        assert guess == 4 if "--target" in args else guess != label
        before, y = clean.batch(torch.tensor([index])), int(clean.labels[index])
        assert label == y
        if "linf:0.2" in args:
            assert float((x.double() - before.double()).abs().max()) <= 0.2


def test_an_image_that_does_not_fool_when_it_is_read_back_is_not_kept(tmp_path):
    """A file that loses what the attack did stands for a defect anywhere between the attack and the disk."""
    from assay.data import png

    def faded(path, *rest, read=png.read_png):
        image = read(path, *rest)
        return image if int(path.name[1:7]) % 2 else image * 0

    command = ("attack", "demo:mnist-plain", "demo:mnist", "--with", "pgd", "--threat", "linf:0.2", "--limit", 12)
    with mock.patch.object(png, "read_png", faded):
        done = run(*command, "--target", 4, "--save-images", "out", "--json", cwd=tmp_path, check=0)
    images = json.loads(done.stdout)["images"]
    names = [p.name for p in (tmp_path / "out").iterdir()]
    assert 0 < len(names) == images["proved"] < images["written"]
    assert all(int(n[:6]) % 2 for n in names)


def stored_arrays(path):
    with np.load(path) as file:
        return dict(file)


def test_attack_writes_what_it_found_and_keeps_to_its_budget(tmp_path):
    command = ("attack", "demo:mnist-plain", "demo:mnist", "--with", "pgd", "--threat", "linf:0.2", "--limit", 12)
    done = run(*command, "--max-passes", 9, "--out", "found", "--json", cwd=tmp_path, check=0)
    result, stored = json.loads(done.stdout), json.loads((tmp_path / "found" / "attack.json").read_text())
    found = stored_arrays(tmp_path / "found" / "adversarials.npz")
    assert stored.items() >= (result | {"seed": 0}).items()
    assert stored["parameters"]["name"] == "pgd"
    assert found["x"].shape == (result["attacked"], 1, 28, 28)
    assert (found["forwards"] + found["backwards"]).max() <= 9
    assert found["success"].sum() == result["broken"]
    assert (np.isfinite(found["size"]) == found["success"]).all()
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == ["adversarials.npz", "attack.json"]


def test_a_targeted_attack_that_sees_labels_only_starts_at_samples(tmp_path):
    """Noise is no 7 for this network, for a third of the samples; a sample that is a 7 always will do."""
    command = ("attack", "demo:mnist-robust", "demo:mnist", "--with", "surfree", "--set", "steps=60", "--threat", "l2")
    noise, pool = (
        json.loads(run(*command, "--target", 7, "--limit", 24, "--json", *more, cwd=tmp_path, check=0).stdout)
        for more in ([], ["--start-from", "demo:mnist"])
    )
    assert noise["broken"] < pool["broken"] == pool["attacked"]


@pytest.mark.parametrize(
    ("with_", "pool", "told"), [("pgd", "demo:mnist", "surfree"), ("rays", "small.npz", "(1, 28, 28)")]
)
def test_samples_to_start_from_that_cannot_be_used(with_, pool, told, tmp_path):
    np.savez(tmp_path / "small.npz", x=np.zeros((2, 1, 8, 8), np.float32), y=np.arange(2))
    command = ("attack", "demo:mnist-plain", "demo:mnist", "--with", with_, "--threat", "linf:0.1", "--limit", 4)
    assert told in run(*command, "--start-from", pool, cwd=tmp_path, check=2 if with_ == "pgd" else 3).stderr


def test_images_are_saved_with_8_bits_or_not_at_all(tmp_path):
    command = ("attack", "demo:mnist-plain", "demo:mnist", "--with", "pgd", "--threat", "linf:0.2", "--limit", 4)
    refused = run(*command, "--save-images", "out", "--quantize", 4, cwd=tmp_path, check=2)
    assert "--quantize 8" in refused.stderr
    coarse = json.loads(run(*command, "--quantize", 2, "--out", "found", "--json", cwd=tmp_path, check=0).stdout)
    found = stored_arrays(tmp_path / "found" / "adversarials.npz")
    assert coarse["quantize"] == 2
    assert np.isin(found["x"][found["success"]], np.arange(4, dtype=np.float32) / 3).all()
    assert "max_passes" in run(*command, "--max-passes", 0, cwd=tmp_path, check=2).stderr


def test_size_brings_images_of_any_size_to_what_the_model_takes(tmp_path):
    for k, (width, height) in enumerate([(40, 30), (56, 28), (28, 28), (31, 64)]):
        (tmp_path / "images" / str(k % 2)).mkdir(parents=True, exist_ok=True)
        grey = np.full((height, width), 40 * k, np.uint8)
        Image.fromarray(grey).save(tmp_path / "images" / str(k % 2) / f"{k}.png")
    command = ("evaluate", "demo:mnist-plain", "images", "--threat", "linf:0.1", "--effort", "quick", "--json")
    assert "--size" in run(*command, cwd=tmp_path, check=3).stderr
    assert "--size takes" in run(*command, "--size", "big", cwd=tmp_path, check=2).stderr
    found = [json.loads(run(*command, "--size", size, cwd=tmp_path, check=0).stdout) for size in ("28", "28,28")]
    assert [r["n"] for r in found] == [4, 4]
    assert found[0]["run"] != found[1]["run"]


def test_doctor_finds_this_installation_sound(tmp_path):
    report = json.loads(run("doctor", "--json", cwd=tmp_path, check=0).stdout)
    assert report["ok"]
    assert {"torch", "devices", "demo model and data"} <= {p["part"] for p in report["parts"]}


def test_doctor_writes_the_extras_as_they_are_to_be_typed(tmp_path, monkeypatch):
    """Brackets are markup to the table's library, and were once eaten."""
    monkeypatch.setenv("COLUMNS", "300")
    remedies = [p["remedy"] for p in json.loads(run("doctor", "--json", cwd=tmp_path, check=0).stdout)["parts"]]
    shown = run("doctor", cwd=tmp_path, check=0).stdout
    assert all(r in shown for r in remedies)


def test_demo_compares_the_two_shipped_models(tmp_path):
    done = run("demo", "--limit", 16, "--effort", "quick", "--out", "runs/demo", "--json", cwd=tmp_path, check=0)
    result = json.loads(done.stdout)
    assert result["mnist-robust"]["robust_accuracy"] > result["mnist-plain"]["robust_accuracy"]
    assert (tmp_path / "runs/demo/comparison.txt").read_text()
    assert (tmp_path / "runs/demo/mnist-plain/report.html").exists()


def test_ctrl_c_ends_with_130_the_race_so_far_and_the_command_to_go_on(tmp_path):
    args = (
        "evaluate",
        "demo:mnist-robust",
        "demo:mnist",
        "--threat",
        "linf:0.3",
        "--limit",
        "300",
        "--batch-size",
        "2",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "assay", *args, "--out", "run"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline, journal = time.monotonic() + 120, tmp_path / "run" / "race" / "block-00000000.npz"
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "assay evaluate demo:mnist-robust" in err
    assert not Run.read(tmp_path / "run").manifest["complete"]
    with np.load(journal) as kept:
        assert len(kept["index"]) == 300


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_folder_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    done = run(*EVALUATE, "--out", "locked/run", cwd=tmp_path, check=3)
    assert "Choose another --out" in done.stderr


def test_an_output_folder_that_is_a_file_or_holds_other_things_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "Choose another --out" in run(*EVALUATE, "--out", "file/run", cwd=tmp_path, check=3).stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    assert "thesis.tex" in run(*EVALUATE, "--out", "full", cwd=tmp_path, check=3).stderr
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"


def test_an_evaluation_at_8_bits_counts_only_what_a_file_can_hold(tmp_path):
    command = ("evaluate", "demo:mnist-plain", "demo:mnist", "--threat", "linf:0.1", "--limit", 6, "--effort", "quick")
    result = json.loads(run(*command, "--quantize", 8, "--json", "--out", "r", cwd=tmp_path, check=0).stdout)
    assert result["n"] == 6
    with np.load(next((tmp_path / "r" / "adversarials").glob("*.npz"))) as kept:
        levels = kept["x"].astype(np.float64) * 255
    assert len(levels)
    assert np.abs(levels - levels.round()).max() < 1e-4
