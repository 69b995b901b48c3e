"""The geometry of the figures: shares and sizes become percent of the plot, so that a browser can stretch it.

The report draws plain SVG instead of embedding a plotting library: the usual one weighs 4.8 MB of script
against some kilobytes here, and these figures are sharp in print, follow dark mode, and need no script.
"""

import math
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import pyarrow as pa

from assay.reports.summary import Summary, is_right
from assay.reports.text import Units, percent, span
from assay.runs import exact_interval

_POINTS: Final = 400
"""Steps drawn at most; more could not be told apart."""


@final
@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled position, in percent."""

    at: float
    label: str


@final
@dataclass(frozen=True, slots=True)
class Curve:
    """The curve of robust accuracy over eps; paths live in a square of 1000, ``mark`` and ticks in percent.

    ``steps`` holds [eps, share, low, high] for the cursor, ``readings`` the same in words for a table.
    """

    line: str
    band: str
    proven: str
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    limit: float
    end: float
    mark: float | None
    mark_at: float
    mark_label: str
    steps: list[list[float]]
    readings: tuple[tuple[str, str, str], ...]
    alt: str


@final
@dataclass(frozen=True, slots=True)
class Steps:
    """A step function that falls: from ``x[i]`` on it is ``y[i]``, within ``low[i] .. high[i]``."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def at(self, eps: float) -> tuple[float, float, float]:
        i = int(np.searchsorted(self.x, eps, side="right")) - 1
        return float(self.y[i]), float(self.low[i]), float(self.high[i])


def falling(sizes: np.ndarray, end: float, confidence: float) -> Steps:
    """Return the share of ``sizes`` above eps, for eps from 0 to ``end``, with its exact interval."""
    ordered = np.sort(sizes)
    x = np.unique(np.concatenate([[0.0], ordered[(ordered > 0) & (ordered <= end)]]))
    if len(x) > _POINTS:
        bins = np.floor(x / end * _POINTS)
        x = x[np.append(np.diff(bins) > 0, True) | (x == 0)]
    above = len(ordered) - np.searchsorted(ordered, x, side="right")
    low, high = exact_interval(above, len(ordered), confidence)
    return Steps(x, above / len(ordered), low, high)


def curve(s: Summary, samples: pa.Table) -> Curve | None:
    """Draw robust accuracy over eps from the sizes in the table; ``None`` where there is nothing to draw."""
    sizes = samples["size"].to_numpy()
    if not len(sizes) or not s.attacked:
        return None
    if s.eps is not None:
        fooled = samples["fooled"].to_numpy(zero_copy_only=False)
        sizes = np.where(fooled, np.minimum(sizes, s.eps), sizes)
    finite = sizes[np.isfinite(sizes)]
    end = s.eps if s.eps is not None else float(finite.max(initial=0)) * 1.03
    end = end or 1.0
    limit = end * 1.06 if s.eps is not None else end
    steps = falling(sizes, end, s.confidence)
    last = percent(float(steps.y[-1]))
    return Curve(
        line=stairs(steps.x, steps.y, end, limit),
        band=_band(steps, end, limit),
        proven=_proven(samples, end, limit),
        x=ticks(limit, s.units, end if s.eps is not None else None),
        y=tuple(Tick(100 - v, f"{v} %") for v in (0, 25, 50, 75, 100)),
        limit=limit,
        end=end,
        mark=100 * end / limit if s.eps is not None else None,
        mark_at=100 * (1 - float(steps.y[-1])),
        mark_label=f"eps {s.eps_text}: {last}" if s.eps is not None else "",
        steps=np.column_stack([steps.x, steps.y, steps.low, steps.high]).round(6).tolist(),
        readings=_readings(steps, end, s.units),
        alt=f"Step curve: the robust accuracy is {percent(float(steps.y[0]))} at size 0 and falls to {last} "
        f"at {s.units.show(end)}.",
    )


def _place(x: Any, y: Any, limit: float) -> tuple[Any, Any]:
    return 1000 * x / limit, 1000 * (1 - y)


def stairs(x: np.ndarray, y: np.ndarray, end: float, limit: float) -> str:
    """Return the path of a step function that is y[i] from x[i] on, up to ``end`` on a scale up to ``limit``."""
    u, v = _place(x, y, limit)
    path = [f"M{u[0]:.1f} {v[0]:.1f}", *(f"H{a:.1f}V{b:.1f}" for a, b in zip(u[1:], v[1:], strict=True))]
    return "".join([*path, f"H{1000 * end / limit:.1f}"])


def _band(steps: Steps, end: float, limit: float) -> str:
    """Return the outline between the two bounds: along the upper, back along the lower."""
    u, v = _place(steps.x, steps.low, limit)
    right = f"{1000 * end / limit:.1f}"
    back = [f"L{right} {v[-1]:.1f}"]
    back += [f"H{u[i]:.1f}" + (f"V{v[i - 1]:.1f}" if i else "") for i in range(len(u) - 1, -1, -1)]
    return stairs(steps.x, steps.high, end, limit) + "".join(back) + "Z"


def _proven(samples: pa.Table, end: float, limit: float) -> str:
    """Draw the share that is proven up to eps; nothing where nothing is proven."""
    right = is_right(samples)
    lower = samples["lower"].to_numpy()
    if not (lower[right] > 0).any():
        return ""
    radii = np.where(right, lower, -1.0)
    x = np.unique(np.concatenate([[0.0], radii[(radii > 0) & (radii < end)]]))
    if len(x) > _POINTS:
        x = np.unique(np.quantile(x, np.linspace(0, 1, _POINTS), method="lower"))
    y = np.array([(radii > eps).mean() for eps in x])
    return stairs(x, y, end, limit)


def ticks(limit: float, units: Units, mark: float | None) -> tuple[Tick, ...]:
    """Return labelled sizes from 0 to ``limit``, and ``mark`` among them."""
    scale = units.denominator or 1
    step = round_step(limit * scale / 5)
    at = np.arange(0, limit * scale * 1.0001, step) / scale
    ticks = [Tick(100 * v / limit, "0" if v == 0 else units.show(float(v))) for v in at]
    if mark is None:
        return tuple(ticks)
    near = [t for t in ticks if abs(t.at - 100 * mark / limit) > 7]
    return (*near, Tick(100 * mark / limit, units.show(mark)))


def round_step(rough: float) -> float:
    """Return the next of 1, 2, 5, times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def _readings(steps: Steps, end: float, units: Units) -> tuple[tuple[str, str, str], ...]:
    found = []
    for eps in (0.0, end / 4, end / 2, 3 * end / 4, end):
        y, low, high = steps.at(eps)
        found.append(("0" if eps == 0 else units.show(eps), percent(y), span(low, high)))
    return tuple(found)


@final
@dataclass(frozen=True, slots=True)
class Confusions:
    """Which label became which prediction: a matrix for few classes, and always the most frequent pairs."""

    numbers: tuple[int, ...]
    cells: tuple[tuple[int, ...], ...]
    top: tuple[tuple[int, int, int], ...]
    most: int
    fooled: int


def confusions(samples: pa.Table, most_classes: int = 20) -> Confusions | None:
    """Count the wrong answers that the attacks reached; ``None`` where nothing was fooled."""
    fooled = samples.filter(samples["fooled"]).select(["label", "adversarial_prediction"]).drop_null()
    if not len(fooled):
        return None
    label, wrong = (fooled[c].to_numpy() for c in ("label", "adversarial_prediction"))
    pairs, times = np.unique(np.column_stack([label, wrong]), axis=0, return_counts=True)
    order = np.argsort(-times, kind="stable")[:10]
    top = tuple((int(pairs[i, 0]), int(pairs[i, 1]), int(times[i])) for i in order)
    numbers = tuple(np.unique(np.concatenate([samples["label"].to_numpy(), wrong])).tolist())
    cells: tuple[tuple[int, ...], ...] = ()
    if len(numbers) <= most_classes:
        table = {(int(a), int(b)): int(t) for (a, b), t in zip(pairs, times, strict=True)}
        cells = tuple(tuple(table.get((a, b), 0) for b in numbers) for a in numbers)
    return Confusions(numbers, cells, top, int(times.max()), len(label))
