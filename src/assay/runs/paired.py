"""What two runs found on the same samples: exact tests, intervals, and resampling of pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

Flags: TypeAlias = NDArray[np.bool_]
Floats: TypeAlias = NDArray[np.float64]

RESAMPLES: Final = 2000
"""Of a bootstrap, unless another number is asked for."""

_AT_ONCE: Final = 2**21
"""Values that a bootstrap holds in memory at once."""


@final
@dataclass(frozen=True, slots=True)
class Shares:
    """How many of ``n`` paired samples have a property in both runs, in one of them only, or in neither.

    ``difference`` is the share in b minus the share in a, ``interval`` Newcombe's (1998), ``p_value`` that of McNemar's
    exact test of no difference.
    """

    n: int
    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    interval: tuple[float, float]
    p_value: float

    @property
    def a(self) -> int:
        """Return how many have it in run a."""
        return self.both + self.only_a

    @property
    def b(self) -> int:
        """Return how many have it in run b."""
        return self.both + self.only_b


@final
@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the smallest changes that fool, on the ``n`` samples that both runs get right and one or both break.

    A size is inf where the run was not fooled. ``ratio`` is the median of size in b over size in a, ``median_a`` and
    ``median_b`` are those of the sizes: each the lower of two middle ones, and at most one of the two is inf, since of
    each pair one at least is not. ``p_value`` is that of the sign test of equal sizes, which leaves ties out.
    """

    n: int
    larger_in_a: int
    larger_in_b: int
    ratio: float
    p_value: float
    median_a: float
    median_b: float

    @property
    def difference(self) -> float:
        """Return the median in b minus that in a; infinite where one of them is."""
        return self.median_b - self.median_a


@final
@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Intervals between the percentiles of ``resamples`` samples of as many pairs, drawn with replacement.

    ``robust`` and ``certified`` are of the difference of shares, ``median`` of the difference of median sizes,
    ``ratio`` of the median ratio of sizes; None where that is not compared. Ends may be infinite for sizes.
    """

    resamples: int
    seed: int
    robust: tuple[float, float] | None
    certified: tuple[float, float] | None
    median: tuple[float, float] | None
    ratio: tuple[float, float] | None


def shares(a: Flags, b: Flags, confidence: float = 0.95) -> Shares:
    """Compare how often a property (n,) holds in two runs on the same samples.

    The test is McNemar's, exact: where the runs differ, either is equally likely to have it.

    References: McNemar (1947), Psychometrika 12(2), 153-157.
    """
    both, only_a, only_b, neither = (int(v.sum()) for v in (a & b, a & ~b, ~a & b, ~a & ~b))
    return Shares(
        n=len(a),
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=neither,
        difference=(only_b - only_a) / len(a),
        interval=difference_interval(both, only_a, only_b, neither, confidence),
        p_value=_coin(only_a, only_b),
    )


def difference_interval(
    both: int, only_a: int, only_b: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the interval of the difference, b minus a, of two shares of the same samples.

    Wilson's score intervals of the two shares are combined, with their correlation, corrected for continuity.

    References: Newcombe (1998), Improved confidence intervals for the difference between binomial proportions based on
    paired data, Statistics in Medicine 17, 2635-2650, method 10.
    """
    n = both + only_a + only_b + neither
    (a, a_low, a_high), (b, b_low, b_high) = (_wilson(both + k, n, confidence) for k in (only_a, only_b))
    spread = np.sqrt(float(both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither))
    product = float(both * neither - only_a * only_b)
    phi = (max(product - n / 2, 0.0) if product > 0 else product) / spread if spread else 0.0
    down, up = (b - b_low, a_high - a), (b_high - b, a - a_low)
    low, high = (np.sqrt(u * u - 2 * phi * u * v + v * v) for u, v in (down, up))
    return float(b - a - low), float(b - a + high)


def _wilson(hits: int, n: int, confidence: float) -> tuple[float, float, float]:
    """Return a share with its score interval (Wilson 1927)."""
    from scipy.special import ndtri

    z, share = float(ndtri((1 + confidence) / 2)), hits / n
    middle, half = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return share, low, high


def sizes(a: Floats, b: Floats) -> Sizes | None:
    """Compare sizes (n,), 0 for samples that are wrong as they are and inf where none was found; None without a pair.

    Both searches must have gone equally far: only then is what was not found in one larger than what was in the other.
    """
    a, b = paired_sizes(a, b)
    if not len(a):
        return None
    ratios = b / a
    less, more = int((ratios < 1).sum()), int((ratios > 1).sum())
    medians = (float(lower_median(v)) for v in (a, b))
    return Sizes(len(a), less, more, float(lower_median(ratios)), _coin(less, more), *medians)


def paired_sizes(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Return the sizes (m,) of the samples that both runs get right and one or both break."""
    pairs = (a > 0) & (b > 0) & (np.isfinite(a) | np.isfinite(b))
    return a[pairs], b[pairs]


def lower_median(values: Floats) -> Floats:
    """Return the lower of the two middle values of the last axis, (..., n) to (...); inf is a value like others."""
    middle = (values.shape[-1] - 1) // 2
    return np.partition(values, middle, axis=-1)[..., middle]


def bootstrap(
    statistic: Callable[..., Floats],
    *columns: NDArray[Any],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of a statistic of paired columns (n,): rows are drawn together, with replacement.

    The ends are values that occurred, with as many outside on either side, and nothing is interpolated: so values may
    be infinite, and b minus a has the interval of a minus b, turned. The same seed gives the same interval.

    Args:
        statistic: from resampled columns (r, n) to values (r,).
        columns: one row a sample.
        confidence: the share of the values between the two ends.
        resamples: how often is drawn.
        seed: of the draws.

    References: Efron (1979), Annals of Statistics 7(1), 1-26; percentile method: Efron (1981), Canadian Journal of
    Statistics 9(2), 139-158.
    """
    n, draws = len(columns[0]), np.random.Generator(np.random.Philox(seed))
    step = max(1, _AT_ONCE // n)
    parts = []
    for done in range(0, resamples, step):
        rows = draws.integers(n, size=(min(step, resamples - done), n))
        parts.append(statistic(*(c[rows] for c in columns)))
    values = np.sort(np.concatenate(parts))
    outside = int(resamples * (1 - confidence) / 2)
    return float(values[outside]), float(values[resamples - 1 - outside])


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for there being several: below alpha, each is so with the error of all of them below.

    The k-th smallest of m is multiplied by m - k + 1; none gets smaller than the one before it, or larger than 1.

    References: Holm (1979), Scandinavian Journal of Statistics 6(2), 65-70.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(v) for v in adjusted]


def _coin(heads: int, tails: int) -> float:
    """Return the two-sided p-value of the exact test that a coin is fair."""
    from scipy.stats import binomtest

    return float(binomtest(heads, heads + tails).pvalue) if heads + tails else 1.0
