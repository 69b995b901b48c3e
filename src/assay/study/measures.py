"""What the values of a layer say: their peak, how they moved, what they tell apart, and what they go with."""

from dataclasses import dataclass
from typing import Final, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray

from assay.core.random import Draws

Values: TypeAlias = NDArray[np.float64]
Hits: TypeAlias = NDArray[np.bool_]

_RESAMPLES: Final = 2000


def histogram(values: Values, bins: int) -> NDArray[np.int64]:
    """Count values of 0 .. 1 in equal bins; what rounding (or responses of both signs) carried out is put into the end.

    NaN values are left out.
    """
    counts: NDArray[np.int64] = np.histogram(np.clip(values[~np.isnan(values)], 0, 1), bins, (0, 1))[0]
    return counts


def mode(counts: NDArray[np.int64]) -> float:
    """Return the middle of the fullest bin of 0 .. 1, the first of equals; NaN where all are empty."""
    return (int(counts.argmax()) + 0.5) / len(counts) if counts.any() else float("nan")


def separation(before: Values, after: Values) -> float | None:
    """Return the chance that one of ``after`` is above one of ``before``, plus half of that of a tie: the ROC's area.

    It is the statistic of Mann and Whitney (1947) over the number of pairs. 0.5: the values tell nothing apart; 0 or 1:
    everything. NaN values are left out; None where nothing is left.
    """
    from scipy.stats import mannwhitneyu

    a, b = before[~np.isnan(before)], after[~np.isnan(after)]
    return float(mannwhitneyu(b, a, method="asymptotic").statistic) / (len(a) * len(b)) if len(a) and len(b) else None


@final
@dataclass(frozen=True, slots=True)
class Shift:
    """How paired values moved.

    ``rank_biserial`` is the effect size of matched pairs, (W+ - W-) / (W+ + W-) with the signed rank sums: 1 where all
    rise, -1 where all fall (Kerby 2014, doi:10.2466/11.IT.3.1). ``p`` is that of Wilcoxon's signed-rank test (1945),
    two-sided; pairs that did not move are left out of both, and ``n`` counts the others.
    """

    mean: float
    median: float
    rank_biserial: float
    p: float
    n: int

    @classmethod
    def of(cls, before: Values, after: Values) -> "Shift | None":
        """Compare values (n,) with those of the same samples later (n,); None where no pair has both."""
        from scipy.stats import rankdata, wilcoxon

        d = after - before
        d = d[~np.isnan(d)]
        if not len(d):
            return None
        moved = d[d != 0]
        if not len(moved):
            return cls(0.0, 0.0, 0.0, 1.0, 0)
        ranks = rankdata(np.abs(moved))
        effect = float((ranks * np.sign(moved)).sum() / ranks.sum())
        p = float(wilcoxon(moved, method="auto").pvalue)
        return cls(float(d.mean()), float(np.median(d)), effect, p, len(moved))


@final
@dataclass(frozen=True, slots=True)
class Relation:
    """Spearman's rank correlation over classes, with a bootstrap interval: percentiles over classes drawn anew.

    A draw in which one of the two is the same for all classes shows no relation and counts as 0: else a single class
    that differs would seem to prove one. With ten classes the interval is wide, and rather too narrow still.
    """

    rho: float
    low: float
    high: float
    classes: int

    @classmethod
    def of(cls, x: Values, y: Values, seed: int = 0, confidence: float = 0.95) -> "Relation | None":
        """Relate values of the classes (k,) with others; None for fewer than 3 classes, or where all are the same."""
        known = ~(np.isnan(x) | np.isnan(y))
        x, y = x[known], y[known]
        if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
            return None
        drawn = Draws.of(seed, torch.arange(_RESAMPLES)).integers(len(x), (len(x),)).numpy()
        found = _spearman(x[drawn], y[drawn])
        low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
        return cls(float(_spearman(x[None], y[None])[0]), float(low), float(high), len(x))


def _spearman(x: Values, y: Values) -> Values:
    """Return the rank correlations of rows (m, k), 0 where a row has one value only."""
    from scipy.stats import rankdata

    a, b = (rankdata(v, axis=1) - (v.shape[1] + 1) / 2 for v in (x, y))
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    found: Values = np.divide((a * b).sum(1), scale, out=np.zeros(len(x)), where=scale > 0)
    return found
