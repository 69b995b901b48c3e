"""Intervals of a share, for one look and for any number of looks, and robust accuracy as a function of eps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final, overload

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


def upper_bound(hits: int, n: int, confidence: float = 0.95) -> float:
    """Return the one-sided exact upper bound of a share (Clopper & Pearson 1934): 0 hits of 60 bound it by 4.9 %."""
    from scipy.special import betaincinv

    return float(betaincinv(hits + 1, n - hits, confidence)) if hits < n else 1.0


@overload
def sequential_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]: ...
@overload
def sequential_interval(
    hits: NDArray[np.int64], n: int | NDArray[np.int64], confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def sequential_interval(hits: Any, n: Any, confidence: float = 0.95) -> tuple[Any, Any]:
    """Return the interval of a share that may be looked at after every sample, elementwise over ``hits`` and ``n``.

    A confidence sequence: with probability ``confidence`` the intervals for n = 1, 2, ... hold the share *all at once*,
    so a run may stop as soon as one is narrow enough. It keeps the shares p for which the martingale

        M_n(p) = B(k + 1, n - k + 1) / (p^k (1 - p)^(n - k)),

    the likelihood ratio of a uniform mixture of shares to p after k hits, is below 1 / (1 - confidence): Ville's
    inequality. log M_n is convex in p and at most 0 at k / n, so they are an interval around k / n; its ends are found
    by halving, and lie outside.

    References: Robbins (1970), Annals of Mathematical Statistics 41(5), 1397-1409; Howard, Ramdas, McAuliffe & Sekhon
    (2021), Annals of Statistics 49(2), 1055-1080, arXiv:1810.08240, sec. 3.2 (there with any beta mixture).
    """
    from scipy.special import betaln, xlog1py, xlogy

    k, trials = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (hits, n)))
    least = betaln(k + 1, trials - k + 1) + np.log1p(-confidence)
    share = np.divide(k, trials, out=np.full(k.shape, 0.5), where=trials > 0)

    def end(outside: NDArray[np.float64]) -> NDArray[np.float64]:
        inside = share
        for _ in range(_HALVINGS):
            p = (inside + outside) / 2
            kept = xlogy(k, p) + xlog1py(trials - k, -p) > least
            inside, outside = np.where(kept, p, inside), np.where(kept, outside, p)
        return outside

    low, high = end(np.zeros(k.shape)), end(np.ones(k.shape))
    return (low, high) if k.ndim else (float(low), float(high))


_HALVINGS: Final = 60
"""Leave no digit of a double between 0 and 1 in doubt."""


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
