"""What is on record of a run: classes of attacks, the section of a model card, the sheet of evidence."""

import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from assay.attacks import ATTACKS, PGD, Chain, Restarts, Square, Transfer, get, names
from assay.attacks.taxonomy import tags, taxonomy
from assay.cli.app import app
from assay.core.errors import RunError
from assay.core.registry import UsageError
from assay.core.trackers import flat
from assay.evaluation.efforts import plan_for
from assay.reports.card import write_card
from assay.reports.evidence import write_evidence
from assay.reports.record import clip, record
from assay.reports.tracking import track
from assay.runs import Run
from assay.threats import Threat
from test_reports import fabricate

TAXONOMY = tags([PGD(), Square()])
HOSTILE = (
    '<script>alert(1)</script><img src=http://evil.example/x>|`*_[a](javascript:b)\n---\n<!-- end -->\x1b[31m"\u202e'
)


@pytest.fixture
def run(tmp_path):
    return fabricate(tmp_path / "run", taxonomy=TAXONOMY)


# --- classes of attacks


def test_every_attack_has_a_technique_and_a_class():
    for name in names():
        known, access = taxonomy(name), ATTACKS.traits(name)["access"]
        assert re.fullmatch(r"AML\.T0043\.00\d [A-Z].*", known.atlas[0]), name
        assert known.atlas[-1] == "AML.T0015 Evade AI Model", name
        assert ("AML.T0044 Full AI Model Access" in known.atlas) == (access == "gradient"), name
        assert known.nist.startswith("NISTAML.022" if access == "gradient" else "NISTAML.025"), name
        assert taxonomy(get(name)) == known, name


@pytest.mark.parametrize(
    ("attack", "technique", "kind"),
    [
        ("pgd", "AML.T0043.000", "white-box"),
        ("mi-fgsm", "AML.T0043.000", "white-box"),
        ("uap", "AML.T0043.000", "white-box, universal"),
        ("square", "AML.T0043.001", "score-based"),
        ("spsa", "AML.T0043.001", "score-based"),
        ("hop-skip-jump", "AML.T0043.001", "decision-based"),
        ("blur", "AML.T0043.003", "decision-based"),
        (Transfer(PGD(), lambda x: x), "AML.T0043.002", "transfer"),
        (Restarts(PGD(), 2), "AML.T0043.000", "white-box"),
    ],
)
def test_what_an_attack_sees_decides_its_class(attack, technique, kind):
    known = taxonomy(attack)
    assert known.atlas[0].startswith(technique)
    assert known.nist.endswith(f": {kind}")


def test_a_combination_has_the_classes_of_its_parts():
    both = Chain((Square(), PGD()))
    assert [*tags([both, PGD()])] == ["pgd", "square"]
    with pytest.raises(UsageError, match="one class"):
        taxonomy(both)


def test_the_rounds_of_an_effort_are_plain_json_by_name():
    plan = plan_for("standard", Threat.parse("linf:0.1"))
    found = tags(r.attack for r in plan.rounds)
    assert {"pgd", "funnel", "square"} <= {*found}
    assert json.loads(json.dumps(found)) == found


# --- the model card


def test_a_card_says_what_was_tested_how_and_what_that_does_not_say(run):
    card = write_card(run).read_text(encoding="utf-8")
    assert card.startswith('---\nmodel-index:\n  - name: "toynet"\n')
    assert '- type: "robust_accuracy"\n            value: 0.6\n            name: "Robust accuracy (linf:0.3)"' in card
    for said in (
        "| Robust accuracy (an upper bound) | 60.0 % | 43.0 to 75.0 % | 40 |",
        "An attacker may change every value of an image by at most 0.3",
        "- pgd: AML.T0043.000 White-Box Optimization;",
        "NISTAML.025 Black-box Evasion: score-based",
        "an attack that was not tried may find more",
        "**Findings.** None.",
        "assay evaluate py:net:make data.npz --threat linf:0.3",
        hashlib.sha256((run.path / "manifest.json").read_bytes()).hexdigest(),
    ):
        assert said in card


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_rest_of_a_card_is_kept_and_a_second_time_changes_nothing(run, tmp_path, newline):
    card = tmp_path / "CARD.md"
    mine = f"# My net{newline}{newline}Trained on a farm.{newline}"
    card.write_bytes(mine.encode())
    once = write_card(run, card).read_bytes()
    assert mine.encode() in once
    assert once.count(b"\r\n") == (once.count(b"\n") if newline == "\r\n" else 0)
    card.write_bytes(once + b"After it." + newline.encode())
    assert write_card(run, card).read_bytes() == once + b"After it." + newline.encode()


def test_a_section_without_its_end_is_left_alone(run, tmp_path):
    card = tmp_path / "README.md"
    begin = re.search("<!-- assay robustness .* -->", write_card(run).read_text())[0]
    card.write_text(f"{begin}\nno end\n")
    for _ in range(2):
        write_card(run, card)
    assert "no end" in card.read_text()
    assert card.read_text().count("## Robustness") == 1


def test_nothing_that_a_run_says_of_itself_is_markup_in_a_card(tmp_path):
    finding = {"code": HOSTILE, "severity": "warning", "message": HOSTILE, "evidence": {}, "remedy": HOSTILE}
    run = fabricate(tmp_path / "run", findings=[finding], command=f"assay {HOSTILE} ```` x", taxonomy={HOSTILE: 3})
    run.save(**{part: {**run.manifest[part], "name": HOSTILE} for part in ("model", "data")})
    card = write_card(run).read_text(encoding="utf-8")
    head, front, body = card.split("\n---\n")[0], *card.removeprefix("---\n").split("\n---\n", 1)
    assert all(re.fullmatch(r' *(- )?("n"|[a-z-]+):( ("([^"\\]|\\.)*"|[\d.]+))?', line) for line in front.splitlines())
    fence = re.search(r"^(`{4,})sh\n(.*)\n\1$", body, re.MULTILINE)
    assert len(fence[1]) > 4  # longer than what the command has in it
    text = body.replace(fence[0], "")
    assert not re.search(r"<(?!!-- (assay|end of assay) robustness [0-9a-f]{8} -->)", text)
    assert "\x1b" not in head + body
    assert "\u202e" not in body
    assert body.count("<!--") == 2


def test_a_card_that_cannot_be_read_is_an_error(run, tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="a card that can be read"):
        write_card(run, tmp_path / "README.md")


# --- the sheet of evidence


class Tags(HTMLParser):
    """What elements a page has, and their attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_a_sheet_has_the_result_the_classes_and_digests_that_can_be_checked(run):
    sheet = write_evidence(run).read_text(encoding="utf-8")
    parts = b"".join(p.read_bytes() for p in sorted((run.path / "samples").glob("*.parquet")))
    for said in (
        "60.0<small> %</small>",
        "24 of 40",
        "AML.T0043.001 Black-Box Optimization",
        "NISTAML.022 Evasion: white-box",
        "ab" * 32,
        "cd" * 32,
        hashlib.sha256((run.path / "manifest.json").read_bytes()).hexdigest(),
        hashlib.sha256(parts).hexdigest(),
    ):
        assert said in sheet


def test_nothing_that_a_run_says_of_itself_is_markup_in_a_sheet(run):
    elements = {tag for tag, _ in Tags(write_evidence(run).read_text(encoding="utf-8")).found} | {"li", "ul", "b"}
    finding = {"code": HOSTILE, "severity": HOSTILE, "message": HOSTILE * 99, "evidence": {}, "remedy": HOSTILE}
    run.save(
        findings=[finding] * 9,
        command=HOSTILE,
        updated=HOSTILE,
        assay=HOSTILE,
        machine={"device": HOSTILE, "torch": HOSTILE},
        taxonomy={HOSTILE: {"atlas": [HOSTILE], "nist": HOSTILE}},
        **{part: {**run.manifest[part], "name": HOSTILE, "fingerprint": HOSTILE} for part in ("model", "data")},
    )
    sheet = write_evidence(run).read_text(encoding="utf-8")
    found = Tags(sheet).found
    assert {tag for tag, _ in found} <= elements
    assert not [a for _, attrs in found for a in attrs if a.startswith("on") or a in ("src", "href")]
    assert "\x1b" not in sheet
    assert "default-src 'none'" in sheet
    assert "6 more findings" in sheet


@pytest.mark.parametrize("known", [None, 3, [], {"pgd": None}, {"pgd": {"atlas": 3, "nist": []}}])
def test_a_run_whose_classes_are_unknown_names_its_attacks_only(tmp_path, known):
    run = fabricate(tmp_path / "run", **({} if known is None else {"taxonomy": known}))
    r = record(run)
    assert [u.names for u in r.used] == ([("pgd",)] if known != {} else [])
    assert not any(u.atlas or u.nist for u in r.used)
    assert "NIST" not in write_evidence(run).read_text(encoding="utf-8")


def test_limits_say_what_the_run_lacks(run):
    assert any("upper bound" in limit for limit in record(run).limits)
    run.save(complete=False, findings=[{"code": "zero-gradient", "severity": "warning", "message": "No gradient."}])
    assert any("1 finding may change" in limit for limit in record(run).limits)
    assert record(run).limits[0].startswith("Interrupted after 40")
    run.save(identity={**run.manifest["identity"], "effort": "none", "prove": {"method": "smoothing", "alpha": 0.001}})
    said = " ".join(record(run).limits)
    assert "Nothing was attacked" in said
    assert "the smoothed classifier" in said
    assert "at least 99.9 %" in said


def test_a_run_without_an_eps_has_sizes_instead_of_a_robust_accuracy(run):
    threat = {"norm": "l2", "eps": None, "text": "l2", "box": [0, 1], "targeted": True}
    run.save(identity={**run.manifest["identity"], "threat": threat})
    r = record(run)
    assert [f.title for f in r.figures] == ["Clean accuracy"]
    assert r.sizes[0][0] == "Median size that fools (l2)"
    assert not r.shares
    assert "chosen wrong class" in " ".join(r.threat)
    assert "Median size" in write_card(run).read_text()


def test_accuracy_under_corruptions_is_on_record(run):
    levels = {"severities": [1, 2], "n": 40, "accuracy": [0.5, 0.25], "interval": [[0.3, 0.7], [0.1, 0.4]]}
    run.save(natural=[{"name": "fog", **levels}])
    for page in (write_card(run), write_evidence(run)):
        text = re.sub("<[^>]*>", "", page.read_text(encoding="utf-8"))
        assert "under fog at five severities it is right in 37.5 % of cases" in text


def test_the_parts_of_all_samples_add_up(run):
    r = record(run)
    assert sum(share for _, _, share in r.shares) == pytest.approx(1)
    assert [kind for kind, *_ in r.shares] == ["stood", "fooled", "wrong"]


def test_long_names_lose_their_middle():
    assert clip("a" * 30 + "b" * 30, 11) == "aaaaa…bbbbb"
    assert clip("short\nlines", 40) == "short lines"


# --- the command, and trackers without their packages


@pytest.mark.parametrize(
    ("form", "file"), [("html", "report.html"), ("card", "README.md"), ("evidence", "evidence.html")]
)
def test_the_command_writes_each_form(run, form, file):
    done = CliRunner().invoke(app, ["report", str(run.path), "--as", form, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"report": str(run.path / file)}
    assert (run.path / file).stat().st_size > 1000


def test_a_form_that_is_none_is_a_usage_error(run):
    done = CliRunner().invoke(app, ["report", str(run.path), "--as", "evidance"])
    assert done.exit_code == 2
    assert "Did you mean 'evidence'?" in done.stderr


def test_an_unknown_tracker_is_named_before_anything_is_sent(run):
    with pytest.raises(UsageError, match="Did you mean 'mlflow'"):
        track(["tensorboard,mlflo"], run)
    assert not (run.path / "tensorboard").exists()
    assert track([], run) == ()


def test_settings_of_settings_have_dotted_names():
    assert flat({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": 1, "d": None}


def test_records_are_written_without_torch(run):
    code = (
        "import sys; from pathlib import Path; from assay.runs import Run; from assay.reports.card import write_card;"
        "from assay.reports.evidence import write_evidence; from assay.reports.tracking import track;"
        f"run = Run.read({str(run.path)!r}); write_card(run); write_evidence(run); track([], run);"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    assert Run.read(run.path).manifest == run.manifest
