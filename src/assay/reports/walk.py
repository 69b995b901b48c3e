"""The walk to the decision boundary as a page and as an animation."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, final

import numpy as np
from markupsafe import Markup
from PIL import Image

from assay.core.errors import DataError, RunError
from assay.core.files import replacing
from assay.reports.html import environment, template, write_page
from assay.reports.landscape import hex_of, short
from assay.reports.pictures import as_image, difference, picture, trace
from assay.reports.text import DASH, NORMS, count, percent

_GIF_SIDE: Final = 224
"""Side in pixels that small images are enlarged to, by whole factors, in an animation."""

_CLASSES: Final = (
    (31, 119, 140), (230, 159, 60), (122, 168, 76), (186, 84, 90), (124, 108, 176),
    (146, 108, 84), (214, 138, 180), (112, 122, 122), (190, 180, 70), (58, 62, 92),
)  # fmt: skip
"""Colours of classes; they repeat where there are more."""

_PAPER: Final = 0.62
"""How pale a class's colour is where the model is least sure."""


class WayLike(Protocol):
    """A way to another class; see ``assay.study.walk.Way``."""

    @property
    def target(self) -> int: ...
    @property
    def size(self) -> float: ...
    @property
    def end(self) -> np.ndarray: ...
    @property
    def shares(self) -> np.ndarray: ...
    @property
    def confidences(self) -> np.ndarray: ...
    @property
    def frames(self) -> np.ndarray: ...
    @property
    def shown(self) -> tuple[int, ...]: ...
    @property
    def found(self) -> bool: ...


class SliceLike(Protocol):
    """A plane coloured by class; see ``assay.study.walk.Slice``."""

    @property
    def first(self) -> np.ndarray: ...
    @property
    def second(self) -> np.ndarray: ...
    @property
    def predictions(self) -> np.ndarray: ...
    @property
    def confidences(self) -> np.ndarray: ...
    @property
    def marks(self) -> tuple[tuple[str, float, float], ...]: ...


class AscentLike(Protocol):
    """An ascent, step by step; see ``assay.study.walk.Ascent``."""

    @property
    def target(self) -> int: ...
    @property
    def frames(self) -> np.ndarray: ...
    @property
    def confidences(self) -> np.ndarray: ...
    @property
    def reached(self) -> int | None: ...


class DistancesLike(Protocol):
    """A matrix of classes; see ``assay.study.walk.Distances``."""

    @property
    def median(self) -> np.ndarray: ...
    @property
    def counts(self) -> np.ndarray: ...
    @property
    def found(self) -> float: ...
    @property
    def norm(self) -> str: ...
    @property
    def attack(self) -> str: ...


class WalkLike(Protocol):
    """A walk; see ``assay.study.walk.Walk``."""

    @property
    def model(self) -> str: ...
    @property
    def x(self) -> np.ndarray: ...
    @property
    def label(self) -> int: ...
    @property
    def prediction(self) -> int: ...
    @property
    def confidences(self) -> np.ndarray: ...
    @property
    def norm(self) -> str: ...
    @property
    def attack(self) -> str: ...
    @property
    def ways(self) -> Sequence[WayLike]: ...
    @property
    def plane(self) -> SliceLike | None: ...
    @property
    def ascent(self) -> AscentLike | None: ...
    @property
    def box(self) -> tuple[float, float]: ...
    @property
    def index(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def forwards(self) -> int: ...
    @property
    def backwards(self) -> int: ...


@final
@dataclass(frozen=True, slots=True)
class Shot:
    """A sample on the way: a PNG, or the path of a line where it is no image."""

    png: str
    path: str
    caption: str
    alt: str


@final
@dataclass(frozen=True, slots=True)
class Row:
    """The way to one class; paths live in a square of 1000."""

    name: str
    size: str
    share: float
    shots: tuple[Shot, ...]
    change: str
    scale: str
    own: str
    wanted: str
    arrival: float
    alt: str


@final
@dataclass(frozen=True, slots=True)
class Map:
    """The coloured slice: marks in percent, and the classes in it with their colours and shares."""

    png: str
    marks: tuple[tuple[str, float, float], ...]
    classes: tuple[tuple[str, str, str], ...]
    scale: str
    alt: str


# ----------------------------------------------------------------------------------------------------------- the page


def write_walk(
    path: Path, found: WalkLike, names: Sequence[str] | None = None, matrix: DistancesLike | None = None,
    command: str = "",
) -> Path:  # fmt: skip
    """Write a walk as a page that needs nothing else, and return where it is.

    Raises:
        RunError: it cannot be written.
    """
    return write_page(path, render_walk(found, names, matrix, command))


def render_walk(
    found: WalkLike, names: Sequence[str] | None = None, matrix: DistancesLike | None = None, command: str = ""
) -> str:
    """Return the page as text; ``names`` are those of classes 0, 1, ..."""
    named = Names(tuple(names or ()))
    script = template("walk.js")
    most = max((w.size for w in found.ways if w.found), default=1.0)
    return (
        environment()
        .get_template("walk.html.j2")
        .render(
            headline=headline(found, named),
            what=f"{found.model} · sample {found.index} · {NORMS.get(found.norm, found.norm)}",
            facts=list(_facts(found, named)),
            label=named(found.label),
            own=named(found.prediction),
            sample=_shot(found, found.x, "as it is", f"Sample {found.index} as it is"),
            rows=[_row(found, w, most, named) for w in found.ways],
            plane=_map(found.plane, named) if found.plane is not None else None,
            ascent=_steps(found, found.ascent, named) if found.ascent is not None else [],
            target=named(found.ascent.target) if found.ascent is not None else "",
            matrix=_matrix(matrix, named) if matrix is not None else [],
            classes=[named(k) for k in range(len(found.confidences))],
            told=_told(matrix) if matrix is not None else "",
            command=command,
            seed=found.seed,
            passes=f"{count(found.forwards)} forward and {count(found.backwards)} backward passes",
            style=Markup(template("report.css") + template("walk.css")),
            script=Markup(script),
            digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        )
    )


@final
@dataclass(frozen=True, slots=True)
class Names:
    """What classes are called: their names, or their numbers."""

    given: tuple[str, ...]

    def __call__(self, number: int) -> str:
        return self.given[number] if number < len(self.given) else str(number)


def headline(found: WalkLike, names: Names) -> str:
    """Say what the nearest other class is, and how far."""
    own, way = names(found.prediction), next(iter(found.ways), None)
    if way is None or not way.found:
        return f"No change of sample {found.index} was found after which {found.model} no longer says {own}."
    norm = NORMS.get(found.norm, found.norm)
    return (
        f"{found.model} says {own} to sample {found.index}. A change of {short(way.size)} ({norm}) is enough for it to "
        f"say {names(way.target)}."
    )


def _facts(found: WalkLike, names: Names) -> Iterator[tuple[str, str]]:
    """Yield what an honest reader has to know beside the headline: (kind, sentence)."""
    if found.label != found.prediction:
        yield "bad", f"The label is {names(found.label)}: the model is wrong on the sample as it is."
    reached = sum(w.found for w in found.ways)
    kind = "good" if reached == len(found.ways) else "plain"
    yield kind, f"{count(reached)} of {count(len(found.ways))} other classes were reached; each end is verified anew."
    yield "plain", f"Sizes are the smallest that {found.attack} found. Smaller changes may exist."
    yield "plain", "Between sample and end the way is straight; the boundary need not be."


def _row(found: WalkLike, way: WayLike, most: float, names: Names) -> Row:
    name = names(way.target)
    if not way.found:
        return Row(name, "none found", 0.0, (), "", "", "", "", 0.0, "")
    own, wanted = (way.confidences[:, k] for k in (found.prediction, way.target))
    at = way.shares / way.shares[-1]
    shots = [
        _shot(found, frame, f"{way.shares[i]:.0%}", f"{way.shares[i]:.0%} of the way to {name}")
        for i, frame in zip(way.shown, way.frames, strict=True)
    ]
    change = way.end.astype(float) - found.x
    scale = float(np.abs(change).max())
    image = as_image(change)
    return Row(
        name=name,
        size=short(way.size),
        share=way.size / most if most else 0.0,
        shots=tuple(shots),
        change=difference(image, scale) if image is not None else "",
        scale=short(scale),
        own=_line(at, own),
        wanted=_line(at, wanted),
        arrival=100 / float(way.shares[-1]),
        alt=f"The probability of {names(found.prediction)} falls from {percent(float(own[0]))} to "
        f"{percent(float(own[-1]))}; that of {name} rises to {percent(float(wanted[-1]))}.",
    )


def _line(at: np.ndarray, share: np.ndarray) -> str:
    return "M" + "L".join(f"{1000 * x:.0f} {1000 * (1 - y):.0f}" for x, y in zip(at, share, strict=True))


def _shot(found: WalkLike, x: np.ndarray, caption: str, alt: str) -> Shot:
    image = as_image(x.astype(float))
    if image is None:
        return Shot("", trace(x, *found.box), caption, alt)
    return Shot(picture(image, *found.box), "", caption, alt)


def _steps(found: WalkLike, ascent: AscentLike, names: Names) -> list[Shot]:
    """Return the steps of the ascent, each with what the model says."""
    shots = []
    for k, (x, sure) in enumerate(zip(ascent.frames, ascent.confidences, strict=True)):
        top = int(sure.argmax())
        said = f"step {k}: {names(top)} {percent(float(sure[top]))}"
        also = "" if top == ascent.target else f", {names(ascent.target)} {percent(float(sure[ascent.target]))}"
        shots.append(_shot(found, x, said + also, said))
    return shots


def _map(plane: SliceLike, names: Names) -> Map:
    """Colour the slice: each class its own, paler where the model is less sure."""
    colours = np.array(_CLASSES, dtype=float)[plane.predictions % len(_CLASSES)]
    sure = plane.confidences[..., None].clip(0, 1)
    pale = (1 - sure) * _PAPER
    image = np.flipud(colours * (1 - pale) + 255 * pale)
    seen, times = np.unique(plane.predictions, return_counts=True)
    order = np.argsort(-times, kind="stable")
    classes = [
        (names(int(seen[i])), hex_of(np.array(_CLASSES[int(seen[i]) % len(_CLASSES)])), percent(times[i] / times.sum()))
        for i in order
    ]
    marks = [(n, _at(a, plane.first), 100 - _at(b, plane.second)) for n, a, b in plane.marks]
    extent = float(plane.first[-1] - plane.first[0])
    return Map(
        picture(image / 255, 0.0, 1.0), tuple(marks), tuple(classes), short(extent),
        f"A slice of the input space with {len(classes)} classes.",
    )  # fmt: skip


def _at(offset: float, along: np.ndarray) -> float:
    n = len(along)
    return 100 * ((offset - float(along[0])) / float(along[-1] - along[0]) * (n - 1) + 0.5) / n


def _matrix(d: DistancesLike, names: Names) -> list[tuple[str, int, list[tuple[str, float]]]]:
    """Return the rows: class, its samples, and for each class wanted the distance with how near it is (0 to 1)."""
    finite = d.median[np.isfinite(d.median)]
    most = float(finite.max(initial=0.0)) or 1.0
    rows = []
    for k, values in enumerate(d.median):
        cells = [(_cell(v, j == k), 0.0 if j == k else max(0.0, 1 - v / most)) for j, v in enumerate(values.tolist())]
        rows.append((names(k), int(d.counts[k]), [(text, a if a == a else 0.0) for text, a in cells]))  # noqa: PLR0124
    return rows


def _cell(v: float, same: bool) -> str:
    return "" if same else DASH if np.isnan(v) else "∞" if np.isinf(v) else f"{v:.2g}"


def _told(d: DistancesLike) -> str:
    norm = NORMS.get(d.norm, d.norm)
    return (
        f"Medians over {count(int(d.counts.sum()))} samples that the model has right, {norm}, the least that "
        f"{d.attack} found; {percent(d.found)} of the searches succeeded."
    )


# ------------------------------------------------------------------------------------------------------ the animation


def write_gif(path: Path, frames: np.ndarray, low: float, high: float, milliseconds: int = 120) -> Path:
    """Write images (n, *f) with values from ``low`` to ``high`` as an animation that ends with a pause and repeats.

    Small images are enlarged by a whole factor. A frame that looks like the one before is not stored twice: that one
    is shown longer.

    Raises:
        DataError: the samples are no images.
        RunError: it cannot be written.
    """
    images = [as_image(x.astype(float)) for x in frames]
    if not images or images[0] is None:
        raise DataError("images (c, h, w) with 1 or 3 channels", f"{frames.shape[1:]}", "Only images can be animated.")
    drawn = [_enlarged(((i - low) / (high - low)).clip(0, 1)) for i in images if i is not None]
    shown = [milliseconds] * len(drawn)
    shown[-1] *= 8
    try:
        with replacing(path) as f:
            drawn[0].save(f, "GIF", save_all=True, append_images=drawn[1:], duration=shown, loop=0)
    except OSError as e:
        raise RunError(f"a place that can be written for {path.name}", str(e), "Choose another file.") from e
    return path


def _enlarged(image: np.ndarray) -> Image.Image:
    factor = max(1, _GIF_SIDE // max(image.shape[:2]))
    levels = (image * 255).round().astype(np.uint8).repeat(factor, 0).repeat(factor, 1)
    return Image.fromarray(levels)
