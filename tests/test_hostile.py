"""Ten hostile inputs: each ends with a clear message and its exit code, and what was computed before stays intact."""

import contextlib
import math
import pickle
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import assay
from assay.cli.app import app
from assay.evaluation import course, journal
from assay.runs import Run

NETS = """from assay.models.demo.nets import mnist_cnn
from torch import nn

def other():
    return nn.Linear(784, 10)
"""


def command(folder, *args, code):
    """Run in ``folder``; return what was said on stderr, after checking the exit code."""
    arguments = [str(a) for a in args]
    with contextlib.chdir(folder), mock.patch.object(sys, "argv", ["assay", *arguments]):
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.stderr
    return done.stderr


def evaluate(folder, model="demo:mnist-robust", data="demo:mnist", *more, code):
    return command(folder, "evaluate", model, data, "--threat", "linf:0.3", "--effort", "quick", *more, code=code)


@pytest.fixture
def place(tmp_path):
    """A working folder with good images, good weights, and a run that must survive whatever comes."""
    (tmp_path / "hostile_nets.py").write_text(NETS)
    data = assay.load_data("demo:mnist", limit=20)
    x, y = data.batch(range(20)), data.labels
    np.savez(tmp_path / "good.npz", x=x.numpy(), y=y.numpy())
    for i in range(20):
        folder = tmp_path / "images" / f"class{int(y[i])}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((x[i, 0].numpy() * 255).astype(np.uint8)).save(folder / f"{i}.png")
    model = assay.load_model("demo:mnist-robust")
    torch.save(model.net.state_dict(), tmp_path / "weights.pth")
    evaluate(tmp_path, "demo:mnist-robust", "good.npz", "--out", "before", "--quiet", code=0)
    table = Run.read(tmp_path / "before").samples()
    yield tmp_path
    assert Run.read(tmp_path / "before").samples().equals(table)
    sys.modules.pop("hostile_nets", None)


def test_1_a_truncated_model_file(place):
    whole = (place / "weights.pth").read_bytes()
    (place / "weights.pth").write_bytes(whole[: len(whole) // 2])
    said = evaluate(place, "weights.pth", "good.npz", "--arch", "hostile_nets:mnist_cnn", code=3)
    assert "weights.pth" in said


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_2_a_pickle_bomb(place):
    torch.save({"state_dict": Bomb()}, place / "bomb.pth")
    said = evaluate(place, "bomb.pth", "good.npz", "--arch", "hostile_nets:mnist_cnn", code=3)
    assert "--trust-pickle" in said
    (place / "raw.pth").write_bytes(pickle.dumps(Bomb()))
    evaluate(place, "raw.pth", "good.npz", "--arch", "hostile_nets:mnist_cnn", code=3)
    np.savez(place / "bomb.npz", x=np.array([Bomb()], dtype=object), y=np.array([0]))
    assert "--trust-pickle" in evaluate(place, "demo:mnist-robust", "bomb.npz", code=3)
    assert not (place / "exploded").exists()


def test_3_weights_of_another_architecture(place):
    said = evaluate(place, "weights.pth", "good.npz", "--arch", "hostile_nets:other", code=3)
    assert "weights of Linear" in said
    assert "weights.pth" in said


def test_4_a_folder_without_images(place):
    (place / "empty" / "cats").mkdir(parents=True)
    (place / "empty" / "cats" / "notes.txt").write_text("no image")
    assert "empty" in evaluate(place, "demo:mnist-robust", "empty", code=3)


def test_5_a_corrupt_image_among_good_ones_is_found_before_any_attack(place):
    bad = next((place / "images").rglob("7.png"))
    bad.write_bytes(bad.read_bytes()[:60])
    said = evaluate(place, "demo:mnist-robust", "images", "--out", "run", code=3)
    assert bad.name in said
    assert not (place / "run").exists()


def test_6_labels_out_of_range(place):
    arrays = dict(np.load(place / "good.npz"))
    arrays["y"][4] = 10
    np.savez(place / "bad.npz", **arrays)
    said = evaluate(place, "demo:mnist-robust", "bad.npz", "--out", "run", code=3)
    assert "10 at sample 4" in said
    assert not (place / "run").exists()


def test_7_nan_pixels(place):
    arrays = dict(np.load(place / "good.npz"))
    arrays["x"][9, 0, 3, 3] = np.nan
    np.savez(place / "bad.npz", **arrays)
    assert "first: sample 9" in evaluate(place, "demo:mnist-robust", "bad.npz", code=3)


def test_8_zero_samples(place):
    np.savez(place / "bad.npz", x=np.zeros((0, 1, 28, 28), np.float32), y=np.zeros(0, np.int64))
    assert "[empty-data]" in evaluate(place, "demo:mnist-robust", "bad.npz", code=3)


@contextlib.contextmanager
def small_disk(folder, options):
    folder.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(made, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield
    finally:
        # Lazily: what has just been read may still be open for a moment.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_9_a_read_only_output_folder(place):
    with small_disk(place / "disk", "ro,size=100k"):
        said = evaluate(place, "demo:mnist-robust", "good.npz", "--out", "disk/run", code=3)
    assert "read-only" in said
    assert "Choose another --out" in said


@pytest.mark.parametrize("journals", ["never", "always"])
def test_10_a_full_disk_keeps_what_is_stored_and_the_run_goes_on_elsewhere(place, monkeypatch, journals):
    """Where all blocks under way are saved all the time, they fill the disk, and the run goes on from them."""
    monkeypatch.setattr(journal, "_SECONDS", {"never": math.inf, "always": 0.0}[journals])
    monkeypatch.setattr(course, "BLOCK", 8)
    options = ("--limit", 64, "--batch-size", 8)
    with small_disk(place / "disk", "size=80k"):
        said = evaluate(place, "demo:mnist-plain", "demo:mnist", *options, "--out", "disk/run", code=3)
        assert "the disk is full" in said
        assert (journals == "never") <= len(Run.read(place / "disk" / "run").samples()) < 64
        shutil.copytree(place / "disk" / "run", place / "run", ignore=shutil.ignore_patterns(".tmp-*"))
    evaluate(place, "demo:mnist-plain", "demo:mnist", *options, "--out", "run", code=0)
    evaluate(place, "demo:mnist-plain", "demo:mnist", "--limit", 64, "--out", "at_once", code=0)
    assert Run.read(place / "run").samples().equals(Run.read(place / "at_once").samples())
    shutil.rmtree(place / "run")
