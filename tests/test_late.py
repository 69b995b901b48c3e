"""Runs that time cut short say so, are not gated, and go on; runs that lost samples are not judged."""

import pyarrow.parquet as pq
import pytest

import assay
from assay.core.errors import RunError
from assay.runs import Run
from assay.runs.policy import Policy, hold

HOW = {"threat": "linf:0.1", "effort": "quick", "progress": False}


@pytest.fixture(scope="module")
def digits():
    return assay.load_data("demo:mnist", limit=8)


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_race_that_time_cut_short_goes_on_to_the_table_of_one_that_it_did_not(digits, tmp_path, seconds):
    whole = assay.evaluate("demo:mnist-plain", digits, **HOW)
    cut = assay.evaluate("demo:mnist-plain", digits, out=tmp_path, max_seconds=seconds, **HOW)
    if seconds == 0:
        assert cut.robust_accuracy == 1
        assert [f.code for f in cut.findings if f.severity == "warning"] == ["stopped-early"]
    later = assay.evaluate("demo:mnist-plain", digits, out=tmp_path, **HOW)
    assert later.samples.equals(whole.samples)
    assert "stopped-early" not in {f.code for f in later.findings}
    assert later.bounded is None


def test_no_floor_holds_where_time_was_over(digits, tmp_path):
    assay.evaluate("demo:mnist-plain", digits, out=tmp_path, max_seconds=0, **HOW)
    (check,) = hold(Policy(min_robust=0.5), Run.read(tmp_path)).checks
    assert not check.held
    assert "Time was over" in check.why


def test_a_run_that_lost_samples_is_not_judged_and_gets_them_back(digits, tmp_path):
    whole = assay.evaluate("demo:mnist-plain", digits, out=tmp_path, **HOW)
    (part,) = (tmp_path / "samples").glob("*.parquet")
    table = pq.read_table(part)
    pq.write_table(table.slice(0, 3), part)
    with pytest.raises(RunError, match="8 samples"):
        hold(Policy(min_robust=0), Run.read(tmp_path))
    again = assay.evaluate("demo:mnist-plain", digits, out=tmp_path, **HOW)
    assert again.complete
    assert again.samples.equals(whole.samples)


def test_a_table_of_other_columns_is_named(digits, tmp_path):
    assay.evaluate("demo:mnist-plain", digits, out=tmp_path, **HOW)
    (part,) = (tmp_path / "samples").glob("*.parquet")
    pq.write_table(pq.read_table(part).drop_columns(["status"]), part)
    with pytest.raises(RunError, match="readable tables"):
        Run.read(tmp_path).samples()
