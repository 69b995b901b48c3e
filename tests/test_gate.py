"""A policy held against a run: what it asks, how a drop is judged, what is written, and what a hostile run can do."""

import ast
import io
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import typer
from rich.console import Console
from scipy.stats import binomtest, multinomial
from typer.testing import CliRunner

from assay.cli.evaluate import evaluate
from assay.cli.gate import gate
from assay.core.errors import RunError
from assay.core.plain import plain
from assay.core.registry import UsageError
from assay.reports.gates import page, print_judgement
from assay.reports.junit import junit
from assay.reports.markdown import escape, markdown
from assay.reports.sarif import sarif
from assay.runs import Run, exact_interval
from assay.runs.baseline import keep
from assay.runs.policy import CODES, SHOWN, Policy, drop, hold

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
INF = float("inf")

app = typer.Typer()
for command in (evaluate, gate):
    app.command()(command)


def manifest(findings=(), class_names=None, name="net", **changes):
    threat = {"norm": "linf", "eps": 0.3, "text": "linf:0.3", "box": [0, 1]} | changes.pop("threat", {})
    rest = {k: changes.pop(k) for k in ("complete", "bounded", "command", "totals") if k in changes}
    return {
        "complete": True,
        "command": "assay evaluate net.onnx data.npz --threat linf:0.3",
        "identity": {"threat": threat, "effort": "quick", "seed": 0, "model": "aa", "data": "cd", "n": 100} | changes,
        "model": {"name": name},
        "data": {"name": "blobs", "fingerprint": "cd", "n": 100, "shape": [1, 8, 8], "class_names": class_names},
        "totals": None,
        "findings": list(findings),
    } | rest


def finding(code, severity="warning", message="It hides.", remedy="Look."):
    return {"code": code, "severity": severity, "message": message, "evidence": {"share": 0.5}, "remedy": remedy}


def store(path, size, certified=None, seconds=2.0, broken_by="pgd", **changes):
    """A run of samples with these sizes: 0 for wrong as it is, inf for robust."""
    size, n = [float(v) for v in size], len(size)
    run = Run.start(path, manifest(**changes))
    status = ["misclassified" if v == 0 else "robust" if v == INF else "fooled" for v in size]
    fooled = [s == "fooled" for s in status]
    constant = {"label": 1, "margin": 1.0, "lower": 0.0, "forwards": 1, "backwards": 1}
    rows = {k: [v] * n for k, v in constant.items()} | {
        "index": [*range(n)],
        "prediction": [2 if s == "misclassified" else 1 for s in status],
        "adversarial_prediction": [3 if f else None for f in fooled],
        "broken_by": [broken_by if f else None for f in fooled],
        "certified": certified or [None] * n,
        "size": size,
        "upper": size,
        "fooled": fooled,
        "status": status,
    }
    at = np.flatnonzero(fooled)
    x = np.random.default_rng(0).random((len(at), 1, 8, 8))
    run.add(rows, {"index": at, "x": x, "clean": x / 2}, {"seconds": seconds})
    run.save(totals=run.manifest["totals"] or {"seconds": seconds})
    run.close()
    return Run.read(path)


ROBUST = [INF] * 90 + [0.1] * 8 + [0.0] * 2
"""90 of 100 stand."""

WORSE = [0.2] * 20 + [INF] * 72 + [0.1] * 6 + [0.0] * 2
"""20 of those do not, and 2 others do."""


@pytest.fixture
def run(tmp_path):
    return store(tmp_path / "now", ROBUST, findings=[finding("zero-gradient"), finding("lost-at-8-bit", "info")])


@pytest.fixture
def worse(tmp_path):
    return store(tmp_path / "worse", WORSE, model="bb", seed=7)


def only(judgement):
    (check,) = judgement.checks
    return check


# floors


@pytest.mark.parametrize(("floor", "held"), [(0.9, True), (0.9000001, False), (0.0, True), (0.5, True), (1.0, False)])
def test_a_floor_is_held_by_the_exact_figure(floor, held, run):
    check = only(hold(Policy(min_robust=floor), run))
    assert check.held is held
    assert check.found == "90 % (90 of 100)"


@pytest.mark.parametrize("hits", [1, 29, 57, 90, 99])
def test_a_share_that_is_the_floor_holds_it_whatever_its_digits(hits, tmp_path):
    run = store(tmp_path / "r", [INF] * hits + [0.1] * (100 - hits))
    assert hold(Policy(min_robust=float(f"0.{hits:02d}")), run).held


def test_why_says_the_interval_and_on_which_side_of_it_the_floor_is(run):
    low, high = (f"{round(100 * v, 2):g} %" for v in exact_interval(90, 100))
    for floor, where, sure in (
        (0.88, "2 points above", "within"),
        (0.95, "5 points below", "within"),
        (0.5, "40", "outside"),
    ):
        why = only(hold(Policy(min_robust=floor), run)).why
        assert where in why
        assert f"{sure} the 95 % interval, {low} to {high}" in why


def test_samples_below_the_floor_are_counted_and_the_first_of_them_named(run):
    check = only(hold(Policy(min_robust=0.95), run))
    assert check.concerned == 10
    assert [s.index for s in check.samples] == [*range(90, 100)]
    assert (check.samples[0].prediction, check.samples[0].broken_by, check.samples[0].size) == (3, "pgd", 0.1)
    assert (check.samples[-1].prediction, check.samples[-1].broken_by, check.samples[-1].size) == (2, None, 0)


def test_no_more_samples_are_named_than_can_be_looked_at(worse):
    check = only(hold(Policy(min_robust=0.95), worse))
    assert (check.concerned, len(check.samples)) == (28, SHOWN)


def test_proofs_are_counted_where_there_are_any(tmp_path, run):
    proven = store(tmp_path / "p", ROBUST, certified=[True] * 60 + [False] * 40)
    assert hold(Policy(min_certified=0.6), proven).held
    assert only(hold(Policy(min_certified=0.61), proven)).found == "60 % (60 of 100)"
    with pytest.raises(RunError, match="with proofs"):
        hold(Policy(min_certified=0.1), run)


def test_a_run_that_could_stop_when_it_pleased_has_an_interval_for_that(tmp_path, run):
    early = store(tmp_path / "e", ROBUST, until_interval=0.1, complete=False, bounded="narrow enough")
    wide, usual = (only(hold(Policy(min_robust=0.8), r)).why for r in (early, run))
    assert wide != usual


# findings and time


def test_a_finding_is_asked_for_by_its_code_or_by_its_severity(run):
    held = {code: hold(Policy(no_finding=(code,)), run).held for code in ("error", "warning", "info", "zero-gradient")}
    assert held == {"error": True, "warning": False, "info": False, "zero-gradient": False}
    assert hold(Policy(no_finding=("no-gradient",)), run).held
    both = only(hold(Policy(no_finding=("info",)), run))
    assert both.found == "zero-gradient (warning), lost-at-8-bit (info)"


def test_time_is_that_of_the_manifest(run, tmp_path):
    assert [hold(Policy(max_seconds=s), run).held for s in (1.9, 2, 60)] == [False, True, True]
    untold = store(tmp_path / "u", ROBUST, seconds=None)
    with pytest.raises(RunError, match="tells its time"):
        hold(Policy(max_seconds=1), untold)


def test_every_code_of_a_finding_is_known_to_the_policy():
    """A new finding needs its code in ``CODES``; a policy against one that is misspelt would hold for ever."""
    table = (ROOT / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    told = set(re.findall(r"(?m)^\| `([a-z0-9-]+)` \|", table)) - {"conversion-differs"}
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "src" / "assay" / "evaluation").glob("*.py")]
    raised = {
        node.args[0].value
        for tree in map(ast.parse, sources)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in {"Finding", "Mistake", "_warning"}
        and node.args
        if isinstance(node.args[0], ast.Constant)
    }
    assert len(raised) > 15
    assert (told | raised) - {*CODES} == set()
    assert {code for code in CODES if not any(f'"{code}"' in source for source in sources)} == set()


# what cannot be judged


def test_what_makes_no_sense_is_an_error(run, worse, tmp_path):
    for policy, text in ((Policy(), "asks for something"), (Policy(max_drop=0.1), "a baseline for max-drop")):
        with pytest.raises(UsageError, match=text):
            hold(policy, run)
    with pytest.raises(UsageError, match="confidence"):
        hold(Policy(max_drop=0), run, worse, confidence=0.4)
    unfinished = store(tmp_path / "u", ROBUST, complete=False)
    sized = store(tmp_path / "s", ROBUST, threat={"eps": None})
    unattacked = store(tmp_path / "n", ROBUST, effort="none")
    empty = Run.start(tmp_path / "z", manifest())
    empty.close()
    for bad, text in (
        (unfinished, "finished"),
        (sized, "robust accuracy"),
        (unattacked, "robust accuracy"),
        (empty, "samples"),
    ):
        with pytest.raises(RunError, match=text):
            hold(Policy(min_robust=0.5), bad)
    with pytest.raises(RunError, match="finished"):
        hold(Policy(max_drop=0.5), run, unfinished)


def test_a_run_that_was_bounded_is_finished(tmp_path):
    run = store(tmp_path / "b", ROBUST, complete=False, bounded="--max-seconds was over")
    assert hold(Policy(min_robust=0.5), run).held


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data": "ef"}, 'data was "cd" and is "ef"'),
        ({"threat": {"eps": 0.2}}, r"threat\.eps was 0\.3 and is 0\.2"),
        ({"effort": "thorough"}, 'effort was "quick" and is "thorough"'),
        ({"max_passes": 10}, "max_passes was null and is 10"),
    ],
)
def test_a_baseline_that_was_harder_or_easier_is_refused(changes, text, run, tmp_path):
    other = store(tmp_path / "o", ROBUST, **changes)
    with pytest.raises(RunError, match=text):
        hold(Policy(max_drop=0), other, run)


def test_what_else_differs_is_said(run, worse):
    assert "The runs also differ in: seed." in only(hold(Policy(max_drop=0), worse, run)).why
    assert "also differ" not in only(hold(Policy(max_drop=0), run, run)).why


# drops


def test_without_an_allowance_the_test_is_mcnemars_one_sided(run, worse):
    check = only(hold(Policy(max_drop=0), worse, run))
    p = binomtest(20, 22, alternative="greater").pvalue
    assert not check.held
    assert f"p = {p:.2g})" in check.why
    assert check.found == "18 points below (90 % then, 72 % now)"
    assert (check.concerned, [s.index for s in check.samples]) == (20, [*range(10)])


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (4, 0), (5, 0), (9, 3), (10, 2), (40, 25)])
def test_the_p_value_is_exact(lost, gained):
    p = drop(80, lost, gained, 20)[2]
    wanted = binomtest(lost, lost + gained, alternative="greater").pvalue if lost + gained else 1.0
    assert p == pytest.approx(wanted)


def test_the_other_way_round_it_is_no_drop(run, worse):
    check = only(hold(Policy(max_drop=0), run, worse))
    assert check.held
    assert check.found == "18 points above (72 % then, 90 % now)"


def test_an_allowance_is_exceeded_only_by_what_is_surely_beyond_it(run, worse):
    low = drop(70, 20, 2, 8)[0]
    limits = [0, 0.05, low - 1e-6, low + 1e-6, 0.18, 0.5]
    assert [hold(Policy(max_drop=d), worse, run).held for d in limits] == [False, False, False, True, True, True]


def test_more_confidence_takes_more_to_fail(run, tmp_path):
    now = store(tmp_path / "n", [0.1] * 6 + [INF] * 84 + [0.1] * 10)
    assert [hold(Policy(max_drop=0), now, run, c).held for c in (0.9, 0.95, 0.99)] == [False, False, True]


def outcomes(n, noise, fallen, robust=0.9):
    """Every outcome that is not next to impossible, with its probability.

    ``noise`` samples change sides by chance, half of them either way, and ``fallen`` fall: all are shares.
    """
    lost, gained = noise / 2 + fallen, noise / 2
    most = [int(n * v + 7 * np.sqrt(n * v) + 7) for v in (lost, gained)]
    for k in range(most[0]):
        for m in range(min(most[1], n - k)):
            chance = float(multinomial.pmf([k, m, n - k - m], n, [lost, gained, 1 - lost - gained]))
            if chance > 1e-6:
                both = round(robust * (n - k - m))
                yield (both, k, m, n - both - k - m), chance


def alarms(n, noise, fallen, limit):
    """Return the exact probability that a gate fails."""
    found = ((drop(*cells), chance) for cells, chance in outcomes(n, noise, fallen))
    return sum(chance for (low, _, p), chance in found if p <= 0.05 and low > limit)


@pytest.mark.parametrize(
    ("n", "noise", "limit"), [(100, 0.05, 0), (200, 0.02, 0), (200, 0.04, 0.02), (200, 0.0, 0.05), (500, 0.01, 0.01)]
)
def test_a_drop_that_is_allowed_fails_in_one_of_twenty_cases_at_most(n, noise, limit):
    """Counted over all outcomes, where the true drop is exactly what is allowed."""
    assert alarms(n, noise, limit, limit) <= 0.05


def test_the_probabilities_in_the_documentation_are_exact():
    lines = re.findall(r"(?m)^\| (none|\d+ points?) \| ([\d.]+) % \| ([\d.]+) % \|", PAGE)
    assert len(lines) == 6
    for name, *told in lines[1:4]:
        fallen = int(name.split()[0]) / 100
        for n, percent in zip((200, 500), told, strict=True):
            assert 100 * alarms(n, 0.03, fallen, 0.01) == pytest.approx(float(percent), abs=0.06)


def test_on_noise_alone_few_gates_fail_and_on_a_drop_of_ten_points_nearly_all():
    draws = np.random.default_rng(0).multinomial(500, [0.87, 0.03, 0.03, 0.07], size=1000)
    failed = [p <= 0.05 and low > 0 for low, _, p in (drop(*map(int, d)) for d in draws)]
    assert np.mean(failed) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)
    fallen = np.random.default_rng(1).multinomial(500, [0.77, 0.13, 0.03, 0.07], size=300)
    assert np.mean([p <= 0.05 and low > 0.01 for low, _, p in (drop(*map(int, d)) for d in fallen)]) > 0.99


# the policy's file


def read(folder, text):
    file = folder / "assay.toml"
    file.write_text(text, encoding="utf-8")
    return Policy.read(file)


def test_a_policy_is_a_table_of_a_file(tmp_path):
    policy = read(tmp_path, '[gate]\nmin-robust = 0.4\nno-finding = ["error"]\nmax-seconds = 9\nbaseline = "old"\n')
    assert policy == Policy(0.4, no_finding=("error",), max_seconds=9, baseline=str(tmp_path / "old"))


def test_a_policy_may_begin_with_the_mark_that_editors_of_windows_write(tmp_path):
    assert read(tmp_path, "\ufeff[gate]\nmin-robust = 0.4\n") == Policy(0.4)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[gate]\nmin-robst = 0.4", "Did you mean 'min-robust'"),
        ("[gate]\nmin_robust = 0.4", "Did you mean 'min-robust'"),
        ("[gate]\nmin-robust = '0.4'", "a number between 0 and 1 for min-robust"),
        ("[gate]\nmin-robust = 45", "a number between 0 and 1"),
        ("[gate]\nmin-robust = true", "a number between 0 and 1"),
        ("[gate]\nmax-drop = nan", "a number between 0 and 1"),
        ("[gate]\nmax-seconds = -1", "at least 0"),
        ("[gate]\nno-finding = 'error'", "a list of codes"),
        ("[gate]\nno-finding = ['zero-gradent']", "Did you mean 'zero-gradient'"),
        ("[gate]\nbaseline = 1", "a folder for baseline"),
        ("[gates]\nmin-robust = 0.4", "a table \\[gate\\]"),
        ("[gate", "can be read"),
    ],
)
def test_a_policy_that_is_misspelt_is_an_error_with_a_hint(text, told, tmp_path):
    with pytest.raises(UsageError, match=told):
        read(tmp_path, text)


def test_a_policy_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"none\.toml"):
        Policy.read(tmp_path / "none.toml")


# a baseline that is kept


def test_a_baseline_is_the_run_without_its_inputs(run, worse, tmp_path):
    folder = keep(run, tmp_path / "kept" / "baseline")
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "samples"]
    assert Run.read(folder).samples().equals(run.samples())
    assert only(hold(Policy(max_drop=0), worse, Run.read(folder))) == only(hold(Policy(max_drop=0), worse, run))
    keep(worse, folder)
    assert Run.read(folder).samples().equals(worse.samples())
    assert sorted(p.name for p in folder.parent.iterdir()) == ["baseline"]
    assert keep(Run.read(folder), folder) == folder


def test_only_a_run_gives_way_to_a_baseline(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all my work")
    keep(run, tmp_path / "kept")
    (tmp_path / "kept" / "notes.md").write_text("why")
    for folder in (tmp_path / "mine", tmp_path / "kept", run.path / "inside", run.path.parent):
        with pytest.raises(RunError):
            keep(run, folder)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "all my work"
    assert (tmp_path / "kept" / "notes.md").exists()


def test_links_out_of_a_run_are_not_followed(run, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (run.path / "samples" / "stolen.parquet").symlink_to(tmp_path / "secret")
    with pytest.raises(RunError, match="is a link"):
        keep(run, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["now", "secret"]


def test_a_baseline_at_a_url_is_read_from_there_and_made_here(run, tmp_path):
    assert read(tmp_path, '[gate]\nbaseline = "memory://runs/base"\n').baseline == "memory://runs/base"
    with pytest.raises(RunError, match="on this machine"):
        keep(run, "memory://runs/base")


# what is written


@pytest.fixture
def judged(run, worse, tmp_path):
    store(tmp_path / "found", WORSE, model="bb", findings=[finding("zero-gradient")])
    policy = Policy(min_robust=0.5, max_drop=0.02, no_finding=("error", "warning"))
    found = Run.read(tmp_path / "found")
    return hold(policy, found, run), found


def test_junit_has_a_case_for_each_check(judged):
    judgement, run = judged
    root = ElementTree.fromstring(junit(*judged))
    cases = root.findall("./testsuite/testcase")
    assert [c.get("name") for c in cases] == [c.name for c in judgement.checks]
    assert (root.get("tests"), root.get("failures")) == ("4", "2")
    failed = {c.get("name"): c.find("failure") for c in cases if c.find("failure") is not None}
    assert [*failed] == ["max-drop", "no-finding warning"]
    assert "18 points below" in failed["max-drop"].get("message")
    assert "sample 0: class 1, taken for 3 by pgd, size 0.2" in failed["max-drop"].text
    assert "and 10 more" in failed["max-drop"].text
    assert run.manifest["command"] in {p.get("value") for p in root.iter("property")}


def check_sarif(log):
    """Assert what the schema of SARIF 2.1.0 requires of a log, and what code hosts do beyond it."""
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("/sarif-schema-2.1.0.json")
    for run in log["runs"]:
        rules = run["tool"]["driver"]["rules"]
        assert run["tool"]["driver"]["name"] == "assay"
        assert len({r["id"] for r in rules}) == len(rules)
        assert all(r[k]["text"] for r in rules for k in ("shortDescription", "fullDescription", "help"))
        assert all(isinstance(i["executionSuccessful"], bool) for i in run["invocations"])
        for result in run["results"]:
            assert result["level"] in {"none", "note", "warning", "error"}
            assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
            assert isinstance(result["message"]["text"], str)
            assert isinstance(result["properties"], dict)
            (place,) = (v["physicalLocation"] for v in result["locations"])
            assert place["region"]["startLine"] >= 1
            assert re.fullmatch(r"[\w.~%/-]+", place["artifactLocation"]["uri"])
            assert not {"..", ""} & set(place["artifactLocation"]["uri"].split("/"))


def test_sarif_has_a_result_for_each_failed_check_and_each_finding(judged, tmp_path):
    policy = tmp_path / "assay.toml"
    policy.write_text('[gate]\nmin-robust = 0.5\nmax-drop = 0.02\nno-finding = ["error", "warning"]\n')
    log = json.loads(sarif(*judged, policy=policy))
    check_sarif(log)
    results = log["runs"][0]["results"]
    assert [(r["ruleId"], r["level"]) for r in results] == [
        ("max-drop", "error"),
        ("no-finding", "error"),
        ("zero-gradient", "warning"),
    ]
    lines = [r["locations"][0]["physicalLocation"]["region"]["startLine"] for r in results]
    assert lines == [3, 4, 4]
    assert log["runs"][0]["invocations"] == [{"executionSuccessful": True, "exitCode": 1}]


def test_markdown_says_the_verdict_first_and_then_the_checks(judged):
    text = markdown(*judged)
    lines = text.splitlines()
    assert lines[0] == "## assay gate: failed"
    assert lines[2].startswith(judged[0].verdict)
    assert sum(line.startswith("| ") for line in lines) == 1 + 4
    assert "\n```sh\nassay evaluate net.onnx" in text


def test_the_page_has_the_checks_the_samples_as_pictures_and_the_commands(judged):
    text = page(*judged)
    assert judged[0].verdict in text
    assert text.count("data:image/png") == 3 * SHOWN
    assert "sample 0: class 1, taken for 3" in text
    assert "The baseline" in text
    assert re.search(r"default-src 'none'", text)
    assert not re.search(r"<script|https?://|<link", text)


def test_a_gate_that_holds_says_so_everywhere(run):
    judgement = hold(Policy(min_robust=0.5), run)
    assert "held" in markdown(judgement, run).splitlines()[0]
    assert ElementTree.fromstring(junit(judgement, run)).get("failures") == "0"
    assert [r["ruleId"] for r in json.loads(sarif(judgement, run))["runs"][0]["results"]] == [
        "zero-gradient",
        "lost-at-8-bit",
    ]
    assert "Samples that made it fail" not in page(judgement, run)


def test_the_same_judgement_gives_the_same_files(judged):
    for write in (junit, sarif, markdown, page):
        assert write(*judged) == write(*judged)


# a hostile run


EVIL = (
    "</td><script>alert(1)</script>]]>\x1b]0;owned\x07\x1b[2J|@everyone #1 `code` ![x](http://evil.example/x.png) "
    "<img src=x onerror=alert(1)> ../../etc/passwd\u202e\ud800\n\n# heading\r\n| a | b |"
)


@pytest.fixture
def hostile(tmp_path):
    changes = {
        "name": EVIL,
        "class_names": [EVIL] * 5,
        "command": EVIL,
        "findings": [
            finding(EVIL, "error", EVIL, EVIL),
            finding("zero-gradient", EVIL),
            "no finding",
            {"code": [EVIL]},
        ],
        "threat": {"text": EVIL, EVIL: 1},
    }
    folder = tmp_path / "..%2F<b>|@run"
    folder.mkdir()
    for part in store(tmp_path / "plain", WORSE, broken_by=EVIL.replace("\ud800", "")).path.iterdir():
        part.rename(folder / part.name)
    told = manifest(**changes) | {"totals": {"seconds": 1.0}, "schema": 1}
    (folder / "manifest.json").write_text(json.dumps(told), encoding="utf-8")
    return Run.read(folder)


def judged_hostile(run):
    return hold(Policy(min_robust=0.99, no_finding=("error", "zero-gradient")), run)


def test_a_hostile_run_writes_only_text_into_xml(hostile):
    text = junit(judged_hostile(hostile), hostile)
    root = ElementTree.fromstring(text.encode("utf-8"))
    assert {e.tag for e in root.iter()} == {"testsuites", "testsuite", "properties", "property", "testcase", "failure"}
    assert len(root.findall("./testsuite/testcase")) == 3
    assert "\x1b" not in text


def test_a_hostile_run_writes_only_text_into_sarif(hostile):
    text = sarif(judged_hostile(hostile), hostile)
    log = json.loads(text)
    check_sarif(log)
    told = [*strings(log)]
    assert not any(c in value for value in told for c in "\x1b\x07\r\n\u202e\ud800")


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for v in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from strings(v)


def test_a_hostile_run_writes_only_text_into_markdown(hostile):
    text = markdown(judged_hostile(hostile), hostile)
    text.encode("utf-8")
    outside = re.sub(r"(?ms)^(`{3,})sh\n.*?^\1$", "", text)
    assert not re.search(r"[<>]|!\[|\]\(|@\w|(?<!&)#\d|://\w|(?<!\*)\*(?!\*)|`", outside)
    assert [line for line in outside.splitlines() if line.startswith("#")] == ["## assay gate: failed"]
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {5}
    assert len(rows) == 2 + 3
    fence = re.search(r"(?m)^`{3,}sh$", text)[0].removesuffix("sh")
    inside = text.partition(f"{fence}sh\n")[2].partition(f"\n{fence}\n")[0]
    assert "\n" not in inside
    assert not re.search(r"[\x00-\x1f\u202e]", inside)


class Tags(HTMLParser):
    """What a browser makes of a page: its tags with their attributes, and its text."""

    def __init__(self):
        super().__init__()
        self.found, self.said = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, attrs))

    def handle_data(self, data):
        self.said.append(data)


def test_a_hostile_run_writes_only_text_into_the_page(hostile):
    text = page(judged_hostile(hostile), hostile)
    text.encode("utf-8")
    assert not re.search(r"[\x1b\x07\u202e]", text)
    tags = Tags()
    tags.feed(text)
    assert not {"script", "iframe", "object", "link", "base", "form"} & {tag for tag, _ in tags.found}
    attributes = [pair for _, attrs in tags.found for pair in attrs]
    assert not [name for name, _ in attributes if name.startswith("on")]
    assert all(value.startswith("data:image/png") for name, value in attributes if name in {"src", "href"})
    assert any(EVIL.partition("]]")[0] in said for said in tags.said)


def test_a_hostile_run_does_not_steer_the_terminal(hostile):
    shown = io.StringIO()
    print_judgement(judged_hostile(hostile), hostile, Console(file=shown, width=100))
    shown.getvalue().encode("utf-8")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown.getvalue())


def test_a_hostile_run_does_not_steer_the_terminal_in_errors(hostile, run):
    with pytest.raises(RunError) as told:
        hold(Policy(max_drop=0), hostile, run)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202e]", str(told.value))


@pytest.mark.parametrize("text", ["a|b", "*x*", "<b>", "@me", "#12", "[a](b)", "`c`", "http://a.b", "www.a.b", "GH-1"])
def test_markdown_is_escaped(text):
    assert text not in escape(text)
    shown = re.sub(r"&#(\d+);", lambda m: chr(int(m[1])), escape(text)).replace("\u200b", "")
    assert shown == text


def test_plain_text_stays_as_it_is():
    assert plain("Größe 8/255, 中文") == "Größe 8/255, 中文"
    assert plain("a\tb\r\n c\x00\x9b31m") == "a b c31m"


# the command


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_exit_code_is_the_answer(run, worse, place):
    assert invoke("gate", run.path, "--min-robust", 0.9).exit_code == 0
    assert invoke("gate", run.path, "--min-robust", 0.91).exit_code == 1
    assert invoke("gate", worse.path, "--baseline", run.path, "--max-drop", 0.01).exit_code == 1
    assert invoke("gate", run.path).exit_code == 2
    assert invoke("gate", run.path, "--min-robust", 90).exit_code == 2
    assert invoke("gate", run.path, "--max-drop", 0.1).exit_code == 2
    assert invoke("gate", run.path, "--no-finding", "zero-gradent").exit_code == 2
    assert invoke("gate", run.path, "--update-baseline").exit_code == 2
    assert invoke("gate", place / "none", "--min-robust", 0.9).exit_code == 3
    assert invoke("gate", run.path, "--min-robust", 0.9, "--html", run.path / "manifest.json" / "x.html").exit_code == 3


def test_the_policy_here_is_read_and_flags_go_before_it(run, place):
    (place / "assay.toml").write_text('[gate]\nmin-robust = 0.95\nno-finding = ["warning"]\n')
    done = invoke("gate", run.path)
    assert done.exit_code == 1
    assert "policy  assay.toml" in done.stdout
    assert invoke("gate", run.path, "--min-robust", 0.9, "--no-finding", "error").exit_code == 0
    assert invoke("gate", run.path, "--min-robust", 0.9).exit_code == 1
    (place / "other.toml").write_text("[gate]\nmin-robust = 0.5\n")
    assert invoke("gate", run.path, "--policy", "other.toml").exit_code == 0


def test_json_is_all_there_is_on_stdout_and_quiet_is_one_line(run, place):
    told = invoke("gate", run.path, "--min-robust", 0.95, "--json")
    found = json.loads(told.stdout)
    assert (told.exit_code, found["held"], found["checks"][0]["name"]) == (1, False, "min-robust")
    quiet = invoke("gate", run.path, "--min-robust", 0.95, "--quiet")
    assert quiet.stdout.splitlines() == [found["verdict"]]


def test_files_are_written_and_the_summary_is_added_to(run, place):
    (place / "summary.md").write_text("before\n")
    files = {"junit": "o/gate.xml", "sarif": "o/gate.sarif", "markdown": "summary.md", "html": "o/gate.html"}
    done = invoke("gate", run.path, "--min-robust", 0.95, *(a for k, v in files.items() for a in (f"--{k}", v)))
    assert done.exit_code == 1
    assert all((place / file).exists() for file in files.values())
    assert (place / "summary.md").read_text(encoding="utf-8").startswith("before\n## assay gate")


def test_a_baseline_is_made_and_renewed_by_what_holds(run, worse, place):
    policy = ("--baseline", "baseline", "--max-drop", 0.02)
    assert invoke("gate", run.path, *policy, "--update-baseline").exit_code == 0
    assert Run.read("baseline").samples().equals(run.samples())
    assert invoke("gate", worse.path, *policy, "--update-baseline").exit_code == 1
    assert Run.read("baseline").samples().equals(run.samples())
    done = invoke("gate", worse.path, "--baseline", "baseline", "--max-drop", 1, "--update-baseline", "--json")
    assert json.loads(done.stdout)["updated"] == "baseline"
    assert Run.read("baseline").samples().equals(worse.samples())


def test_an_unfinished_run_becomes_no_baseline(place, tmp_path):
    bad = store(tmp_path / "u", ROBUST, complete=False)
    assert invoke("gate", bad.path, "--baseline", "baseline", "--update-baseline").exit_code == 3
    assert not (place / "baseline").exists()


def test_a_gate_needs_no_torch():
    names = ("cli.gate", "reports.gates", "reports.junit", "reports.sarif", "reports.markdown", "runs.baseline")
    code = f"import sys, {', '.join(f'assay.{n}' for n in names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_network_that_forgets_its_adversarial_training_is_stopped(tmp_path):
    """The demo network learns on: from adversarial images of another seed, and from clean images alone."""
    import assay

    data, held = assay.load_data("demo:mnist"), Policy(max_drop=0.02)
    how = {"epochs": 4, "batch_size": 100, "lr": 5e-4, "select": "last", "valid_steps": 1, "progress": False}
    runs = {}
    for name, method, seed in (("before", "pgd", 0), ("again", "pgd", 1), ("plain", "plain", 1)):
        train, valid = data.take(range(2000, 5000)), data.take(range(1000, 1100))
        net = assay.harden("demo:mnist-robust", train, "linf:0.3", method, valid, seed=seed, monitor="off", **how).model
        on = data.take(range(500))
        runs[name] = assay.evaluate(net, on, "linf:0.3", "quick", seed=seed, out=tmp_path / name, progress=False).run
    assert hold(held, runs["again"], runs["before"]).held
    assert not hold(held, runs["plain"], runs["before"]).held


# docs/ci.md


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def workflows():
    return map(pytest.importorskip("yaml").safe_load, blocks("yaml"))


def told_to_run():
    """Return the lines that call assay: of the page, of the workflow, and of the job."""
    github, gitlab = workflows()
    steps = "\n".join(step.get("run", "") for job in github["jobs"].values() for step in job["steps"])
    script = "\n".join(gitlab["robustness"]["script"])
    lines = [line.strip() for text in (*blocks("sh"), steps, script) for line in text.splitlines()]
    return [line for line in lines if line.startswith("assay ")]


def test_the_workflows_are_what_their_hosts_expect():
    github, gitlab = workflows()
    assert {"name", "permissions", "jobs"} < github.keys()
    assert all(("run" in step) != ("uses" in step) for step in github["jobs"]["gate"]["steps"])
    assert gitlab["robustness"]["artifacts"]["reports"]["junit"] == "gate.xml"


def test_every_command_of_the_page_runs_as_it_stands(place, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place / "step.md"))
    policy = (ROOT / "docs" / "examples" / "assay.toml").read_text(encoding="utf-8")
    assert blocks("toml") == [policy.partition("\n")[2]]
    (place / "assay.toml").write_text(policy, encoding="utf-8")
    invoke("evaluate", *shlex.split(told_to_run()[0])[2:], "--quiet")
    assert invoke("gate", "runs/gate", "--update-baseline").exit_code == 0
    for line in told_to_run():
        program, *arguments = shlex.split(line.replace("$GITHUB_STEP_SUMMARY", str(place / "step.md")))
        assert program == "assay"
        done = invoke(*arguments, *(["--quiet"] if "evaluate" in arguments else []))
        assert done.exit_code == 0, done.output
    assert (place / "step.md").read_text(encoding="utf-8").startswith("## assay gate: held")
    assert all((place / f).exists() for f in ("gate.xml", "gate.sarif", "gate.html", "gate.md", "baseline"))
