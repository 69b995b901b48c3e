"""One run: its figures and findings, the curve with a mark that can be dragged, and its samples, filtered."""

from typing import Any, Final

import numpy as np
import pyarrow as pa

from assay.core.errors import AssayError
from assay.core.optional import need
from assay.reports.figures import Curve, curve
from assay.reports.summary import Summary
from assay.reports.table import audited, interrupted, stopped
from assay.reports.text import count, percent, plural, span
from assay.runs.schema import ROBUST
from assay.serve.catalogue import Arrays, Kept
from assay.serve.elements import (
    Element,
    brief,
    core,
    drawing,
    figure,
    finding,
    h,
    kept_together,
    link,
    pictured,
    shown,
    slider,
    trouble,
)
from assay.serve.home import Query
from assay.serve.shelf import Shelf

_STATES: Final = {
    "all": "all",
    "fooled": "fooled",
    "open": "open",
    "proven": "proven",
    "misclassified": "misclassified",
}

_PAGE: Final = 24
"""Samples that are shown at once."""

_FALLEN: Final = 120
"""Fallen samples that are listed at once, those of the largest sizes."""

_NOTCHES: Final = 1000


def page(shelf: Shelf, query: Query) -> Element:
    """Return the page of the run ``name``.

    Raises:
        RunError: it is not there, or damaged.
    """
    run = shelf.catalogue.open(query.get("name", ""))
    s = run.summary
    return h(
        "Div",
        h("H1", kept_together(run.verdict)),
        h("Dl", *_figures(s), className="figures"),
        h("Ul", *(h("Li", fact, className=kind) for kind, fact in _facts(s)), className="facts"),
        core("Store", id="run-name", data=run.name),
        _curve(run),
        _findings(s),
        _gallery(run),
        h("Section", h("H2", "Try an image of your own"), _own(shelf, run), id="try"),
    )


def _figures(s: Summary) -> list[Element]:
    found = [figure("Clean accuracy", "no attacker", s.clean, s.confidence)]
    if s.judged:
        found.append(figure("Robust accuracy", f"under {s.threat}", s.robust, s.confidence, main=True))
    if s.certified.value is not None:
        told = "proven against every attack"
        found.append(figure("Certified accuracy", told, s.certified, s.confidence, main=not s.attacked))
    return found


def _facts(s: Summary) -> list[tuple[str, str]]:
    told = f"Complete: all {plural(s.n, s.noun)} were evaluated." if s.complete else f"{interrupted(s)}."
    facts = [("good" if s.complete else "bad", told)]
    if s.bounded:
        facts.append(("bad", stopped(s)))
    if s.audit:
        facts.append(("plain" if s.audit.broken else "good", audited(s.audit)))
    facts.append(("plain", f"{s.model} on {s.data}, {s.threat}."))
    return facts


def _own(shelf: Shelf, run: Kept) -> Element:
    try:
        shelf.sources.model(run)
    except AssayError as e:
        return trouble(str(e))
    return h("P", link("Upload an image", "upload", "button", run=run.name), " and see what the model makes of it.")


def _findings(s: Summary) -> Element:
    said = [finding(note) for note in s.findings] or [h("P", "None.", className="friendly")]
    return h("Section", h("H2", "Findings"), *said, id="findings")


# ----------------------------------------------------------------------------------------------------------- the curve


def _curve(run: Kept) -> Element:
    c = curve(run.summary, run.samples)
    if c is None:
        return None
    s = run.summary
    mark = slider("eps", "Size of the change to read the curve at", _NOTCHES, _NOTCHES)
    beyond = h("Div", className="beyond", style={"left": f"{c.mark:.2f}%"}) if c.mark is not None else None
    return h(
        "Section",
        h("H2", "How robust accuracy falls as the attacker may change more"),
        h("P", "Drag the mark: below stand the samples that have fallen by there, the last first.", className="lead"),
        h(
            "Div",
            beyond,
            h("Img", src=_drawn(c), alt=c.alt),
            *(h("Span", t.label, className="tick y", style={"top": f"{t.at:.2f}%"}) for t in c.y),
            *(h("Span", t.label, className=f"tick x{' skip' if i % 2 else ''}", style={"left": f"{t.at:.2f}%"})
              for i, t in enumerate(c.x)),
            h("Span", f"allowed size of the change{f' ({s.norm})' if s.norm else ''}", className="axis"),
            h("Div", h("I", id="eps-dot"), id="eps-mark", className="cursor"),
            className="plot",
        ),
        h("Div", h("Div", mark, style={"width": f"{100 * c.end / c.limit:.2f}%"}), className="track"),
        h("P", id="eps-told", className="status", role="status"),
        h("P", id="eps-fallen", className="chips"),
        id="curve",
    )  # fmt: skip


def _drawn(c: Curve) -> str:
    grid = "".join(f'<path class="line" d="M0 {10 * t.at:.1f}H1000"/>' for t in c.y)
    proven = f'<path class="ink dashes" d="{c.proven}"/>' if c.proven else ""
    return drawing(f'{grid}<path class="band" d="{c.band}"/>{proven}<path class="accent" d="{c.line}"/>')


def _at(run: Kept, notch: Any) -> tuple[Any, Any, str, list[Element]]:
    """Return where the mark stands, what holds there, and which samples have fallen by there."""
    c, s = curve(run.summary, run.samples), run.summary
    assert c is not None
    eps = c.end * min(max(float(notch or 0) / _NOTCHES, 0.0), 1.0)
    at = max((step for step in c.steps if step[0] <= eps), default=c.steps[0], key=lambda step: step[0])
    share, low, high = at[1:]
    fallen = _fallen(run.samples, eps, s.eps)
    wrong = int((fallen["size"].to_numpy() == 0).sum())
    told = (
        f"At {s.units.show(eps) if eps else '0'}: {percent(share)} still right ({span(low, high)}). "
        f"{count(len(fallen))} of {count(len(run.samples))} have fallen, {count(wrong)} of them wrong as they are."
    )
    rest = len(fallen) - _FALLEN
    chips = [_chip(run, row) for row in fallen.slice(0, _FALLEN).to_pylist()]
    more = [f" and {count(rest)} smaller ones"] if rest > 0 else []
    return {"left": f"{100 * eps / c.limit:.2f}%"}, {"top": f"{100 * (1 - share):.2f}%"}, told, [*chips, *more]


def _fallen(samples: pa.Table, eps: float, limit: float | None) -> pa.Table:
    """Return the samples that are wrong within eps, the last to fall first."""
    size = samples["size"].to_numpy()
    fooled = samples["fooled"].to_numpy(zero_copy_only=False)
    if limit is not None:
        size = np.where(fooled, np.minimum(size, limit), size)
    return samples.filter(pa.array(size <= eps)).sort_by([("size", "descending"), ("index", "ascending")])


def _chip(run: Kept, row: dict[str, Any]) -> Element:
    s = run.summary
    wrong = row["adversarial_prediction"] if row["fooled"] else row["prediction"]
    became = "" if wrong is None or row["label"] < 0 else f" {s.label(row['label'])} → {s.label(wrong)}"
    size = s.units.show(row["size"]) if row["size"] else "wrong"
    return link(f"#{row['index']}{became} ({size})", "sample", "chip", run=run.name, index=row["index"])


# ---------------------------------------------------------------------------------------------------------- the samples


def states(run: Kept) -> dict[str, np.ndarray]:
    """Return (n,) which samples are in which state; what stands unproven is open."""
    status = np.array(run.samples["status"].to_pylist(), dtype=object)
    sure = np.array([v is True for v in run.samples["certified"].to_pylist()], dtype=bool)
    if run.summary.eps is None:
        sure = run.samples["lower"].to_numpy() > 0
    standing = status == ROBUST
    return {
        "all": np.ones(len(status), dtype=bool),
        "fooled": status == "fooled",
        "open": standing & ~sure,
        "proven": sure,
        "misclassified": status == "misclassified",
    }


def _gallery(run: Kept) -> Element:
    s, found = run.summary, states(run)
    numbers = sorted({int(v) for v in run.samples["label"].to_pylist() if v >= 0})
    attacks = sorted({v for v in run.samples["broken_by"].to_pylist() if v})
    shown_states = [{"label": f"{name} {count(int(found[k].sum()))}", "value": k} for k, name in _STATES.items()]
    return h(
        "Section",
        h("H2", "Samples"),
        h(
            "Div",
            core("RadioItems", id="of-state", options=shown_states, value="all", inline=True),
            _choice("of-class", "any class", [{"label": brief(s.label(k)), "value": k} for k in numbers]),
            _choice("of-attack", "any attack", [{"label": brief(a), "value": a} for a in attacks]),
            _choice("in-order", "by number", [{"label": "smallest change first", "value": "size"}]),
            className="filters",
        ),
        h("P", id="told", className="status", role="status"),
        h("Div", id="gallery", className="cards"),
        h(
            "Div",
            h("Button", "Earlier", id="earlier", type="button"),
            h("Button", "Later", id="later", type="button"),
            className="turn",
        ),
        core("Store", id="from", data=0),
        id="samples",
    )


def _choice(name: str, otherwise: str, options: list[dict[str, Any]]) -> Element:
    return core("Dropdown", id=name, options=options, placeholder=otherwise, searchable=len(options) > 12)


def _chosen(run: Kept, state: Any, label: Any, attack: Any, order: Any) -> pa.Table:
    keep = states(run).get(state, states(run)["all"]).copy()
    if label is not None:
        keep &= run.samples["label"].to_numpy() == label
    if attack is not None:
        keep &= np.array([v == attack for v in run.samples["broken_by"].to_pylist()], dtype=bool)
    found = run.samples.filter(pa.array(keep))
    return found.sort_by([("size", "ascending"), ("index", "ascending")]) if order == "size" else found


def _cards(shelf: Shelf, run: Kept, table: pa.Table) -> list[Element]:
    rows = table.to_pylist()
    try:
        stored = run.arrays([r["index"] for r in rows])
    except AssayError:
        stored = {}
    return [_card(shelf, run, r, stored.get(r["index"], {})) for r in rows]


def _card(shelf: Shelf, run: Kept, row: dict[str, Any], stored: Arrays) -> Element:
    s, index = run.summary, row["index"]
    views = []
    for name, x in (
        ("clean", shelf.clean(run, index, stored)),
        ("adversarial", stored.get("x") if row["fooled"] else None),
    ):
        if x is not None:
            views.append(_view(run, x, name, index))
    said = (
        h("Strong", s.label(row["prediction"]))
        if row["prediction"] >= 0
        else h("Span", "wrong as it is", className="dim")
    )
    after = (
        [" → ", h("Strong", s.label(row["adversarial_prediction"]))]
        if row["adversarial_prediction"] is not None
        else []
    )
    how = f"true class {s.label(row['label'])} · {state_of(row)}" if row["label"] >= 0 else state_of(row)
    if row["fooled"]:
        how += f" · size {s.units.show(row['size'])}"
    card = h(
        "Article",
        h("Div", h("Span", f"#{index}"), h("Span", row["broken_by"] or ""), className="why"),
        h("Div", *views, className="views") if views else None,
        h("P", said, *after, className="says"),
        h("P", how, className="how"),
        className="card",
    )
    return link(card, "sample", "plain", run=run.name, index=index)


def _view(run: Kept, x: np.ndarray, name: str, index: int) -> Element:
    try:
        return pictured(shown(x, *run.box, alt=f"Sample {index}, {name}"), name)
    except (TypeError, ValueError):
        return h("Span", "no picture", className="dim")


def state_of(row: dict[str, Any]) -> str:
    """Say in which state a sample is."""
    if row["certified"] is True:
        return "proven"
    return "open" if row["status"] == ROBUST else str(row["status"])


def register(app: Any, shelf: Shelf) -> None:
    """Make the mark, the filters and the pages of samples work."""
    dash = need("dash", "serve")
    out, given, held = dash.Output, dash.Input, dash.State

    @app.callback(
        out("eps-mark", "style"), out("eps-dot", "style"), out("eps-told", "children"), out("eps-fallen", "children"),
        given("eps", "value"), held("run-name", "data"),
    )  # fmt: skip
    def drag(notch: Any, name: Any) -> Any:
        return _at(shelf.catalogue.open(str(name)), notch)

    @app.callback(
        out("gallery", "children"), out("told", "children"), out("from", "data"),
        out("earlier", "disabled"), out("later", "disabled"),
        given("of-state", "value"), given("of-class", "value"), given("of-attack", "value"), given("in-order", "value"),
        given("earlier", "n_clicks"), given("later", "n_clicks"), held("from", "data"), held("run-name", "data"),
    )  # fmt: skip
    def choose(state: Any, label: Any, attack: Any, order: Any, _e: Any, _l: Any, begin: Any, name: Any) -> Any:
        run = shelf.catalogue.open(str(name))
        found = _chosen(run, state, label, attack, order)
        step = {"earlier": -_PAGE, "later": _PAGE}.get(dash.ctx.triggered_id)
        first = 0 if step is None else min(max(0, int(begin or 0) + step), max(0, len(found) - 1) // _PAGE * _PAGE)
        some = found.slice(first, _PAGE)
        told = f"{plural(len(found), run.summary.noun)}" + (
            f", {first + 1} to {first + len(some)}" if len(some) else ""
        )
        return _cards(shelf, run, some), told, first, first == 0, first + _PAGE >= len(found)
