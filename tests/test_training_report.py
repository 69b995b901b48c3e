"""How a training is shown: in the terminal while it lasts, and as a page when it is over."""

import html as markup
import io
import math
import re
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
from rich.console import Console

from assay.core.errors import RunError
from assay.reports.text import Units
from assay.reports.training import Scale, headline, kept_row, render_history, spread, write_history
from assay.reports.training_live import showing

EPS = 8 / 255
COLLAPSE = (
    "catastrophic overfitting: FGSM accuracy 61.0%, PGD accuracy 2.0%; back to the best weights, at half the rate"
)


def row(epoch, **changes):
    """A row as training writes it; the network gets better with every epoch."""
    return {
        "epoch": epoch,
        "steps": round(100 * epoch),
        "attempt": 0,
        "lr": 0.1 - 0.01 * epoch,
        "eps": EPS,
        "loss": 2.0 / (1 + epoch),
        "train": 0.30 + 0.02 * epoch,
        "clean": 0.60 + 0.02 * epoch,
        "fgsm": 0.35 + 0.02 * epoch,
        "pgd": 0.30 + 0.02 * epoch,
        "forwards": round(11_000 * epoch),
        "backwards": round(10_000 * epoch),
        "seconds": 40.0 * epoch,
        "validation": 2.0,
        "event": "",
        "parts": {"natural": 1.0 / (1 + epoch), "regulariser": 1.0 / (1 + epoch)},
    } | changes


def about(**changes):
    """What training says of itself."""
    return {
        "method": {"name": "trades", "beta": 6.0},
        "threat": {"norm": "linf", "eps": EPS, "box": [0.0, 1.0], "targeted": False, "text": "linf:8/255"},
        "settings": {"batch_size": 128, "lr": 0.1, "augment": "", "select": "robust"},
        "epochs": 4,
        "seed": 7,
        "model": "ab" * 32,
        "data": {"train": "cd" * 32, "valid": "ef" * 32, "extra": None},
        "stopped": "",
        "file": "hardened.safetensors",
    } | changes


ROWS = [row(1.0), row(2.0), row(3.0, pgd=0.02, fgsm=0.61, event=COLLAPSE), row(4.0)]


def words(page):
    """What is to be read on a page."""
    body = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", markup.unescape(re.sub(r"<[^>]+>", "", body)))


# the page


def test_the_page_says_what_validation_saw_and_that_it_is_no_verdict(tmp_path):
    path = write_history(tmp_path / "history.html", ROWS, about())
    text = words(path.read_text(encoding="utf-8"))
    for said in (
        "Trained by trades within an l-infinity ball of 8/255, the network of epoch 4 is right on 68.0 % of the "
        "validation samples, and on 38.0 % when PGD attacks them.",
        "Complete: all 4 epochs were trained.",
        "This is a validation by PGD, not a verdict: assay evaluate says what the network can take.",
        "The weights with the best validation are kept in hardened.safetensors: those of epoch 4.",
        "44,000 forward and 40,000 backward passes, in 2 min 40 s; of these, validation took 8.0 s.",
        "Catastrophic overfitting: FGSM accuracy 61.0%",
        "kept: epoch 4",
        "regulariser",
        "batch size",
        "ab" * 32,
    ):
        assert said in text, said
    assert [p.name for p in tmp_path.iterdir()] == ["history.html"]


def test_the_page_needs_nothing_else():
    page = render_history(ROWS, about())
    assert not re.search(r"https?:|url\(|@import|<script|<img|<link", page)
    assert "default-src 'none'" in page
    assert page.count("<svg") == page.count('role="img" aria-label="') == 4
    assert page.count("<table") == page.count("<thead") == 1
    assert len(page) < 60_000


def test_every_validation_is_a_row_of_the_table_and_the_kept_one_is_marked():
    table = re.search(r"<tbody>.*?</tbody>", render_history(ROWS, about()), flags=re.DOTALL).group()
    lines = [[words(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", line)] for line in table.split("</tr>")[:-1]]
    assert [line[0] for line in lines] == ["1", "2", "3 1", "4 kept"]
    assert lines[1][1:5] == ["34.0 %", "39.0 %", "64.0 %", "34.0 %"]
    assert lines[1][5:] == ["0.6667", "0.3333", "0.3333", "0.08", "8/255", "22,000", "20,000", "1 min 20 s"]


def test_a_long_history_is_folded():
    assert "<summary>40 rows</summary>" in render_history([row(float(i)) for i in range(1, 41)], about(epochs=40))
    assert "rows</summary>" not in render_history(ROWS, about())


@pytest.mark.parametrize("rows", [[], [row(0.5, parts={})], [row(1.0, event=COLLAPSE)]], ids=["none", "one", "bad"])
def test_a_history_may_be_short(rows):
    page = render_history(rows, about())
    assert page.count("<svg") == (4 if rows else 0)
    assert "nan" not in page
    assert "Not complete: " in words(page)


def test_values_that_are_not_finite_leave_a_gap():
    broken = [row(1.0), row(2.0, loss=math.inf, parts={"natural": math.nan}), row(3.0)]
    drawn = re.findall(r' d="([^"]*)"', render_history(broken, about()))
    assert [path.count("L") for path in drawn] == [2, 2, 2, 2, 1, 1, 1, 2, 2]
    assert not any("nan" in path or "inf" in path for path in drawn)


def test_whatever_comes_from_a_training_is_escaped():
    evil = "</style><script>alert(1)</script>\" onload='alert(2)"
    given = about(method={"name": evil, evil: evil}, stopped=evil, file=evil, settings={evil: evil}, data={evil: evil})
    given["threat"] = {"text": evil, "norm": evil, "eps": EPS}
    page = render_history([row(1.0, event=evil, parts={evil: 1.0}), row(2.0, parts={evil: 1.0})], given)
    assert "alert(1)" in page
    assert "<script" not in page
    assert page.count("</style>") == 1
    assert not re.search(r"<[^>]*\sonload=", re.sub(r'"[^"]*"', '""', page))


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(RunError, match="Choose another --out"):
        write_history(tmp_path / "nowhere" / "history.html", ROWS, about())


def test_why_training_ended_early_is_said():
    early = "stopped: no better validation in 3 epochs"
    text = words(render_history(ROWS, about(epochs=30, stopped=early)))
    assert "Ended in epoch 4 of 30: no better validation in 3 epochs." in text
    assert "Complete" not in text


# which weights were kept


@pytest.mark.parametrize(
    ("pgds", "epses", "select", "epoch"),
    [
        ([0.2, 0.4, 0.3], [EPS] * 3, "robust", 2),
        ([0.2, 0.4, 0.3], [EPS] * 3, "last", 3),
        ([0.4, 0.4, 0.4], [EPS] * 3, "robust", 3),
        ([0.4, 0.4, 0.3], [EPS / 4, EPS / 2, EPS], "robust", 1),
        ([0.4, 0.4, 0.4], [EPS / 2, EPS, EPS], "robust", 3),
    ],
    ids=["best", "last", "latest of equals", "equals before the full eps", "equals at the full eps"],
)
def test_the_row_that_was_kept_is_found(pgds, epses, select, epoch):
    rows = [row(float(i), pgd=p, eps=e) for i, (p, e) in enumerate(zip(pgds, epses, strict=True), 1)]
    assert kept_row(rows, about(settings={"select": select}))["epoch"] == epoch


def test_a_row_of_trouble_is_never_kept():
    assert kept_row([row(1.0), row(2.0, pgd=0.9, event=COLLAPSE)], about())["epoch"] == 1
    assert kept_row([row(1.0, event=COLLAPSE)], about()) is None


def test_last_weights_that_are_not_the_best_are_said_to_be_so():
    rows = [row(1.0, pgd=0.45), row(2.0, pgd=0.40)]
    text = words(render_history(rows, about(settings={"select": "last"})))
    assert "The last weights are kept in hardened.safetensors; PGD accuracy was best in epoch 1, 45.0 %." in text


def test_without_a_validation_nothing_is_claimed():
    assert "nothing can be said of it" in headline(None, about())


# the charts


def test_a_line_runs_through_its_values():
    """Two epochs: the path is at half and at all of the width, at 1 - accuracy of the height."""
    rows = [row(1.0, pgd=0.25), row(2.0, pgd=0.5)]
    assert '<path class="n0" d="M500.0 750.0L1000.0 500.0"/>' in render_history(rows, about())


@pytest.mark.parametrize(
    ("values", "units", "labels"),
    [
        ([0.3, 2.1], Units(), ["0", "0.5", "1", "1.5", "2", "2.5"]),
        ([0.1], Units(), ["0", "0.02", "0.04", "0.06", "0.08", "0.1"]),
        ([0.0], Units(), ["0", "1"]),
        ([-0.9, 0.9], Units(), ["-1", "-0.5", "0", "0.5", "1"]),
        ([EPS], Units(255), ["0", "2/255", "4/255", "6/255", "8/255"]),
    ],
    ids=["loss", "lr", "zero", "negative", "eps"],
)
def test_ticks_are_round_and_values_fit(values, units, labels):
    scale = Scale.around(values, units)
    assert [t.label for t in scale.ticks] == labels
    np.testing.assert_allclose([t.at for t in scale.ticks], np.linspace(100, 0, len(labels)))
    assert all(0 <= scale.down(v) <= 100 for v in values)


@pytest.mark.parametrize("places", [[], [40.0], [50, 50, 50, 50], [0, 1, 99, 100], [100, 100, 99], [20, 60, 40]])
def test_labels_do_not_touch_and_keep_their_order(places):
    moved = spread(places, gap=7)
    assert list(np.argsort(moved, kind="stable")) == list(np.argsort(places, kind="stable"))
    assert all(b - a >= 7 - 1e-9 for a, b in zip(sorted(moved), sorted(moved)[1:], strict=False))
    assert all(0 <= v <= 100 for v in moved)


def test_labels_with_room_stay_where_they_are():
    assert spread([20, 60, 40], gap=7) == [20, 60, 40]


# the terminal


@dataclass(frozen=True)
class Told:
    """What training tells whoever watches."""

    done: int
    what: str = "trades"
    total: int = 400
    steps: int = 100
    loss: float | None = None
    row: dict | None = None


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=100, legacy_windows=False)


def plain(console):
    return re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", console.file.getvalue())


def test_progress_shows_the_epoch_and_the_last_validation():
    console = terminal()
    with showing(True, console) as tell:
        tell(Told(10))
        tell(Told(250, row=row(2.0), loss=0.5))
    shown = plain(console)
    for said in ("epoch 2.5 of 4", "robust ≤ 34.0 % (PGD)", "clean 64.0 %", "loss 0.500", "trades", "0:00 elapsed"):
        assert said in shown, said


def test_an_event_is_printed_once_and_stays():
    console = terminal()
    with showing(True, console) as tell:
        for done in (300, 300, 310, 320):
            tell(Told(done, row=row(3.0, event="[red]trouble[/]")))
    assert plain(console).count("trades, epoch 3: [red]trouble[/]") == 1


def test_an_event_from_before_a_resumption_is_not_news():
    console = terminal()
    with showing(True, console) as tell:
        tell(Told(310, row=row(3.0, event="trouble")))
    assert "trouble" not in plain(console)


def seconds(shown, what):
    """The last time of this kind that was shown, in seconds."""
    minutes, second = re.findall(rf"(\d+):(\d\d) {what}", shown)[-1]
    return 60 * int(minutes) + int(second)


def test_time_left_counts_only_what_was_done_since():
    """After a resumption at batch 200 of 400, 100 batches in t seconds leave t seconds for the other 100."""
    console, began = terminal(), time.monotonic()
    with showing(True, console) as tell:
        tell(Told(200))
        time.sleep(1.6)
        tell(Told(300))
    assert 2 <= seconds(plain(console), "left") <= round(time.monotonic() - began)


def test_trainings_follow_each_other_with_clocks_of_their_own():
    console = terminal()
    with showing(True, console) as tell:
        tell(Told(400, what="standard 1 first"))
        time.sleep(1.6)
        began = time.monotonic()
        tell(Told(10))
    shown = plain(console)
    assert "epoch 4.0 of 4" in shown
    assert "epoch 0.1 of 4" in shown
    assert seconds(shown, "elapsed") <= round(time.monotonic() - began)


def test_progress_is_cheap():
    console = terminal()
    with showing(True, console) as tell:
        began = time.perf_counter()
        for i in range(20_000):
            tell(Told(i, total=20_000, row=ROWS[0]))
        spent = time.perf_counter() - began
    assert spent < 2
    assert plain(console).count("epoch") < 10 * (spent + 1)


@pytest.mark.parametrize(("progress", "force"), [(True, False), (False, True)], ids=["no terminal", "not wanted"])
def test_progress_keeps_quiet(progress, force):
    console = Console(file=io.StringIO(), force_terminal=force)
    with showing(progress, console) as tell:
        tell(Told(300, row=ROWS[2]))
    assert console.file.getvalue() == ""


def test_a_function_is_told_itself():
    heard = []
    with showing(heard.append) as tell:
        tell(Told(3))
    assert heard == [Told(3)]


def test_progress_lets_an_interrupt_through():
    def interrupted():
        with showing(True, terminal()) as tell:
            tell(Told(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_no_torch_is_needed():
    code = "import sys, assay.reports.training; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
