"""Two runs side by side, sample by sample: the difference, its test, and the samples that changed sides."""

from typing import Final

from assay.reports.paired import conclusion, factor, p_text, points
from assay.reports.text import DASH, count, percent
from assay.runs.compare import Comparison, Shares, compare
from assay.serve.catalogue import Kept
from assay.serve.elements import Element, h, kept_together, link, table
from assay.serve.home import Query
from assay.serve.shelf import Shelf

_LISTED: Final = 200
"""Samples of each kind that are listed."""


def page(shelf: Shelf, query: Query) -> Element:
    """Return the comparison of runs ``a`` and ``b``.

    Raises:
        RunError: one is not there, or they are on different data.
    """
    a, b = (shelf.catalogue.open(query.get(side, "")) for side in ("a", "b"))
    c = compare(a.source, b.source)
    return h(
        "Div",
        h("H1", kept_together(conclusion(c))),
        *(h("P", note) for note in c.notes),
        table(["", "a", "b"], _sides(c, a, b)),
        h("H3", "What the two found"),
        table(
            ["", "a", "b", "b minus a, points", "interval", "exact McNemar test"], _figures(c), numbers=(1, 2, 3, 4, 5)
        ),
        *([] if c.robust is None else [h("H3", "Sample by sample"), _four(c.robust), *_changed(c, a, b)]),
    )


def _sides(c: Comparison, a: Kept, b: Kept) -> list[list[Element]]:
    aspects = [
        [name, *(h("Span", getattr(side, name)) for side in (c.a, c.b))] for name in ("model", "threat", "effort")
    ]
    runs: list[Element] = ["run", *(link(run.name, "run", name=run.name) for run in (a, b))]
    held: list[Element] = ["samples", *(f"{count(side.samples)}, {count(c.n)} in both" for side in (c.a, c.b))]
    return [runs, *aspects, held]


def _figures(c: Comparison) -> list[list[Element]]:
    rows: list[list[Element]] = []
    for name, s in (("clean accuracy", c.clean), ("robust accuracy", c.robust)):
        if s is not None:
            each = [f"{count(k)} ({percent(k / s.n)})" for k in (s.a, s.b)]
            low, high = (points(v).removesuffix(" points") for v in s.interval)
            rows.append(
                [name, *each, points(s.difference).removesuffix(" points"), f"{low} to {high}", p_text(s.p_value)]
            )
    if c.sizes is not None:
        each = [f"{count(k)} of {count(c.sizes.n)}" for k in (c.sizes.larger_in_a, c.sizes.larger_in_b)]
        rows.append(["larger size", *each, factor(c.sizes.ratio), DASH, f"{p_text(c.sizes.p_value)} (sign test)"])
    return rows


def _four(s: Shares) -> Element:
    rows = [["robust in a", count(s.both), count(s.only_a)], ["not in a", count(s.only_b), count(s.neither)]]
    return table(["", "robust in b", "not in b"], rows, numbers=(1, 2))


def _changed(c: Comparison, a: Kept, b: Kept) -> list[Element]:
    """Return the samples that are robust in one run only."""
    lost, won = ([x.index for x in c.changes if x.held_by == side] for side in "ab")
    name_a, name_b = _called(a, b)
    found: list[Element] = []
    for title, indices, in_ in (
        (f"Robust in {name_a}, not in {name_b}", lost, b),
        (f"Robust in {name_b}, not in {name_a}", won, a),
    ):
        found += [h("H3", f"{title}: {count(len(indices))}"), _chips(in_, indices)]
    return found


def _called(a: Kept, b: Kept) -> tuple[str, str]:
    pair = (a.summary.model, b.summary.model)
    return pair if pair[0] != pair[1] else (a.name, b.name)


def _chips(run: Kept, indices: list[int]) -> Element:
    """Return links to samples in the run in which they fell."""
    rest = len(indices) - _LISTED
    chips = [link(f"#{i}", "sample", "chip", run=run.name, index=i) for i in indices[:_LISTED]]
    return h("P", *chips, f" and {count(rest)} more" if rest > 0 else None, className="chips all")
