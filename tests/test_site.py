"""The site and the release: every finding has a page, every public name is documented, what the pages show runs."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

import assay
from assay.evaluation import diagnosis, health, ladder, preflight, wrapping

ROOT = Path(__file__).parents[1]
DOCS, SOURCE = ROOT / "docs", ROOT / "src" / "assay"


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module(name)


# --- findings and errors


def parts() -> Iterator[ast.stmt]:
    """Yield the functions and the other statements of all files that give findings."""
    for path in sorted((SOURCE / "evaluation").glob("*.py")):
        yield from ast.parse(path.read_text(encoding="utf-8")).body


def strings(nodes: Iterable[ast.AST | None]) -> set[str]:
    return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def keys(node: ast.AST) -> set[str]:
    """Return the keys of the tables that a piece of code writes down."""
    return strings(k for n in ast.walk(node) if isinstance(n, ast.Dict) for k in n.keys)


def told(part: ast.stmt) -> Iterator[tuple[str, set[str]]]:
    """Yield the codes that a piece of code gives, each with the keys of its evidence where they are written out."""
    evidence = [n for n in ast.walk(part) if isinstance(n, ast.Assign | ast.AnnAssign) and n.value is not None]
    named = set().union(*(keys(n) for n in evidence if "evidence" in ast.unparse(n).split("=")[0]))
    for call in (n for n in ast.walk(part) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)):
        if ast.unparse(call.func) in ("Finding", "Mistake", "_warning"):
            uses = any(isinstance(a, ast.Name) and a.id == "evidence" for a in call.args)
            for code in strings(call.args[:1]):
                yield code, keys(call) | (named if uses else set())
    if isinstance(part, ast.AnnAssign) and ast.unparse(part.target) == "_LADDER":
        yield from ((code, set()) for code in keys(part))


TOLD = [found for part in parts() for found in told(part)]
CODES = sorted({code for code, _ in TOLD})
COUNTED = ("flat-in-eps", "noise-as-strong", "single-step-overfit", "single-step-stronger", "unbounded-attack-fails")


def test_every_finding_has_a_page_and_every_page_a_finding() -> None:
    pages = {p.stem for p in (DOCS / "findings").glob("*.md")} - {"index", "errors"}
    assert pages == set(CODES)
    assert set(CODES) >= diagnosis.MASKING


@pytest.mark.parametrize("code", CODES)
def test_a_page_says_what_why_the_remedy_the_evidence_and_how_it_is_calibrated(code: str) -> None:
    page = text(f"docs/findings/{code}.md")
    assert page.startswith(f"# {code}\n")
    headings = ["Why it matters", "What to do", "Evidence", "How it is calibrated"]
    assert re.findall("(?m)^## (.*)$", page) == headings
    assert all(len(part.split()) >= 4 for part in re.split("(?m)^#.*$", page)[1:])


def test_every_figure_of_the_evidence_is_explained() -> None:
    whole = [(code, {f.name for f in fields(diagnosis.Counts)}) for code in COUNTED]
    wrong = [(m.code, {"right", "right_without", "n", "p_value"}) for m, _ in wrapping._MISTAKES]
    repaired = [(c, {"without_gradient_before", "without_gradient", "gain_before", "gain"}) for c in ladder._LADDER]
    wanted = {(code, key) for code, known in (*TOLD, *whole, *wrong, *repaired) for key in known}
    assert ("zero-gradient", "share_ce") in wanted
    pages = {code: text(f"docs/findings/{code}.md") for code in CODES}
    assert {(code, key) for code, key in wanted if not re.search(rf"(?m)^\|.*`{key}`", pages[code])} == set()


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


THRESHOLDS = {
    "batch-dependent": [f"{preflight._SAME:.0e}".replace("e-0", "e-")],
    "black-box-gain": [percent(diagnosis.BLACK_BOX)],
    "converted": [f"{preflight._CONVERTED:.0e}".replace("e-0", "e-")],
    "exploding-gradient": [f"above {preflight.STEEP:g}"],
    "flat-in-eps": [percent(diagnosis.UNREACHED)],
    "inverted": [percent(wrapping.GOOD), percent(wrapping.EXPLAINED), f"{wrapping.GAIN * 100:g} points", "1e-4"],
    "loss-disagreement": [percent(diagnosis.DISAGREEMENT), percent(diagnosis.RACE_GAP)],
    "noise-as-strong": [f"above {diagnosis.EXCEPTIONS} samples"],
    "randomized": [f"at least {health.EOT[0]} and at most {health.EOT[1]}"],
    "repaired-bpda": [percent(health.BLIND), "{:g} to {:g}".format(*health.LINEAR)],
    "restart-yield": [percent(diagnosis.RESTART_YIELD)],
    "shattered-gradient": ["{:g} to {:g}".format(*health.LINEAR)],
    "single-step-overfit": [percent(diagnosis.OVERFIT)],
    "single-step-stronger": [f"above {diagnosis.EXCEPTIONS} samples"],
    "unbounded-attack-fails": [percent(diagnosis.UNREACHED)],
}


@pytest.mark.parametrize("code", THRESHOLDS)
def test_thresholds_of_the_pages_are_those_of_the_code(code: str) -> None:
    page = text(f"docs/findings/{code}.md")
    assert [t for t in THRESHOLDS[code] if t not in page] == []


def test_every_error_with_a_code_is_explained() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    given = set(re.findall(r'\bcode="([a-z0-9/-]+)"', source))
    assert given == set(re.findall("(?m)^### (.*)$", text("docs/findings/errors.md")))


# --- pages


def test_pages_that_list_others_are_as_the_generator_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise run ``python scripts/docs_pages.py``."""
    assert [str(p.relative_to(ROOT)) for p in module("docs_pages", monkeypatch).stale()] == []


def test_the_generator_says_what_it_would_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = module("docs_pages", monkeypatch)
    for folder in ("findings", "benchmarks"):
        (tmp_path / "docs" / folder).mkdir(parents=True)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "speed.md").write_text("# Speed\n", encoding="utf-8")
    (tmp_path / "docs" / "benchmarks" / "gone.md").write_text("# gone\n", encoding="utf-8")
    (tmp_path / "docs" / "findings" / "inverted.md").write_text(text("docs/findings/inverted.md"), encoding="utf-8")
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    monkeypatch.setattr(generator, "DOCS", tmp_path / "docs")
    assert generator.main(["--check"]) == 1
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0
    assert "docs/benchmarks/gone.md" in capsys.readouterr().out
    assert "[`inverted`](inverted.md) | error |" in (tmp_path / "docs/findings/index.md").read_text(encoding="utf-8")
    assert (tmp_path / "docs/benchmarks/speed.md").read_text(encoding="utf-8").startswith("# Speed\n")


def test_every_page_is_in_the_navigation() -> None:
    """Add it to a ``toctree`` of docs/index.md (docs/api/index.md for the Python interface)."""
    listed = {"index"}
    for page in ("index", "api/index"):
        for tree in re.findall(r"(?ms)^```\{toctree\}\n(.*?)^```", text(f"docs/{page}.md")):
            names = [re.sub(r".*<(.*)>", r"\1", line) for line in tree.splitlines() if line and line[0] != ":"]
            listed |= {os.path.normpath(Path(page).parent / name) for name in names}
    folders = {Path(name).parent for name in ("attacks/index", "benchmarks/README", "findings/index")}
    pages = {p.relative_to(DOCS).with_suffix("") for p in DOCS.rglob("*.md")}
    assert {str(p) for p in pages if str(p) not in listed and p.parent not in folders} == set()
    assert {name for name in listed if not (DOCS / f"{name}.md").exists()} == set()


@pytest.mark.parametrize(
    "name", ["assay", "assay.attacks", "assay.defences", "assay.nets", "assay.runs", "assay.study"]
)
def test_every_public_name_is_in_the_python_interface_once(name: str) -> None:
    page = text(f"docs/api/{name.rpartition('.')[2]}.md")
    listed = re.findall(rf"^\.\. (?:auto\w+|py:data):: {re.escape(name)}\.(\w+)$", page, re.MULTILINE)
    submodules = {"attacks", "defences", "nets", "study", "presets", "__version__", "ACTIVATIONS"}
    assert sorted(listed) == sorted(set(importlib.import_module(name).__all__) - submodules)


# --- what the pages show


def test_every_promise_of_security_has_its_test() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text("SECURITY.md"))
    assert len(named) > 30
    assert [f"{file}::{name}" for file, name in named if f"def {name}(" not in text(file)] == []


# --- release


def test_the_version_is_said_in_one_place_and_repeated_rightly() -> None:
    project = tomllib.loads(text("pyproject.toml"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/assay/__init__.py"
    assert f"\nversion: {assay.__version__}\n" in text("CITATION.cff")


def pins(name: str) -> dict[str, str]:
    found = re.findall(r"(?m)^([A-Za-z][\w.-]*)==([^\s\\]+)", text(name))
    return {re.sub("[_.]", "-", package.lower()): version for package, version in found}


def test_the_release_is_pinned_to_the_constraints_with_hashes_and_names_no_index() -> None:
    locked, constraints = pins("requirements-release.txt"), pins("constraints.txt")
    assert {p: v for p, v in locked.items() if p in constraints and constraints[p] != v.partition("+")[0]} == {}
    project = tomllib.loads(text("pyproject.toml"))["project"]
    assert {re.split("[>=<]", d)[0] for d in project["dependencies"]} <= set(locked)
    entries = re.split(r"(?m)^(?=[A-Za-z])", text("requirements-release.txt"))[1:]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", e) for e in entries)
    assert "://" not in text("requirements-release.txt")
    assert "index-url" not in text("requirements-release.txt")


def test_a_wheel_holds_the_package_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    release = module("release", monkeypatch)
    names = [f"assay/{p.relative_to(SOURCE)}" for p in SOURCE.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert release.superfluous([*names, f"assay-{assay.__version__}.dist-info/METADATA"]) == []
    assert any(n.endswith("mnist-robust.safetensors") for n in names)
    wrong = ["assay/__pycache__/a.pyc", "tests/test_site.py", "assay/notes.txt"]
    assert release.superfluous([*names, *wrong]) == wrong


def test_the_lock_takes_torch_of_any_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    release = module("release", monkeypatch)
    monkeypatch.setattr(release, "torch_hashes", lambda version: iter(["b" * 64] * (version == "2.13.0")))
    before, after = "sympy==1.0 \\\n    --hash=sha256:00\n", "typer==1.0 \\\n    --hash=sha256:11\n"
    torch = f"torch==2.13.0+cpu \\\n    --hash=sha256:{'a' * 64}\n"
    linux = torch.replace("+cpu", '+cpu ; sys_platform == "linux"')
    other = torch.replace("+cpu", ' ; sys_platform != "linux"').replace("a" * 64, "b" * 64)
    assert release.with_every_torch(before + torch + after) == before + linux + other + after
    assert release.with_every_torch(before + after) == before + after


def test_the_image_runs_as_nobody_special_and_installs_by_hashes() -> None:
    lines = text("Dockerfile").replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and line[0] != "#"]
    assert {step for step, _ in steps} <= {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert dict(steps)["USER"] == "assay"
    assert dict(steps)["ENTRYPOINT"] == '["assay"]'
    installs = [rest for step, rest in steps if step == "RUN" and " install " in rest]
    assert len(installs) == 2
    assert all("--require-hashes" in rest or "--no-deps" in rest for rest in installs)
    kept = {line[1:] for line in text(".dockerignore").splitlines() if line.startswith("!")}
    copied = {rest.split()[0] for step, rest in steps if step == "COPY" and not rest.startswith("--from")}
    assert copied == kept


@pytest.mark.parametrize(
    ("typed", "offered"), [("ev", "evaluate"), ("evaluate --thr", "--threat"), ("study w", "walk")]
)
def test_the_shell_completes_without_torch(typed: str, offered: str) -> None:
    words = f"assay {typed}"
    asked = {"_ASSAY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "import sys, atexit; sys.argv = ['assay']; from assay.cli import main\n"
    code += "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [offered]
    assert done.stderr.split() == ["False"]
