"""What corruptions did to the samples of a run: a table for each in the folder ``natural``."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assay.core.errors import RunError
from assay.core.files import replacing
from assay.core.registry import one_of
from assay.runs.statistics import exact_interval
from assay.runs.store import Run

GROUPS: Final = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
"""The fifteen corruptions of the benchmark in four groups, and the four that it keeps for validation."""

SEVERITIES: Final = (1, 2, 3, 4, 5)

SCHEMA: Final = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("severity", pa.int8(), nullable=False),
        pa.field("prediction", pa.int64(), nullable=False),
    ]
)
"""One row a sample and severity."""

_CONFIDENCE = 0.95


def corruptions(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the corruptions that are meant, each once: of names, groups, ``common`` (four groups) and ``all``.

    Raises:
        UsageError: none of these.

    Example:
        >>> corruptions("blur,fog")
        ('defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur', 'fog')
    """
    *common, _ = GROUPS
    known = {name: (name,) for group in GROUPS.values() for name in group} | GROUPS
    known |= {"common": sum((GROUPS[g] for g in common), ()), "all": sum(GROUPS.values(), ())}
    wanted = [w.strip() for w in names.split(",")] if isinstance(names, str) else names
    for name in wanted:
        one_of("a corruption or a group of them", name, [*known])
    return tuple(dict.fromkeys(name for w in wanted for name in known[w]))


def keep(run: Run, name: str, rows: Mapping[str, Sequence[int]]) -> None:
    """Store what a corruption did, as a whole.

    Raises:
        RunError: it cannot be written.
    """
    try:
        (run.path / "natural").mkdir(exist_ok=True)
        with replacing(run.path / "natural" / f"{name}.parquet") as f:
            pq.write_table(pa.table(dict(rows), schema=SCHEMA), f)
    except OSError as e:
        raise RunError(f"a folder that can be written in {run.path}", str(e), "Free some space, or mend it.") from e


def kept(run: Run) -> dict[str, pa.Table]:
    """Return the tables that are there, by corruption.

    Raises:
        RunError: one cannot be read.
    """
    try:
        return {p.stem: pq.read_table(p) for p in sorted((run.path / "natural").glob("[!.]*.parquet"))}
    except (OSError, pa.ArrowInvalid) as e:
        raise RunError(f"readable tables in {run.path / 'natural'}", str(e), "Remove the broken file.") from e


def natural(run: Run) -> list[dict[str, Any]] | None:
    """Return accuracy under each corruption, by severity, with exact intervals; None where none was tried."""
    tables = kept(run)
    known = [(group, name) for group, names in GROUPS.items() for name in names]
    return [{"name": n, "group": g, **_accuracy(tables[n])} for g, n in known if n in tables] or None


def _accuracy(table: pa.Table) -> dict[str, Any]:
    severity, right = table["severity"].to_numpy(), (table["label"].to_numpy() == table["prediction"].to_numpy())
    levels = [int(s) for s in np.unique(severity)]
    hits, n = ([int(v[severity == s].sum()) for s in levels] for v in (right, np.ones_like(right)))
    return {
        "severities": levels,
        "n": n[0] if n else 0,
        "accuracy": [k / m for k, m in zip(hits, n, strict=True)],
        "interval": [[*exact_interval(k, m, _CONFIDENCE)] for k, m in zip(hits, n, strict=True)],
    }
