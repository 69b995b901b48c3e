"""Attributions before and after an attack as a page: pictures side by side, and what their numbers say."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, final

import numpy as np
from markupsafe import Markup

from assay.reports.gallery import View
from assay.reports.html import environment, template, write_page
from assay.reports.landscape import short
from assay.reports.pictures import as_image, difference, picture, stems, trace
from assay.reports.text import DASH, Units, call, count, percent, plural

_FULL: Final = 0.995
"""The quantile of the absolute attributions of a sample that gets the full colour."""

_TITLES: Final = {"integrated-gradients": "Integrated gradients", "saliency": "Saliency"}

_SIDES: Final = ("clean", "attacked")

_UNITS: Final = {"integrated-gradients": "logits a pixel", "saliency": "logits a unit of input"}


class ComparedLike(Protocol):
    """The maps of one method; see ``assay.study.attribution.Compared``."""

    @property
    def rank(self) -> np.ndarray: ...
    @property
    def overlap(self) -> np.ndarray: ...
    @property
    def share(self) -> np.ndarray: ...
    @property
    def rise(self) -> np.ndarray: ...
    @property
    def gap(self) -> np.ndarray: ...
    @property
    def maps(self) -> np.ndarray | None: ...


class SampleLike(Protocol):
    """A sample with its maps; see ``assay.study.attribution.Sample``."""

    @property
    def index(self) -> int: ...
    @property
    def label(self) -> int: ...
    @property
    def rival(self) -> int: ...
    @property
    def fooled(self) -> bool: ...
    @property
    def steady(self) -> bool: ...
    @property
    def size(self) -> float: ...
    @property
    def sure(self) -> np.ndarray: ...
    @property
    def by(self) -> Mapping[str, ComparedLike]: ...
    @property
    def x(self) -> np.ndarray | None: ...
    @property
    def attacked(self) -> np.ndarray | None: ...


class AttributionLike(Protocol):
    """Samples with their maps; see ``assay.study.attribution.Attribution``."""

    @property
    def model(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def threat(self) -> str: ...
    @property
    def attack(self) -> Mapping[str, Any]: ...
    @property
    def methods(self) -> Sequence[str]: ...
    @property
    def baseline(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def samples(self) -> Sequence[SampleLike]: ...
    @property
    def seen(self) -> int: ...
    @property
    def pixels(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def box(self) -> tuple[float, float]: ...
    @property
    def class_names(self) -> Sequence[str]: ...
    @property
    def seed(self) -> int: ...
    @property
    def forwards(self) -> int: ...
    @property
    def backwards(self) -> int: ...
    def quantiles(self, method: str, what: str, at: Any, *, fooled: bool) -> list[float] | None: ...


@final
@dataclass(frozen=True, slots=True)
class Pair:
    """The maps of one class, clean and attacked, and how alike they are."""

    name: str
    views: tuple[View, View]
    rank: str
    overlap: str


@final
@dataclass(frozen=True, slots=True)
class Strip:
    """All maps of one method; full colour stands for ``scale``."""

    title: str
    scale: str
    pairs: tuple[Pair, ...]


@final
@dataclass(frozen=True, slots=True)
class Card:
    """A sample with its pictures."""

    index: int
    label: str
    rival: str
    fooled: bool
    size: str
    views: tuple[View, ...]
    strips: tuple[Strip, ...]


@final
@dataclass(frozen=True, slots=True)
class Row:
    """One number over samples: for both classes the median and the range of most."""

    what: str
    cells: tuple[tuple[str, str], ...]
    note: str


@final
@dataclass(frozen=True, slots=True)
class Table:
    """The numbers of one method over one group of samples."""

    title: str
    group: str
    rows: tuple[Row, ...]


def per_pixel(values: np.ndarray) -> np.ndarray:
    """Return values (*f) by pixel (n,), summed over the channels of an image; as they are where it is no image."""
    return _by_pixel(values).reshape(-1)


def _by_pixel(values: np.ndarray) -> np.ndarray:
    """Return an image as (h, w), summed over its channels, and other values as they are."""
    image = as_image(values)
    summed: np.ndarray = values if image is None else image.sum(-1) if image.ndim == 3 else image
    return summed


# ----------------------------------------------------------------------------------------------------------- the page


def write_attribution(path: Path, found: AttributionLike, command: str = "") -> Path:
    """Write attributions as a page that needs nothing else, and return where it is.

    Raises:
        RunError: it cannot be written.
    """
    return write_page(path, render_attribution(found, command))


def render_attribution(found: AttributionLike, command: str = "") -> str:
    """Return the page as text."""
    units = Units.of(found.threat)
    return (
        environment()
        .get_template("attribution.html.j2")
        .render(
            headline=headline(found),
            what=f"{found.model} · {found.data} · {found.threat}",
            facts=list(_facts(found)),
            cards=[_card(found, s, units) for s in found.samples if s.x is not None],
            tables=list(_tables(found)),
            methods=[_TITLES[m] for m in found.methods],
            samples=list(_samples(found)),
            units=[f"{_TITLES[m].lower()}: {_UNITS[m]}" for m in found.methods],
            seen=plural(found.seen, "sample"),
            k=count(found.k),
            pixels=count(found.pixels),
            baseline=found.baseline,
            steps=found.steps,
            attack=call(found.attack),
            command=command,
            seed=found.seed,
            passes=f"{count(found.forwards)} forward and {count(found.backwards)} backward passes",
            style=Markup(template("report.css") + template("attribution.css")),
        )
    )


def headline(found: AttributionLike) -> str:
    """Say what the attack did to the model's answers and to the maps of their labels."""
    n, fooled = len(found.samples), sum(s.fooled for s in found.samples)
    if not n:
        return f"{found.model} is wrong on all of {plural(found.seen, 'sample')}: nothing was attacked."
    told = f"The attack fools {found.model} on {count(fooled)} of {plural(n, 'sample')} that it has right."
    method, group = found.methods[0], fooled > 0
    attacked, random = (found.quantiles(method, "rank", (0, column), fooled=group) for column in (0, 1))
    if attacked is None or random is None:
        return told
    where = "There" if group else "All the same"
    return (
        f"{told} {where}, {_TITLES[method].lower()} of the label keep a rank correlation of {attacked[1]:.2f} "
        f"(median); after a random change of the same sizes it is {random[1]:.2f}."
    )


def _facts(found: AttributionLike) -> Iterator[tuple[str, str]]:
    """Yield what an honest reader has to know beside the pictures: (kind, sentence)."""
    wrong = found.seen - len(found.samples)
    if wrong:
        yield "plain", f"{count(wrong)} of {plural(found.seen, 'sample')} were wrong as they are, and not attacked."
    yield from _completeness(found)
    if found.samples:
        steady = sum(s.steady for s in found.samples)
        yield (
            "plain",
            "Attributions are fragile: a change that is no attack may turn them too. Compare the random change of the "
            f"same sizes, which leaves {count(steady)} of {count(len(found.samples))} answers right.",
        )
    yield "plain", "A map says what the logit of a class goes back to near this input. It does not say why."


def _completeness(found: AttributionLike) -> Iterator[tuple[str, str]]:
    """Yield how well integrated gradients add up."""
    method = "integrated-gradients"
    if method not in found.methods or not found.samples:
        return
    gaps = np.concatenate([s.by[method].gap.reshape(-1) for s in found.samples])
    rises = np.abs(np.concatenate([s.by[method].rise.reshape(-1) for s in found.samples]))
    share = float(np.median(gaps)) / (float(np.median(rises)) or 1.0)
    yield (
        "good" if share < 0.05 else "bad",
        f"Integrated gradients add up to the rise of the logit but for {short(float(np.median(gaps)))} (median; "
        f"{short(float(gaps.max()))} at most), where the median rise is {short(float(np.median(rises)))}.",
    )


def _name(found: AttributionLike, number: int) -> str:
    names = found.class_names
    return names[number] if number < len(names) else str(number)


# ------------------------------------------------------------------------------------------------------- the pictures


def _card(found: AttributionLike, s: SampleLike, units: Units) -> Card:
    assert s.x is not None
    assert s.attacked is not None
    names = _name(found, s.label), _name(found, s.rival)
    change = s.attacked.astype(float) - s.x
    scale = float(np.abs(change).max())
    clean, attacked = (
        "\n".join(f"{name}: {percent(float(p))}" for name, p in zip(names, row, strict=True)) for row in s.sure.T
    )
    views = (
        _shown(found, s.x, "clean", clean, s.index),
        _shown(found, s.attacked, "attacked", attacked, s.index),
        _signed(change, scale, "difference", f"Sample {s.index}: attacked minus clean", f"± {units.show(scale)}"),
    )
    return Card(
        index=s.index,
        label=names[0],
        rival=names[1],
        fooled=s.fooled,
        size=units.show(s.size),
        views=views,
        strips=tuple(_strip(method, s.by[method], s.index, names) for method in found.methods),
    )


def _strip(method: str, c: ComparedLike, index: int, names: tuple[str, str]) -> Strip:
    assert c.maps is not None
    maps = [[_by_pixel(m.astype(float)) for m in row] for row in c.maps]
    levels = np.abs(maps)
    scale = float(np.quantile(levels, _FULL)) or float(levels.max())
    title = _TITLES[method]
    pairs = []
    for name, row, rank, overlap in zip(names, maps, c.rank[:, 0].tolist(), c.overlap[:, 0].tolist(), strict=True):
        alts = (f"Sample {index}: {title.lower()} for {name}, {side}" for side in _SIDES)
        views = [_signed(m, scale, side, alt) for m, side, alt in zip(row, _SIDES, alts, strict=True)]
        pairs.append(Pair(name, (views[0], views[1]), _two(rank), percent(overlap)))
    return Strip(title, f"± {short(scale)}", tuple(pairs))


def _shown(found: AttributionLike, x: np.ndarray, caption: str, said: str, index: int) -> View:
    image, alt = as_image(x.astype(float)), f"Sample {index}, {caption}"
    if image is None:
        return View(caption, alt, path=trace(x, *found.box), under=said)
    return View(caption, alt, png=picture(image, *found.box), under=said)


def _signed(values: np.ndarray, scale: float, caption: str, alt: str, said: str = "") -> View:
    """Draw signed values (*f): blue below 0, red above, full colour at ``scale``."""
    image = as_image(values)
    if image is None:
        return View(caption, alt, path=stems(values, scale), under=said)
    return View(caption, alt, png=difference(image, scale), under=said)


def _two(v: float) -> str:
    return DASH if np.isnan(v) else f"{v:.2f}"


# -------------------------------------------------------------------------------------------------------- the numbers


def _tables(found: AttributionLike) -> Iterator[Table]:
    """Yield the numbers of each method, of samples that were fooled and of those that held."""
    for method in found.methods:
        for fooled, told in ((True, "fooled the model"), (False, "held")):
            n = sum(s.fooled is fooled for s in found.samples)
            if n:
                rows = tuple(_rows(found, method, fooled=fooled))
                yield Table(_TITLES[method], f"{plural(n, 'sample')} that {told}", rows)


def _rows(found: AttributionLike, method: str, *, fooled: bool) -> Iterator[Row]:
    chance = percent(found.k / found.pixels)
    spread = f"of the perturbation's sizes; {chance} if it lay evenly"
    wanted: list[tuple[str, str, int, Callable[[float], str], str]] = [
        ("rank correlation, attacked", "rank", 0, _two, "of the clean and the attacked map, pixel by pixel"),
        ("rank correlation, random change", "rank", 1, _two, "the same sizes of change elsewhere, of random sign"),
        ("common top pixels, attacked", "overlap", 0, percent, f"of {count(found.k)}; by chance {chance}"),
        ("common top pixels, random change", "overlap", 1, percent, ""),
        ("perturbation in top pixels, clean", "share", 0, percent, spread),
        ("perturbation in top pixels, attacked", "share", 1, percent, ""),
        ("completeness gap, clean", "gap", 0, short, "sum of a map against the rise of the logit, in logits"),
        ("completeness gap, attacked", "gap", 1, short, ""),
    ]
    for what, name, column, write, note in wanted:
        known = [found.quantiles(method, name, (row, column), fooled=fooled) for row in (0, 1)]
        if any(known):
            cells = ((DASH, "") if q is None else (write(q[1]), _span(q, write)) for q in known)
            yield Row(what, tuple(cells), note)


def _span(known: list[float], write: Callable[[float], str]) -> str:
    return f"{write(known[0]).removesuffix(' %')} to {write(known[2])}"


def _samples(found: AttributionLike) -> Iterator[tuple[str, ...]]:
    """Yield the table of samples: who, and for each method the two classes' correlations and overlaps."""
    for s in found.samples:
        numbers = (
            text
            for method in found.methods
            for text in (*map(_two, s.by[method].rank[:, 0]), *map(percent, s.by[method].overlap[:, 0]))
        )
        fooled = "yes" if s.fooled else "no"
        yield (str(s.index), _name(found, s.label), _name(found, s.rival), fooled, short(s.size), *numbers)
