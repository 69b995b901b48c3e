"""Reports: what they say, that they need nothing else, and that nothing a run holds can break them."""

import copy
import html as markup
import io
import json
import re
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from typer.testing import CliRunner

from assay.cli.app import app
from assay.core.errors import RunError
from assay.core.progress import Snapshot, silent
from assay.reports import compare_table, live, print_run, verdict, write_report
from assay.reports.figures import confusions, curve, falling
from assay.reports.pictures import as_image, difference, picture
from assay.reports.summary import read, summarize
from assay.reports.table import median_size
from assay.reports.text import Units, call, count, duration, memory, percent, span
from assay.runs import SAMPLES, Run, exact_interval, totals
from assay.runs.statistics import upper_bound

EPS = 0.3
N, RIGHT, FOOLED = 40, 36, 12


def manifest_of(rows, **changes):
    """A manifest as the engine writes it."""
    n, clean, robust = (
        len(rows["index"]),
        rows["status"].count("misclassified"),
        rows["status"].count("robust"),
    )
    return {
        "assay": "0.1.0",
        "complete": True,
        "created": "2026-01-02T03:04:00+00:00",
        "updated": "2026-01-02T03:05:00+00:00",
        "command": "assay evaluate py:net:make data.npz --threat linf:0.3",
        "identity": {
            "threat": {"norm": "linf", "eps": EPS, "box": [0, 1], "targeted": False, "text": "linf:0.3"},
            "effort": "standard",
            "seed": 0,
            "prove": None,
            "model": "ab" * 32,
            "data": "cd" * 32,
            "plan": {"rounds": [{"name": "pgd-margin", "attack": {"name": "pgd", "steps": 20, "rel_step": 0.25}}]},
        },
        "model": {
            "name": "toynet",
            "source": "py:net:make",
            "fingerprint": "ab" * 32,
            "parameters": 1234,
            "classes": 4,
            "box": [0, 1],
            "mean": None,
            "std": None,
        },
        "data": {
            "name": "blobs",
            "source": "data.npz",
            "fingerprint": "cd" * 32,
            "n": n,
            "shape": [1, 8, 8],
            "class_names": ["ant", "bee", "cat", "dog"],
        },
        "machine": {"python": "3.11", "torch": "2.13", "device": "cpu", "threads": 2},
        "tolerance": "logits agree to 1e-5",
        "totals": {
            "n": n,
            "clean_accuracy": (n - clean) / n,
            "robust_accuracy": robust / n,
            "certified_accuracy": None,
            "interval": {"confidence": 0.95, "clean": [0.76, 0.97], "robust": [0.43, 0.75]},
            "passes": {"forwards": 8000, "backwards": 4000},
            "seconds": 1.5,
            "claimed": FOOLED,
            "rejected": 0,
            "per_class": [{"class": 0, "name": "ant", "n": 10, "clean": 0.9, "robust": 0.6}],
            "stages": [
                {"name": "clean", "entered": n, "broken": clean, "forwards": n, "backwards": 0, "seconds": 0.01},
                {
                    "name": "pgd-margin",
                    "entered": n - clean,
                    "broken": FOOLED,
                    "forwards": 7960,
                    "backwards": 4000,
                    "seconds": 1.4,
                },
            ],
        },
        "findings": [],
    } | changes


def fabricate(path, shape=(1, 8, 8), n=N, right=RIGHT, fooled=FOOLED, batch=20, classes=4, **changes):
    """Store a run of made-up samples: some wrong as they are, some fooled, the others robust."""
    draw = np.random.default_rng(0)
    order = draw.permutation(n)
    fell, wrong = set(order[:fooled].tolist()), set(order[right:].tolist())
    label = draw.integers(0, classes, n)
    size = np.where(np.isin(np.arange(n), list(wrong)), 0.0, np.inf)
    size[list(fell)] = draw.uniform(0.02, EPS, fooled)
    rows = {
        "index": list(range(n)),
        "label": label.tolist(),
        "prediction": [(y + (i in wrong)) % classes for i, y in enumerate(label)],
        "margin": [-1.0 if i in wrong else 2.0 for i in range(n)],
        "fooled": [i in fell for i in range(n)],
        "adversarial_prediction": [(y + 1) % classes if i in fell else None for i, y in enumerate(label)],
        "size": size.tolist(),
        "broken_by": ["pgd-margin" if i in fell else None for i in range(n)],
        "certified": [None] * n,
        "lower": [0.0] * n,
        "upper": size.tolist(),
        "forwards": [200] * n,
        "backwards": [100] * n,
        "status": ["misclassified" if i in wrong else "fooled" if i in fell else "robust" for i in range(n)],
    }
    clean = draw.uniform(0, 1, (n, *shape)).astype(np.float32)
    signs = draw.choice([-1.0, 1.0], (n, *shape))
    x = (clean + signs * np.where(np.isfinite(size), size, 0).reshape(-1, *[1] * len(shape))).clip(0, 1)
    run = Run.start(path, manifest_of(rows, **changes))
    for start in range(0, n, batch):
        hit = [i for i in range(start, min(n, start + batch)) if i in fell]
        run.add(
            {name: column[start : start + batch] for name, column in rows.items()},
            {
                "index": np.array(hit),
                "x": x[hit].astype(np.float32),
                "clean": clean[hit],
                "label": label[hit],
                "prediction": (label[hit] + 1) % classes,
                "clean_confidence": np.full(len(hit), 0.9),
                "confidence": np.linspace(0.5, 0.8, len(hit)),
            },
            {
                "seconds": 0.5,
                "claimed": len(hit),
                "rejected": 0,
                "stages": [
                    {"name": "clean", "entered": batch, "broken": 0, "forwards": batch, "backwards": 0, "seconds": 0.1},
                    {
                        "name": "pgd",
                        "entered": batch,
                        "broken": len(hit),
                        "forwards": 9,
                        "backwards": 9,
                        "seconds": 0.4,
                    },
                ],
            },
        )
    run.close()
    return run


@pytest.fixture
def run(tmp_path):
    return fabricate(tmp_path / "run")


def page_of(run):
    return write_report(run).read_text(encoding="utf-8")


def words(page):
    """What is to be read on a page."""
    body = re.sub(r"<(style|script)>.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", markup.unescape(re.sub(r"<[^>]+>", "", body)))


def printed(show, run, **options):
    console = Console(file=io.StringIO(), width=120, **options)
    show(run, console)
    return console.file.getvalue()


# the page


def test_the_page_says_what_the_run_found(run):
    page = page_of(run)
    text = words(page)
    for said in (
        verdict(run.manifest),
        "60.0 %",
        "90.0 %",
        "43.0 to 75.0 %",
        "All 12 adversarial inputs verified",
        "Complete: all 40 images",
        "upper bound",
        "pgd-margin",
        "pgd(steps=20, rel_step=0.25)",
        "ab" * 32,
        "ant",
        "logits agree",
        "assay evaluate py:net:make",
        "2 January 2026, 03:04 UTC",
        "8,000 forward and 4,000 backward",
    ):
        assert said in text, said
    assert page.count("<img ") == 3 * 12
    assert "None. The checks" in text


def test_the_page_needs_nothing_else(run):
    page = page_of(run)
    loaded = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert all(u.startswith(("data:image/png;base64,", "#")) for u in loaded)
    assert not re.search(r"https?:|url\(|@import|//cdn", page)
    assert "default-src 'none'" in page
    assert str(run.path.parent) not in page
    assert 20_000 < len(page) < 200_000


def test_every_picture_has_a_text_and_every_table_heads(run):
    page = page_of(run)
    assert all('alt="Sample ' in tag for tag in re.findall(r"<img [^>]*>", page))
    assert page.count("<table") == page.count("<thead")
    assert re.search(r'<svg[^>]*role="img" aria-label="Step curve: the robust accuracy is 90.0 % at size 0', page)


@pytest.mark.parametrize("out", ["elsewhere/r.html", "."])
def test_the_page_goes_where_it_is_wanted(run, tmp_path, out):
    written = write_report(run, tmp_path / out)
    assert written == (tmp_path / out if out != "." else tmp_path / "report.html")
    assert written.exists()
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_place_that_cannot_be_written_is_said(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Choose another --out"):
        write_report(run, tmp_path / "file" / "report.html")


def test_whatever_comes_from_a_run_is_escaped(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='alert(3)"
    template = manifest_of({"index": [0], "status": ["robust"]})
    finding = {"code": evil, "severity": evil, "message": evil, "evidence": {evil: [evil]}, "remedy": evil}
    identity = {
        "plan": {"rounds": [{"name": evil, "attack": {"name": evil, evil: evil}}]},
        "threat": template["identity"]["threat"] | {"text": evil, "norm": evil},
    }
    stage = {"name": evil, "entered": 40, "broken": 3, "forwards": 9}
    run = fabricate(
        tmp_path / "run",
        command=evil,
        assay=evil,
        created=evil,
        tolerance=evil,
        findings=[finding],
        model=template["model"] | {"name": evil, "source": evil},
        data=template["data"] | {"name": evil, "class_names": [evil] * 4, "n": N},
        machine={evil: evil},
        identity=template["identity"] | identity,
        totals=template["totals"] | {"n": N, "stages": [stage]},
    )
    page = page_of(run)
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert page.count("<script") == page.count("</script>") == 1
    assert not re.search(r"<[^>]*\s(?:onload|onerror)=", re.sub(r'"[^"]*"', '""', page))
    printed(print_run, run)


def test_markup_of_the_terminal_is_not_obeyed(tmp_path):
    finding = {"code": "c", "severity": "info", "message": "[red]loud[/red] [/]", "remedy": "[bold"}
    assert "[red]loud[/red] [/]" in printed(print_run, fabricate(tmp_path / "run", findings=[finding]))


# what is missing


def place(value, way):
    for key in way:
        value = value[key]
    return value


def without(manifest, path):
    changed = copy.deepcopy(manifest)
    *way, last = path
    place(changed, way)[last] = None
    return changed


def paths(value, way=()):
    """Every place in a nested mapping."""
    for key, inner in value.items():
        yield (*way, key)
        if isinstance(inner, dict):
            yield from paths(inner, (*way, key))


def test_any_part_of_the_manifest_may_be_missing(run, tmp_path):
    whole = copy.deepcopy(run.manifest)
    for path in paths(whole):
        run.manifest = without(whole, path)
        assert "<h1>" in write_report(run, tmp_path / "x.html").read_text(), path
        assert printed(print_run, run), path
        assert verdict(run.manifest).endswith("."), path


def test_an_interrupted_run_counts_what_is_stored(tmp_path):
    run = fabricate(tmp_path / "run", complete=False, totals=None)
    run.manifest["data"]["n"] = 100
    text = words(page_of(run))
    assert "Interrupted after 40 of 100 images: within an l-infinity ball of 0.3, toynet still" in text
    assert "60.0 % of these 40 images" in text
    assert "Complete" not in text
    assert "Interrupted after 40 of 100 images" in verdict(run)


def test_an_interrupted_run_does_not_say_that_nothing_was_found(tmp_path):
    over, partial = fabricate(tmp_path / "over"), fabricate(tmp_path / "partial", complete=False, totals=None)
    for shown in (printed(print_run, over), words(page_of(over))):
        assert "makes these numbers doubtful" in shown
        assert "so far" not in shown
    for shown in (printed(print_run, partial), words(page_of(partial))):
        assert "No findings so far." in shown
        assert "doubtful" not in shown


def test_totals_that_fit_the_table_are_not_counted_anew(run):
    assert read(run)[0] is run.manifest


@pytest.mark.parametrize("changes", [{"n": 20, "robust_accuracy": 0.1}, {"n": None}, {"clean_accuracy": "many"}])
def test_stale_totals_give_way_to_the_table_and_the_batches(run, changes):
    run.manifest["totals"] |= changes
    manifest, table = read(run)
    names = run.manifest["data"]["class_names"]
    assert manifest["totals"] == totals(table, run.tallies(), eps=EPS, class_names=names)
    s = summarize(manifest)
    assert (s.n, s.robust.value, s.claimed, s.seconds) == (40, 0.6, FOOLED, 1.0)
    assert [(g.name, g.entered, g.broken) for g in s.stages] == [("clean", 40, 0), ("pgd", 40, FOOLED)]
    assert [c.name for c in s.classes] == names
    assert all(c.robust.low < c.robust.value < c.robust.high for c in s.classes)


@pytest.mark.parametrize("evil", [-1, 0, 10**400, 1e308, float("nan"), True, "x", [], [1], {"a": 1}, None])
def test_no_entry_of_the_totals_can_break_the_page(run, tmp_path, evil):
    whole = copy.deepcopy(run.manifest)
    whole["totals"]["per_class"] = whole["totals"]["per_class"][:1]
    ways = [("totals", *way) for way in paths(whole["totals"])]
    for way in ways:
        run.manifest = copy.deepcopy(whole)
        place(run.manifest, way[:-1])[way[-1]] = evil
        assert "<h1>" in write_report(run, tmp_path / "x.html").read_text(), way
        assert printed(print_run, run), way
        assert verdict(run.manifest).endswith("."), way
    for part in ("per_class", "stages"):
        for key in whole["totals"][part][0]:
            run.manifest = copy.deepcopy(whole)
            run.manifest["totals"][part][0][key] = evil
            assert "<h1>" in write_report(run, tmp_path / "x.html").read_text(), (part, key)
            assert printed(print_run, run), (part, key)


def test_a_run_without_samples_has_a_page(tmp_path):
    run = Run.start(tmp_path / "run", {"complete": False, "model": None, "findings": None})
    run.close()
    text = words(page_of(run))
    assert "interrupted before any sample was finished" in text
    assert "no curve" in text
    assert "interrupted" in printed(print_run, run)


def test_inputs_that_cannot_be_read_do_not_hide_the_numbers(run):
    for file in (run.path / "adversarials").glob("*.npz"):
        file.write_bytes(b"no zip")
    text = words(page_of(run))
    assert "cannot be read" in text
    assert "60.0 %" in text


# kinds of runs


def minimal(tmp_path, **changes):
    run = fabricate(tmp_path / "minimal", **changes)
    run.manifest["identity"]["threat"] |= {"norm": "l2", "eps": None, "text": "l2"}
    run.manifest["totals"] |= {"robust_accuracy": None}
    run.manifest["totals"]["interval"]["robust"] = None
    return run


def test_without_eps_sizes_are_the_result(tmp_path):
    run = minimal(tmp_path, fooled=30)
    text = words(page_of(run))
    middle = Units().show(median_size(run.samples()))
    assert f"half of those are fooled by an l2 change of {middle} or less" in text
    assert "Robust accuracy of" not in text
    assert "Clean accuracy" in text
    assert "measured the smallest l2 change" in verdict(run.manifest)
    assert "robust  " not in printed(print_run, run)


@pytest.mark.parametrize(
    ("shape", "pngs", "lines"),
    [((3, 8, 8), 36, 0), ((8, 8, 3), 36, 0), ((8, 8), 36, 0), ((30,), 0, 36), ((2, 700), 0, 36)],
)
def test_samples_of_any_shape_are_drawn(tmp_path, shape, pngs, lines):
    page = page_of(fabricate(tmp_path / "run", shape=shape))
    assert page.count("<img ") == pngs
    assert page.count('class="view"><svg') == lines


def test_large_pictures_are_reduced(tmp_path):
    assert len(page_of(fabricate(tmp_path / "run", shape=(3, 224, 224), n=16, right=14, batch=4))) < 4_000_000


def test_many_classes_show_the_weakest_first(tmp_path):
    run = fabricate(tmp_path / "run", n=600, right=550, fooled=200, batch=100, classes=60, totals=None)
    run.manifest["data"]["class_names"] = None
    page = page_of(run)
    assert "The 20 least robust of 60 classes" in page
    assert "The other 40 classes" in page
    assert 'class="heat' not in page


def test_findings_stand_in_order_of_gravity(tmp_path):
    low = {
        "code": "train-mode",
        "severity": "info",
        "message": "In training mode.",
        "evidence": {"modules": 3},
    }
    high = {"code": "zero-gradient", "severity": "error", "message": "No gradient.", "remedy": "Look."}
    found = [low, high]
    run = fabricate(tmp_path / "run", findings=found)
    text = words(page_of(run))
    assert text.index("zero-gradient") < text.index("train-mode")
    assert "1 finding may change" in text
    assert "modules3" in text.replace(" ", "")
    shown = printed(print_run, run)
    assert shown.index("zero-gradient") < shown.index("train-mode")


def test_what_is_proven_is_drawn(run):
    table = run.samples()
    lower = pa.array(np.where(np.asarray(table["status"].to_pylist()) == "robust", EPS, 0.01))
    table = table.set_column(table.schema.get_field_index("lower"), SAMPLES.field("lower"), lower)
    drawn = curve(summarize(run.manifest), table)
    assert drawn.proven
    run.manifest["totals"]["certified_accuracy"] = 0.5
    assert "and 50.0 % is proven." in verdict(run.manifest)


def test_threats_are_said_in_words(run):
    threat = run.manifest["identity"]["threat"]
    threat |= {"norm": "l0", "eps": 20, "text": "l0:20"}
    assert verdict(run.manifest).startswith("With at most 20 values changed, toynet")
    threat |= {"norm": "linf", "eps": 8 / 255, "text": "linf:8/255", "targeted": True}
    assert "l-infinity ball of 8/255 and facing an attacker who wants a chosen class" in verdict(run.manifest)


# what an evaluation was asked to say besides


AUDIT = {"attacked": 20, "broken": 0, "missed_at_most": upper_bound(0, 20), "confidence": 0.95}


def test_the_robust_accuracy_at_the_eps_that_were_asked_for(tmp_path):
    run = fabricate(tmp_path / "run", eps_list=[0.1, 0.2, EPS, 0.5])
    sizes = run.samples()["size"].to_numpy()
    shown, text = printed(print_run, run), words(page_of(run))
    for eps in (0.1, 0.2, EPS):
        hits = int((sizes > eps).sum())
        low, high = exact_interval(hits, N)
        row = rf"{eps}\s+{percent(hits / N)}\s+{span(low, high)}"
        assert re.search(row, shown), row
        assert re.search(row.replace(r"\s+", r"\s*"), text), row
    assert "0.5" not in shown
    assert "0.225" not in text


def test_without_a_list_of_eps_the_page_shows_five(run):
    assert "0.225" in words(page_of(run))
    assert "eps   robust" not in printed(print_run, run)


def test_an_audit_is_said_beside_the_verdict(tmp_path):
    run = fabricate(tmp_path / "run", audit=AUDIT)
    said = "An audit of 20 of the 24 survivors broke none: at most 13.9 % of survivors were missed (95 %)."
    assert said in words(page_of(run))
    assert said in printed(print_run, run)


def test_an_audit_that_broke_something_says_of_how_many(tmp_path):
    """What it broke was standing before: 24 are robust after it, 26 before."""
    broke = AUDIT | {"broken": 2, "missed_at_most": upper_bound(2, 20)}
    shown = printed(print_run, fabricate(tmp_path / "run", audit=broke))
    assert "An audit of 20 of the 26 survivors broke 2: at most 28.3 % of survivors were missed (95 %)." in shown


def test_what_bounded_a_run_is_said(tmp_path):
    run = fabricate(tmp_path / "run", bounded="--max-passes 50 ended the attacks on 9 samples")
    for shown in (words(page_of(run)), printed(print_run, run)):
        assert "Stopped early: --max-passes 50 ended the attacks on 9 samples." in shown
    assert "Complete: all 40 images" in words(page_of(run))
    partial = fabricate(tmp_path / "partial", bounded="--max-seconds 60 passed", complete=False, totals=None)
    partial.manifest["data"]["n"] = 100
    assert verdict(partial).startswith("Stopped after 40 of 100 images: within")
    assert verdict(partial).endswith("Stopped early: --max-seconds 60 passed.")


def test_json_tells_the_same(tmp_path):
    from assay.cli.evaluate import summary
    from assay.evaluation import Evaluation

    run = fabricate(tmp_path / "run", eps_list=[0.1, EPS], audit=AUDIT, bounded="enough")
    told = json.loads(json.dumps(summary(Evaluation(run)), allow_nan=False))
    assert (told["audit"], told["bounded"]) == (AUDIT, "enough")
    assert [p["eps"] for p in told["curve"]] == [0.1, EPS]
    assert told["curve"][1] == {"eps": EPS, "robust_accuracy": 0.6, "interval": [*exact_interval(24, N)]}
    plain = summary(Evaluation(fabricate(tmp_path / "plain")))
    assert (plain["audit"], plain["bounded"], plain["curve"]) == (None, None, [])


@pytest.mark.parametrize(
    ("asked", "code", "says"), [(".1,.5", 2, "up to the eps of --threat, 0.3"), (".1,x", 2, "--eps-list")]
)
def test_a_list_of_eps_that_cannot_be_read_off_is_refused_before_anything_runs(asked, code, says):
    command = ["evaluate", "demo:mnist-robust", "demo:mnist", "--threat", "linf:0.3", "--eps-list", asked]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == code
    assert says in done.stderr


@pytest.mark.parametrize("evil", [-1, 0, 10**400, 1e308, float("nan"), True, "x", [], [1, "a", None], {"a": 1}, None])
def test_none_of_it_can_break_the_page(run, tmp_path, evil):
    whole = run.manifest | {"audit": AUDIT, "bounded": "enough", "eps_list": [0.1]}
    for way in [("audit",), ("bounded",), ("eps_list",), *(("audit", key) for key in AUDIT)]:
        run.manifest = copy.deepcopy(whole)
        place(run.manifest, way[:-1])[way[-1]] = evil
        assert "<h1>" in write_report(run, tmp_path / "x.html").read_text(), way
        assert printed(print_run, run), way


# figures


def test_the_curve_ends_at_the_robust_accuracy(run):
    s, table = summarize(run.manifest), run.samples()
    drawn = curve(s, table)
    assert drawn.steps[0][:2] == [0.0, 0.9]
    assert drawn.steps[-1][1] == s.robust.value
    assert drawn.readings[-1][:2] == ("0.3", "60.0 %")


def test_a_size_just_above_eps_counts_within_it(run):
    table = run.samples()
    size = np.where(table["fooled"].to_numpy(), np.float32(EPS), table["size"].to_numpy())
    table = table.set_column(table.schema.get_field_index("size"), SAMPLES.field("size"), pa.array(size))
    assert curve(summarize(run.manifest), table).steps[-1][1] == 0.6


def test_a_thousand_steps_are_thinned_without_changing_the_ends():
    sizes = np.random.default_rng(1).uniform(0, 1, 5000)
    steps = falling(sizes, 1.0, 0.95)
    assert len(steps.x) < 420
    assert steps.at(0.0)[0] == 1.0
    assert steps.at(1.0)[0] == 0.0
    assert all(abs(steps.at(e)[0] - (sizes > e).mean()) < 0.005 for e in (0.1, 0.5, 0.9))
    assert (steps.low <= steps.y).all()
    assert (steps.y <= steps.high).all()


def test_confusions_count_what_was_fooled(run):
    counted = confusions(run.samples())
    assert counted.fooled == FOOLED == sum(map(sum, counted.cells))
    assert all(b == (a + 1) % 4 for a, b, _ in counted.top)


def test_pictures_are_exact():
    from PIL import Image

    def pixels(uri):
        import base64

        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))

    grey = np.linspace(0, 1, 64).reshape(1, 8, 8)
    assert (pixels(picture(as_image(grey), 0, 1))[..., 0] == np.round(grey[0] * 255)).all()
    change = np.zeros((4, 4))
    change[0, 0], change[0, 1] = 0.1, -0.1
    shown = pixels(difference(change, 0.1))
    assert shown[0, 0].tolist() == [178, 24, 43]
    assert shown[0, 1].tolist() == [33, 102, 172]
    assert shown[1, 1].tolist() == [247, 247, 247]


# words


def test_numbers_are_written_honestly():
    assert [percent(v) for v in (1, 0.9996, 0.87, 0.0004, 0, None)] == [
        "100.0 %",
        "99.96 %",
        "87.0 %",
        "0.04 %",
        "0.0 %",
        "\N{EN DASH}",
    ]
    assert [count(v) for v in (100000, 9.97, 9.5, 3, None)] == ["100,000", "10", "9.5", "3", "\N{EN DASH}"]
    assert [duration(v) for v in (0.034, 31.2, 59.97, 125, 11520)] == [
        "0.034 s",
        "31.2 s",
        "1 min 00 s",
        "2 min 05 s",
        "3 h 12 min",
    ]
    assert [memory(v) for v in (0, 999, 1000, 2_471_424)] == ["0 B", "999 B", "1 kB", "2.47 MB"]
    assert Units.of("linf:8/255").show(4 / 255) == "4/255"
    assert Units.of("linf:0.3").show(float("inf")) == "none found"
    assert call({"name": "targets", "attack": {"name": "apgd", "steps": 9}}) == "targets(attack=apgd(steps=9))"


# the terminal


def test_the_summary_in_the_terminal(run):
    for shown in (printed(print_run, run), printed(print_run, run.manifest)):
        for said in (
            "toynet still classifies 60.0 % of 40 images",
            "43.0 to 75.0 %",
            "300",
            "pgd-margin",
            "No findings",
        ):
            assert said in shown, said


def test_runs_stand_side_by_side(run, tmp_path):
    other = fabricate(tmp_path / "other", complete=False)
    shown = printed(lambda runs, console: console.print(compare_table(runs)), [run, other, run.manifest])
    assert shown.index("run ") < shown.index("other")
    assert shown.count("60.0 %") == 3
    assert "40*" in shown
    assert "* interrupted" in shown


def shot(done=0, **changes):
    told = {"total": 500, "done": done, "right": done, "fooled": done // 8, "stage": "apgd-ce"}
    return Snapshot(**(told | {"passes": done * 100, "seconds": done / 10} | changes))


def test_progress_is_shown_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, legacy_windows=False)
    with live(console) as progress:
        progress(shot())
        progress(shot(320, right=310, fooled=40))
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", console.file.getvalue())
    for said in (
        "320 of 500 samples",
        "84.4 % so far",
        "40 fooled",
        "apgd-ce",
        "1,000 passes/s",
        "0:32 elapsed",
        "0:18 left",
    ):
        assert said in shown, said


def test_progress_tells_how_samples_stand_before_any_is_stored():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, legacy_windows=False)
    with live(console) as progress:
        progress(shot(0, seen=500, right=490, fooled=40, proven=0))
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", console.file.getvalue())
    assert "0 of 500 samples" in shown
    assert "0.0 % proven ≤ robust ≤ 90.0 % so far" in shown


def test_progress_is_cheap():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, legacy_windows=False)
    with live(console) as progress:
        began = time.perf_counter()
        for i in range(20_000):
            progress(shot(i % 500))
        spent = time.perf_counter() - began
    assert spent < 2
    assert console.file.getvalue().count("samples") < 10 * (spent + 1)


def test_progress_keeps_quiet_where_nobody_looks():
    console = Console(file=io.StringIO(), force_terminal=False)
    with live(console) as progress:
        assert progress is silent
        progress(shot(3))
    assert console.file.getvalue() == ""


def test_progress_lets_an_interrupt_through():
    def interrupted():
        with live(Console(file=io.StringIO(), force_terminal=True)) as progress:
            progress(shot(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_reports_do_not_import_torch():
    code = "import sys, assay.reports; sys.exit(any(m in sys.modules for m in ('torch', 'plotly')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_hostile_manifest_says_of_corruptions_is_left_out_or_escaped() -> None:
    """Only known corruptions, and shares that are shares."""
    from assay.reports.natural import natural

    assert natural({}) is None
    assert natural({"natural": [{"name": "<script>"}, 7, None]}) is None
    told = {"name": "fog", "severities": [1, 2, 9, "x"], "accuracy": [0.5, 7, 0.1, None], "interval": [[0, 1], "?"]}
    fog = natural({"natural": [told]}).worst
    assert [r.value for r in fog.rates] == [0.5, None, None, None, None]
    assert fog.mean == 0.5
