"""Between proof and attack: each sample as an interval, and what is proven, open and broken at every eps."""

from dataclasses import dataclass
from typing import Final, final

import numpy as np
import pyarrow as pa

from assay.reports.figures import Tick, stairs, ticks
from assay.reports.summary import Summary, is_right
from assay.reports.text import percent, plural

_ROWS: Final = 250
"""Intervals drawn at most; of more, as many are chosen at equal distances in their order."""

_GAP: Final = 0.2
"""Share of a row that is left free, where there are few enough for that to be seen."""

_STEPS: Final = 400


@final
@dataclass(frozen=True, slots=True)
class Brackets:
    """Two figures on one scale of sizes; paths live in squares of 1000, ticks are in percent.

    ``proven`` and ``open`` are the bars of the intervals, ``ends`` the strokes at the sizes that fool; ``below`` and
    ``between`` the areas under the share that is proven, and from there to the share that is not broken. ``readings``
    are rows of words: size, proven, open, broken. ``ratio`` is the mean of the lower ends over that of the upper ones,
    None where a sample has no upper end.
    """

    n: int
    drawn: int
    proven: str
    open: str
    ends: str
    below: str
    between: str
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    readings: tuple[tuple[str, str, str, str], ...]
    ratio: float | None
    alt: str


def brackets(s: Summary, samples: pa.Table, asked: tuple[float, ...] = ()) -> Brackets | None:
    """Draw the brackets of a run that has radii; ``None`` for any other. ``asked`` are sizes to be read off."""
    right = is_right(samples)
    radii = s.prove is not None and (s.eps is None or s.smoothed)
    if not radii or not right.any():
        return None
    lower, upper = (samples[c].to_numpy() for c in ("lower", "upper"))
    known = np.concatenate([upper[np.isfinite(upper)], lower])
    limit = float(known.max(initial=0)) * 1.04 or 1.0
    order = np.lexsort((upper[right], lower[right]))
    low, high = lower[right][order], upper[right][order]
    chosen = np.unique(np.linspace(0, len(low) - 1, min(len(low), _ROWS)).round().astype(int))
    shown = low[chosen], np.minimum(high[chosen], limit)
    held, standing = np.where(right, lower, -1.0), np.where(right, upper, 0.0)
    ends = np.where(np.isfinite(high[chosen]), shown[1], np.nan)
    return Brackets(
        n=int(right.sum()),
        drawn=len(chosen),
        proven=_bars(np.zeros(len(chosen)), shown[0], limit),
        open=_bars(shown[0], shown[1], limit),
        ends=_ends(ends, limit),
        below=_area(held, None, limit),
        between=_area(standing, held, limit),
        x=ticks(limit, s.units, None),
        y=tuple(Tick(100 - v, f"{v} %") for v in (0, 25, 50, 75, 100)),
        readings=_readings(s, held, standing, asked, limit),
        ratio=float(low.sum() / high.sum()) if np.isfinite(high).all() and high.sum() else None,
        alt=f"{plural(int(right.sum()), s.noun)}, each an interval from the size it is proven to, at most "
        f"{s.units.show(float(low.max()))}, to the smallest size that was found to fool.",
    )


def _bars(begin: np.ndarray, end: np.ndarray, limit: float) -> str:
    """Return one rectangle a row, from the top."""
    high = 1000 / len(begin)
    gap = _GAP * high if len(begin) <= _ROWS // 2 else 0.0
    a, b = 1000 * begin / limit, 1000 * end / limit
    return "".join(
        f"M{a[i]:.1f} {i * high:.2f}H{b[i]:.1f}v{high - gap:.2f}H{a[i]:.1f}z" for i in range(len(a)) if b[i] > a[i]
    )


def _ends(at: np.ndarray, limit: float) -> str:
    high = 1000 / len(at)
    return "".join(f"M{1000 * v / limit:.1f} {i * high:.2f}v{high:.2f}" for i, v in enumerate(at) if np.isfinite(v))


def _area(sizes: np.ndarray, above: np.ndarray | None, limit: float) -> str:
    """Return the area below the share of ``sizes`` (n,) that reach eps, and over that of others."""
    top = stairs(*_falling(sizes, limit), limit, limit)
    if above is None:
        return f"{top}V1000H0Z"
    x, y = _falling(above, limit)
    u, v = 1000 * x / limit, 1000 * (1 - y)
    back = [f"V{v[-1]:.1f}"]
    back += [f"H{u[i]:.1f}" + (f"V{v[i - 1]:.1f}" if i else "") for i in range(len(u) - 1, -1, -1)]
    return "".join([top, *back, "Z"])


def _falling(sizes: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Return where the share of ``sizes`` (n,) above eps falls, beginning with 0, and to what."""
    x = np.unique(np.concatenate([[0.0], sizes[(sizes > 0) & (sizes < limit)]]))
    if len(x) > _STEPS:
        x = np.unique(np.quantile(x, np.linspace(0, 1, _STEPS), method="lower"))
    ordered = np.sort(sizes)
    return x, (len(ordered) - np.searchsorted(ordered, x, side="right")) / len(ordered)


def _readings(
    s: Summary, held: np.ndarray, standing: np.ndarray, asked: tuple[float, ...], limit: float
) -> tuple[tuple[str, str, str, str], ...]:
    """Return what holds at the sizes of the ticks, and at those that were ``asked`` for."""
    found, named = [], {eps: s.units.show(eps) for eps in (*asked, *([] if s.eps is None else [s.eps]))}
    marks = {t.at * limit / 100: t.label for t in ticks(limit, s.units, None)[1:] if t.label not in named.values()}
    for eps, label in sorted({**marks, **named}.items()):
        proven, left = float((held >= eps).mean()), float((standing > eps).mean())
        shares = proven, max(0.0, left - proven), 1 - max(left, proven)
        found.append((label, *map(percent, shares)))
    return tuple(found)  # type: ignore[arg-type]
