"""Landscapes of loss and margin as a page: contour maps and surfaces in plain SVG, and the numbers beside them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, final

import numpy as np
from markupsafe import Markup

from assay.reports.figures import Tick, round_step
from assay.reports.html import environment, template, write_page
from assay.reports.pictures import PALETTE, picture
from assay.reports.text import DASH, NORMS, Units, count, percent, plural

_SIDE: Final = 1000
"""Side of the square that drawings live in."""

_LOSS_RAMP: Final = ((240, 245, 242), (150, 205, 194), (52, 143, 134), (17, 84, 92), (10, 34, 52))
"""Colours from the smallest loss to the largest."""

_LOSSES: Final = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""Losses at which contour lines are drawn."""

_MESH: Final = 28
"""Cells along a side of a drawn surface, at most."""

_WIDTH, _DEPTH, _RISE, _TOP = 480.0, 190.0, 330.0, 360.0
"""A surface: half its width, half its depth, its height, and where its middle is, in units of the drawing."""


class SurfaceLike(Protocol):
    """One model over a plane; see ``assay.study.landscape.Surface``."""

    @property
    def name(self) -> str: ...
    @property
    def loss(self) -> np.ndarray: ...
    @property
    def margin(self) -> np.ndarray: ...
    @property
    def vanished(self) -> np.ndarray | None: ...
    @property
    def saturated(self) -> float: ...
    @property
    def eigenvalues(self) -> tuple[float, ...]: ...
    @property
    def nonlinearity(self) -> float: ...
    @property
    def forwards(self) -> int: ...
    @property
    def backwards(self) -> int: ...
    @property
    def blind(self) -> float: ...
    @property
    def masked(self) -> bool: ...
    @property
    def centre(self) -> tuple[float, float]: ...


class LandscapeLike(Protocol):
    """Models over one plane; see ``assay.study.landscape.Landscape``."""

    @property
    def of(self) -> str: ...
    @property
    def along(self) -> np.ndarray: ...
    @property
    def axes(self) -> tuple[str, str]: ...
    @property
    def surfaces(self) -> Sequence[SurfaceLike]: ...
    @property
    def samples(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def label(self) -> str: ...
    @property
    def threat(self) -> str: ...
    @property
    def eps(self) -> float: ...
    @property
    def size(self) -> np.ndarray | None: ...
    @property
    def marks(self) -> tuple[tuple[str, float, float], ...]: ...
    @property
    def seed(self) -> int: ...


@final
@dataclass(frozen=True, slots=True)
class Contour:
    """A coloured map with lines in a square of 1000, all positions in percent of it.

    ``lines`` are paths with what they stand for; ``bold`` is where the model's answer changes, ``ball`` the edge of
    the ball, ``blind`` strokes over the points without a gradient.
    """

    png: str
    lines: tuple[tuple[str, str], ...]
    bold: str
    ball: str
    blind: str
    alt: str


@final
@dataclass(frozen=True, slots=True)
class Panel:
    """All drawings of one model."""

    name: str
    loss: Contour
    margin: Contour
    mesh: tuple[tuple[str, str], ...]
    alt: str


# ----------------------------------------------------------------------------------------------------------- the page


def write_landscape(path: Path, found: LandscapeLike, command: str = "") -> Path:
    """Write a landscape as a page that needs nothing else, and return where it is.

    Raises:
        RunError: it cannot be written.
    """
    return write_page(path, render_landscape(found, command))


def render_landscape(found: LandscapeLike, command: str = "") -> str:
    """Return the page as text."""
    units = Units.of(found.threat)
    top = max(float(np.log1p(s.loss).max()) for s in found.surfaces) or 1.0
    return (
        environment()
        .get_template("landscape.html.j2")
        .render(
            headline=headline(found, units),
            what=_what(found),
            facts=list(_facts(found)),
            panels=[_panel(found, s, top) for s in found.surfaces],
            ticks=plane_ticks(found.along, units),
            marks=[(n, _place(a, found.along), 100 - _place(b, found.along)) for n, a, b in found.marks],
            axes=found.axes,
            of_input=found.of == "input",
            legend=_legend(top),
            names=[s.name for s in found.surfaces],
            rows=list(_rows(found, units)),
            command=command,
            seed=found.seed,
            style=Markup(template("report.css") + template("landscape.css")),
        )
    )


def headline(found: LandscapeLike, units: Units) -> str:
    """Say how high the loss gets, which is what the pictures show."""
    parts = []
    for s in found.surfaces:
        inside = s.loss if found.size is None else s.loss[found.size <= found.eps * (1 + 1e-6)]
        parts.append(f"{short(float(inside.max()))} ({s.name})")
    highest = " and ".join(parts)
    if found.of == "weights":
        return f"Away from the weights, the mean loss over {plural(found.samples, 'sample')} rises to {highest}."
    norm = found.threat.partition(":")[0]
    ball = f"within an {NORMS.get(norm, norm)} ball of {units.show(found.eps)}"
    return f"Around sample {found.index}, {ball}, the loss in this plane rises to {highest}."


def _what(found: LandscapeLike) -> str:
    if found.of == "weights":
        return f"{plural(found.samples, 'sample')} · filter-normalised directions"
    return f"sample {found.index}, class {found.label} · {found.threat}"


def _facts(found: LandscapeLike) -> Iterator[tuple[str, str]]:
    """Yield what an honest reader has to know beside the pictures: (kind, sentence)."""
    for s in found.surfaces:
        if s.masked:
            yield (
                "bad",
                (
                    f"{s.name}: at {percent(s.blind)} of the points the gradient of cross-entropy is exactly zero. "
                    "Attacks that follow it are blind there; that is no robustness."
                ),
            )
        elif found.of == "input":
            where = "none" if s.blind == 0 else percent(s.blind)
            yield "good", f"{s.name}: the gradient vanishes at {where} of the points."
        if s.centre[1] <= 0 and found.of == "input":
            yield "bad", f"{s.name} is wrong on the sample as it is."
    if found.of == "input":
        yield "plain", "Points outside the input box are drawn back into it, as an attack would."
        yield "plain", "A plane is two directions out of very many: that it looks calm proves nothing."
    else:
        yield (
            "plain",
            "A direction is as long in each filter as that filter, so that models of any scale can be compared.",
        )


def _rows(found: LandscapeLike, units: Units) -> Iterator[tuple[str, list[str], str]]:
    """Yield the table of numbers: what, one value a model, what it means."""
    ss = found.surfaces
    mean = "mean " if found.of == "weights" else ""
    yield f"{mean}loss in the middle", [short(s.centre[0]) for s in ss], "cross-entropy"
    yield f"{mean}margin in the middle", [short(s.centre[1]) for s in ss], "label's logit minus the strongest other"
    yield "largest loss in the plane", [short(float(s.loss.max())) for s in ss], ""
    yield "wrong", [percent(float((s.margin < 0).mean())) for s in ss], "share of the plane with a negative margin"
    if found.of == "input":
        yield "no gradient", [percent(s.blind) for s in ss], "share of points where it is exactly zero"
        yield "saturated", [percent(s.saturated) for s in ss], "share of points where float32 takes a probability for 1"
        for i in range(max(len(s.eigenvalues) for s in ss)):
            values = [short(s.eigenvalues[i]) if i < len(s.eigenvalues) else DASH for s in ss]
            yield (
                f"eigenvalue {i + 1}",
                values,
                "of the Hessian of the loss by the input, largest first" if not i else "",
            )
        inside = f"largest distance of the loss from its tangent found within {units.show(found.eps)}"
        yield "nonlinearity", [short(s.nonlinearity) for s in ss], inside
    passes = [f"{count(s.forwards)} / {count(s.backwards)}" for s in ss]
    yield "passes", passes, "forward / backward"


def short(v: float) -> str:
    """Write a number with three digits; a very small or large one with its power of ten."""
    if not math.isfinite(v):
        return DASH
    return "0" if v == 0 else f"{v:.3g}" if 1e-3 <= abs(v) < 1e5 else f"{v:.1e}"


def _legend(top: float) -> list[tuple[str, str]]:
    """Return some losses with their colours."""
    shown = [v for v in (0.0, *_LOSSES) if math.log1p(v) <= top and (v == 0 or v >= 0.1)]
    return [(short(v), hex_of(ramp(np.array([math.log1p(v) / top]), _LOSS_RAMP)[0])) for v in shown]


# ------------------------------------------------------------------------------------------------------- the drawings


def _panel(found: LandscapeLike, s: SurfaceLike, top: float) -> Panel:
    level = np.log1p(s.loss) / top
    edge = "" if found.size is None else isoline(found.size, found.eps)
    blind = "" if s.vanished is None else hatch(s.vanished)
    most = float(np.abs(s.margin).max()) or 1.0
    bold = isoline(s.margin, 0.0)
    steps = [round_step(most / 4) * k for k in range(-5, 6) if k]
    return Panel(
        name=s.name,
        loss=Contour(
            png=picture(np.flipud(ramp(level, _LOSS_RAMP)) / 255, 0.0, 1.0),
            lines=isolines(s.loss, _LOSSES),
            bold=bold,
            ball=edge,
            blind=blind,
            alt=f"Loss of {s.name} over the plane, from {short(float(s.loss.min()))} to {short(float(s.loss.max()))}.",
        ),
        margin=Contour(
            png=picture(np.flipud(_signed(s.margin / most)) / 255, 0.0, 1.0),
            lines=isolines(s.margin, steps),
            bold=bold,
            ball=edge,
            blind="",
            alt=f"Margin of {s.name}, from {short(float(s.margin.min()))} to {short(float(s.margin.max()))}.",
        ),
        mesh=mesh(level),
        alt=f"The same loss of {s.name} as a surface.",
    )


def ramp(share: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return the colours (..., 3) of shares from 0 to 1 on a ramp."""
    at = np.linspace(0, 1, len(colours))
    bands = [np.interp(share, at, [c[i] for c in colours]) for i in range(3)]
    return np.stack(bands, -1)


def _signed(share: np.ndarray) -> np.ndarray:
    """Return the colours (..., 3) of shares from -1, red, to 1, blue."""
    colours = np.array(PALETTE).reshape(-1, 3)
    middle = len(colours) // 2
    signed: np.ndarray = colours[(middle - np.round(share * middle)).astype(int)].astype(float)
    return signed


def hex_of(colour: np.ndarray) -> str:
    """Write a colour of three values up to 255 as ``#rrggbb``."""
    return "#" + "".join(f"{round(float(v)):02x}" for v in colour)


def isolines(values: np.ndarray, levels: Sequence[float]) -> tuple[tuple[str, str], ...]:
    """Return the contour lines at those levels that the values cross, each with the level in words."""
    drawn = ((short(level), isoline(values, level)) for level in levels)
    return tuple((name, path) for name, path in drawn if path)


def isoline(values: np.ndarray, level: float) -> str:
    """Return where values (s, s), linear between neighbours, take a level: a path in the square of the drawing.

    Marching squares (Lorensen & Cline 1987, in two dimensions): each cell whose corners lie on both sides gets one
    segment between the points where its sides cross the level, two at a saddle. Row 0 is at the bottom.
    """
    s = len(values)
    above = values > level
    mixed = above[:-1, :-1].astype(int) + above[1:, :-1] + above[:-1, 1:] + above[1:, 1:]
    path = []
    for i, j in np.argwhere((mixed > 0) & (mixed < 4)):
        ends = _crossings(values, level, int(i), int(j))
        for (a, b), (c, d) in zip(ends[::2], ends[1::2], strict=True):
            places = ((v + 0.5) / s * _SIDE for v in (a, s - 1 - b, c, s - 1 - d))
            path.append("M{:.0f} {:.0f}L{:.0f} {:.0f}".format(*places))
    return "".join(path)


def _crossings(values: np.ndarray, level: float, i: int, j: int) -> list[tuple[float, float]]:
    """Return the points (column, row) where the sides of a cell cross the level, around the cell: two or four."""
    corners = ((i, j), (i, j + 1), (i + 1, j + 1), (i + 1, j))
    found = []
    for (r, c), (q, d) in zip(corners, (*corners[1:], corners[0]), strict=True):
        here, there = values[r, c] - level, values[q, d] - level
        if (here > 0) != (there > 0):
            t = here / (here - there)
            found.append((c + t * (d - c), r + t * (q - r)))
    return found


def hatch(where: np.ndarray) -> str:
    """Return diagonal strokes over the cells (s, s) that are true; row 0 is at the bottom."""
    s = len(where)
    each = _SIDE / s
    return "".join(
        f"M{j * each:.0f} {(s - i) * each:.0f}l{each:.0f} {-each:.0f}" for i, j in np.argwhere(where).tolist()
    )


def mesh(level: np.ndarray) -> tuple[tuple[str, str], ...]:
    """Return a surface of heights (s, s) from 0 to 1 as tiles (path, colour), the farthest first.

    It is seen from above one corner: columns run to the right front, rows to the right back, heights upwards.
    """
    at = np.unique(np.linspace(0, len(level) - 1, min(len(level), _MESH + 1)).round().astype(int))
    heights, n = level[np.ix_(at, at)], len(at)
    i, j = np.meshgrid(np.linspace(-1, 1, n), np.linspace(-1, 1, n), indexing="ij")
    x = _SIDE / 2 + _WIDTH * (j + i) / 2
    y = _TOP + _DEPTH * (j - i) / 2 + _RISE * (0.5 - heights)
    tiles = []
    for r, c in sorted(((r, c) for r in range(n - 1) for c in range(n - 1)), key=lambda rc: rc[1] - rc[0]):
        corners = ((r, c), (r, c + 1), (r + 1, c + 1), (r + 1, c))
        path = "M" + "L".join(f"{x[k]:.0f} {y[k]:.0f}" for k in corners) + "Z"
        mean = float(np.mean([heights[k] for k in corners]))
        tiles.append((path, hex_of(ramp(np.array([mean]), _LOSS_RAMP)[0])))
    return tuple(tiles)


def plane_ticks(along: np.ndarray, units: Units) -> tuple[Tick, ...]:
    """Return labelled offsets of an axis, in percent from its start; points lie in the middle of their cells."""
    over = units.denominator or 1
    low, high = float(along[0]) * over, float(along[-1]) * over
    step = round_step((high - low) / 5)
    marks = np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step
    return tuple(Tick(_place(v / over, along), "0" if abs(v) < step / 2 else units.show(v / over)) for v in marks)


def _place(offset: float, along: np.ndarray) -> float:
    """Return where an offset lies on an axis, in percent."""
    n = len(along)
    index = (offset - float(along[0])) / float(along[-1] - along[0]) * (n - 1)
    return 100 * (index + 0.5) / n
