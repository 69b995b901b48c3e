"""A judgement as SARIF 2.1.0: one result for each check that did not hold, and one for each finding of the run.

References: OASIS Standard, Static Analysis Results Interchange Format (SARIF) Version 2.1.0, 27 March 2020.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from assay import __version__
from assay.core.plain import plain
from assay.reports.gates import about, command, listed
from assay.reports.summary import Note, Summary
from assay.runs import Run
from assay.runs.policy import Check, Judgement

_SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

_LEVELS: Final = {"error": "error", "warning": "warning", "info": "note"}

_RULES: Final = {
    "min-robust": "The share of samples that no attack of the run fooled reaches a floor.",
    "min-certified": "The share of samples that are proven robust reaches a floor.",
    "max-drop": "The robust accuracy is not significantly further below that of a baseline run than allowed.",
    "max-seconds": "The run took no longer than allowed.",
    "no-finding": "The run has no finding of the codes and severities that the policy names.",
}


def sarif(judgement: Judgement, run: Run, policy: Path | None = None) -> str:
    """Return the log as JSON.

    Code hosts show a result at a line of a file: here that of the ``policy`` which the check is from, or else the run's
    manifest.
    """
    s = about(run)
    results = [*(_failed(c, s, policy, run) for c in judgement.failed), *(_found(n, policy, run) for n in s.findings)]
    rules = {_rule_of(check.name): _RULES[_rule_of(check.name)] for check in judgement.failed}
    rules |= {plain(note.code): plain(note.remedy) or plain(note.code) for note in s.findings}
    numbers = {rule: i for i, rule in enumerate(rules)}
    log = {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "assay",
                        "version": __version__,
                        "rules": [_rule(*pair) for pair in rules.items()],
                    }
                },
                "automationDetails": {"id": "assay/gate/"},
                "invocations": [{"executionSuccessful": True, "exitCode": 0 if judgement.held else 1}],
                "results": [result | {"ruleIndex": numbers[result["ruleId"]]} for result in results],
                "properties": dict(_facts(judgement, run, s)),
            }
        ],
    }
    return json.dumps(log, indent=2) + "\n"


def _rule(name: str, says: str) -> dict[str, Any]:
    return {"id": name} | {key: {"text": says} for key in ("shortDescription", "fullDescription", "help")}


def _rule_of(check: str) -> str:
    """Return the key of the policy that a check is about."""
    return check.partition(" ")[0]


def _facts(judgement: Judgement, run: Run, s: Summary) -> Iterator[tuple[str, Any]]:
    told = {"run": judgement.run, "model": s.model, "data": s.data, "threat": s.threat, "command": command(run)}
    yield from ((name, plain(value)) for name, value in told.items())
    yield "verdict", plain(judgement.verdict)
    yield "held", [plain(check.name) for check in judgement.checks if check.held]


def _failed(check: Check, s: Summary, policy: Path | None, run: Run) -> dict[str, Any]:
    said = f"Wanted {plain(check.wanted)}; found {plain(check.found)}. {plain(check.why)}"
    key = _rule_of(check.name)
    return _result(key, "error", said, _place(policy, run, key)) | {
        "properties": {"check": plain(check.name), "concerned": check.concerned, "samples": listed(check, s)}
    }


def _found(note: Note, policy: Path | None, run: Run) -> dict[str, Any]:
    said = f"{plain(note.message)} {plain(note.remedy)}".strip() or plain(note.code)
    evidence = {plain(name): plain(value) for name, value in note.evidence}
    return _result(plain(note.code), _LEVELS[note.severity], said, _place(policy, run, "no-finding")) | {
        "properties": {"severity": note.severity, "evidence": evidence}
    }


def _result(rule: str, level: str, said: str, place: dict[str, Any]) -> dict[str, Any]:
    return {"ruleId": rule, "level": level, "message": {"text": said}, "locations": [place]}


def _place(policy: Path | None, run: Run, key: str) -> dict[str, Any]:
    """Return the line of a key in the policy, or the first of the run's manifest."""
    file = policy or run.path / "manifest.json"
    return {
        "physicalLocation": {
            "artifactLocation": {"uri": _uri(file), "uriBaseId": "%SRCROOT%"},
            "region": {"startLine": _line(policy, key) if policy else 1},
        }
    }


def _uri(file: Path) -> str:
    """Write a path from the current folder; of one that is outside only the name, so that nobody is led there."""
    whole, here = file.resolve(), Path.cwd()
    inside = whole.relative_to(here) if whole.is_relative_to(here) else Path(whole.name)
    return quote(plain(inside.as_posix()))


def _line(policy: Path, key: str) -> int:
    lines = policy.read_text(encoding="utf-8").splitlines()
    return next((i for i, line in enumerate(lines, 1) if re.match(rf'\s*"?{re.escape(key)}"?\s*=', line)), 1)
