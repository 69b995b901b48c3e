"""A run folder from a stranger: names in it do nothing in reports, terminal and files for CI, or outside of it."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console
from typer.testing import CliRunner

import assay
from assay.cli.app import app
from assay.reports import print_run
from assay.runs import Run

EVIL = (
    "\x1b]0;owned\x07\x1b[2Jx\r\n<script>alert(1)</script>\"'](javascript:x)|`rm`\u202e"
    "../../../../tmp/pwned@all {{7*7}}"
)

COMMANDS = {
    "report": ["report", "run"],
    "card": ["report", "run", "--as", "card", "--out", "out/card.md"],
    "evidence": ["report", "run", "--as", "evidence", "--out", "out/evidence.html"],
    "compare": ["compare", "run", "twin", "--out", "out/compare.html"],
    "gate": [
        *("gate", "run", "--min-robust", "0.1", "--no-finding", "error", "--baseline", "twin", "--max-drop", "0.5"),
        *("--junit", "out/gate.xml", "--sarif", "out/gate.sarif", "--markdown", "out/gate.md"),
        *("--html", "out/gate.html"),
    ],
    "gate, quietly": ["gate", "run", "--min-robust", "0.1", "--quiet"],
}  # fmt: skip


def poisoned(value, key=""):
    """Return a manifest in which every name and sentence is hostile; what decides how it is read stays."""
    if isinstance(value, dict):
        kept = ("identity", "fingerprint", "severity", "norm", "created", "updated", "library")
        return {k: v if k in kept else poisoned(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v, key) for v in value]
    return f"{EVIL}{value}" if isinstance(value, str) else value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose manifest was written by an enemy, and a twin of it."""
    place = tmp_path_factory.mktemp("hostile") / "deep" / "down"
    place.mkdir(parents=True)
    for name in ("run", "twin"):
        assay.evaluate(
            "demo:mnist-plain", "demo:mnist", "linf:0.3", "quick", limit=12, out=place / name, progress=False
        )
        file = place / name / "manifest.json"
        manifest = json.loads(file.read_text())
        manifest["data"]["class_names"] = [f"{EVIL}{i}" for i in range(10)]
        manifest["findings"] = [
            {"code": EVIL, "severity": "warning", "message": EVIL, "evidence": {EVIL: EVIL}, "remedy": EVIL},
            {"code": "zero-gradient", "severity": "error", "message": EVIL, "evidence": [EVIL], "remedy": EVIL},
        ]
        manifest["natural"] = [{"name": "../../fog", "severities": [1], "accuracy": [EVIL], "interval": EVIL}]
        manifest["identity"]["threat"]["text"] = f"linf:0.3{EVIL}"
        manifest["bounded"] = EVIL
        file.write_text(json.dumps(poisoned(manifest)))
    (place / "out").mkdir()
    return place


@pytest.mark.parametrize("name", COMMANDS)
def test_hostile_names_do_nothing(name: str, folder: Path) -> None:
    around = folder.parents[1]
    before = {p: p.stat().st_mtime_ns for p in around.rglob("*")}
    with contextlib.chdir(folder), mock.patch.object(sys, "argv", ["assay", *COMMANDS[name]]):
        done = CliRunner().invoke(app, COMMANDS[name], catch_exceptions=False)
    assert done.exit_code in (0, 1), done.output
    changed = {p for p in around.rglob("*") if before.get(p) != p.stat().st_mtime_ns and p.is_file()}
    assert all(p.is_relative_to(folder / "out") or p == folder / "run" / "report.html" for p in changed), changed
    for said in (done.output, *(p.read_text(encoding="utf-8") for p in changed)):
        assert "\x1b" not in said
        assert "\x07" not in said
        assert "\u202e" not in said
        assert "{{7*7}}" in said or "49" not in said.partition("pwned@all")[2][:12]
    for page in changed:
        if page.suffix in (".html", ".md", ".xml"):
            said = page.read_text(encoding="utf-8")
            body = said.rpartition("\n---\n")[2] if page.name == "card.md" else said  # before it: YAML, as data
            assert "<script>alert" not in body
    assert not Path("/tmp/pwned").exists()


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut off"], ids=["empty", "text", "cut off"])
@pytest.mark.parametrize("name", ["report", "gate"])
def test_adversarial_inputs_that_cannot_be_read_cost_the_pictures_only(
    name: str, content: bytes, folder: Path, tmp_path: Path
) -> None:
    for run in ("run", "twin"):
        shutil.copytree(folder / run, tmp_path / run)
    (tmp_path / "out").mkdir()
    for file in tmp_path.rglob("*.npz"):
        file.write_bytes(content)
    with contextlib.chdir(tmp_path):
        more = ["--min-robust", "0.9"] if name == "gate" else []  # so that there are samples to draw
        done = CliRunner().invoke(app, [*COMMANDS[name], *more], catch_exceptions=False)
    assert done.exit_code == (1 if name == "gate" else 0), done.output


def test_a_hostile_run_steers_no_terminal(folder: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    print_run(Run.read(folder / "run"), console)
    said = console.file.getvalue()
    assert "mnist-plain" in said
    assert not {c for c in said if not c.isprintable()} - {"\n"}
