"""The samples that tell most: the closest calls, the surest mistakes, and one of each class."""

import heapq
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import pyarrow as pa

from assay.reports.pictures import as_image, difference, picture, stems, trace
from assay.reports.summary import Summary, dig
from assay.reports.text import percent
from assay.runs.source import Source

Row = Mapping[str, Any]
"""One fooled sample: its arrays from the store, and its size and attack from the table."""

SHOWN: Final = 12

_CLOSE, _SURE, _CLASS = "smallest change", "surest before and after", "one of its class"


@final
@dataclass(frozen=True, slots=True)
class View:
    """One of the pictures of a sample: a PNG, or the path of a line, with another line to compare with."""

    caption: str
    alt: str
    png: str = ""
    path: str = ""
    under: str = ""


@final
@dataclass(frozen=True, slots=True)
class Card:
    """A fooled sample, ready to be shown."""

    index: int
    why: str
    label: str
    before: str
    before_confidence: str
    after: str
    after_confidence: str
    size: str
    attack: str
    scale: str
    views: tuple[View, ...]


def drawn(run: Source, s: Summary, samples: pa.Table) -> tuple[tuple[Card, ...], str]:
    """Return the gallery of some samples of a run, and a sentence where the stored inputs cannot be read."""
    box = dig(run.manifest, "model", "box") or dig(run.manifest, "identity", "threat", "box")
    try:
        return gallery(s, samples, run.adversarials(), box), ""
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        return (), f"The stored adversarial inputs cannot be read ({type(e).__name__}), so no pictures are shown."


def gallery(s: Summary, samples: pa.Table, stored: Iterable[Mapping[str, np.ndarray]], box: Any) -> tuple[Card, ...]:
    """Choose and draw about a dozen fooled samples; holds only the candidates in memory."""
    facts = _facts(samples)
    return tuple(_card(s, row, why, box) for row, why in _chosen(facts, _fooled(facts, stored)))


def _facts(samples: pa.Table) -> dict[int, dict[str, Any]]:
    """Return what the table says of the fooled samples, by index."""
    columns = ["index", "label", "prediction", "adversarial_prediction", "size", "broken_by"]
    table = samples.filter(samples["fooled"]).select(columns)
    return {row["index"]: row for row in table.to_pylist()}


def _fooled(facts: Mapping[int, Row], stored: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Row]:
    for batch in stored:
        for i, index in enumerate(np.asarray(batch["index"]).tolist()):
            if index in facts:
                arrays = {k: v[i] for k, v in batch.items() if k in _ARRAYS and len(v) > i}
                yield {**facts[index], **arrays}


_SURE_BY = {"clean_confidence", "confidence"}
_ARRAYS = {"x", "clean", "clean_confidence", "confidence"}


def _sure(row: Row) -> float:
    """Rank by confidence, before and after: a shrunk input is at the boundary, where after alone tells little."""
    return sum(float(row[c]) for c in ("clean_confidence", "confidence")) if row.keys() >= _SURE_BY else -1.0


def _chosen(facts: Mapping[int, Row], fooled: Iterable[Row]) -> list[tuple[Row, str]]:
    """Choose in one pass: a third each by size and by confidence, then the smallest of other classes."""
    by_size = sorted(facts.values(), key=lambda r: (r["size"], r["index"]))
    of_class: dict[int, Row] = {}
    for r in by_size:
        of_class.setdefault(r["label"], r)
    rank = [r["index"] for r in by_size[:SHOWN]]
    wanted = {*rank, *(r["index"] for r in list(of_class.values())[: 2 * SHOWN])}
    kept: dict[int, Row] = {}
    sure: list[tuple[float, int, Row]] = []
    for row in fooled:
        if row["index"] in wanted:
            kept[row["index"]] = _own(row)
        entry = (_sure(row), -row["index"])
        if len(sure) < SHOWN or entry > sure[0][:2]:
            (heapq.heappush if len(sure) < SHOWN else heapq.heappushpop)(sure, (*entry, _own(row)))
    confident = [row for c, _, row in sorted(sure, key=lambda e: e[:2], reverse=True) if c >= 0]
    close = [kept[i] for i in rank if i in kept]
    classes = [kept[r["index"]] for r in of_class.values() if r["index"] in kept]
    return _mixed(close, confident, classes)


def _own(row: Row) -> Row:
    """Copy the arrays out of their batch, so that it can go."""
    return {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in row.items()}


def _mixed(close: list[Row], confident: list[Row], classes: list[Row]) -> list[tuple[Row, str]]:
    chosen: dict[int, tuple[Row, str]] = {}

    def take(rows: Iterable[Row], why: str, upto: int) -> None:
        for row in rows:
            if len(chosen) >= upto:
                return
            chosen.setdefault(row["index"], (row, why))

    third = SHOWN // 3
    take(close, _CLOSE, third)
    take(confident, _SURE, 2 * third)
    seen = {row["label"] for row, _ in chosen.values()}
    take((r for r in sorted(classes, key=lambda r: int(r["label"])) if r["label"] not in seen), _CLASS, SHOWN)
    take(close, _CLOSE, SHOWN)
    order = {_CLOSE: 0, _SURE: 1, _CLASS: 2}
    return sorted(chosen.values(), key=lambda pair: order[pair[1]])


def _card(s: Summary, row: Row, why: str, box: Any) -> Card:
    scale = _scale(row)
    return Card(
        index=row["index"],
        why=why,
        label=s.label(row["label"]),
        before=s.label(row["prediction"]),
        before_confidence=percent(float(row["clean_confidence"])) if "clean_confidence" in row else "",
        after=s.label(row["adversarial_prediction"]),
        after_confidence=percent(float(row["confidence"])) if "confidence" in row else "",
        size=s.units.show(row["size"]),
        attack=str(row["broken_by"] or ""),
        scale=s.units.show(scale) if scale else "",
        views=_views(s, row, scale, box),
    )


def _scale(row: Row) -> float:
    """Return the largest change of any value; where one value stands out (l0), it is still full colour."""
    if "x" not in row or "clean" not in row:
        return 0.0
    return float(np.abs(np.asarray(row["x"], float) - np.asarray(row["clean"], float)).max(initial=0.0))


def _views(s: Summary, row: Row, scale: float, box: Any) -> tuple[View, ...]:
    """Draw clean, adversarial and difference, or what there is of them."""
    if "x" not in row:
        return ()
    x = np.asarray(row["x"], dtype=float)
    clean = np.asarray(row["clean"], dtype=float) if "clean" in row else None
    low, high = _bounds(box, [v for v in (x, clean) if v is not None])
    what = f"Sample {row['index']}"
    told = [
        ("clean", clean, f"{what}, clean: class {s.label(row['label'])}"),
        ("adversarial", x, f"{what}, adversarial: predicted {s.label(row['adversarial_prediction'])}"),
    ]
    views = [_view(c, alt, v, clean, low, high) for c, v, alt in told if v is not None]
    if clean is not None:
        alt = f"{what}, difference: adversarial minus clean, at most {s.units.show(scale)}"
        image = as_image(x - clean)
        drawn = View("difference", alt, png=difference(image, scale)) if image is not None else None
        views.append(drawn or View("difference", alt, path=stems(x - clean, scale)))
    return tuple(views)


def _view(caption: str, alt: str, values: np.ndarray, clean: np.ndarray | None, low: float, high: float) -> View:
    image = as_image(values)
    if image is not None:
        return View(caption, alt, png=picture(image, low, high))
    under = trace(clean, low, high) if clean is not None and values is not clean else ""
    return View(caption, alt, path=trace(values, low, high), under=under)


def _bounds(box: Any, arrays: list[np.ndarray]) -> tuple[float, float]:
    """Return the box, or where there is none of two finite numbers, the range of the values."""
    try:
        low, high = float(box[0]), float(box[1])
    except (TypeError, ValueError, IndexError, KeyError):
        low, high = float("nan"), float("nan")
    if np.isfinite(low) and np.isfinite(high) and low < high:
        return low, high
    return float(min(a.min() for a in arrays)), float(max(a.max() for a in arrays))
