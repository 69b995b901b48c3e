"""Exact intervals, and robust accuracy as a function of eps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final, overload

import numpy as np
from numpy.typing import NDArray


@overload
def exact_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]: ...
@overload
def exact_interval(
    hits: NDArray[np.int64], n: int, confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def exact_interval(hits: Any, n: int, confidence: float = 0.95) -> tuple[Any, Any]:
    """Return the two-sided exact binomial interval of a share (Clopper & Pearson 1934), elementwise over ``hits``."""
    from scipy.special import betaincinv

    k, tail = np.asarray(hits, dtype=np.float64), (1 - confidence) / 2
    rest = float(n) - k
    low = np.where(k > 0, betaincinv(np.maximum(k, 1), rest + 1, tail), 0.0)
    high = np.where(rest > 0, betaincinv(k + 1, np.maximum(rest, 1), 1 - tail), 1.0)
    return (low, high) if k.ndim else (float(low), float(high))


@final
@dataclass(frozen=True, slots=True)
class Curve:
    """Robust accuracy at every eps up to ``limit``: a step function that falls at each of ``sizes``.

    ``sizes`` (k,) are the sizes found, ascending; ``robust`` (k,) the share of samples that need more than that.
    Beyond ``limit``, the eps that was attacked, nothing is known (None: every size was searched).
    """

    sizes: NDArray[np.float64]
    robust: NDArray[np.float64]
    limit: float | None

    @classmethod
    def of(cls, sizes: Sequence[float] | NDArray[np.float64], limit: float | None) -> "Curve":
        """Build the curve from one size a sample: 0 where it is wrong as it is, inf where none was found.

        A size that float32 rounded to just above ``limit`` was found within it, and counts so.
        """
        values = np.sort(np.asarray(sizes, dtype=np.float64))
        found = np.isfinite(values)
        if limit is not None:
            values[found] = np.minimum(values[found], limit)
        steps = np.unique(values[found])
        above = len(values) - np.searchsorted(values, steps, side="right")
        return cls(steps, above / len(values), limit)

    def __call__(self, eps: float) -> float:
        """Return the robust accuracy at eps.

        Raises:
            ValueError: eps is negative or NaN, or beyond what was attacked.
        """
        if not eps >= 0:
            raise ValueError(f"eps is at least 0, got {eps:g}")
        if self.limit is not None and eps > self.limit:
            raise ValueError(
                f"the curve is known up to eps = {self.limit:g}, the budget that was attacked; got {eps:g}"
            )
        at = int(np.searchsorted(self.sizes, eps, side="right")) - 1
        return float(self.robust[at]) if at >= 0 else 1.0
