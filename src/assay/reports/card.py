"""The model card: a section on robustness in a README.md, and its results as metadata, as Hugging Face reads them."""

import datetime
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from assay.core.errors import RunError
from assay.core.optional import need
from assay.reports.html import write_page
from assay.reports.markdown import escape
from assay.reports.record import Record, record
from assay.reports.summary import dig
from assay.reports.text import percent, span
from assay.runs import Run

_FRONT: Final = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_BEGIN, _END = "<!-- assay robustness {} -->", "<!-- end of assay robustness {} -->"


def write_card(run: Run, out: Path | None = None) -> Path:
    """Write the section on robustness into a model card, and return where that is.

    Of a card that is there, the section of the same model, data and threat is replaced, or one is added; results go
    beside those that its metadata hold already. Nothing else in it changes.

    Args:
        run: to be read, finished or not.
        out: the card; ``README.md`` in the run by default, or in the folder that is given.

    Raises:
        RunError: the run or the card cannot be read, the metadata of the card are no YAML, or it cannot be written.
        MissingExtraError: the card has metadata, and PyYAML, which reads them, is not installed.
    """
    file = run.path / "README.md" if out is None else Path(out)
    if file.is_dir():
        file = file / "README.md"
    try:
        with file.open(encoding="utf-8", newline="") as f:
            there = f.read()
    except FileNotFoundError:
        there = ""
    except (OSError, ValueError) as e:
        raise RunError(f"a card that can be read: {file}", str(e), "Choose another --out.") from e
    return write_page(file, merged(there, run), parents=True)


def merged(card: str, run: Run) -> str:
    """Return a card with the section and the results of a run in it."""
    if "\r\n" in card and card.count("\r\n") == card.count("\n"):
        return merged(card.replace("\r\n", "\n"), run).replace("\n", "\r\n")
    r = record(run)
    front = _FRONT.match(card)
    body = card[front.end() :] if front else card
    metadata = _with_results(front[1] if front else "", r, run)
    return f"---\n{metadata}---\n{_with_section(body, r)}"


# --- metadata


def results(r: Record, run: Run) -> dict[str, Any]:
    """Return the results of a run as an entry of ``model-index``.

    References: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    s, shape = r.s, dig(run.manifest, "data", "shape")
    flat = isinstance(shape, list) and len(shape) == 1
    task = "image-classification" if s.noun == "image" else "tabular-classification" if flat else "other"
    about = {"threat": s.threat, "effort": str(dig(run.manifest, "identity", "effort") or "")}
    metrics: list[dict[str, Any]] = []
    for f in r.figures:
        bare = f.title == "Clean accuracy"
        args = {"n": f.of, "confidence": s.confidence, "low": f.rate.low, "high": f.rate.high}
        name = f.title if bare else f"{f.title} ({s.threat})"
        kind = "accuracy" if bare else f.title.lower().replace(" ", "_")
        metrics.append({"type": kind, "value": f.rate.value, "name": name, "args": args if bare else {**about, **args}})
    return {
        "task": {"type": task, "name": "Classification"},
        "dataset": {
            "type": re.sub(r"[^\w.-]+", "-", s.data, flags=re.ASCII).strip("-") or "data",
            "name": s.data,
            "args": {"fingerprint": str(dig(run.manifest, "data", "fingerprint") or "")},
        },
        "metrics": metrics,
    }


def _with_results(front: str, r: Record, run: Run) -> str:
    """Return the YAML of a card with the results of a run in it; every other key stays as it is written."""
    ours = results(r, run)
    if not front.strip():
        return front + _yaml({"model-index": [{"name": r.s.model, "results": [ours]}]})
    before = _parsed(front)
    index = _merged_index(before.get("model-index"), r.s.model, ours)
    written = _yaml({"model-index": index})
    front = front if front.endswith("\n") else front + "\n"
    after = _replaced(front, written)
    others, left = ({k: v for k, v in d.items() if k != "model-index"} for d in (before, _parsed(after)))
    if others != left:
        found = "what is left of it would change (a mapping in braces, or references across keys)"
        raise RunError("metadata that model-index can be set in", found, "Write them as one key a line.")
    return after


def _replaced(front: str, written: str) -> str:
    """Return metadata with another ``model-index``; comments and empty lines before the next key stay."""
    lines = re.split(r"(?<=\n)", front)
    start = next((i for i, line in enumerate(lines) if re.match(r"model-index[ \t]*:", line)), len(lines))
    end = next((i for i in range(start + 1, len(lines)) if re.match(r"[^\s#-]", lines[i])), len(lines))
    while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
        end -= 1
    return "".join([*lines[:start], written, *lines[end:]])


def _parsed(front: str) -> dict[Any, Any]:
    yaml = need("yaml", "huggingface")
    try:
        found = yaml.safe_load(front)
    except yaml.YAMLError as e:
        said = " ".join(str(e).split())
        raise RunError("metadata in YAML at the head of the card", said, "Mend them, or choose another --out.") from e
    if not isinstance(found, dict):
        raise RunError("metadata by key at the head of the card", type(found).__name__, "Write key: value.")
    return found


def _merged_index(index: Any, model: str, ours: Mapping[str, Any]) -> list[Any]:
    """Return ``model-index`` with our results: in its first model, as a card is of one, beside all that it has."""
    models = [*index] if isinstance(index, list) else []
    first = models[0] if models and isinstance(models[0], dict) else {"name": model}
    listed = first.get("results")
    kept = [*listed] if isinstance(listed, list) else []
    same = next((i for i, one in enumerate(kept) if _about(one) == _about(ours)), None)
    if same is None:
        kept.append(ours)
    else:
        kept[same] = {**kept[same], **ours, "metrics": _merged_metrics(kept[same].get("metrics"), ours["metrics"])}
    return [{**first, "results": kept}, *models[1:]]


def _about(result: Any) -> tuple[Any, ...]:
    return dig(result, "task", "type"), dig(result, "dataset")


def _merged_metrics(old: Any, new: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Replace metrics of the same type and name, those of other threats stay."""
    names = {(m["type"], m["name"]) for m in new}
    stay = [m for m in (old if isinstance(old, list) else []) if (dig(m, "type"), dig(m, "name")) not in names]
    return [*stay, *new]


def _yaml(value: Any, indent: str = "") -> str:
    """Write plain values as YAML: keys and items a line each, texts as JSON writes them, which YAML reads."""
    lines = []
    items = value.items() if isinstance(value, Mapping) else ((None, v) for v in value)
    for key, item in items:
        lead = "-" if key is None else f"{key if _KEY.fullmatch(str(key)) else _scalar(key)}:"
        if isinstance(item, Mapping | list | tuple) and item:
            inner = _yaml(item, f"{indent}  ")
            # an item's first line follows its dash
            lines.append(f"{indent}- {inner[len(indent) + 2 :]}" if key is None else f"{indent}{lead}\n{inner}")
        else:
            lines.append(f"{indent}{lead} {_scalar(item)}\n")
    return "".join(lines)


_KEY: Final = re.compile(r"(?!(?i:y|n|yes|no|on|off|true|false|null)\b)[A-Za-z][\w-]*", re.ASCII)


def _scalar(value: Any) -> str:
    """Write a value in one line; characters that YAML does not print, or reads as line breaks, are escaped."""
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, float):
        return _float(value)
    plain = isinstance(value, str | int | list | dict | None)
    written = json.dumps(value if plain else str(value), ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]", lambda c: f"\\u{ord(c[0]):04x}", written)


def _float(value: float) -> str:
    """Write a float so that YAML 1.1 reads one: 1e-05 would be a text."""
    if math.isfinite(value):
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
    return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"


# --- text


def _with_section(body: str, r: Record) -> str:
    """Return the text of a card with our section in it: where it was, else at the end."""
    about = (r.s.model, r.s.data, r.s.threat)
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    begin, end = _BEGIN.format(key), _END.format(key)
    section = "\n".join([begin, *_lines(r), end])
    ours = re.compile(f"{re.escape(begin)}(?:(?!{re.escape(begin)}).)*?{re.escape(end)}", re.DOTALL)
    if ours.search(body):
        return ours.sub(lambda _: section, body, count=1)
    return f"{body.rstrip()}\n\n{section}\n".lstrip("\n") if body.strip() else f"# {escape(r.s.model)}\n\n{section}\n"


def _lines(r: Record) -> Iterator[str]:
    s = r.s
    yield f"## Robustness: {escape(s.threat)}\n"
    yield f"{escape(r.verdict)}\n"
    yield f"| | share | {100 * s.confidence:g} % interval | of |"
    yield "|---|---|---|---|"
    for f in r.figures:
        yield f"| {f.title} ({f.note}) | {percent(f.rate.value)} | {span(f.rate.low, f.rate.high)} | {f.of:,} |"
    for title, size in r.sizes:
        yield f"| {escape(title)} | {escape(size)} | | |"
    yield ""
    yield "**What was tested.**\n"
    for name, value in r.tested:
        yield f"- {escape(name)}: {escape(value)}"
    yield f"\n**Threat.** {escape(' '.join(r.threat))}\n"
    yield f"**How.** {escape(' '.join(r.work))}\n"
    for used in r.used:
        classes = "; ".join([*used.atlas, *([used.nist] if used.nist else [])])
        yield f"- {escape(', '.join(used.names))}{': ' * bool(classes)}{escape(classes)}"
    yield "\n**Findings.**\n" if s.findings else "\n**Findings.** None."
    for note in s.findings:
        yield f"- {escape(note.code)} ({note.severity}): {escape(note.message)}"
    yield "\n**Limits.**\n"
    for limit in r.limits:
        yield f"- {escape(limit)}"
    yield from _reproduce(r)


def _reproduce(r: Record) -> Iterator[str]:
    settings = ", ".join(f"{name} {escape(value)}" for name, value in r.settings)
    yield f"\n**To reproduce.** {settings}; {escape(r.date)}."
    if r.command:
        # Inside a fence nothing can be escaped: a comment, which could be taken for the end of our section, is broken.
        command = r.command.replace("<!--", "<! --")
        fence = "`" * (max(map(len, re.findall("`+", command)), default=2) + 1)
        yield f"\n{fence}sh\n{command}\n{fence}"
    yield ""
    for name, digest in r.digests:
        yield f"- SHA-256 of `{name}`: `{digest}`"
