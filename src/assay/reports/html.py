"""The report: one HTML file that needs nothing else, neither network nor script, to be read."""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from assay.core.errors import RunError
from assay.core.files import replacing
from assay.core.plain import without_controls
from assay.reports import text
from assay.reports.brackets import brackets
from assay.reports.figures import confusions, curve
from assay.reports.gallery import drawn
from assay.reports.natural import natural
from assay.reports.summary import ClassRow, Manifest, Summary, dig, points, read, summarize, whole
from assay.reports.table import audited, interrupted, median_radius, median_size, sentence, stopped
from assay.runs import Run
from assay.runs.source import Source
from assay.runs.totals import number, rows

_MOST_CLASSES = 20


def write_report(run: Source, out: Path | None = None) -> Path:
    """Write the report of a run, finished or not, and return where it is.

    Args:
        run: to be read; nothing is computed that would need the model.
        out: the file, or an existing folder to put ``report.html`` in; the run's own folder by default.

    Raises:
        RunError: the run cannot be read, or the file cannot be written.
    """
    file = run.path / "report.html" if out is None else Path(out)
    if file.is_dir():
        file = file / "report.html"
    return write_page(file, render(run), parents=True)


def write_page(path: Path, page: str, *, parents: bool = False) -> Path:
    """Write a page as a whole, with ``parents`` in a folder that is made where it is missing; return where it is.

    Raises:
        RunError: it cannot be written.
    """
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as f:
            f.write(page.encode())
    except OSError as e:
        raise RunError(f"a place that can be written for {path.name}", str(e), "Choose another --out.") from e
    return path


def render(run: Source) -> str:
    """Return the report as text."""
    manifest, samples = read(run)
    s, asked = summarize(manifest), points(manifest, samples)
    cards, trouble = drawn(run, s, samples)
    script = template("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            s=s,
            run=run.path.resolve().name,
            diagnosed=isinstance(run, Run),
            command=str(run.manifest.get("command") or ""),
            version=str(run.manifest.get("assay") or ""),
            verdict=sentence(s, samples),
            median=median_size(samples) if s.eps is None and s.attacked else None,
            radius=median_radius(samples) if s.eps is None and s.prove is not None else None,
            curve=curve(s, samples),
            points=[(s.units.show(p.eps), p.rate) for p in asked] if s.attacked else [],
            brackets=brackets(s, samples, tuple(p.eps for p in asked)),
            confusions=confusions(samples),
            natural=natural(run.manifest),
            cards=cards,
            trouble=trouble,
            classes=_weakest_first(s.classes),
            most_classes=_MOST_CLASSES,
            facts=list(_facts(s)),
            sheets=_sheets(run.manifest, s),
            attacks=_attacks(run.manifest),
            raw=json.dumps(run.manifest, indent=2, ensure_ascii=False),
            style=Markup(template("report.css")),
            script=Markup(script),
            digest=digest,
        )
    )


def template(name: str) -> str:
    """Return a style or a script of the reports."""
    return resources.files("assay.reports").joinpath("templates", name).read_text(encoding="utf-8")


@functools.cache
def environment() -> Environment:
    """Return what fills the templates of the reports in."""
    made = Environment(
        loader=PackageLoader("assay.reports"),
        autoescape=True,
        finalize=_harmless,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": text.percent,
        "count": text.count,
        "duration": text.duration,
        "together": together,
        "size_of": _length,
    }
    made.globals |= {"span": text.span, "plural": text.plural}
    return made


def _harmless(value: Any) -> Any:
    """Drop from texts of others what turns the direction of reading, or steers whatever shows the page's source."""
    return without_controls(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def together(sentence: str) -> Markup:
    """Keep each number and its unit on one line."""
    return Markup(re.sub(r"(\d[\d.,]* (?:%|s\b|min\b|h\b))", r'<span class="nb">\1</span>', str(escape(sentence))))


def _length(share: float | None) -> str:
    """Write a share as a CSS length."""
    return f"{100 * min(1.0, max(0.0, share or 0.0)):.2f}%"


def _weakest_first(classes: tuple[ClassRow, ...]) -> tuple[ClassRow, ...]:
    """Keep few classes in their order, and sort many by robust accuracy: only the first are seen at once."""
    if len(classes) <= _MOST_CLASSES:
        return classes
    return tuple(sorted(classes, key=lambda c: (c.robust.value or 0, c.clean.value or 0, c.number or 0)))


def _facts(s: Summary) -> Iterator[tuple[str, str]]:
    """Yield what an honest reader has to know beside the verdict: (kind, sentence)."""
    if s.complete:
        yield "good", f"Complete: all {text.plural(s.n, s.noun)} were evaluated."
    else:
        held = "the figures hold for those only" if s.n else "nothing is stored yet"
        yield "bad", f"{interrupted(s)}: {held}."
    if s.bounded:
        yield "bad", stopped(s)
    if s.audit:
        yield "good" if not s.audit.broken else "plain", audited(s.audit)
    if s.n and s.attacked:
        bound = "an attack that was not tried may find more" if s.eps is not None else "smaller changes may exist"
        yield "plain", f"An upper bound on the truth: {bound}."
    yield from _proofs(s)
    if s.claimed is not None and s.attacked:
        yield _verified(s.claimed, s.rejected or 0)
    if s.passes:
        yield (
            "plain",
            (
                f"{text.count(s.forwards)} forward and {text.count(s.backwards)} backward passes, "
                f"{text.count(s.per_sample)} per {s.noun}{f', in {text.duration(s.seconds)}' if s.seconds else ''}."
            ),
        )


def _proofs(s: Summary) -> Iterator[tuple[str, str]]:
    """Yield what a proof in this run says, and what it does not."""
    if s.certified.value is not None:
        also = "A lower bound as well" if s.attacked else "A lower bound on the truth"
        yield "plain", f"{also}: {text.percent(s.certified.value)} is proven, against every attack."
    if s.prove is not None and not s.attacked:
        yield "plain", f"Nothing was attacked: what is not proven here may be robust, or not (method {s.method})."
    if s.smoothed:
        alpha = number(dig(s.prove, "alpha"))
        yield (
            "bad",
            "This is about the smoothed classifier, which must be what is deployed; about the network itself it "
            "says nothing.",
        )
        if alpha is not None:
            yield "plain", f"Each radius holds with a probability of at least {100 * (1 - alpha):g} % over the noise."


def _verified(claimed: int, rejected: int) -> tuple[str, str]:
    if not claimed:
        return "plain", "No attack claimed an adversarial input, so there was none to verify."
    how = "in float32, outside the attack"
    if not rejected:
        return (
            "good",
            f"All {text.plural(claimed, 'adversarial input')} verified by a fresh forward pass {how}.",
        )
    kept = text.plural(claimed - rejected, "adversarial input")
    return "plain", (
        f"{kept} verified by a fresh forward pass {how}; "
        f"{text.count(rejected)} of {text.count(claimed)} claims did not hold and do not count."
    )


def _sheets(manifest: Manifest, s: Summary) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the manifest as titled lists of names and values."""
    identity = {k: v for k, v in _items(manifest, "identity") if k not in ("threat", "plan", "model", "data")}
    sheets = [
        ("Model", dict(_items(manifest, "model"))),
        ("Data", {k: v for k, v in _items(manifest, "data") if k != "class_names"}),
        ("Threat", {"": s.threat, **dict(_items(manifest, "identity", "threat"))}),
        ("Settings", identity | {"tolerance": manifest.get("tolerance")}),
        ("Machine", dict(_items(manifest, "machine"))),
        (
            "Run",
            {k: _moment(manifest.get(k)) for k in ("created", "updated")} | {"assay": manifest.get("assay")},
        ),
    ]
    return [(title, [(k, text.call(v)) for k, v in sheet.items() if k and v is not None]) for title, sheet in sheets]


def _items(manifest: Manifest, *keys: str) -> list[tuple[str, Any]]:
    found = dig(manifest, *keys)
    return [(str(k), v) for k, v in found.items()] if isinstance(found, dict) else []


def _moment(value: Any) -> str | None:
    """Write a time for people: ``21 November 2026, 05:30 UTC``."""
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return None if value is None else str(value)
    zone = "UTC" if moment.utcoffset() is not None and not moment.utcoffset() else moment.strftime("%z")
    return f"{moment.day} {moment:%B %Y, %H:%M} {zone}".strip()


def _attacks(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the rounds of the race, and those of its audit, with their parameters."""
    plan = dig(manifest, "identity", "plan")
    found = [r for part in ("rounds", "ladder") for r in rows(dig(plan, part))]
    return [(str(r.get("name", "?")), text.call(r.get("attack") or {}) + _terms(r)) for r in found]


def _terms(part: Mapping[str, Any]) -> str:
    """Say on which samples a round is run, and how often."""
    share, repeat = number(part.get("share")), whole(part.get("repeat"))
    nearest = "" if share is None or share >= 1 else f", the nearest {text.percent(share)}"
    return nearest + (f", up to {repeat} times" if repeat is not None and repeat > 1 else "")
