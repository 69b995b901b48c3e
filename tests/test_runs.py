"""The run's folder: valid at any moment, never mixed, never double."""

import errno
import os

import numpy as np
import pytest

from assay.core.errors import RunError
from assay.runs import Run
from assay.runs import store as store_module


def rows(*index):
    n = len(index)
    constant = {
        "label": 1,
        "prediction": 1,
        "margin": 0.5,
        "fooled": False,
        "adversarial_prediction": None,
        "size": float("inf"),
        "broken_by": None,
        "certified": None,
        "lower": 0.0,
        "upper": float("inf"),
        "forwards": 3,
        "backwards": 2,
        "status": "robust",
    }
    return {"index": list(index), **{k: [v] * n for k, v in constant.items()}}


def arrays(*index):
    return {"index": np.array(index), "x": np.zeros((len(index), 1, 2, 2), np.float32)}


@pytest.fixture
def run(tmp_path):
    run = Run.start(tmp_path / "run", {"identity": {"seed": 0, "threat": {"eps": 0.3}}})
    yield run
    run.close()


def test_what_is_added_is_read_back_in_order(run):
    run.add(rows(4, 5), arrays(5), {"seconds": 1.0})
    run.add(rows(0, 1, 2, 3), {}, {"seconds": 2.0})
    again = Run.read(run.path)
    assert again.samples()["index"].to_pylist() == [*range(6)]
    assert again.done() == set(range(6))
    assert [t["seconds"] for t in again.tallies()] == [2.0, 1.0]
    assert [a["index"].tolist() for a in again.adversarials()] == [[5]]


def test_only_the_same_identity_goes_on_and_the_message_says_what_differs(run):
    run.add(rows(0), {}, {})
    run.close()
    with pytest.raises(RunError, match=r"threat\.eps was 0\.3 and is 0\.1"):
        Run.start(run.path, {"identity": {"seed": 0, "threat": {"eps": 0.1}}})
    same = Run.start(run.path, {"identity": {"seed": 0, "threat": {"eps": 0.3}}})
    assert same.done() == {0}
    same.close()


def test_two_writers_cannot_share_a_run(run):
    with pytest.raises(RunError, match="another process"):
        Run.start(run.path, {"identity": {"seed": 0, "threat": {"eps": 0.3}}})


def test_adversarials_without_rows_did_not_happen(run):
    """A kill between the two files of a batch leaves inputs without rows: they do not count, and are replaced."""
    run.add(rows(0, 1), arrays(0), {})
    orphan = run.path / "samples" / "00000000-00000001.parquet"
    orphan.unlink()
    assert run.done() == set()
    assert [*run.adversarials()] == []


def test_adversarials_without_rows_are_swept_away_by_the_next_session(run):
    run.add(rows(0, 1), arrays(0), {})
    run.add(rows(2, 3), arrays(2), {})
    (run.path / "samples" / "00000002-00000003.parquet").unlink()
    run.close()
    again = Run.start(run.path, {"identity": {"seed": 0, "threat": {"eps": 0.3}}})
    assert [p.name for p in (run.path / "adversarials").iterdir()] == ["00000000-00000001.npz"]
    again.close()


def test_a_folder_with_other_things_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"thesis\.tex"):
        Run.start(tmp_path, {"identity": {}})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_half_written_files_are_swept_away(run):
    run.close()
    left = run.path / "samples" / ".tmp-999-00000000-00000001.parquet"
    left.write_bytes(b"PAR1")
    again = Run.start(run.path, {"identity": {"seed": 0, "threat": {"eps": 0.3}}})
    assert not left.exists()
    again.close()


def test_a_sample_in_two_files_is_an_error_not_two_samples(run):
    run.add(rows(0, 1), {}, {})
    run.add(rows(1, 2), {}, {})
    with pytest.raises(RunError, match="each sample once"):
        run.samples()


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only")])
def test_a_disk_that_gives_out_is_told_in_a_sentence_and_spoils_nothing(run, monkeypatch, number, says):
    run.add(rows(0, 1), {}, {})

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store_module.os, "fsync", fail)
    with pytest.raises(RunError, match=says) as e:
        run.add(rows(2, 3), arrays(2), {})
    assert "intact" in str(e.value)
    monkeypatch.undo()
    assert Run.read(run.path).done() == {0, 1}
    assert not [*run.path.rglob(".tmp-*")]
    run.add(rows(2, 3), arrays(2), {})
    assert run.done() == {0, 1, 2, 3}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}'])
def test_a_broken_or_later_manifest_is_refused(run, text):
    (run.path / "manifest.json").write_text(text)
    with pytest.raises(RunError):
        Run.read(run.path)


def test_a_broken_part_is_named(run):
    run.add(rows(0), {}, {})
    (run.path / "samples" / "00000000-00000000.parquet").write_bytes(b"not a table")
    with pytest.raises(RunError, match="readable tables"):
        run.samples()
