"""The parts that pages are made of: elements of HTML, links, figures, pictures.

Text given to an element is text: React escapes it, so that no name in a run can become a tag.
"""

import base64
from collections.abc import Iterable, Sequence
from typing import Any, Final
from urllib.parse import urlencode

import numpy as np

from assay.core.optional import need
from assay.reports.pictures import as_image, difference, picture, stems, trace
from assay.reports.summary import Note, Rate
from assay.reports.text import percent, span

Element = Any
"""A component of Dash, or text."""

_LONGEST: Final = 1000
"""Characters of a name from a run that are shown."""

_INK: Final = {
    "light": {"accent": "#0b6b63", "ink": "#16201f", "line": "#dfe4e3"},
    "dark": {"accent": "#5cc7ba", "ink": "#e7eeec", "line": "#2b3634"},
}
"""The colours of the reports, for drawings, which do not see the style sheet of the page."""


def h(tag: str, *children: Element, **props: Any) -> Element:
    """Return an element of HTML; ``aria`` takes a dictionary."""
    known = {f"aria-{name}": str(value) for name, value in props.pop("aria", {}).items()}
    inside = [brief(child) if isinstance(child, str) else child for child in children if child is not None]
    return getattr(need("dash", "serve").html, tag)(inside, **props, **known)


def core(name: str, **props: Any) -> Element:
    """Return one of Dash's own components."""
    return getattr(need("dash", "serve").dcc, name)(**props)


def link(text: Element, page: str, className: str = "", **query: Any) -> Element:  # noqa: N803 (the name of the property)
    """Return a link to a page of this app; what the query holds is quoted."""
    return core(
        "Link",
        children=brief(text) if isinstance(text, str) else text,
        href=address(page, **query),
        className=className,
    )


def address(page: str, **query: Any) -> str:
    """Return the address of a page."""
    told = {k: v for k, v in query.items() if v not in (None, "")}
    return f"/{page}" + (f"?{urlencode(told)}" if told else "")


def brief(text: str) -> str:
    """Cut what is too long to be meant for people, and replace what is no character."""
    kept = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return kept.encode("utf-8", "replace").decode()


def slider(name: str, told: str, most: int, value: int, *, disabled: bool = False) -> Element:
    """Return a slider over 0 .. ``most``; ``told`` is read aloud."""
    how = {"type": "range", "min": 0, "max": most, "step": 1, "value": value, "disabled": disabled}
    return h("Label", h("Span", told, className="away"), core("Input", id=name, **how), className="slider")


def table(heads: Sequence[Element], rows: Iterable[Sequence[Element]], *, numbers: Sequence[int] = ()) -> Element:
    """Return a table; the columns ``numbers`` are aligned to the right, the first one heads its row."""
    kind = ["num" if i in numbers else "" for i in range(len(heads))]
    head = h("Tr", *(h("Th", cell, scope="col", className=kind[i]) for i, cell in enumerate(heads)))
    body = [h("Tr", *(h("Td" if i else "Th", cell, className=kind[i]) for i, cell in enumerate(row))) for row in rows]
    return h("Div", h("Table", h("Thead", head), h("Tbody", *body)), className="wide")


def figure(title: str, note: str, rate: Rate, confidence: float, *, main: bool = False) -> Element:
    """Return a share as a large number with its interval and a bar, as in the report."""
    told = "" if rate.low is None else f"{100 * confidence:g} % interval {span(rate.low, rate.high)}"
    number, _, unit = percent(rate.value).partition(" ")
    return h(
        "Div",
        h("Dt", title),
        h(
            "Dd",
            h("Div", number, h("Small", f" {unit}") if unit else None, className="big"),
            bar(rate),
            h("Div", told, h("Br") if told else None, note, className="note"),
        ),
        className="key" if main else "",
    )


def bar(rate: Rate) -> Element:
    """Return a bar of a share, with a whisker for its interval."""
    whisker = None
    if rate.low is not None and rate.high is not None:
        whisker = h("B", style={"left": _length(rate.low), "width": _length(rate.high - rate.low)})
    return h("Span", h("I", style={"width": _length(rate.value or 0.0)}), whisker, className="bar")


def _length(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


def share_bar(name: str, share: float, *, main: bool = False) -> Element:
    """Return one line of a list of confidences."""
    return h(
        "Div",
        h("Span", name, className="name"),
        h("Span", h("I", style={"width": _length(share)}), className="bar"),
        h("Span", certainty(share), className="num"),
        className="sure key" if main else "sure",
    )


def certainty(share: float) -> str:
    """Write a probability with one decimal; what is neither 0 nor 1 is not written as such."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return "> 99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.1f} %"


def kept_together(sentence: str) -> str:
    """Keep numbers and their unit on one line."""
    return sentence.replace(" %", "\N{NO-BREAK SPACE}%")


def finding(note: Note) -> Element:
    """Return a finding, as in the report."""
    evidence = [h("Div", h("Dt", k), h("Dd", v)) for k, v in note.evidence]
    return h(
        "Article",
        h("Div", h("Span", note.severity.capitalize(), className="severity"), h("Span", note.code, className="code")),
        h("P", note.message),
        h("Dl", *evidence, className="evidence") if evidence else None,
        h("P", h("Strong", "What to do: "), note.remedy) if note.remedy else None,
        className=f"finding {note.severity}",
    )


def trouble(sentence: str) -> Element:
    """Return what went wrong, or what is missing, in one sentence."""
    return h("P", sentence, className="trouble")


# ----------------------------------------------------------------------------------------------------------- pictures


def shown(x: np.ndarray, low: float, high: float, alt: str) -> Element:
    """Return a sample (*f) as a picture, or as a line where it is no image."""
    image = as_image(np.asarray(x, dtype=float))
    return _img(picture(image, low, high) if image is not None else _line(trace(x, low, high)), alt)


def shown_change(change: np.ndarray, alt: str) -> tuple[Element, float]:
    """Return a signed change (*f) in full colour at its largest value, and that value."""
    change = np.nan_to_num(np.asarray(change, dtype=float))
    scale = float(np.abs(change).max(initial=0.0))
    image = as_image(change)
    return _img(difference(image, scale) if image is not None else _line(stems(change, scale)), alt), scale


def pictured(source: Element, caption: Element, note: str = "") -> Element:
    """Return a picture with what is written below it."""
    return h("Figure", source, h("Figcaption", caption, h("Br") if note else None, note or None), className="view")


def _img(source: str, alt: str) -> Element:
    return h("Img", src=source, alt=alt)


def _line(path: str) -> str:
    return drawing(f'<path class="accent" d="{path}"/>', "0 0 100 40")


def drawing(shapes: str, box: str = "0 0 1000 1000") -> str:
    """Return SVG as the address of a picture that is stretched to its place, in the colours of the reports.

    ``shapes`` are of the classes ``accent``, ``ink``, ``line``, ``band`` and ``dashes``, and hold numbers only.
    """
    light, dark = (
        "".join(f".{name}{{stroke:{colour}}}" for name, colour in ink.items()) + f".band{{fill:{ink['accent']}}}"
        for ink in (_INK["light"], _INK["dark"])
    )
    style = (
        "path,line{fill:none;stroke-width:2;vector-effect:non-scaling-stroke}.line{stroke-width:1}"
        f".band{{opacity:.15;stroke:none}}.dashes{{stroke-dasharray:5 4;stroke-width:1.5}}{light}"
        f"@media(prefers-color-scheme:dark){{{dark}}}"
    )
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" preserveAspectRatio="none">'
        f"<style>{style}</style>{shapes}</svg>"
    )
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode("ascii")
