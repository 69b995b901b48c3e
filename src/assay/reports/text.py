"""Numbers and settings in words, the same in the terminal and in the report. What is missing is a dash."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

DASH: Final = "\N{EN DASH}"

NORMS: Final = {"linf": "l-infinity", "l2": "l2", "l1": "l1", "l0": "l0"}


def percent(share: float | None) -> str:
    """Write a share of 1 with one decimal; more of them where 0 or 100 would be said of what is neither."""
    if share is None or math.isnan(share):
        return DASH
    for digits in (1, 2, 3):
        written = f"{100 * share:.{digits}f}"
        if share in (0, 1) or float(written) not in (0, 100):
            break
    return f"{written} %"


def span(low: float | None, high: float | None) -> str:
    """Write an interval of shares, ``83.7 to 89.8 %``."""
    return DASH if low is None or high is None else f"{percent(low).removesuffix(' %')} to {percent(high)}"


def count(n: float | None) -> str:
    """Write a number of things: ``100,000``; below ten with one decimal where it is not whole."""
    if n is None or math.isnan(n):
        return DASH
    return f"{n:,.0f}" if n >= 9.95 or n == int(n) else f"{n:.1f}"


def duration(seconds: float | None) -> str:
    """Write a time: ``31.2 s``, ``2 min 05 s``, ``3 h 12 min``."""
    if seconds is None or math.isnan(seconds):
        return DASH
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory(size: int) -> str:
    """Write a number of bytes: ``2.4 MB``."""
    power = min((len(str(size)) - 1) // 3, 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def epoch_text(epoch: float) -> str:
    """Write when in training it was: ``7``, ``7.25``."""
    return f"{epoch:.2f}".rstrip("0").rstrip(".")


def plural(n: int | None, noun: str) -> str:
    """Write a count with its noun: ``1 image``, ``500 images``."""
    return f"{count(n)} {noun}{'' if n == 1 else 's'}"


@final
@dataclass(frozen=True, slots=True)
class Units:
    """How sizes are written: plain, or as fractions where eps was given as one (``8/255``)."""

    denominator: int | None = None

    @classmethod
    def of(cls, threat: str) -> "Units":
        """Take the denominator from the text of a threat, ``linf:8/255``."""
        below = threat.rpartition("/")[2] if "/" in threat else ""
        return cls(int(below) if below.isdigit() and int(below) > 1 else None)

    def show(self, size: float | None) -> str:
        """Write a size with three significant digits."""
        if size is None or math.isnan(size):
            return DASH
        if math.isinf(size):
            return "none found"
        if self.denominator:
            return f"{size * self.denominator:.3g}/{self.denominator}"
        return f"{size:.3g}" if size < 1000 else f"{size:,.0f}"


def call(value: Any) -> str:
    """Write an attack and its parameters as a call: ``apgd(steps=100, loss=margin)``."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{k}={call(v)}" for k, v in value.items() if k != "name")
        return f"{value.get('name', '')}({inner})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(call, value))}]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
