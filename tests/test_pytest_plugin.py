"""``assay.check`` and the pytest plugin: what fails explains itself, and the summary tells of what holds, too."""

import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import assay
from assay.cli.app import app
from assay.core.errors import RunError
from assay.core.registry import UsageError
from assay.evaluation.check import CheckError, check, outcome
from assay.integrations import pytest_plugin
from assay.runs import Run

pytest_plugins = "pytester"

INSTALLED = any(point.value == pytest_plugin.__name__ for point in entry_points(group="pytest11"))
"""Whether pytest finds the plugin by itself; from a source tree it has to be told."""

ROBUST, PLAIN, DATA, THREAT = "demo:mnist-robust", "demo:mnist-plain", "demo:mnist", "linf:0.3"


@pytest.fixture(scope="module", autouse=True)
def _loaded():
    """Load all that a check needs, so that the tests within tests, which forget what they import, find it there."""
    assay.evaluate(PLAIN, DATA, THREAT, effort="quick", limit=2, progress=False)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """A run of the robust network on 20 samples."""
    return check(ROBUST, DATA, THREAT, min_robust=0.5, limit=20, out=tmp_path_factory.mktemp("kept") / "base")


@pytest.fixture(scope="module")
def failure(tmp_path_factory):
    """How the plain network fails."""
    out = tmp_path_factory.mktemp("kept") / "plain"
    with pytest.raises(CheckError) as e:
        check(PLAIN, DATA, THREAT, min_robust=0.4, no_finding=["error"], limit=20, out=out)
    return e.value


# assay.check


def test_what_holds_gives_the_evaluation(baseline):
    assert baseline.n == 20
    assert baseline.robust_accuracy >= 0.5
    assert re.fullmatch(
        r"mnist-robust, linf:0.3, 20 images: robust \S+ %, clean \S+ %; .* passes, .*", outcome(baseline)
    )


def test_what_does_not_hold_is_an_assertion_that_knows_what_was_measured(failure):
    assert isinstance(failure, AssertionError)
    assert failure.evaluation.robust_accuracy < 0.4
    assert [c.name for c in failure.judgement.failed] == ["min-robust"]


def test_a_failure_says_what_was_wanted_and_found_and_which_samples_fell_to_what(failure):
    told, table = str(failure), failure.evaluation.samples.to_pylist()
    broken = sum(row["status"] == "fooled" for row in table)
    assert told.startswith(f"1 of 2 checks failed: min-robust found {5 * (20 - broken):g} %")
    assert "wanted  robust accuracy of at least 40 %" in told
    assert "95 % interval" in told
    assert "no-finding error held" in told
    first = table[0]
    assert f"#0     {first['label']} -> {first['adversarial_prediction']}, size {first['size']:.3g}, by " in told
    counts = dict(re.findall(r"([\w-]+) (\d+)", told.partition("broken by")[2].partition(", wrong as")[0]))
    assert sum(map(int, counts.values())) == broken


def test_the_command_that_a_failure_names_repeats_the_run(failure, tmp_path):
    line = re.search(r"(?m)^  command +(assay evaluate .*)$", str(failure))[1]
    assert failure.evaluation.run.manifest["command"] == line
    done = CliRunner().invoke(app, [*shlex.split(line)[1:], "--out", str(tmp_path / "again"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert Run.read(tmp_path / "again").samples().equals(failure.evaluation.samples)


def test_the_python_line_that_a_failure_names_repeats_the_run(failure):
    line = re.search(r"(?m)^  python +(.*)$", str(failure))[1]
    assert eval(line, {"assay": assay}).samples.equals(failure.evaluation.samples)


def test_of_objects_only_the_python_line_is_told_with_all_that_the_threat_is(tmp_path):
    model, data = assay.load_model(PLAIN), assay.load_data(DATA, limit=4)
    with pytest.raises(CheckError) as e:
        check(model, data, assay.Threat("linf", 0.3, quantize=8), min_robust=0.4)
    assert "assay.evaluate(model, data, assay.Threat('linf', eps=0.3, quantize=8), effort='quick', seed=0)" in str(
        e.value
    )
    assert "assay evaluate" not in str(e.value)
    assert "run         not kept; out=FOLDER keeps it" in str(e.value)


def test_a_drop_against_a_baseline_names_the_samples_that_were_lost(baseline):
    with pytest.raises(CheckError, match="max-drop found") as e:
        check(PLAIN, DATA, THREAT, max_drop=0.1, baseline=baseline, limit=20)
    lost = [row["index"] for row in baseline.samples.to_pylist() if row["status"] == "robust"][:5]
    assert [int(i) for i in re.findall(r"(?m)^      #(\d+) ", str(e.value))] == lost
    assert check(ROBUST, DATA, THREAT, max_drop=0.0, baseline=baseline.run.path, limit=20).n == 20


def test_a_floor_of_proofs_asks_for_proofs():
    with pytest.raises(CheckError, match="min-certified found") as e:
        check(PLAIN, DATA, THREAT, min_certified=0.9, limit=4)
    assert "prove='crown'" in str(e.value)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "min_robust=0.4"),
        ({"max_drop": 0.1}, "baseline for max_drop"),
        ({"min_robust": 40}, "between 0 and 1"),
        ({"no_finding": ["zero-gradent"]}, "'zero-gradient'"),
    ],
)
def test_what_cannot_be_held_is_refused_before_anything_is_evaluated(asked, said):
    asked_of = SimpleNamespace()  # no model at all: it would be an error to look at it
    with pytest.raises(UsageError, match=re.escape(said)):
        check(asked_of, DATA, THREAT, **asked)


def test_a_baseline_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"manifest\.json"):
        check(PLAIN, DATA, THREAT, max_drop=0.1, baseline=tmp_path)


def test_hostile_class_names_cannot_steer_the_terminal(tmp_path):
    x, y = (v.numpy() for v in next(iter(assay.load_data(DATA, limit=4))))
    np.savez(tmp_path / "x.npz", x=x, y=y, class_names=[f"\x1b]0;owned\x07{i}\n\u202e" for i in range(10)])
    with pytest.raises(CheckError) as e:
        check(PLAIN, tmp_path / "x.npz", THREAT, min_robust=0.9)
    assert "owned" in str(e.value)
    assert not {"\x1b", "\x07", "\u202e"} & {*str(e.value)}


# the plugin


def run_tests(pytester, code, *arguments):
    """Run tests with the plugin, warnings being errors, and return what pytest said."""
    pytester.makepyfile(code)
    plugins = () if INSTALLED else (pytest_plugin,)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-W", "error", *arguments, plugins=plugins)


def test_a_check_that_holds_passes_and_has_a_line_in_the_summary(pytester):
    done = run_tests(
        pytester,
        """
        def test_it(assay):
            assay.check("demo:mnist-robust", "demo:mnist", "linf:0.3", min_robust=0.4, limit=20)
        """,
        "--strict-markers",
    )
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(
        ["*= assay =*", "held *mnist-robust, linf:0.3, 20 images: robust *clean *passes*test_it*"]
    )


def test_a_check_that_fails_shows_the_test_and_the_reason_and_no_inner_frames(pytester):
    done = run_tests(
        pytester,
        """
        import pytest

        @pytest.mark.assay(seed=1, limit=10)
        def test_it(assay):
            model = assay.load_model("demo:mnist-plain")
            assay.check(model, "demo:mnist", "linf:0.3", min_robust=0.4)
        """,
    )
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            ">*assay.check(model*",
            "E*1 of 1 check failed: min-robust found*",
            "E*wanted*at least 40 %",
            "E*#0 *, size *, by *",
            "E*broken by*",
            "E*run *test_it0*assay",
            "E*assay.evaluate(model, 'demo:mnist', 'linf:0.3', effort='quick', seed=1, limit=10)",
            "failed *mnist-plain*10 images*",
        ]
    )
    shown = done.stdout.str()
    assert "pytest_plugin.py" not in shown
    assert "def check(" not in shown


def test_settings_come_from_the_command_line_the_call_the_marker_and_the_ini_file_in_this_order(pytester):
    pytester.makeini("[pytest]\nassay_effort = thorough")
    code = """
        import pytest

        def settings(e):
            return e.run.manifest["identity"]["effort"], e.run.manifest["identity"]["seed"], e.n

        @pytest.mark.assay(effort="quick", seed=3, limit=2)
        def test_it(assay):
            found = assay.evaluate("demo:mnist-plain", "demo:mnist", "linf:0.3")
            called = assay.evaluate("demo:mnist-plain", "demo:mnist", "linf:0.3", seed=4, limit=1)
            assert [settings(found), settings(called)] == {wanted}

        def test_without_a_marker(assay):
            assert assay.defaults["effort"] == "thorough"
        """
    plain = code.replace("{wanted}", "[('quick', 3, 2), ('quick', 4, 1)]")
    run_tests(pytester, plain).assert_outcomes(passed=2)
    asked = code.replace("{wanted}", "[('standard', 3, 1), ('standard', 4, 1)]").replace("seed=4, limit=1", "seed=4")
    run_tests(pytester, asked, "--assay-effort", "standard", "--assay-limit", "1").assert_outcomes(passed=2)


def test_a_setting_that_the_marker_does_not_have_is_named(pytester):
    code = """
        import pytest

        @pytest.mark.assay(efort="quick")
        def test_it(assay):
            pass
        """
    done = run_tests(pytester, code)
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*Did you mean 'effort'?*"])


def test_the_last_run_of_each_check_is_kept_where_the_ini_file_says(pytester):
    pytester.makeini("[pytest]\nassay_runs = kept")
    code = """
        import pytest

        @pytest.mark.parametrize("threat", ["linf:0.3", "linf:76/255"])
        def test_it(assay, threat):
            for seed in (0, {seed}):
                assay.evaluate("demo:mnist-plain", "demo:mnist", threat, limit=1, seed=seed)
        """
    for seed in (1, 2):  # the second session finds other settings where the first has left its runs
        run_tests(pytester, code.replace("{seed}", str(seed))).assert_outcomes(passed=2)
    kept = [Run.read(folder) for folder in (pytester.path / "kept").iterdir()]
    identities = [r.manifest["identity"] for r in kept]
    found = sorted((i["threat"]["eps"], i["seed"]) for i in identities)
    assert found == [(76 / 255, 0), (76 / 255, 2), (0.3, 0), (0.3, 2)]


def test_folders_of_tests_stay_in_their_folder_and_are_told_apart():
    names = [pytest_plugin._name(n) for n in ("a/t.py::t[../../x]", "b/t.py::t[../../x]", "t.py::t[" + "x" * 300)]
    assert len({*names}) == 3
    assert all(Path(n).name == n and len(n) < 100 for n in names)


def test_what_checks_found_is_in_junit_xml(pytester):
    code = "def test_it(assay): assay.evaluate('demo:mnist-plain', 'demo:mnist', 'linf:0.3', limit=1)"
    run_tests(pytester, code, "--junitxml=found.xml").assert_outcomes(passed=1)
    written = (pytester.path / "found.xml").read_text(encoding="utf-8")
    assert re.search(r'<property name="assay" value="found +mnist-plain, linf:0.3', written)


def test_tests_without_checks_see_nothing_of_the_plugin(pytester):
    done = run_tests(pytester, "def test_it(): pass")
    assert "assay" not in done.stdout.str().replace(str(pytester.path), "").partition("collected")[2]


def test_loading_the_plugin_loads_nothing_but_pytest():
    code = "import sys, pytest; before = {*sys.modules}; import assay.integrations.pytest_plugin; "
    code += "print(*sorted({m.split('.')[0] for m in {*sys.modules} - before}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["assay"]


# the page

PAGE = (Path(__file__).parents[1] / "docs" / "pytest.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE)


def test_the_tests_on_the_page_pass(pytester):
    files = {code.split()[1]: code for code in BLOCKS if code.startswith("# test_")}
    assert len(files) == 2
    for name, code in files.items():
        (pytester.path / name).write_text(code, encoding="utf-8")
    run_tests(pytester, "def test_it(): pass").assert_outcomes(passed=4)


def test_the_other_blocks_of_the_page_run():
    for code in BLOCKS:
        if not code.startswith("# test_"):
            exec(compile(code, "pytest.md", "exec"), {})


def test_the_page_shows_a_failure_as_it_is(failure):
    shown = [line.removeprefix("E").strip() for line in PAGE.splitlines() if line.startswith("E  ")]
    told = [line.strip() for line in str(failure).splitlines()]
    words = {line.split()[0] for line in told if line and not line.startswith(("no-finding", "#"))}
    assert {line.split()[0] for line in shown if line and not line.startswith(("assay.", "#", "..."))} <= words


@pytest.mark.slow
def test_workers_tell_the_summary_what_their_checks_found(pytester):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("model", ["demo:mnist-plain", "demo:mnist-robust"])
        def test_it(assay, model):
            assay.check(model, "demo:mnist", "linf:0.3", min_robust=0.4, limit=10)
        """
    )
    told = () if INSTALLED else ("-p", pytest_plugin.__name__)
    done = pytester.runpytest_subprocess(*told, "-p", "no:cacheprovider", "-n", "2")
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["*= assay =*", "failed *mnist-plain*", "held *mnist-robust*"])
