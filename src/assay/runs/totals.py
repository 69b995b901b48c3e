"""The totals of a run: what its table and the tallies of its batches add up to."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from assay.runs.schema import ROBUST
from assay.runs.statistics import exact_interval

_CONFIDENCE = 0.95


def totals(
    table: pa.Table,
    tallies: Iterable[Any],
    *,
    eps: float | None,
    class_names: Sequence[str] | None,
    attacked: bool = True,
    probe: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return all figures of a run as plain JSON.

    Accuracies that were not measured are None: the robust one without an eps, the certified one without proofs. So is
    a cost that no tally tells.

    Args:
        table: the samples, as :meth:`assay.runs.Run.samples` returns them.
        tallies: what each batch cost, as :meth:`assay.runs.Run.tallies` yields it.
        eps: of the threat; None where the smallest change of each sample was searched.
        class_names: by label, as far as there are any.
        attacked: whether anything was attacked: without that there is no robust accuracy.
        probe: ``forwards`` and ``backwards`` that were spent on the model as a whole, not on samples.
    """
    n, status = len(table), _column(table, "status")
    proven = table["certified"].drop_null().to_pylist()
    hits = {"clean": n - int((status == "misclassified").sum())}
    bounded = eps is not None and attacked
    if bounded:
        hits["robust"] = int((status == ROBUST).sum())
    if proven:
        hits["certified"] = sum(proven)
    share = {which: k / n for which, k in hits.items()} if n else {"clean": 0.0}
    told = rows([*tallies])
    return {
        "n": n,
        **{f"{which}_accuracy": share.get(which) for which in ("clean", "robust", "certified")},
        "interval": {"confidence": _CONFIDENCE} | {w: [*exact_interval(k, n, _CONFIDENCE)] for w, k in hits.items()},
        "passes": {c: int(_column(table, c).sum()) + (probe or {}).get(c, 0) for c in ("forwards", "backwards")},
        **{key: _sum(told, key) for key in ("seconds", "claimed", "rejected", "survive_8bit")},
        "per_class": _classes(_column(table, "label"), status, class_names or (), bounded=bounded),
        "stages": _stages(told),
    }


def number(value: Any) -> float | None:
    """Return a finite number, or ``None`` for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return value


def rows(value: Any) -> list[Mapping[str, Any]]:
    """Return the mappings in a list, nothing of anything else."""
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, list | tuple) else []


def _column(table: pa.Table, name: str) -> NDArray[Any]:
    return table[name].to_numpy()  # type: ignore[no-any-return]


def _sum(told: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Add up what is told; None where there is something to tell, and nobody tells it."""
    found = [v for v in (number(t.get(key)) for t in told) if v is not None]
    return sum(found) if found or not told else None


def _classes(label: NDArray[Any], status: NDArray[Any], names: Sequence[str], *, bounded: bool) -> list[dict[str, Any]]:
    """Return clean and robust accuracy class by class."""
    classes, place, sizes = np.unique(label, return_inverse=True, return_counts=True)
    clean, robust = (np.bincount(place, hits) / sizes for hits in (status != "misclassified", status == ROBUST))
    return [
        {
            "class": int(c),
            "name": names[c] if 0 <= c < len(names) else str(c),
            "n": int(sizes[i]),
            "clean": float(clean[i]),
            "robust": float(robust[i]) if bounded else None,
        }
        for i, c in enumerate(classes)
    ]


def _stages(told: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add up the stages of all batches by name, in the order of their first appearance."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for tally in told:
        for stage in rows(tally.get("stages")):
            by_name.setdefault(str(stage.get("name", "?")), []).append(stage)
    columns = ("entered", "broken", "forwards", "backwards", "seconds")
    return [
        {"name": n, "kind": same[0].get("kind"), "last": _last(same)}
        | {c: _sum(same, c) for c in columns}
        | ({"proven": _sum(same, "proven")} if "proven" in same[0] else {})
        for n, same in by_name.items()
    ]


def _last(same: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Add up what the last turn of a stage did in each batch."""
    told = [s.get("last", s) for s in same]
    return {c: _sum(rows(told), c) for c in ("entered", "broken")}
