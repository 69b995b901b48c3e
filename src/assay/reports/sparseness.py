"""How the sparseness of layers is shown: a page with a histogram and a scatter of classes for every layer."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from markupsafe import Markup

from assay.reports.figures import Tick, round_step
from assay.reports.html import environment, template, write_page
from assay.reports.summary import Rate
from assay.reports.text import DASH, NORMS, Units, call, count, duration, percent, plural
from assay.runs import exact_interval

Found = Mapping[str, Any]

_NAMES: Final = {"clean": "clean", "attacked": "attacked", "adaptive": "adaptive attack"}

_LABELLED: Final = 20
"""Classes whose dots are named; of more, names would hide the dots."""


def write_sparseness(path: Path, found: Found) -> Path:
    """Write a page about ``found``, as ``Sparseness.to_json`` gives it, and return where it is.

    Raises:
        RunError: the file cannot be written.
    """
    return write_page(path, render_sparseness(found), parents=True)


def render_sparseness(found: Found) -> str:
    """Return the page as text."""
    names = found["class_names"]
    return (
        environment()
        .get_template("sparseness.html.j2")
        .render(
            f=found,
            title=f"Sparseness of {found['model']} under {found['attack']['name']}",
            headline=headline(found),
            figures=[(name, _rate(v, found["n"])) for name, v in found["accuracy"].items()],
            names=_NAMES,
            facts=list(_facts(found)),
            width=percent(1 / found["bins"]),
            layers=[_Shown.of(layer, found, names) for layer in found["layers"]],
            area=area,
            index=index,
            chance=chance,
            effect=lambda v: DASH if v is None else f"{v:+.2f}",
            sheets=_sheets(found),
            raw=json.dumps(found, indent=1, ensure_ascii=False),
            style=Markup(template("report.css") + template("training.css") + template("sparseness.css")),
        )
    )


def _rate(share: float, n: int) -> Rate:
    return Rate(share, *exact_interval(round(share * n), n))


def headline(found: Found) -> str:
    """Say what the attack did to accuracy, and where sparseness moved most."""
    accuracy, how = found["accuracy"], f"{found['attack']['name'].upper()} {_within(found['threat'])}"
    said = f"{how} takes accuracy from {percent(accuracy['clean'])} to {percent(accuracy['attacked'])}"
    moved = [layer for layer in found["layers"] if layer["shift"] is not None]
    if not moved:
        return f"{said}; no layer answered."
    most = max(moved, key=lambda layer: abs(float(layer["shift"]["mean"])))
    before, after = (most["sides"][side]["psi"] for side in ("clean", "attacked"))
    return (
        f"{said}; the sparseness of {most['name']} moves most, from {percent(before)} to {percent(after)} on average."
    )


def _within(threat: Found) -> str:
    return (
        f"within an {NORMS.get(threat['norm'], threat['norm'])} ball of {Units.of(threat['text']).show(threat['eps'])}"
    )


def index(v: float | None) -> str:
    """Write an index in percent; a missing one as a dash."""
    return percent(v).removesuffix(" %")


def area(v: float | None) -> str:
    """Write the area under a ROC."""
    return DASH if v is None else f"{v:.3f}"


def chance(p: float | None) -> str:
    """Write a p-value: ``0.03``, ``< 1e-10``."""
    return DASH if p is None else "< 1e-10" if p < 1e-10 else f"{p:.2g}"


def apart(area: float | None) -> float:
    """Return how well an area tells two sides apart, whichever is the higher one: 0.5 not at all, 1 always."""
    return 0.5 if area is None else max(area, 1 - area)


def _facts(found: Found) -> Iterator[tuple[str, str]]:
    """Yield what an honest reader has to know beside the headline: (kind, sentence)."""
    layers = found["layers"]
    best = max(layers, key=lambda layer: apart(layer["auc_fooled"]))
    yield (
        "plain",
        f"Of single layers, {best['name']} tells the {count(found['fooled']['attacked'])} fooled samples from the same "
        f"samples clean best: area under the ROC {area(best['auc_fooled'])} (0.5 is guessing, and 0 as good as 1).",
    )
    yield from _warning(found)
    silent = [(s["name"], s["sides"]["clean"]["silent"]) for s in layers if s["sides"]["clean"]["silent"]]
    if silent:
        text = ", ".join(f"{name} {count(n)}" for name, n in silent)
        yield "bad", f"Clean samples to which no unit of a layer answers, and which have no index there: {text}."
    if any(side["signed"] for s in layers for side in s["sides"].values()):
        yield "bad", "Some layers answer below 0. The index was made for responses that do not; read it with care."
    passes = found["passes"]
    yield (
        "plain",
        f"{plural(found['n'], 'sample')}, {count(passes['forwards'])} forward and {count(passes['backwards'])} "
        f"backward passes, in {duration(found['seconds'])}.",
    )


def _warning(found: Found) -> Iterator[tuple[str, str]]:
    if found["adaptive"] is None:
        yield "bad", "No attack that knows of the index was tried: take none of these figures for a defence."
        return
    best = max(found["layers"], key=lambda layer: apart(layer["auc_adaptive"]))
    yield (
        "bad",
        f"This is no defence. An attack that also tries to keep the index of every layer fools "
        f"{count(found['fooled']['adaptive'])}, and on those the best layer ({best['name']}) has an area of "
        f"{area(best['auc_adaptive'])}.",
    )


def _sheets(found: Found) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the settings as titled lists of names and values."""
    plain = {k: found[k] for k in ("model", "data", "n", "bins", "seed")}
    sheets = {"Run": plain, "Threat": found["threat"], "Attack": found["attack"]}
    sheets["Adaptive attack"] = found["adaptive"] or {}
    return [(t, [(k, call(v)) for k, v in s.items() if v is not None]) for t, s in sheets.items()]


# --------------------------------------------------------------------------------------------------------- the layers


@final
@dataclass(frozen=True, slots=True)
class Histogram:
    """Outlines of shares of samples by PSI, the same scale for all; paths in a square of 1000, ticks in percent."""

    lines: tuple[tuple[str, int, str], ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    alt: str


@final
@dataclass(frozen=True, slots=True)
class Dot:
    """A class in a scatter, in percent from the left and from the top."""

    x: float
    y: float
    style: int
    label: str
    says: str


@final
@dataclass(frozen=True, slots=True)
class Scatter:
    """Accuracy of the classes over the PSI of their mean responses."""

    dots: tuple[Dot, ...]
    named: bool
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    alt: str


@final
@dataclass(frozen=True, slots=True)
class _Shown:
    """A layer as the page shows it."""

    found: Found
    said: tuple[str, ...]
    histogram: Histogram
    scatter: Scatter
    rows: tuple[tuple[str, int, Found], ...]

    @classmethod
    def of(cls, layer: Found, found: Found, names: Sequence[str]) -> "_Shown":
        accuracy = {side: found["class_accuracy"][side] for side in layer["sides"]}
        rows = tuple(
            (
                name,
                n,
                {side: (s["of_means"][i], s["mean_of"][i], accuracy[side][i]) for side, s in layer["sides"].items()},
            )
            for i, (name, n) in enumerate(zip(names, found["class_counts"], strict=True))
            if n
        )
        return cls(layer, tuple(_said(layer)), histogram(layer), scatter(layer, accuracy, names), rows)


def _said(layer: Found) -> Iterator[str]:
    """Yield sentences about a layer."""
    clean, attacked, shift = layer["sides"]["clean"], layer["sides"]["attacked"], layer["shift"]
    yield f"{count(math.prod(layer['shape']))} units of module {layer['module']}."
    yield (
        f"{percent(clean['active'])} of them answer a clean sample, {percent(attacked['active'])} an attacked one; "
        f"{count(clean['dead'])} never answer a clean one."
    )
    if shift is not None:
        way = "rises" if shift["rank_biserial"] > 0 else "falls" if shift["rank_biserial"] < 0 else "stays"
        yield (
            f"Under attack the index {way}: peak {percent(clean['mode'])} to {percent(attacked['mode'])}, median "
            f"change {100 * shift['median']:+.2f} points, rank-biserial effect {shift['rank_biserial']:+.2f}, "
            f"p {chance(shift['p'])} (Wilcoxon)."
        )
    for side in ("clean", "attacked"):
        if r := layer["relations"][side]:
            yield (
                f"{side.capitalize()}, class index and class accuracy: Spearman {r['rho']:+.2f}, 95 % interval "
                f"{r['low']:+.2f} to {r['high']:+.2f} over {r['classes']} classes."
            )


def histogram(layer: Found) -> Histogram:
    """Draw the shares of samples in the bins of the index, one outline a condition, where there are any."""
    counts = {name: np.array(side["counts"], dtype=float) for name, side in layer["sides"].items()}
    shares = {name: c / max(c.sum(), 1) for name, c in counts.items()}
    held, n = np.flatnonzero(sum(shares.values())), len(next(iter(shares.values())))
    low, high, across = _range([held[0] / n, (held[-1] + 1) / n] if len(held) else [])
    top = max(float(s.max()) for s in shares.values()) or 1.0
    step = round_step(top / 4)
    top = step * math.ceil(top / step - 1e-9)
    peaks = ", ".join(f"{_NAMES[name]} {percent(side['mode'])}" for name, side in layer["sides"].items())
    return Histogram(
        lines=tuple((name, i, outline(s / top, low, high)) for i, (name, s) in enumerate(shares.items())),
        x=_across(low, high, across),
        y=tuple(Tick(100 * (1 - v / top), f"{100 * v:g} %") for v in step * np.arange(round(top / step) + 1)),
        alt=f"Histograms of the sparseness of {layer['name']}; peaks: {peaks}.",
    )


def outline(heights: np.ndarray, low: float = 0.0, high: float = 1.0) -> str:
    """Return the outline of bars of heights 0 .. 1 over equal bins of 0 .. 1, as seen between ``low`` and ``high``."""
    held = np.flatnonzero(heights)
    if not len(held):
        return "M0 1000"
    edges = 1000 * (np.arange(len(heights) + 1) / len(heights) - low) / (high - low)
    bars = (f"V{1000 * (1 - heights[i]):.1f}H{edges[i + 1]:.1f}" for i in range(held[0], held[-1] + 1))
    return f"M{edges[held[0]]:.1f} 1000{''.join(bars)}V1000"


def scatter(layer: Found, accuracy: Mapping[str, Sequence[float | None]], names: Sequence[str]) -> Scatter:
    """Draw a dot a class and condition: accuracy over the PSI of the class's mean responses."""
    points = [
        (i, names[k], v, a)
        for i, (side, s) in enumerate(layer["sides"].items())
        if side != "adaptive"
        for k, (v, a) in enumerate(zip(s["of_means"], accuracy[side], strict=True))
        if v is not None and a is not None
    ]
    low, high, step = _range([v for _, _, v, _ in points])
    dots = tuple(
        Dot(
            100 * (v - low) / (high - low), 100 * (1 - a), i, name, f"{name}: index {percent(v)}, accuracy {percent(a)}"
        )
        for i, name, v, a in points
    )
    return Scatter(
        dots=dots,
        named=len(names) <= _LABELLED,
        x=_across(low, high, step),
        y=tuple(Tick(100 - v, f"{v} %") for v in (0, 25, 50, 75, 100)),
        alt=f"Accuracy over sparseness of the classes in {layer['name']}; the table has them in numbers.",
    )


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    """Return round ends around values, and the step between ticks."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    step = round_step(max(high - low, 1e-4) / 4)
    low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
    return low, high if high > low else low + step, step


def _across(low: float, high: float, step: float) -> tuple[Tick, ...]:
    """Return labelled positions of an axis of shares."""
    n = round((high - low) / step)
    digits = max(0, -math.floor(math.log10(100 * step) + 1e-9))
    return tuple(Tick(100 * i / n, f"{100 * (low + i * step):.{digits}f} %") for i in range(n + 1))
