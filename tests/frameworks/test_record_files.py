"""What others read of a record: model cards by Hugging Face's own reader, sheets of evidence as PDF."""

import math
import re
import shlex
import zlib
from datetime import date
from pathlib import Path

import pytest
from needs import framework
from typer.testing import CliRunner

from assay.cli.app import app
from assay.core.errors import RunError
from assay.reports.card import _yaml, write_card
from assay.reports.evidence import write_evidence
from test_records import HOSTILE, TAXONOMY
from test_reports import fabricate

hub = framework("huggingface_hub")
yaml = framework("yaml")
framework("weasyprint")

PAGE = (Path(__file__).parents[2] / "docs" / "records.md").read_text(encoding="utf-8")

MINE = """---
# what I wrote
license: mit
tags: [digits,   "a: b"]
model-index:
- name: My Net   # its name
  results:
  - task:
      type: text-generation
    dataset: {type: other, name: Other}
    metrics:
    - {type: bleu, value: 3, verified: false}
    note: kept, too
# of its release

date: 2026-01-02
---
# My net
"""


@pytest.fixture
def run(tmp_path):
    return fabricate(tmp_path / "run", taxonomy=TAXONOMY)


# --- model cards


def test_hugging_face_reads_what_was_measured(run):
    card = hub.ModelCard.load(write_card(run))
    clean, robust = card.data.eval_results
    assert card.data.model_name == "toynet"
    assert (clean.metric_type, clean.metric_value) == ("accuracy", 0.9)
    assert (robust.metric_type, robust.metric_value) == ("robust_accuracy", 0.6)
    assert robust.metric_name == "Robust accuracy (linf:0.3)"
    assert robust.metric_args["threat"] == "linf:0.3"
    assert robust.task_type == "image-classification"
    assert robust.dataset_args == {"fingerprint": "cd" * 32}


def test_a_card_keeps_its_metadata_as_they_were_written(run, tmp_path):
    file = tmp_path / "README.md"
    file.write_text(MINE)
    card = write_card(run, file).read_text()
    assert card.startswith('---\n# what I wrote\nlicense: mit\ntags: [digits,   "a: b"]\nmodel-index:\n')
    assert "\n# of its release\n\ndate: 2026-01-02\n---\n# My net\n" in card
    other, *ours = hub.ModelCard.load(file).data.eval_results
    assert (other.metric_type, other.metric_value, other.verified) == ("bleu", 3, False)
    assert [r.metric_name for r in ours] == ["Clean accuracy", "Robust accuracy (linf:0.3)"]
    assert yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"][0]["note"] == "kept, too"
    assert write_card(run, file).read_text() == card


def test_runs_of_several_threats_stand_side_by_side(run, tmp_path):
    file = tmp_path / "README.md"
    write_card(run, file)
    threat = {"norm": "l2", "eps": 0.5, "text": "l2:0.5", "box": [0, 1], "targeted": False}
    write_card(fabricate(tmp_path / "other", identity={**run.manifest["identity"], "threat": threat}), file)
    kept = {r.metric_name for r in hub.ModelCard.load(file).data.eval_results}
    assert kept == {"Clean accuracy", "Robust accuracy (linf:0.3)", "Robust accuracy (l2:0.5)"}
    assert file.read_text().count("\n## Robustness") == 2


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ("license: [", "metadata in YAML"),
        ("just a sentence", "metadata by key"),
        ("{license: mit}", "metadata"),
        ("model-index: &a\n- name: x\n  results: []\nother: *a", "metadata"),
    ],
)
def test_metadata_that_would_be_harmed_are_refused(run, tmp_path, front, said):
    file = tmp_path / "README.md"
    file.write_text(f"---\n{front}\n---\n")
    with pytest.raises(RunError, match=said):
        write_card(run, file)
    assert file.read_text() == f"---\n{front}\n---\n"


def test_hostile_names_come_back_as_they_are(tmp_path):
    run = fabricate(tmp_path / "run")
    name = "a: \"b\" # c\t\\ {d} 'e' é \N{SNAKE} - ? ! & * %"
    run.save(model={**run.manifest["model"], "name": name})
    assert hub.ModelCard.load(write_card(run)).data.model_name == " ".join(name.split())


@pytest.mark.parametrize(
    "value",
    [
        "",
        "yes",
        "1e3",
        HOSTILE,
        "\x85\u2028\x7f\ufeff\x00",
        1e-05,
        -1e22,
        math.inf,
        10**30,
        None,
        True,
        date(2026, 1, 2),
    ],
)
def test_every_value_comes_back_from_yaml(value):
    nested = {"a-b": [value, [value, {"n": value, "y": []}], {}], "on": {"x": {"z": value}}}
    assert yaml.safe_load(_yaml(nested)) == nested


# --- the sheet as PDF


def objects(pdf):
    """The objects of a PDF, unpacked."""
    packed = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL)
    return pdf + b"".join(zlib.decompressobj().decompress(p) for p in packed if p[:1] == b"x")


def pages(pdf):
    return len(re.findall(rb"/Type\s*/Page\b", objects(pdf)))


def test_a_pdf_has_one_page_and_the_same_bytes_again(run, tmp_path):
    first = write_evidence(run, tmp_path / "evidence.pdf").read_bytes()
    assert first.startswith(b"%PDF")
    assert pages(first) == 1
    assert re.search(rb"/MediaBox\s*\[0 0 595\.\d+ 841\.\d+\]", objects(first))
    assert b"/CreationDate" not in objects(first)
    assert write_evidence(run, tmp_path / "again.PDF").read_bytes() == first


def test_a_pdf_has_one_page_whatever_a_run_says_of_itself(run, tmp_path):
    long = HOSTILE + "M" * 5000
    finding = {"code": long, "severity": "error", "message": long, "remedy": long}
    run.save(
        complete=False,
        bounded=long,
        findings=[finding] * 99,
        command=long,
        assay=long,
        machine=dict.fromkeys(("python", "torch", "device", "platform"), long),
        taxonomy={
            f"{i}{long}": {"atlas": ["AML.T0043.000 " + "M" * 32] * 9, "nist": f"NISTAML.022 {'M' * (i + 1)}"}
            for i in range(48)
        },
        **{part: {**run.manifest[part], "name": long, "fingerprint": long} for part in ("model", "data")},
    )
    pdf = write_evidence(run, tmp_path / "evidence.pdf").read_bytes()
    assert pages(pdf) == 1
    assert b"/URI" not in objects(pdf)


# --- the page about all this


def test_every_command_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in re.search(r"(?ms)^```sh\n(.*?)^```$", PAGE)[1].splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
    assert pages((tmp_path / "evidence.pdf").read_bytes()) == 1
    assert hub.ModelCard.load(tmp_path / "README.md").data.eval_results
    for code in re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE):
        exec(compile(code, "records.md", "exec"), {})
