"""The history of a training as a page."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, final

from markupsafe import Markup

from assay.reports.figures import Tick, round_step, ticks
from assay.reports.html import environment, template, write_page
from assay.reports.summary import Rate
from assay.reports.text import NORMS, Units, call, count, duration, epoch_text, percent, plural

Row = Mapping[str, Any]

_GAP: Final = 7.0
"""Percent of a chart's height that a label at the end of a line needs."""

_SHORT: Final = 12
"""Rows of a table that is shown at once; a longer one is folded."""

_ACCURACIES: Final = {"PGD": "pgd", "FGSM": "fgsm", "clean": "clean", "train": "train"}
"""Names of lines, and the columns they are drawn from."""

_STYLES: Final = 4
"""How many lines look different; the first is the main one."""


def write_history(path: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> Path:
    """Write the history of a training as a page that needs nothing else, and return where it is.

    Args:
        path: the file.
        rows: one a validation, as training writes them; there may be none.
        about: ``method``, ``threat``, ``settings``, ``epochs``, ``seed``, ``stopped``, ``file``; whatever else there is
            is listed.

    Raises:
        RunError: the file cannot be written.
    """
    return write_page(path, render_history(rows, about))


def render_history(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """Return the page as text."""
    kept = kept_row(rows, about)
    units = Units.of(str(about["threat"].get("text", "")))
    return (
        environment()
        .get_template("training.html.j2")
        .render(
            method=str(about["method"]["name"]),
            threat=str(about["threat"].get("text", "")),
            file=str(about.get("file") or ""),
            headline=headline(kept, about),
            figures=[(name, Rate(kept[_ACCURACIES[name]])) for name in ("clean", "FGSM", "PGD")] if kept else [],
            facts=list(_facts(rows, kept, about)),
            charts=_charts(rows, kept, units),
            events=_events(rows),
            rows=rows,
            kept=kept,
            parts_of_loss=_names(rows),
            folded=len(rows) > _SHORT,
            show_eps=units.show,
            epoch_of=epoch_text,
            sheets=_sheets(about),
            raw=json.dumps(about, indent=2, ensure_ascii=False, default=str),
            style=Markup(template("report.css") + template("training.css")),
        )
    )


def kept_row(rows: Sequence[Row], about: Mapping[str, Any]) -> Row | None:
    """Return the row of the weights that were kept, as training chooses: of the best robust accuracy, or the last.

    Of equals it is the latest at the full eps, else the earliest; where training had gone wrong nothing was kept.
    """
    sound = [r for r in rows if not r["event"]]
    if not sound:
        return None
    if about.get("settings", {}).get("select") == "last":
        return sound[-1]
    best = [r for r in sound if r["pgd"] == max(s["pgd"] for s in sound)]
    full = [r for r in best if r["eps"] >= about["threat"].get("eps", 0.0)]
    return full[-1] if full else best[0]


def headline(kept: Row | None, about: Mapping[str, Any]) -> str:
    """Say what was trained against what, and what validation saw of it."""
    how = f"trained by {about['method']['name']} {_within(about['threat'])}"
    if kept is None:
        return f"There is no validation of this network, {how}: nothing can be said of it."
    return (
        f"{how[0].upper()}{how[1:]}, the network of epoch {epoch_text(kept['epoch'])} is right on "
        f"{percent(kept['clean'])} of the validation samples, and on {percent(kept['pgd'])} when PGD attacks them."
    )


def _within(threat: Mapping[str, Any]) -> str:
    text, norm, eps = str(threat.get("text", "")), threat.get("norm"), threat.get("eps")
    if norm is None or eps is None:
        return f"against {text}"
    name = NORMS.get(norm, norm)
    return f"within an {name} ball of {Units.of(text).show(eps)}"


def _facts(rows: Sequence[Row], kept: Row | None, about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what an honest reader has to know beside the headline: (kind, sentence)."""
    stopped, epochs = str(about.get("stopped") or "").removeprefix("stopped: "), about["epochs"]
    if stopped:
        yield "bad", f"Ended in epoch {epoch_text(rows[-1]['epoch']) if rows else 0} of {epochs}: {stopped}."
    elif rows and rows[-1]["epoch"] >= epochs:
        yield "good", f"Complete: all {plural(epochs, 'epoch')} were trained."
    else:
        yield "bad", f"Not complete: {epoch_text(rows[-1]['epoch']) if rows else 0} of {plural(epochs, 'epoch')}."
    if kept is not None:
        yield "plain", _choice(rows, kept, about)
    yield "plain", "This is a validation by PGD, not a verdict: assay evaluate says what the network can take."
    if rows:
        last, checks = rows[-1], sum(r["validation"] for r in rows)
        yield (
            "plain",
            (
                f"{count(last['forwards'])} forward and {count(last['backwards'])} backward passes, in "
                f"{duration(last['seconds'])}; of these, validation took {duration(checks)}."
            ),
        )


def _choice(rows: Sequence[Row], kept: Row, about: Mapping[str, Any]) -> str:
    """Say which weights were kept, and where that is not the best of all validations."""
    file = f" in {about['file']}" if about.get("file") else ""
    best = max((r for r in rows if not r["event"]), key=lambda r: float(r["pgd"]))
    if best["pgd"] == kept["pgd"]:
        return f"The weights with the best validation are kept{file}: those of epoch {epoch_text(kept['epoch'])}."
    seen = f"PGD accuracy was best in epoch {epoch_text(best['epoch'])}, {percent(best['pgd'])}"
    return f"The last weights are kept{file}; {seen}."


def _events(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return when there was an event, and what it was, as sentences."""
    found = [(epoch_text(r["epoch"]), str(r["event"])) for r in rows if r["event"]]
    return [(epoch, f"{said[0].upper()}{said[1:]}.") for epoch, said in found]


def _names(rows: Sequence[Row]) -> list[str]:
    """Return the parts of the loss, in the order they were first seen."""
    return list(dict.fromkeys(name for r in rows for name in r["parts"]))


def _sheets(about: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the settings as titled lists of names and values."""
    named = ("method", "threat", "settings", "data")
    rest = {k: v for k, v in about.items() if k not in (*named, "stopped")}
    sheets = {"Method": about["method"], "Threat": about["threat"], "Data": about.get("data") or {}, "Training": rest}
    sheets["Settings of the loop"] = about.get("settings") or {}
    return [(t, [(str(k), call(v)) for k, v in s.items() if v is not None and v != ""]) for t, s in sheets.items()]


# --------------------------------------------------------------------------------------------------------- the charts


@final
@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart: its path in a square of 1000, and its last value in words, at ``at`` percent from the top."""

    name: str
    style: int
    path: str
    end: str
    at: float


@final
@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over epochs; ticks and the moments marked are in percent, ``marks`` with their numbers."""

    title: str
    lines: tuple[Line, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    kept: Tick | None
    marks: tuple[Tick, ...]
    alt: str


@final
@dataclass(frozen=True, slots=True)
class Scale:
    """The values between which a chart extends, the distance of its ticks, and how a value is written."""

    low: float
    high: float
    step: float
    show: Callable[[float], str]

    @classmethod
    def around(cls, values: Sequence[float], units: Units) -> "Scale":
        """Return a scale from 0 with room for all values; its ticks are round in these units."""
        over = units.denominator or 1
        low, high = min(0.0, *values) * over, max(0.0, *values) * over
        step = round_step((high - low) / 5) if high > low else 1.0
        low, high = step * math.floor(low / step), step * math.ceil(max(high, low + step) / step - 1e-9)
        return cls(low / over, high / over, step / over, lambda v: "0" if v == 0 else units.show(v))

    @property
    def ticks(self) -> tuple[Tick, ...]:
        """Labelled positions, in percent from the top."""
        n = round((self.high - self.low) / self.step)
        return tuple(
            Tick(100 * (n - i) / n, self.show(round(self.low / self.step + i) * self.step)) for i in range(n + 1)
        )

    def down(self, value: float) -> float:
        """Return the place of a value, in percent from the top."""
        return 100 * (self.high - value) / (self.high - self.low)


_SHARES: Final = Scale(0.0, 1.0, 0.25, lambda v: f"{100 * v:.0f} %")


def _charts(rows: Sequence[Row], kept: Row | None, units: Units) -> list[Chart]:
    """Return the charts of accuracy, loss, learning rate and eps; none where there is no row."""
    if not rows:
        return []
    accuracies = {name: [r[column] for r in rows] for name, column in _ACCURACIES.items()}
    losses = {"loss": [r["loss"] for r in rows]}
    losses |= {name: [r["parts"].get(name, math.nan) for r in rows] for name in _names(rows)}
    finite = [v for line in losses.values() for v in line if math.isfinite(v)]
    rates, sizes = [r["lr"] for r in rows], [r["eps"] for r in rows]
    plain = Units()
    return [
        chart("Accuracy", accuracies, _SHARES, percent, rows, kept),
        chart("Loss", losses, Scale.around(finite, plain), plain.show, rows, kept),
        chart("Learning rate", {"lr": rates}, Scale.around(rates, plain), plain.show, rows, kept),
        chart("Trained up to this eps", {"eps": sizes}, Scale.around(sizes, units), units.show, rows, kept),
    ]


def chart(
    title: str, lines: Mapping[str, Sequence[float]], scale: Scale, show: Callable[[float], str],
    rows: Sequence[Row], kept: Row | None,
) -> Chart:  # fmt: skip
    """Draw lines of one value a row over the epochs of the rows.

    Args:
        title: of the chart.
        lines: by name; what is not finite is left out.
        scale: of the values.
        show: writes a value.
        rows: at least one; their epochs and events.
        kept: the row to mark.
    """
    limit = rows[-1]["epoch"]
    drawn = {}
    for name, values in lines.items():
        at = [(r["epoch"] / limit, v) for r, v in zip(rows, values, strict=True) if math.isfinite(v)]
        if at:
            drawn[name] = at
    places = spread([scale.down(points[-1][1]) for points in drawn.values()])
    found = tuple(
        Line(name, i % _STYLES, _path(points, scale), show(points[-1][1]), at)
        for i, ((name, points), at) in enumerate(zip(drawn.items(), places, strict=True))
    )
    marks = [100 * r["epoch"] / limit for r in rows if r["event"]]
    ends = ", ".join(f"{line.name} {line.end}" for line in found)
    return Chart(
        title=title,
        lines=found,
        x=ticks(limit, Units(), None),
        y=scale.ticks,
        kept=Tick(100 * kept["epoch"] / limit, f"kept: epoch {epoch_text(kept['epoch'])}") if kept else None,
        marks=tuple(Tick(at, str(i)) for i, at in enumerate(marks, 1)),
        alt=f"{title} over {limit:g} epochs; at the end: {ends}.",
    )


def _path(points: Sequence[tuple[float, float]], scale: Scale) -> str:
    """Return the path through points (share of the width, value); a single one is a dot."""
    path = "L".join(f"{1000 * x:.1f} {10 * scale.down(v):.1f}" for x, v in points)
    return f"M{path}h0" if len(points) == 1 else f"M{path}"


def spread(places: Sequence[float], gap: float = _GAP) -> list[float]:
    """Move labels apart until neighbours have a gap, in percent, in the order they are in; none leaves the chart."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [places[i] for i in order]
    for i, j in pairwise(range(len(moved))):
        moved[j] = max(moved[j], moved[i] + gap)
    if moved and moved[-1] > 100:
        moved[-1] = 100.0
        for j in range(len(moved) - 1, 0, -1):
            moved[j - 1] = min(moved[j - 1], moved[j] - gap)
    back = dict(zip(order, moved, strict=True))
    return [back[i] for i in range(len(moved))]
