"""A judgement as JUnit XML, one test case a check: what continuous integration shows as a list of tests."""

from xml.etree.ElementTree import Element, SubElement, indent, tostring

from assay.core.plain import plain
from assay.reports.gates import about, command, listed
from assay.reports.summary import Summary
from assay.runs import Run
from assay.runs.policy import Check, Judgement


def junit(judgement: Judgement, run: Run) -> str:
    """Return the XML; the same judgement gives the same text."""
    s, failed = about(run), len(judgement.failed)
    counts = {"tests": str(len(judgement.checks)), "failures": str(failed), "errors": "0", "skipped": "0"}
    root = Element("testsuites", counts)
    suite = SubElement(root, "testsuite", {"name": "assay gate", **counts})
    properties = SubElement(suite, "properties")
    for name, value in _facts(judgement, run, s):
        SubElement(properties, "property", {"name": name, "value": plain(value)})
    for check in judgement.checks:
        _case(suite, check, s)
    indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _facts(judgement: Judgement, run: Run, s: Summary) -> list[tuple[str, str]]:
    found = [("run", judgement.run), ("model", s.model), ("data", s.data), ("threat", s.threat)]
    found += [("baseline", judgement.baseline)] if judgement.baseline else []
    return found + ([("command", told)] if (told := command(run)) else [])


def _case(suite: Element, check: Check, s: Summary) -> None:
    case = SubElement(suite, "testcase", {"classname": "assay.gate", "name": plain(check.name)})
    said = f"wanted {plain(check.wanted)}; found {plain(check.found)}"
    if check.held:
        return
    failure = SubElement(case, "failure", {"type": plain(check.name), "message": said})
    failure.text = "\n".join([said, plain(check.why), *listed(check, s)])
