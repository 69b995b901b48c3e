"""Two maps beside each other: whether they rank pixels alike, share their top ones, and lie where the change is."""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from assay.reports.attribution import per_pixel
from assay.study.measures import Values


@final
@dataclass(frozen=True, slots=True)
class Compared:
    """What one method says of a sample: of its label (row 0) and of the rival class (row 1).

    ``rank`` (2, 2) is Spearman's correlation, pixel by pixel, of the clean map with that of the attacked input (column
    0) and with that after a random change of the same sizes (column 1); NaN where a map is the same everywhere.
    ``overlap`` (2, 2) is the share of their top pixels that they have in common. In the others the columns are the
    clean (0) and the attacked (1) input: ``share`` (2, 2) is how much of the perturbation's l1 size lies in the top
    pixels of each map, ``total`` (2, 2) the sum of a map, ``rise`` (2, 2) how much higher the class's logit is than at
    the baseline; these two are equal where integrated gradients are exact. ``maps`` (2, 2, *f) are kept for the first
    samples only.
    """

    rank: Values
    overlap: Values
    share: Values
    total: Values
    rise: Values
    maps: NDArray[np.float32] | None

    @property
    def gap(self) -> Values:
        """How far the maps are from complete, in logits (2, 2)."""
        gap: Values = np.abs(self.total - self.rise)
        return gap

    def to_json(self) -> dict[str, Any]:
        names = ("rank", "overlap", "share", "total", "rise", "gap")
        return {name: plain_of(getattr(self, name)) for name in names}


def compared(maps: np.ndarray, delta: np.ndarray, rise: Values, k: int, *, keep: bool = True) -> Compared:
    """Compare the maps (2, 3, *f) of two classes at the clean, the attacked and the randomly changed input.

    Args:
        maps: rows are classes, columns inputs.
        delta: the perturbation (*f), attacked minus clean.
        rise: see :class:`Compared`; NaN where sums of maps mean nothing.
        k: how many pixels are the top ones.
        keep: whether the result holds the maps.
    """
    flat = np.stack([[per_pixel(m.astype(np.float64)) for m in row] for row in maps])
    tops = np.stack([[top_pixels(m, k) for m in row] for row in flat])
    moved = per_pixel(np.abs(delta.astype(np.float64)))
    return Compared(
        rank=np.array([[rank_correlation(row[0], other) for other in row[1:]] for row in flat]),
        overlap=np.array([[common(row[0], other) for other in row[1:]] for row in tops]),
        share=tops[:, :2] @ moved / moved.sum() if moved.any() else np.full((2, 2), np.nan),
        total=np.where(np.isnan(rise), np.nan, flat[:, :2].sum(2)),
        rise=rise,
        maps=maps[:, :2].astype(np.float32) if keep else None,
    )


def rank_correlation(a: Values, b: Values) -> float:
    """Return Spearman's rank correlation of values (n,); NaN where one of them is the same everywhere."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else float("nan")


def top_pixels(values: Values, k: int) -> NDArray[np.bool_]:
    """Return the mask (n,) of the k largest absolute values, the first of equals; a value of 0 is never among them."""
    size = np.abs(values)
    mask = np.zeros(len(values), dtype=np.bool_)
    mask[np.argsort(-size, kind="stable")[:k]] = True
    found: NDArray[np.bool_] = mask & (size > 0)
    return found


def common(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Return the share of the larger of two sets, given as masks, that is in both; NaN where both are empty."""
    most = max(a.sum(), b.sum())
    return float((a & b).sum() / most) if most else float("nan")


def plain_of(values: Values) -> Any:
    """Return an array as nested lists, None for what is not a number."""
    found = values.astype(object)
    found[~np.isfinite(values)] = None
    return found.tolist()
