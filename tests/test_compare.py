"""Two runs compared: pairs by sample, exact tests, an interval that holds, and words that say no more than that."""

import io
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest, multinomial
from scipy.stats import bootstrap as resampled_by_scipy
from typer.testing import CliRunner

from assay.cli.app import app
from assay.core.errors import RunError
from assay.reports.comparison import render_comparison
from assay.reports.paired import conclusion, p_text, print_comparison
from assay.runs import Run
from assay.runs.compare import compare, difference_interval, shares, sizes
from assay.runs.paired import bootstrap, holm, lower_median

INF = float("inf")


def identity(**changes):
    threat = {"norm": "linf", "eps": 0.3, "text": "linf:0.3"} | changes.pop("threat", {})
    return {"threat": threat, "effort": "standard", "seed": 0, "model": "aa", "assay": "0.1.0"} | changes


def manifest(name="net", data="cd" * 32, of_data=MappingProxyType({}), **changes):
    return {
        "identity": identity(**changes),
        "model": {"name": name},
        "data": {"name": "blobs", "fingerprint": data, "n": 100, "shape": [1, 8, 8]} | of_data,
    }


def columns(size, status, lower=0.0):
    """The rows of samples by column."""
    n = len(size)
    constant = {"prediction": 1, "margin": 1.0, "forwards": 1, "backwards": 1}
    return {k: [v] * n for k, v in constant.items()} | {
        "size": size,
        "upper": size,
        "status": status,
        "fooled": [s == "fooled" for s in status],
        "adversarial_prediction": [2 if s == "fooled" else None for s in status],
        "certified": [s == "robust" and lower >= 0.3 for s in status],
        "lower": [lower if s == "robust" else 0.0 for s in status],
    }


def store(path, size, order=None, labels=None, broken_by=None, lower=0.0, adversarials=MappingProxyType({}), **changes):
    """A run of samples with these sizes, 0 for wrong as it is and inf for robust, stored in two batches."""
    run = Run.start(path, manifest(**changes))
    attacks = broken_by or ["apgd"] * len(size)
    for part in np.array_split(np.arange(len(size)) if order is None else np.asarray(order), 2):
        values = [float(size[i]) for i in part]
        status = ["misclassified" if v == 0 else "robust" if v == INF else "fooled" for v in values]
        told = {"label": [labels[i] if labels else 1 for i in part], "index": part.tolist()}
        told["broken_by"] = [attacks[i] if s == "fooled" else None for i, s in zip(part, status, strict=True)]
        if len(part):
            of_part = np.isin(adversarials.get("index", ()), part)
            run.add(columns(values, status, lower) | told, {k: v[of_part] for k, v in adversarials.items()}, {})
    run.close()
    return run


BEFORE = [INF] * 10 + [0.1] * 20 + [0.2] * 8 + [0.0] * 2
AFTER = [INF] * 25 + [0.2] * 5 + [0.1] * 8 + [INF, 0.0]


@pytest.fixture
def runs(tmp_path):
    return store(tmp_path / "a", BEFORE), store(tmp_path / "b", AFTER, model="bb", name="hardened")


def printed(c, width=100):
    console = Console(file=io.StringIO(), width=width)
    print_comparison(c, console, details=True)
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
    assert c.bootstrap.median is None
    assert c.differs == ("threat",)
    assert conclusion(c)


def test_without_an_eps_sizes_are_the_result(tmp_path):
    sized = [np.linspace(0.1, 0.2, 40) * k for k in (1, 1.5)]
    c = compare(*(store(tmp_path / n, s, threat={"eps": None}) for n, s in zip("ab", sized, strict=True)))
    assert c.robust is None
    assert re.search(r"fool \S+/b are larger than those that fool \S+/a", conclusion(c))
    assert "1.50 times as large in the median (sign test, p < 0.0001)" in conclusion(c)
    assert "No difference in size" in conclusion(compare(c.a.run, c.a.run))


# what is comparable when threats or efforts differ


def test_runs_at_two_eps_are_compared_at_the_smaller_one(tmp_path):
    """A change of 0.2 breaks the second sample at 0.3, and is no change that 0.15 allows."""
    wide = store(tmp_path / "w", [0.1, 0.2, INF, 0.0])
    narrow = store(tmp_path / "n", [INF, INF, 0.15, 0.0], threat={"eps": 0.15, "text": "linf:0.15"})
    c = compare(wide, narrow)
    assert (c.eps, c.robust.a, c.robust.b, c.robust.only_a, c.robust.only_b) == (0.15, 2, 2, 1, 1)
    assert "compared at eps 0.15, the smaller one. The other run searched up to 0.3" in c.notes[0]
    assert "robust at 0.15" in printed(c)


def test_a_run_without_an_eps_is_compared_at_that_of_the_other(tmp_path):
    free = store(tmp_path / "f", [0.1, 0.3, 0.31, 0.9], threat={"eps": None, "text": "linf"})
    c = compare(free, store(tmp_path / "b", [0.1, INF, INF, 0.2]))
    assert (c.eps, c.robust.a, c.robust.b) == (0.3, 2, 2)
    assert "without a limit" in c.notes[0]


@pytest.mark.parametrize("other", [{"norm": "l2"}, {"box": [-1, 1]}, {"quantize": 8}])
def test_under_unlike_threats_nothing_but_clean_accuracy_is_compared(other, runs, tmp_path):
    c = compare(runs[0], store(tmp_path / "o", AFTER, threat=other))
    assert (c.robust, c.certified, c.sizes, c.stages) == (None, None, None, ())
    assert c.clean.only_b == 1
    assert c.notes[0].startswith(f"The threats differ in {next(iter(other))}: only clean accuracy is comparable")
    assert [(x.index, x.held_by) for x in c.changes] == [(38, "b")]


def test_a_difference_of_efforts_is_said(runs, tmp_path):
    c = compare(runs[0], store(tmp_path / "o", AFTER, effort="quick"))
    assert c.robust is not None
    assert "The efforts differ (standard and quick)" in c.notes[0]
    assert c.notes[0] in " ".join(printed(c, 200).split())


def test_certified_accuracy_is_compared_where_both_runs_have_proofs(tmp_path):
    proofs = [store(tmp_path / n, AFTER, prove={"method": "crown"}, lower=low) for n, low in (("a", 0.0), ("b", 0.3))]
    c = compare(*proofs)
    assert (c.certified.a, c.certified.b) == (0, 26)
    assert c.bootstrap.certified[0] > 0
    without = compare(proofs[1], store(tmp_path / "o", AFTER))
    assert without.certified is None
    assert "only one run has proofs" in without.notes[0]
    smoothed = compare(proofs[1], store(tmp_path / "s", AFTER, prove={"method": "smoothing"}, lower=0.3))
    assert smoothed.certified is None
    assert "smoothed classifier" in smoothed.notes[0]


# resampling


def test_the_bootstrap_agrees_with_one_of_another_library():
    """Both draw pairs and take percentiles; 4,000 resamples leave an end uncertain by a few of its standard errors."""
    draws = np.random.default_rng(0)
    a = draws.lognormal(size=120)
    b = a * draws.lognormal(0.2, 0.3, size=120)

    def shift(x, y, axis=-1):
        return np.median(y, axis=axis) - np.median(x, axis=axis)

    odd = slice(119)  # the lower of two middle values is the median only where there is one in the middle
    ours = bootstrap(shift, a[odd], b[odd], resamples=4000)
    theirs = resampled_by_scipy((a[odd], b[odd]), shift, paired=True, n_resamples=4000, method="percentile", rng=draws)
    assert ours == pytest.approx(theirs.confidence_interval, abs=0.02)


def test_the_bootstrap_of_a_share_has_the_percentiles_of_the_binomial():
    hits = np.arange(50) < 20
    low, high = bootstrap(lambda v: v.mean(-1), hits, resamples=20_000)
    assert (low, high) == pytest.approx((13 / 50, 27 / 50), abs=0.011)


def test_every_resample_of_three_pairs_is_drawn_as_often_as_the_others():
    """All 27 are drawn: of 1, 2 and 4 the lower median is 1 in 7 of 27, 2 in 13, and 4 in 7."""
    values = np.array([1.0, 2.0, 4.0])
    seen = []
    bootstrap(lambda v: seen.append(lower_median(v)) or seen[-1], values, resamples=27_000)
    _, times = np.unique(np.concatenate(seen), return_counts=True)
    middle = [sorted(r)[1] for r in itertools.product(values, repeat=3)]
    expected = [1000 * middle.count(v) for v in values]
    assert times == pytest.approx(expected, rel=0.04)


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    values = np.random.default_rng(0).normal(size=50)
    first, again, other = (bootstrap(lower_median, values, resamples=100, seed=s) for s in (0, 0, 1))
    assert first == again != other


def test_the_bootstrap_of_the_turned_comparison_is_turned(runs):
    c, d = compare(*runs).bootstrap, compare(*runs[::-1]).bootstrap
    assert d.robust == pytest.approx([-v for v in c.robust[::-1]])
    assert d.median == pytest.approx([-v for v in c.median[::-1]])


def test_a_median_that_was_not_found_is_infinite_and_its_interval_too(tmp_path):
    a, b = store(tmp_path / "a", [0.1] * 20), store(tmp_path / "b", [INF] * 20)
    c = compare(a, b)
    assert (c.sizes.median_a, c.sizes.median_b, c.sizes.difference) == (0.1, INF, INF)
    assert (c.bootstrap.median, c.bootstrap.ratio) == ((INF, INF), (INF, INF))
    plain = json.loads(json.dumps(c.to_json(), allow_nan=False))
    assert plain["bootstrap"]["median"] == [None, None]
    assert "none found in b" in printed(c)


# class by class, attack by attack, sample by sample

LABELS = [i % 3 for i in range(40)]


@pytest.fixture
def classed(tmp_path):
    named = {"of_data": {"class_names": ["cat", "dog", "owl"]}, "labels": LABELS}
    fallen_to = {"broken_by": ["apgd" if i % 2 else "square" for i in range(40)]}
    a = store(tmp_path / "a", BEFORE, **named, **fallen_to)
    return a, store(tmp_path / "b", AFTER, model="bb", name="hardened", **named, **fallen_to)


def test_classes_add_up_to_the_whole(classed):
    c = compare(*classed)
    assert [p.name for p in c.classes] == ["cat", "dog", "owl"]
    for cell in ("n", "both", "only_a", "only_b", "neither"):
        assert sum(getattr(p.robust, cell) for p in c.classes) == getattr(c.robust, cell)
        assert sum(getattr(p.clean, cell) for p in c.classes) == getattr(c.clean, cell)


def test_the_p_values_of_classes_are_corrected_for_their_number(classed):
    c = compare(*classed)
    assert [p.p_value for p in c.classes] == holm([p.robust.p_value for p in c.classes])
    assert all(p.p_value > p.robust.p_value for p in c.classes)


@pytest.mark.parametrize("seed", range(5))
def test_holms_correction_is_that_of_the_closed_test(seed):
    """A hypothesis falls if every set with it falls in a Bonferroni test: its p-value is the largest of theirs."""
    p = np.random.default_rng(seed).beta(0.4, 1, size=5).tolist()
    sets = [s for k in range(1, 6) for s in itertools.combinations(range(5), k)]
    closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(5)]
    assert holm(p) == pytest.approx(closed)


def test_attacks_are_counted_on_both_sides(classed):
    c = compare(*classed)
    assert {(s.name, s.a, s.b) for s in c.stages} == {("apgd", 14, 7), ("square", 14, 6)}
    assert sum(s.b for s in c.stages) == c.clean.b - c.robust.b


def test_every_sample_that_changed_sides_is_named_with_how_it_fell(classed):
    c = compare(*classed[::-1])
    assert len(c.changes) == c.robust.only_a + c.robust.only_b == 16
    assert {x.held_by for x in c.changes} == {"a"}
    first, last = c.changes[0], c.changes[-1]
    assert (first.index, first.label, first.broken_by, first.size, first.status) == (10, 1, "square", 0.1, "fooled")
    assert (last.index, last.broken_by, last.size, last.status) == (38, None, 0, "misclassified")
    shown = printed(c)
    assert "the first 10 of 16" in shown
    assert re.search(r"#10\s+dog\s+a\s+fooled as owl\s+square\s+0\.1", shown)


# the page


def test_the_page_shows_both_runs_their_classes_attacks_and_changes(classed):
    page = render_comparison(*classed, compare(*classed))
    for part in ("+40.0<small> points", "owl", "square", "Robust in hardened, not in net: 16", "wrong as it is"):
        assert part in page, part
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=[\"'](?:https?:)?//", page)


def test_pictures_are_of_those_that_changed_sides(tmp_path):
    fallen = {"index": np.array([1, 2]), "x": np.full((2, 1, 8, 8), 0.5, np.float32)}
    fallen |= {"clean": np.zeros((2, 1, 8, 8), np.float32)}
    a = store(tmp_path / "a", [INF, INF, 0.1])
    b = store(tmp_path / "b", [INF, 0.2, 0.2], adversarials=fallen)
    page = render_comparison(a, b, compare(a, b))
    assert page.count("<img ") == 3
    assert "Sample 1, adversarial" in page
    assert "Sample 2, adversarial" not in page


def test_pictures_that_cannot_be_read_are_missed_and_said(tmp_path):
    a, b = store(tmp_path / "a", [INF] * 2), store(tmp_path / "b", [0.2] * 2, adversarials={"index": np.array([0, 1])})
    for file in (b.path / "adversarials").iterdir():
        file.write_bytes(b"no archive")
    assert "cannot be read" in render_comparison(a, b, compare(a, b))


@pytest.mark.parametrize("seen", [{"eps": None, "text": "linf"}, {"norm": "l2", "text": "l2:1"}, {"eps": 0.1}])
def test_there_is_a_page_whatever_is_comparable(seen, runs, tmp_path):
    other = store(tmp_path / "o", AFTER, threat=seen)
    assert conclusion(compare(runs[0], other)).split(":")[0] in render_comparison(*runs, compare(runs[0], other))


HOSTILE = "<script>alert(1)</script>\x1b]0;owned\x07\u202e"


def test_hostile_names_do_nothing_on_the_page_and_in_the_terminal(tmp_path):
    names = {"of_data": {"class_names": [HOSTILE] * 4, "name": HOSTILE}, "name": HOSTILE, "broken_by": [HOSTILE] * 4}
    a, b = store(tmp_path / "a", [INF] * 4, **names), store(tmp_path / "b", [0.1] * 4, **names | {"model": "bb"})
    c = compare(a, b)
    page, shown = render_comparison(a, b, c), printed(c)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "alert(1)" in shown


def test_the_command_writes_the_page_and_says_where(classed, tmp_path):
    folders = [str(r.path) for r in classed]
    file = tmp_path / "pages" / "both.html"
    told = CliRunner().invoke(app, ["compare", *folders, "--out", str(file), "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["page"] == str(file)
    assert "hardened" in file.read_text(encoding="utf-8")
    assert {"classes", "stages", "changes", "bootstrap", "notes", "certified"} <= found.keys()
    assert len(found["changes"]) == 16


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


def test_what_the_page_of_the_documentation_shows_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "compare.md").read_text(encoding="utf-8")
    lines = re.search(r"(?ms)^```sh\n(.*?)^```$", page)[1].splitlines()
    said = [CliRunner().invoke(app, [*shlex.split(line)[1:], "--quiet"], catch_exceptions=False) for line in lines]
    assert [done.exit_code for done in said] == [0, 0, 0]
    assert said[-1].stdout.split() == re.search(r"(?ms)^```text\n(The robust.*?)^```$", page)[1].split()
    assert (tmp_path / "comparison.html").is_file()
    exec(compile(re.search(r"(?ms)^```python\n(.*?)^```$", page)[1], "compare.md", "exec"), {})
