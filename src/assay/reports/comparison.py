"""Two runs on one page: what differs, how sure that is, where it comes from, and the samples that changed sides."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from assay.reports import text
from assay.reports.figures import Tick, falling, stairs, ticks
from assay.reports.gallery import Card, drawn
from assay.reports.html import environment, template, write_page
from assay.reports.paired import (
    change_of_size,
    conclusion,
    ends,
    factor,
    fell,
    figures,
    names,
    p_text,
    ranked,
    resampled,
    signed,
    units,
)
from assay.reports.summary import Rate, Summary, dig, noun_of, read, summarize
from assay.runs import exact_interval
from assay.runs.compare import Change, Comparison, Shares
from assay.runs.source import Source

_FIRST: Final = 20
"""Classes that are seen at once."""

_LISTED: Final = 500
"""Samples that changed sides and are listed; ``--json`` has them all."""


def write_comparison(path: Path, a: Source, b: Source, c: Comparison) -> Path:
    """Write a page about the comparison ``c`` of two runs, and return where it is.

    Args:
        path: the file, or an existing folder to put ``comparison.html`` in.
        a: the run that is compared with.
        b: the run that is compared; pictures come from both.
        c: what :func:`assay.compare` found.

    Raises:
        RunError: a run cannot be read, or the file cannot be written.
    """
    file = path / "comparison.html" if path.is_dir() else path
    return write_page(file, render_comparison(a, b, c), parents=True)


def render_comparison(a: Source, b: Source, c: Comparison) -> str:
    """Return the page as text."""
    sides = [_Read.of(run) for run in (a, b)]
    called = names(c)
    return (
        environment()
        .get_template("comparison.html.j2")
        .render(
            c=c,
            s=sides[0].summary,
            noun=noun_of(dig(a.manifest, "data", "shape")),
            headline=conclusion(c),
            called=called,
            figures=[_figure(name, shares, c) for name, shares in figures(c)],
            sizes=_sizes(c),
            facts=list(_facts(c)),
            curves=_curves(c, sides),
            resampled=list(resampled(c)),
            classes=ranked(c),
            first=_FIRST,
            stages=c.stages,
            most=max((max(g.a, g.b) for g in c.stages), default=1),
            moved=list(_moved(c, sides, called)),
            listed=_LISTED,
            sheets=[_sheet(f"{side}: {name}", r.run) for side, name, r in zip("ab", called, sides, strict=True)],
            raw=json.dumps(c.to_json() | {"changes": len(c.changes)}, indent=1, ensure_ascii=False),
            signed=signed,
            ends=ends,
            p_text=p_text,
            style=Markup(template("report.css") + template("comparison.css")),
        )
    )


@final
@dataclass(frozen=True, slots=True)
class _Read:
    """A run that is read."""

    run: Source
    summary: Summary
    samples: pa.Table

    @classmethod
    def of(cls, run: Source) -> "_Read":
        manifest, samples = read(run)
        return cls(run, summarize(manifest), samples)


@final
@dataclass(frozen=True, slots=True)
class _Figure:
    """One accuracy in both runs, its difference, and how sure that is."""

    title: str
    main: bool
    shares: Shares
    rates: tuple[Rate, Rate]


def _figure(name: str, s: Shares, c: Comparison) -> _Figure:
    rates = (Rate(k / s.n, *exact_interval(k, s.n, c.confidence)) for k in (s.a, s.b))
    what, _, at = name.partition(" at ")
    title = f"{what.capitalize()} accuracy{' at ' + at if at else ''}"
    a, b = rates
    return _Figure(title, s is c.robust, s, (a, b))


def _sizes(c: Comparison) -> Mapping[str, str] | None:
    """Return what is said about sizes."""
    s = c.sizes
    if s is None:
        return None
    show = units(c).show
    told = factor(s.ratio)
    of, in_b, in_a = map(text.count, (s.n, s.larger_in_b, s.larger_in_a))
    return {
        "big": told.removesuffix(" times as large"),
        "unit": " times" if told.endswith("large") else "",
        "medians": f"{show(s.median_a)} in a, {show(s.median_b)} in b ({change_of_size(c, s.difference)})",
        "test": f"larger in b on {in_b} of {of}, in a on {in_a}; sign test, {p_text(s.p_value)}",
    }


def _facts(c: Comparison) -> Iterator[tuple[str, str]]:
    """Yield what an honest reader has to know beside the conclusion: (kind, sentence)."""
    for note in c.notes:
        yield "bad", note
    for name, side in (("a", c.a), ("b", c.b)):
        if side.samples != c.n:
            held = text.plural(side.samples, "sample")
            yield "bad", f"Run {name} holds {held}; the {text.count(c.n)} that are in both runs are compared."
    apart = ", ".join(c.differs) or "nothing: these are two runs of the same"
    yield "plain", f"Not the same in both: {apart}."
    if c.robust is not None:
        moved = c.robust.only_a + c.robust.only_b
        yield "plain", f"{text.plural(moved, 'sample')} changed sides; the others tell nothing about the difference."
        yield "plain", "Robust accuracies are upper bounds: an attack that was not tried may find more, in either run."


@final
@dataclass(frozen=True, slots=True)
class _Curves:
    """Robust accuracy over eps in both runs; paths in a square of 1000, ticks in percent."""

    lines: tuple[str, str]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    readings: tuple[tuple[str, str, str], ...]
    alt: str


def _curves(c: Comparison, sides: list[_Read]) -> _Curves | None:
    """Draw both curves up to the common eps; None where the runs did not search in balls of one kind."""
    if c.robust is None and c.sizes is None:
        return None
    common = np.intersect1d(*(r.samples["index"].to_numpy() for r in sides))
    found = [_found(r, common) for r in sides]
    finite = np.concatenate(found)
    end = c.eps if c.eps is not None else float(finite[np.isfinite(finite)].max(initial=0.0)) * 1.03
    end = end or 1.0
    a, b = (falling(v, end, c.confidence) for v in found)
    show = units(c).show
    readings = tuple(
        ("0" if eps == 0 else show(eps), text.percent(a.at(eps)[0]), text.percent(b.at(eps)[0]))
        for eps in np.linspace(0, end, 5).tolist()
    )
    return _Curves(
        lines=(stairs(a.x, a.y, end, end), stairs(b.x, b.y, end, end)),
        x=ticks(end, units(c), None),
        y=tuple(Tick(100 - v, f"{v} %") for v in (0, 25, 50, 75, 100)),
        readings=readings,
        alt="Two step curves of robust accuracy over the size of the change; the table has them in numbers.",
    )


def _found(r: _Read, indices: np.ndarray) -> np.ndarray:
    """Return the sizes (n,) of these samples; what fell within eps is not beyond it by a rounding."""
    table = r.samples.filter(np.isin(r.samples["index"].to_numpy(), indices))
    sizes: np.ndarray = table["size"].to_numpy()
    fooled = table["fooled"].to_numpy(zero_copy_only=False)
    return sizes if r.summary.eps is None else np.where(fooled, np.minimum(sizes, r.summary.eps), sizes)


@final
@dataclass(frozen=True, slots=True)
class _Moved:
    """The samples that only one run holds, with pictures from the run in which they fell."""

    title: str
    fallen: Summary
    count: int
    cards: tuple[Card, ...]
    rows: list[tuple[int, str, str, str, str]]
    trouble: str


def _moved(c: Comparison, sides: list[_Read], called: tuple[str, str]) -> Iterator[_Moved]:
    labels = {pair.number: pair.name for pair in c.classes}
    held = "Right" if c.robust is None else "Robust"
    for holder, there, fallen in (("a", 0, sides[1]), ("b", 1, sides[0])):
        changes = [x for x in c.changes if x.held_by == holder]
        theirs = fallen.samples.filter(np.isin(fallen.samples["index"].to_numpy(), [x.index for x in changes]))
        cards, trouble = drawn(fallen.run, fallen.summary, theirs) if changes else ((), "")
        title = f"{held} in {called[there]}, not in {called[1 - there]}: {text.count(len(changes))}"
        rows = [_row(c, x, labels) for x in changes[:_LISTED]]
        yield _Moved(title, fallen.summary, len(changes), cards, rows, trouble)


def _row(c: Comparison, x: Change, labels: dict[int, str]) -> tuple[int, str, str, str, str]:
    return x.index, labels.get(x.label, str(x.label)), fell(x, labels), x.broken_by or "", units(c).show(x.size)


def _sheet(title: str, run: Source) -> tuple[str, list[tuple[str, str]]]:
    """Return what one of the runs was, as a titled list of names and values."""
    found: dict[str, Any] = {
        "run": run.path.resolve().name,
        "model": dig(run.manifest, "model", "name"),
        "model fingerprint": dig(run.manifest, "model", "fingerprint"),
        "data": dig(run.manifest, "data", "name"),
        "threat": dig(run.manifest, "identity", "threat", "text"),
        "effort": dig(run.manifest, "identity", "effort"),
        "seed": dig(run.manifest, "identity", "seed"),
        "assay": run.manifest.get("assay"),
        "command": run.manifest.get("command"),
    }
    return title, [(k, text.call(v)) for k, v in found.items() if v is not None]
