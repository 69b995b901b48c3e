"""Two runs on the same samples, compared pair by pair, with tests of significance."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from assay.core.errors import RunError
from assay.runs.comparable import Identity, Terms, part, states
from assay.runs.paired import (
    RESAMPLES,
    Bootstrap,
    Flags,
    Floats,
    Shares,
    Sizes,
    bootstrap,
    difference_interval,
    holm,
    lower_median,
    paired_sizes,
    shares,
    sizes,
)
from assay.runs.source import Source, opened

__all__ = [
    "Change",
    "ClassPair",
    "Comparison",
    "Shares",
    "Side",
    "Sizes",
    "StagePair",
    "compare",
    "difference_interval",
    "shares",
    "sizes",
]


Both: TypeAlias = tuple[Flags, Flags]


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
class ClassPair:
    """The samples of one class in both runs.

    ``p_value`` is that of ``robust``, or of ``clean`` where there is no robust accuracy, corrected by Holm's method for
    the number of classes.
    """

    number: int
    name: str
    clean: Shares
    robust: Shares | None
    p_value: float


@final
@dataclass(frozen=True, slots=True)
class StagePair:
    """How many of the paired samples the attack of this name broke in each run."""

    name: str
    a: int
    b: int


@final
@dataclass(frozen=True, slots=True)
class Change:
    """A sample that stands in one run only, ``held_by`` a or b; the rest says how it fell in the other one.

    ``status`` is ``misclassified`` where it is wrong as it is: its ``size`` is 0, and there is no attack.
    """

    index: int
    label: int
    held_by: str
    status: str
    prediction: int
    adversarial_prediction: int | None
    broken_by: str | None
    size: float


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs on the same samples.

    ``robust`` is the robust accuracy at ``eps``, the smaller of the two; None where there is no such eps, or the
    threats differ in more than that. ``certified`` is that at the same eps, where both runs have proofs. ``sizes`` is
    None where the runs did not search within the same ball. ``differs`` names what is not the same in both: of model,
    threat, effort, seed and assay; ``notes`` say in sentences what follows from it. ``changes`` are the samples that
    are robust in one run only; where there is no robust accuracy, those that are right in one only.
    """

    a: Side
    b: Side
    n: int
    confidence: float
    differs: tuple[str, ...]
    notes: tuple[str, ...]
    eps: float | None
    clean: Shares
    robust: Shares | None
    certified: Shares | None
    sizes: Sizes | None
    bootstrap: Bootstrap
    classes: tuple[ClassPair, ...]
    stages: tuple[StagePair, ...]
    changes: tuple[Change, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON; what is infinite becomes None."""
        return _finite(asdict(self))  # type: ignore[no-any-return]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def compare(
    a: Source | str | os.PathLike[str],
    b: Source | str | os.PathLike[str],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two runs on the same data, sample by sample: the difference of b from a.

    Models, threats and efforts may differ; ``notes`` say what is comparable then. Of runs that were interrupted the
    samples that both hold are compared.

    Args:
        a: a run, or its folder.
        b: another.
        confidence: of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        RunError: the runs are on different data (the message says what differs), or have no sample in common.
    """
    runs = [opened(v) if isinstance(v, str | os.PathLike) else v for v in (a, b)]
    _check_data(*runs)
    tables = [run.samples() for run in runs]
    pair = _paired(*tables)
    if not len(pair[0]):
        held = " and ".join(str(len(t)) for t in tables)
        raise RunError("two runs with samples in common", f"{held} samples, none in both", "Let the runs go on.")
    terms = Terms.of(*map(_identity, runs))
    right = ~states(pair[0], "misclassified"), ~states(pair[1], "misclassified")
    robust = _each(terms.robust, pair) if terms.eps is not None and terms.attacked else None
    proven = _each(terms.proven, pair) if terms.eps is not None and terms.proved else None
    found = pair[0]["size"].to_numpy(), pair[1]["size"].to_numpy()
    measured = sizes(*found) if terms.searched_alike else None
    side_a, side_b = (_side(run, len(table)) for run, table in zip(runs, tables, strict=True))
    return Comparison(
        a=side_a,
        b=side_b,
        n=len(pair[0]),
        confidence=confidence,
        differs=tuple(_differences(*map(_identity, runs))),
        notes=tuple(terms.notes()),
        eps=terms.eps,
        clean=shares(*right, confidence),
        robust=shares(*robust, confidence) if robust else None,
        certified=shares(*proven, confidence) if proven else None,
        sizes=measured,
        bootstrap=_bootstrap(robust, proven, found if measured else None, confidence, resamples, seed),
        classes=tuple(_classes(pair[0]["label"].to_numpy(), right, robust, _names(runs), confidence)),
        stages=tuple(_stages(pair, robust)) if terms.ball else (),
        changes=tuple(_changes(pair, robust or right)),
    )


def _each(of: Callable[[pa.Table, int], Flags], pair: tuple[pa.Table, pa.Table]) -> Both:
    return of(pair[0], 0), of(pair[1], 1)


def _bootstrap(
    robust: Both | None,
    proven: Both | None,
    found: tuple[Floats, Floats] | None,
    confidence: float,
    resamples: int,
    seed: int,
) -> Bootstrap:
    """Resample whatever is compared; None stands for what is not."""
    terms: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    flags = {"robust": robust, "certified": proven}
    gained = {k: bootstrap(_mean, v[1].astype(float) - v[0], **terms) if v else None for k, v in flags.items()}
    median = ratio = None
    if found:
        a, b = paired_sizes(*found)
        median, ratio = bootstrap(_shift, a, b, **terms), bootstrap(lower_median, b / a, **terms)
    return Bootstrap(resamples, seed, **gained, median=median, ratio=ratio)


def _mean(values: Floats) -> Floats:
    return np.asarray(values.mean(axis=-1))


def _shift(a: Floats, b: Floats) -> Floats:
    return lower_median(b) - lower_median(a)


def _classes(
    label: NDArray[np.int64], right: Both, robust: Both | None, names: list[Any], confidence: float
) -> Iterator[ClassPair]:
    """Compare class by class."""
    found = []
    for c in np.unique(label).tolist():
        of = label == c
        told = shares(robust[0][of], robust[1][of], confidence) if robust else None
        found.append((c, shares(right[0][of], right[1][of], confidence), told))
    corrected = holm([(told or clean).p_value for _, clean, told in found])
    for (c, clean, told), p in zip(found, corrected, strict=True):
        yield ClassPair(c, str(names[c]) if 0 <= c < len(names) else str(c), clean, told, p)


def _stages(pair: tuple[pa.Table, pa.Table], robust: Both | None) -> Iterator[StagePair]:
    """Count what each attack broke, those that broke most first."""
    counts = []
    for i, table in enumerate(pair):
        fallen = states(table, "fooled") & (~robust[i] if robust else True)
        counts.append(Counter(str(v or "?") for v in table.filter(fallen)["broken_by"].to_pylist()))
    a, b = counts
    for name in sorted(a | b, key=lambda n: (-a[n] - b[n], n)):
        yield StagePair(name, a[name], b[name])


def _changes(pair: tuple[pa.Table, pa.Table], held: Both) -> Iterator[Change]:
    """List the samples that stand in one run only, in the order of their indices."""
    columns = ["index", "label", "status", "prediction", "adversarial_prediction", "broken_by", "size"]
    told = [
        {"held_by": "ab"[i]} | row
        for i in (0, 1)
        for row in pair[1 - i].filter(held[i] & ~held[1 - i]).select(columns).to_pylist()
    ]
    yield from (Change(**row) for row in sorted(told, key=lambda row: row["index"]))


def _names(runs: list[Source]) -> list[Any]:
    """Return the class names of the first run that has any."""
    given = (part(run.manifest, "data").get("class_names") for run in runs)
    return next((names for names in given if isinstance(names, list)), [])


def _check_data(a: Source, b: Source) -> None:
    marks = [part(run.manifest, "data") for run in (a, b)]
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


def _identity(run: Source) -> Identity:
    return part(run.manifest, "identity")


def _side(run: Source, samples: int) -> Side:
    identity = _identity(run)
    return Side(
        run=str(run.path),
        model=str(part(run.manifest, "model").get("name", "?")),
        threat=str(part(identity, "threat").get("text", "?")),
        effort=str(identity.get("effort", "?")),
        samples=samples,
    )


def _differences(a: Identity, b: Identity) -> Iterable[str]:
    return (key for key in ("model", "threat", "effort", "seed", "assay") if a.get(key) != b.get(key))
