"""The first page: all runs of the folder, to be sorted, opened, and chosen for a comparison."""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final, TypeAlias

from assay.core.optional import need
from assay.reports.summary import Rate
from assay.reports.text import DASH, percent, plural, span
from assay.serve.catalogue import Entry
from assay.serve.elements import Element, bar, core, h, link, table, trouble
from assay.serve.shelf import Shelf

Query: TypeAlias = Mapping[str, str]


def _rate(which: str) -> Callable[[Entry], Any]:
    return lambda e: None if e.summary is None else getattr(e.summary, which).value


_COLUMNS: Final[dict[str, Callable[[Entry], Any]]] = {
    "run": lambda e: e.name.lower(),
    "model": lambda e: None if e.summary is None else e.summary.model.lower(),
    "data": lambda e: None if e.summary is None else e.summary.data.lower(),
    "threat": lambda e: None if e.summary is None else e.summary.threat,
    "clean": _rate("clean"),
    "robust": _rate("robust"),
    "certified": _rate("certified"),
    "findings": lambda e: None if e.summary is None else len(_serious(e)),
    "date": lambda e: e.created or None,
}
"""What the columns are sorted by; None comes last."""


def page(shelf: Shelf, query: Query) -> Element:
    """Return the list of runs."""
    entries = shelf.catalogue.entries()
    by = query.get("sort", "")
    down = by.startswith("-") if by else True
    column = by.lstrip("-") if by.lstrip("-") in _COLUMNS else "date"
    ordered = _sorted([*entries.values()], column, down=down)
    whole = [e for e in ordered if not e.error]
    head = f"{plural(len(entries), 'run')} in {shelf.catalogue.root.name}"
    if not entries:
        return h(
            "Div", h("H1", head), h("P", "Make one: assay evaluate MODEL DATA --threat linf:8/255", className="lead")
        )
    rows = [_row(e, whole.index(e) if not e.error else None) for e in ordered]
    heads = [_head(name, column, down=down) for name in _COLUMNS]
    return h(
        "Div",
        h("H1", head),
        h("P", "Choose two runs on the same data to compare them sample by sample.", id="compare", className="compare"),
        core("Store", id="listed", data=[e.name for e in whole]),
        table(["", *heads], rows, numbers=(5, 6, 7, 8)),
        className="runs",
    )


def _sorted(entries: list[Entry], column: str, *, down: bool) -> list[Entry]:
    key = _COLUMNS[column]
    known = sorted((e for e in entries if key(e) is not None), key=lambda e: (key(e), e.name), reverse=down)
    return known + [e for e in entries if key(e) is None]


def _head(name: str, column: str, *, down: bool) -> Element:
    mine = name == column
    mark = (" ↓" if down else " ↑") if mine else ""
    other = name if mine and down else f"-{name}"
    return link(f"{name}{mark}", "", "sort", sort=other)


def _row(e: Entry, at: int | None) -> list[Element]:
    if e.summary is None or at is None:
        told = h("Span", h("Strong", "damaged: "), e.error, className="damaged")
        return ["", h("Span", e.name, className="name"), told, *[""] * 7]
    s = e.summary
    label = h("Span", f"compare {e.name}", className="away")
    pick = core("Checklist", id={"type": "pick", "row": at}, options=[{"label": label, "value": "x"}], value=[])
    return [
        pick,
        h("Span", link(e.name, "run", name=e.name), "" if s.complete else h("Span", " interrupted", className="dim")),
        s.model,
        s.data,
        h("Span", s.threat, h("Span", f" {e.kind}", className="dim") if e.kind == "attack" else None),
        *(_share(r) for r in (s.clean, s.robust, s.certified)),
        _findings(e),
        h("Span", _moment(e.created), className="nb dim"),
    ]


def _share(r: Rate) -> Element:
    if r.value is None:
        return DASH
    return h(
        "Div",
        percent(r.value),
        h("Span", span(r.low, r.high).replace(" %", ""), className="note"),
        bar(r),
        className="share",
    )


def _serious(e: Entry) -> list[str]:
    return [f.severity for f in e.summary.findings if f.severity != "info"] if e.summary is not None else []


def _findings(e: Entry) -> Element:
    found = _serious(e)
    return h("Span", str(len(found)), className="grave" if found else "dim")


def _moment(text: str) -> str:
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return text[:16]


def register(app: Any) -> None:
    """Make the choice of two runs work."""
    dash = need("dash", "serve")

    @app.callback(
        dash.Output("compare", "children"),
        dash.Input({"type": "pick", "row": dash.ALL}, "value"),
        dash.State({"type": "pick", "row": dash.ALL}, "id"),
        dash.State("listed", "data"),
        prevent_initial_call=True,
    )
    def chosen(values: Any, ids: Any, names: Any) -> Any:
        rows = sorted(i["row"] for v, i in zip(values, ids, strict=True) if v)
        if len(rows) != 2:
            return f"Choose two runs on the same data to compare them sample by sample; {len(rows)} chosen."
        try:
            a, b = (str(names[k]) for k in rows)
        except (IndexError, TypeError):
            return trouble("The list has changed; load the page again.")
        return link(f"Compare {a} with {b}", "compare", "button", a=a, b=b)
