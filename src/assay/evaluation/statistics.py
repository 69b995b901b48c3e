"""Exact intervals, and robust accuracy as a function of eps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta


def exact_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided exact binomial interval of a share (Clopper & Pearson 1934)."""
    if n == 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


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
        """Build the curve from one size a sample: 0 where it is wrong as it is, inf where none was found."""
        values = np.asarray(sizes, dtype=np.float64)
        steps = np.unique(values[np.isfinite(values)])
        above = np.array([(values > s).mean() for s in steps])
        return cls(steps, above, limit)

    def __call__(self, eps: float) -> float:
        """Return the robust accuracy at eps.

        Raises:
            ValueError: eps is beyond what was attacked.
        """
        if self.limit is not None and eps > self.limit:
            raise ValueError(
                f"the curve is known up to eps = {self.limit:g}, the budget that was attacked; got {eps:g}"
            )
        at = int(np.searchsorted(self.sizes, eps, side="right")) - 1
        return float(self.robust[at]) if at >= 0 else 1.0
