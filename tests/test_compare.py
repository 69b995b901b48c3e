"""Two runs compared: pairs by sample, exact tests, an interval that holds, and words that say no more than that."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest, multinomial
from typer.testing import CliRunner

from assay.cli.app import app
from assay.core.errors import RunError
from assay.reports.paired import conclusion, p_text, print_comparison
from assay.runs import Run
from assay.runs.compare import compare, difference_interval, shares, sizes

INF = float("inf")


def identity(**changes):
    threat = {"norm": "linf", "eps": 0.3, "text": "linf:0.3"} | changes.pop("threat", {})
    return {"threat": threat, "effort": "standard", "seed": 0, "model": "aa", "assay": "0.1.0"} | changes


def manifest(name="net", data="cd" * 32, **changes):
    return {
        "identity": identity(**changes),
        "model": {"name": name},
        "data": {"name": "blobs", "fingerprint": data, "n": 100, "shape": [1, 8, 8]},
    }


def columns(size, status):
    """The rows of samples by column."""
    n = len(size)
    constant = {"label": 1, "prediction": 1, "margin": 1.0, "broken_by": None, "certified": None, "lower": 0.0}
    constant |= {"adversarial_prediction": None, "forwards": 1, "backwards": 1}
    return {k: [v] * n for k, v in constant.items()} | {
        "size": size,
        "upper": size,
        "status": status,
        "fooled": [s == "fooled" for s in status],
    }


def store(path, size, order=None, **changes):
    """A run of samples with these sizes, 0 for wrong as it is and inf for robust, stored in two batches."""
    run = Run.start(path, manifest(**changes))
    for part in np.array_split(np.arange(len(size)) if order is None else np.asarray(order), 2):
        values = [float(size[i]) for i in part]
        status = ["misclassified" if v == 0 else "robust" if v == INF else "fooled" for v in values]
        if len(part):
            run.add(columns(values, status) | {"index": part.tolist()}, {}, {})
    run.close()
    return run


BEFORE = [INF] * 10 + [0.1] * 20 + [0.2] * 8 + [0.0] * 2
AFTER = [INF] * 25 + [0.2] * 5 + [0.1] * 8 + [INF, 0.0]


@pytest.fixture
def runs(tmp_path):
    return store(tmp_path / "a", BEFORE), store(tmp_path / "b", AFTER, model="bb", name="hardened")


def printed(c, width=100):
    console = Console(file=io.StringIO(), width=width)
    print_comparison(c, console)
    return console.file.getvalue()


# what is counted


def test_samples_fall_into_four_kinds_of_pairs(runs):
    c = compare(*runs)
    assert c.n == 40
    assert (c.clean.a, c.clean.b, c.clean.only_a, c.clean.only_b) == (38, 39, 0, 1)
    assert c.robust is not None
    assert (c.robust.both, c.robust.only_a, c.robust.only_b, c.robust.neither) == (10, 0, 16, 14)
    assert (c.robust.a, c.robust.b, c.robust.difference) == (10, 26, 0.4)
    assert c.robust.p_value == 2 * 0.5**16
    assert c.robust.interval[0] > 0
    assert c.differs == ("model",)


def test_pairs_are_formed_by_index_whatever_the_order_in_which_samples_were_stored(runs, tmp_path):
    shuffled = store(tmp_path / "s", AFTER, np.random.default_rng(0).permutation(40), model="bb")
    assert compare(runs[0], shuffled).robust == compare(*runs).robust


def test_the_other_way_round_everything_is_turned(runs):
    c, d = compare(*runs), compare(*runs[::-1])
    assert (d.robust.only_a, d.robust.difference, d.robust.p_value) == (16, -0.4, c.robust.p_value)
    assert d.robust.interval == pytest.approx([-v for v in c.robust.interval[::-1]])
    assert (d.sizes.larger_in_a, d.sizes.larger_in_b) == (c.sizes.larger_in_b, c.sizes.larger_in_a)


def test_runs_are_given_as_runs_or_folders(runs):
    assert compare(str(runs[0].path), runs[1].path) == compare(*runs)


def test_a_run_compared_with_itself_shows_no_difference(runs):
    c = compare(runs[0], runs[0])
    assert (c.differs, c.robust.difference, c.robust.p_value, c.sizes.ratio, c.sizes.p_value) == ((), 0, 1, 1, 1)
    assert "No difference in robust accuracy" in conclusion(c)


def test_of_an_interrupted_run_the_samples_that_both_hold_are_compared(runs, tmp_path):
    partial = store(tmp_path / "p", AFTER, range(12, 30))
    c = compare(runs[0], partial)
    assert (c.n, c.a.samples, c.b.samples) == (18, 40, 18)
    assert (c.robust.a, c.robust.b) == (0, 13)
    assert "18 in both" in printed(c)


# what cannot be compared


def test_runs_on_other_data_are_refused_and_the_message_says_what_differs(runs, tmp_path):
    other = store(tmp_path / "o", AFTER, data="ef" * 32)
    with pytest.raises(RunError, match=r"cdcdcd.*efefef.*same --limit"):
        compare(runs[0], other)


def test_runs_without_a_fingerprint_are_refused(tmp_path):
    nameless = [store(tmp_path / n, AFTER, data=None) for n in "ab"]
    with pytest.raises(RunError, match="same data"):
        compare(*nameless)


def test_runs_without_a_common_sample_are_refused(runs, tmp_path):
    with pytest.raises(RunError, match="40 and 0 samples, none in both"):
        compare(runs[0], store(tmp_path / "o", []))


# the tests and the interval


@pytest.mark.parametrize(("b", "c"), [(0, 5), (3, 12), (40, 41), (0, 0)])
def test_the_test_is_mcnemars_exact_one(b, c):
    flags = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [30, b, c, 7], axis=0).astype(bool)
    p = binomtest(b, b + c).pvalue if b + c else 1
    assert shares(*flags.T).p_value == pytest.approx(p)


def test_the_interval_gives_a_published_example():
    """Of Newcombe (1998), method 10: of 50 pairs 36 agree on yes, 12 and 2 differ."""
    assert difference_interval(36, 2, 12, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)


@pytest.mark.parametrize("cells", [(0.8, 0.02, 0.08, 0.1), (0.5, 0.05, 0.05, 0.4), (0.9, 0.0, 0.03, 0.07)])
def test_the_interval_holds_the_difference_as_often_as_it_says(cells):
    """Drawn 4,000 times for 200 samples: 95 % of the intervals, but for three standard errors (1 %)."""
    drawn = multinomial(200, cells).rvs(4000, random_state=np.random.default_rng(0))
    tables, times = np.unique(drawn, axis=0, return_counts=True)
    ends = np.array([difference_interval(*map(int, row)) for row in tables])
    truth = cells[2] - cells[1]
    held = ((ends[:, 0] <= truth) & (truth <= ends[:, 1])) @ times / len(drawn)
    assert 0.94 <= held <= 0.99


@pytest.mark.parametrize("cells", [(1, 0, 0, 0), (0, 0, 0, 1), (0, 5, 0, 0), (0, 0, 5, 0), (7, 0, 0, 3), (0, 3, 3, 0)])
def test_the_interval_is_one_whatever_is_empty(cells):
    low, high = difference_interval(*cells)
    truth = (cells[2] - cells[1]) / sum(cells)
    assert -1 <= low <= truth <= high <= 1
    assert low < high


# sizes


def test_sizes_are_compared_where_both_runs_are_right_and_one_found_something():
    a, b = np.array([0.1, 0.2, 0.4, INF, 0.0, INF]), np.array([0.2, 0.2, 0.2, 0.1, 0.3, INF])
    s = sizes(a, b)
    assert (s.n, s.larger_in_a, s.larger_in_b) == (4, 2, 1)
    assert s.ratio == 0.5
    assert s.p_value == 1


def test_what_was_not_found_is_larger_than_all_that_was():
    s = sizes(np.full(9, 0.1), np.full(9, INF))
    assert (s.larger_in_b, s.ratio, s.p_value) == (9, INF, 2 * 0.5**9)


def test_nothing_found_is_nothing_to_compare():
    assert sizes(np.full(3, INF), np.full(3, INF)) is None


@pytest.mark.parametrize("threat", [{"norm": "l2"}, {"eps": 0.1}, {"eps": None}])
def test_sizes_of_unlike_searches_are_not_compared(threat, runs, tmp_path):
    c = compare(runs[0], store(tmp_path / "o", AFTER, threat=threat))
    assert c.sizes is None
    assert c.differs == ("threat",)
    assert (c.robust is None) == (threat.get("eps", 0) is None)
    assert conclusion(c)


def test_without_an_eps_sizes_are_the_result(tmp_path):
    sized = [np.linspace(0.1, 0.2, 40) * k for k in (1, 1.5)]
    c = compare(*(store(tmp_path / n, s, threat={"eps": None}) for n, s in zip("ab", sized, strict=True)))
    assert c.robust is None
    assert re.search(r"fool \S+/b are larger than those that fool \S+/a", conclusion(c))
    assert "1.50 times as large in the median (sign test, p < 0.0001)" in conclusion(c)
    assert "No difference in size" in conclusion(compare(c.a.run, c.a.run))


# words


def test_the_conclusion_names_what_differs_and_how_sure_that_is(runs):
    said = conclusion(compare(*runs))
    for part in ("hardened is higher than that of net", "40 samples", "+40.0 points", "exact McNemar", "p < 0.0001"):
        assert part in said, part


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_a_terminal(runs, width):
    shown = printed(compare(*runs), width)
    for part in ("net", "hardened", "26 (65.0 %)", "+22.7 to", "robust in a", "16", "larger size"):
        assert part in shown, part
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown


def test_the_chance_that_is_said_is_never_zero():
    assert [p_text(p) for p in (1, 0.51234, 0.031, 0.0004, 3e-9)] == [
        "p = 1",
        "p = 0.51",
        "p = 0.031",
        "p = 0.0004",
        "p < 0.0001",
    ]


# the command


def test_the_command_prints_a_sentence_or_one_object(runs):
    folders = [str(r.path) for r in runs]
    plain, quiet, told = (CliRunner().invoke(app, ["compare", *folders, *o]) for o in ([], ["-q"], ["--json"]))
    assert [r.exit_code for r in (plain, quiet, told)] == [0, 0, 0]
    assert "robust in b" in plain.stdout
    assert quiet.stdout.strip() == conclusion(compare(*runs))
    found = json.loads(told.stdout)
    assert found["robust"]["only_b"] == 16
    assert found["conclusion"] == quiet.stdout.strip()


def test_an_infinite_ratio_is_no_json_number(tmp_path):
    a, b = store(tmp_path / "a", [0.1, 0.1]), store(tmp_path / "b", [INF, INF])
    assert json.loads(json.dumps(compare(a, b).to_json(), allow_nan=False))["sizes"]["ratio"] is None


def test_runs_that_cannot_be_compared_end_with_code_3(runs, tmp_path):
    assert CliRunner().invoke(app, ["compare", str(runs[0].path), str(tmp_path)]).exit_code == 3
    other = store(tmp_path / "o", AFTER, data="ef" * 32)
    assert CliRunner().invoke(app, ["compare", str(runs[0].path), str(other.path)]).exit_code == 3


def test_runs_are_compared_without_torch():
    code = "import sys, assay.runs.compare, assay.reports.paired; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
