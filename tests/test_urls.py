"""Models, data and runs at URLs: fetched once, sent part by part, gone on with on another machine."""

import pickle
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import assay
from assay.cli.app import app
from assay.core.errors import DataError, MissingExtraError, ModelError, RunError
from assay.core.urls import cache_folder, url_of
from assay.evaluation import course
from assay.runs import Run


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An object store in memory, empty, and a cache folder of our own."""
    machine(tmp_path / "one", monkeypatch)
    kept = fsspec.filesystem("memory")
    kept.store.clear()
    kept.pseudo_dirs[:] = [""]
    return kept


def machine(folder, monkeypatch):
    """Go to another machine: its cache knows nothing of what was done here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.fixture(scope="module")
def digits():
    return assay.load_model("demo:mnist-robust"), assay.load_data("demo:mnist", limit=36)


def images(folder, count=4):
    """Write pictures of two classes, each of another grey; return the folder."""
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 6, 3), 10 * i, np.uint8)).save(path)
    return folder


def test_a_path_is_no_url_and_a_scheme_of_our_own_is_none_either():
    for source in ("runs/a", "/runs/a", "demo:mnist", "hf:DIR", "http://host/answer", "C:/runs", "file:///runs/a"):
        assert url_of(source) is None
    assert url_of(Path("memory://bucket/run")) == "memory://bucket/run"


def test_arrays_at_a_url_are_those_of_the_file(store, tmp_path):
    np.savez(tmp_path / "some.npz", x=np.zeros((3, 1, 4, 4), np.float32), y=[0, 1, 0])
    store.put_file(str(tmp_path / "some.npz"), "/bucket/some.npz")
    far, near = assay.load_data("memory://bucket/some.npz"), assay.load_data(f"file://{tmp_path}/some.npz")
    assert far.fingerprint() == near.fingerprint()
    assert (far.name, far.source) == ("some", "memory://bucket/some.npz")


def test_a_folder_at_a_url_is_opened_again_wherever_it_is_sent(store, tmp_path, monkeypatch):
    store.put(str(images(tmp_path / "val")), "/bucket/val", recursive=True)
    data = assay.load_data("memory://bucket/val/", limit=3, size=4)
    assert data.class_names == ("a", "b")
    sent = pickle.dumps(data)
    machine(tmp_path / "two", monkeypatch)
    there = pickle.loads(sent)
    assert (tmp_path / "two").exists()
    assert there.fingerprint() == data.fingerprint()
    assert there.batch([0, 1, 2]).equal(data.batch([0, 1, 2]))


def test_what_has_changed_is_fetched_again_and_what_has_not_is_not(store, tmp_path):
    copies = cache_folder() / "urls"
    for count, expected in ((2, 1), (2, 1), (4, 2)):
        for path in images(tmp_path / f"{count}", count).rglob("*.png"):
            name = f"/bucket/val/{path.parent.name}/{path.name}"
            if not store.exists(name):
                store.put_file(str(path), name)
        assert len(assay.load_data("memory://bucket/val")) == count
        assert len([*copies.iterdir()]) == expected


def test_samples_that_are_others_elsewhere_are_refused(store, tmp_path, monkeypatch):
    store.put(str(images(tmp_path / "val", 4)), "/bucket/val", recursive=True)
    sent = pickle.dumps(assay.load_data("memory://bucket/val"))
    store.rm("/bucket/val/a/2.png")
    with pytest.raises(DataError, match="the same for every worker"):
        pickle.loads(sent)


def test_a_model_at_a_url_is_that_of_the_file(store):
    weights = Path(assay.__file__).parent / "models" / "demo"
    file = next(weights.rglob("*robust*.safetensors"))
    store.put_file(str(file), f"/bucket/{file.name}")
    far = assay.load_model(f"memory://bucket/{file.name}", arch="demo:mnist-robust")
    near = assay.load_model(file, arch="demo:mnist-robust")
    x = assay.load_data("demo:mnist", limit=4).batch([0, 1, 2, 3])
    assert far(x).equal(near(x))
    assert far.name == near.name


def test_a_url_where_nothing_is_says_so(store):
    with pytest.raises(ModelError, match=r"nothing at memory://bucket/net\.onnx"):
        assay.load_model("memory://bucket/net.onnx")
    with pytest.raises(RunError, match="a run folder with a manifest"):
        Run.read("memory://bucket/run")


def test_a_url_whose_package_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtraError, match=r"assay\[s3\]"):
        assay.load_data("s3://bucket/val.npz")


def test_names_that_lead_out_of_the_folder_are_refused(store, tmp_path):
    store.store["/bucket/val/../../../../evil.png"] = store.open("/bucket/val/a.png", "wb")
    store.pipe("/bucket/val/a/0.png", b"0")
    with pytest.raises(DataError, match="names inside the folder"):
        assay.load_data("memory://bucket/val")
    assert not [*tmp_path.rglob("evil.png")]


def test_a_run_at_a_url_goes_on_on_another_machine_and_sends_each_part_once(store, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "BLOCK", 9)

    def run(out, progress=False):
        return assay.evaluate(*digits, "linf:0.35", "quick", out=out, progress=progress)

    def interrupt(snapshot):
        if snapshot.done == 18:
            raise KeyboardInterrupt

    assert run("memory://bucket/runs/one", interrupt).n == 18
    first = {path: store.created(path) for path in store.find("/bucket/runs/one/samples")}
    assert len(first) == 2
    machine(tmp_path / "two", monkeypatch)
    assert run("memory://bucket/runs/one").samples.equals(run(tmp_path / "here").samples)
    assert len(store.find("/bucket/runs/one/samples")) == 4
    assert {path: store.created(path) for path in first} == first
    manifest = store.created("/bucket/runs/one/manifest.json")
    assert manifest > max(store.created(p) for p in store.find("/bucket/runs/one") if not p.endswith("manifest.json"))
    machine(tmp_path / "three", monkeypatch)
    read = Run.read("memory://bucket/runs/one")
    assert read.samples().equals(Run.read(tmp_path / "here").samples())
    assert sum(len(a["index"]) for a in read.adversarials()) > 0
    assert Run.read("memory://bucket/runs/one").manifest["complete"]


def test_the_command_line_brings_the_report_too(store):
    command = "evaluate demo:mnist-plain demo:mnist --threat linf:0.1 --effort quick --limit 8 --quiet"
    result = CliRunner().invoke(app, [*command.split(), "--out", "memory://bucket/r"], catch_exceptions=False)
    assert result.exit_code == 0
    assert {p.rpartition("/")[2] for p in store.find("/bucket/r")} >= {"manifest.json", "report.html"}
    assert not [p for p in store.find("/bucket/r") if "/." in p]


def test_a_place_that_holds_something_else_is_left_alone(store, digits):
    store.pipe("/bucket/thesis/chapter.tex", b"dear to somebody")
    with pytest.raises(RunError, match=r"chapter\.tex"):
        assay.evaluate(*digits, "linf:0.35", "quick", out="memory://bucket/thesis", progress=False)
    assert store.find("/bucket/thesis") == ["/bucket/thesis/chapter.tex"]
