"""Two runs on the same samples, compared pair by pair, with tests of significance."""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from assay.core.errors import RunError
from assay.runs.schema import ROBUST, UNATTACKED
from assay.runs.store import Run

Flags: TypeAlias = NDArray[np.bool_]


@final
@dataclass(frozen=True, slots=True)
class Side:
    """What one of the two runs was: whose answers, under which attack. ``samples`` are all that it holds."""

    run: str
    model: str
    threat: str
    effort: str
    samples: int


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

    ``ratio`` is the median of size in b over size in a (the lower of two middle ones), inf where b was not fooled.
    ``p_value`` is that of the sign test of equal sizes, which leaves ties out.
    """

    n: int
    larger_in_a: int
    larger_in_b: int
    ratio: float
    p_value: float


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs on the same samples.

    ``robust`` is None where a run has no eps, ``sizes`` where the runs did not search within the same ball.
    ``differs`` names what is not the same in both: of model, threat, effort, seed and assay.
    """

    a: Side
    b: Side
    n: int
    confidence: float
    differs: tuple[str, ...]
    clean: Shares
    robust: Shares | None
    sizes: Sizes | None

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON; an infinite ratio becomes None."""
        plain = asdict(self)
        if self.sizes and not np.isfinite(self.sizes.ratio):
            plain["sizes"]["ratio"] = None
        return plain


def compare(a: Run | str | os.PathLike[str], b: Run | str | os.PathLike[str], confidence: float = 0.95) -> Comparison:
    """Compare two runs on the same data, sample by sample: the difference of b from a.

    Models, threats and efforts may differ. Of runs that were interrupted the samples that both hold are compared.

    Args:
        a: a run, or its folder.
        b: another.
        confidence: of the intervals.

    Raises:
        RunError: the runs are on different data (the message says what differs), or have no sample in common.
    """
    runs = [v if isinstance(v, Run) else Run.read(v) for v in (a, b)]
    _check_data(*runs)
    tables = [run.samples() for run in runs]
    first, second = _paired(*tables)
    if not len(first):
        held = " and ".join(str(len(t)) for t in tables)
        raise RunError("two runs with samples in common", f"{held} samples, none in both", "Let the runs go on.")
    sides = [_side(run, len(table)) for run, table in zip(runs, tables, strict=True)]
    identities = [_identity(run) for run in runs]
    bounded = all(_threat(i).get("eps") is not None and i.get("effort") != UNATTACKED for i in identities)
    alike = len({(_threat(i).get("norm"), _threat(i).get("eps")) for i in identities}) == 1
    right = [_status(t) != "misclassified" for t in (first, second)]
    robust = [_status(t) == ROBUST for t in (first, second)]
    return Comparison(
        a=sides[0],
        b=sides[1],
        n=len(first),
        confidence=confidence,
        differs=tuple(_differences(*identities)),
        clean=shares(right[0], right[1], confidence),
        robust=shares(robust[0], robust[1], confidence) if bounded else None,
        sizes=sizes(first["size"].to_numpy(), second["size"].to_numpy()) if alike else None,
    )


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


def sizes(a: NDArray[np.float64], b: NDArray[np.float64]) -> Sizes | None:
    """Compare sizes (n,), 0 for samples that are wrong as they are and inf where none was found; None without a pair.

    Both searches must have gone equally far: only then is what was not found in one larger than what was in the other.
    """
    pairs = (a > 0) & (b > 0) & (np.isfinite(a) | np.isfinite(b))
    if not pairs.any():
        return None
    ratios = np.sort(b[pairs] / a[pairs])
    less, more = int((ratios < 1).sum()), int((ratios > 1).sum())
    return Sizes(len(ratios), less, more, float(ratios[(len(ratios) - 1) // 2]), _coin(less, more))


def _coin(heads: int, tails: int) -> float:
    """Return the two-sided p-value of the exact test that a coin is fair."""
    from scipy.stats import binomtest

    return float(binomtest(heads, heads + tails).pvalue) if heads + tails else 1.0


def _check_data(a: Run, b: Run) -> None:
    marks = [_part(run.manifest, "data") for run in (a, b)]
    if marks[0].get("fingerprint") == marks[1].get("fingerprint") and marks[0].get("fingerprint"):
        return
    told = [f"{m.get('name')}, {m.get('n')} samples of shape {m.get('shape')}, {_short(m)}" for m in marks]
    raise RunError(
        "two runs on the same data",
        f"{told[0]} in {a.path}; {told[1]} in {b.path}",
        "Evaluate both on the same data, with the same --limit.",
    )


def _short(data: dict[str, Any]) -> str:
    return f"fingerprint {str(data.get('fingerprint'))[:12]}"


def _paired(a: pa.Table, b: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return the rows of the samples that are in both tables, in one order."""
    left, right = (t["index"].to_numpy() for t in (a, b))
    _, at, to = np.intersect1d(left, right, assume_unique=True, return_indices=True)
    return a.take(at), b.take(to)


def _status(table: pa.Table) -> NDArray[np.object_]:
    return np.asarray(table["status"].to_pylist(), dtype=object)


def _part(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _identity(run: Run) -> dict[str, Any]:
    return _part(run.manifest, "identity")


def _threat(identity: dict[str, Any]) -> dict[str, Any]:
    return _part(identity, "threat")


def _side(run: Run, samples: int) -> Side:
    identity = _identity(run)
    return Side(
        run=str(run.path),
        model=str(_part(run.manifest, "model").get("name", "?")),
        threat=str(_threat(identity).get("text", "?")),
        effort=str(identity.get("effort", "?")),
        samples=samples,
    )


def _differences(a: dict[str, Any], b: dict[str, Any]) -> Iterable[str]:
    return (key for key in ("model", "threat", "effort", "seed", "assay") if a.get(key) != b.get(key))
