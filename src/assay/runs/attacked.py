"""What ``assay attack --out`` wrote, read as a run: one attack, of the samples that the model has right."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from assay.core.errors import RunError
from assay.runs.comparable import part
from assay.runs.schema import ROBUST, SAMPLES
from assay.runs.totals import number

HEAD, INPUTS = "attack.json", "adversarials.npz"
"""The files of the folder: what was asked for and what came of it, and a row for each sample that was attacked."""

_MOST: Final = 10**6
"""Samples that are listed."""


@final
@dataclass(frozen=True, slots=True)
class Attacked:
    """The folder of an attack, to be read as a :class:`assay.runs.Run` is; a sample not attacked is wrong as it is."""

    path: Path
    manifest: dict[str, Any]
    table: pa.Table

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "Attacked":
        """Open the folder of an attack.

        Raises:
            RunError: there is none, it cannot be read, or it is from a version that told neither model nor data.
        """
        path = Path(folder)
        try:
            told = json.loads((path / HEAD).read_text(encoding="utf-8"))
            if not isinstance(told, dict) or not part(told, "identity"):
                raise RunError(f"an {HEAD} that says its model and data", f"none in {path}", "Repeat the attack.")
            return cls.of(path, told)
        except RunError:
            raise
        except Exception as e:  # a file written by others may break anything
            found = f"{type(e).__name__}: {e}"
            raise RunError(f"what assay attack --out writes in {path}", found, "Repeat the attack.") from e

    @classmethod
    def of(cls, path: Path, told: Mapping[str, Any]) -> "Attacked":
        """Read the inputs that belong to what an ``attack.json`` tells; any exception may come of a damaged file."""
        table = _table(path, told)
        identity = part(told, "identity")
        attack = {"name": identity.get("effort"), "attack": told.get("parameters")}
        manifest = {
            **{key: told.get(key) for key in ("assay", "created", "command", "model", "machine", "findings")},
            "complete": True,
            "identity": identity | {"plan": {"rounds": [attack]}},
            "data": part(told, "data") or {"n": len(table)},
        }
        return cls(path, manifest, table)

    def samples(self) -> pa.Table:
        """Return the table of all samples, in the order of their indices."""
        return self.table

    def tallies(self) -> Iterator[dict[str, Any]]:
        """Yield what the clean pass and the attack did, as a run tells it of each batch; times are not told."""
        tried = self.table.filter(pc.not_equal(self.table["status"], "misclassified"))
        clean = {"name": "clean", "entered": len(self.table), "broken": len(self.table) - len(tried)}
        passes = {key: int(tried[key].to_numpy().sum()) for key in ("forwards", "backwards")}
        broken = int(tried["fooled"].to_numpy(zero_copy_only=False).sum())
        attack = {"name": part(self.manifest, "identity").get("effort"), "entered": len(tried), "broken": broken}
        yield {"stages": [clean, attack | passes]}

    def adversarials(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield the adversarial inputs, by array."""
        arrays = _arrays(self.path)
        if "success" in arrays:
            fooled = np.asarray(arrays["success"], dtype=bool)
            yield {name: values[fooled] for name, values in arrays.items() if values.ndim}


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with (path / INPUTS).open("rb") as f, np.load(f, allow_pickle=False) as arrays:
        return dict(arrays)


def _table(path: Path, told: Mapping[str, Any]) -> pa.Table:
    """Return one row a sample; a targeted attack says nothing of those that it was not tried on."""
    aimed = number(told.get("target")) is not None
    tried = _tried(str(told["attack"]), _arrays(path))
    n = 0 if aimed else min(int(number(told.get("n")) or 0), _MOST)
    others = np.setdiff1d(np.arange(n), tried["index"].to_numpy())
    return pa.concat_tables([tried, _untried(others, part(told, "misclassified"))]).sort_by("index")


def _tried(name: str, found: Mapping[str, NDArray[Any]]) -> pa.Table:
    """Return the rows of the samples that an attack of this name was tried on."""
    index, label, forwards, backwards = (
        np.asarray(found.get(key, ()), np.int64) for key in ("index", "label", "forwards", "backwards")
    )
    fooled = np.asarray(found.get("success", ()), dtype=bool)
    became = np.asarray(found.get("prediction", label), np.int64)
    size = np.where(fooled, np.asarray(found.get("size", ()), float), np.inf)
    columns = {
        "index": index,
        "label": label,
        "prediction": label,
        "fooled": fooled,
        "adversarial_prediction": pa.array(became, mask=~fooled | (became == label)),
        "broken_by": [name if f else None for f in fooled.tolist()],
        "forwards": forwards,
        "backwards": backwards,
        "status": ["fooled" if f else ROBUST for f in fooled.tolist()],
    }
    return _rows(columns, size)


def _untried(index: NDArray[np.int64], known: Mapping[str, Any]) -> pa.Table:
    """Return the rows of the samples that are wrong as they are; -1 for labels and predictions that nobody told."""
    told = {i: k for k, i in enumerate(known.get("index", ()))}
    label, prediction = (
        [int(known[key][told[i]]) if i in told else -1 for i in index.tolist()] for key in ("label", "prediction")
    )
    none = np.zeros(len(index), np.int64)
    columns = {
        "index": index,
        "label": label,
        "prediction": prediction,
        "fooled": none.astype(bool),
        "adversarial_prediction": [None] * len(index),
        "broken_by": [None] * len(index),
        "forwards": none,
        "backwards": none,
        "status": ["misclassified"] * len(index),
    }
    return _rows(columns, none.astype(float))


def _rows(columns: Mapping[str, Any], size: NDArray[np.float64]) -> pa.Table:
    """Return rows of samples of which nothing is proven."""
    n = len(size)
    unproven = {"margin": np.full(n, np.nan), "certified": [None] * n, "lower": np.zeros(n)}
    return pa.table({**columns, **unproven, "size": size, "upper": size}, schema=SAMPLES)
