"""What an evaluation found: figures, table, findings, curve, report. A view of the run on disk."""

import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from assay.core.errors import RunError
from assay.evaluation.finding import Finding
from assay.evaluation.statistics import Curve, exact_interval
from assay.reports import write_report
from assay.runs import Run


@final
@dataclass(frozen=True, slots=True)
class Passes:
    """Forward and backward passes, summed over samples."""

    forwards: int
    backwards: int


@final
class Evaluation:
    """The result of :func:`assay.evaluate`; everything is read from the run's folder.

    A ``passing`` folder is removed together with this object.
    """

    def __init__(self, run: Run, *, passing: bool = False) -> None:
        self.run = run
        self.passing = passing
        if passing:
            weakref.finalize(self, shutil.rmtree, run.path, ignore_errors=True)
        self.samples: pa.Table = run.samples()

    def __repr__(self) -> str:
        robust = "" if self.robust_accuracy is None else f", robust_accuracy={self.robust_accuracy:.4f}"
        return f"Evaluation(n={self.n}, clean_accuracy={self.clean_accuracy:.4f}{robust})"

    @property
    def n(self) -> int:
        """Samples evaluated; less than were asked for when the run was interrupted (``complete`` is False)."""
        return len(self.samples)

    @property
    def complete(self) -> bool:
        return bool(self.run.manifest["complete"])

    @property
    def eps(self) -> float | None:
        return self.run.manifest["identity"]["threat"]["eps"]  # type: ignore[no-any-return]

    def _count(self, *states: str) -> int:
        return int(pc.sum(pc.is_in(self.samples["status"], pa.array(states, pa.string()))).as_py() or 0)

    def _hits(self, which: str) -> int | None:
        if which == "clean":
            return self.n - self._count("misclassified")
        if which == "robust":
            return None if self.eps is None else self._count("robust")
        if which == "certified":
            known = self.samples["certified"]
            return None if known.null_count == len(known) else int(pc.sum(known).as_py() or 0)
        raise ValueError(f"clean, robust or certified, not {which!r}")

    def _share(self, which: str) -> float | None:
        hits = self._hits(which)
        return None if hits is None or not self.n else hits / self.n

    @property
    def clean_accuracy(self) -> float:
        """Share of the samples that are classified correctly."""
        return self._share("clean") or 0.0

    @property
    def robust_accuracy(self) -> float | None:
        """Share that is right and not fooled, an upper bound on the truth; None for a threat without eps."""
        return self._share("robust")

    @property
    def certified_accuracy(self) -> float | None:
        """Share that is right and proven so; None unless proofs were asked for."""
        return self._share("certified")

    def interval(self, which: str = "robust", confidence: float = 0.95) -> tuple[float, float]:
        """Return the exact binomial interval of the clean, robust or certified accuracy.

        Raises:
            ValueError: that accuracy was not measured.
        """
        hits = self._hits(which)
        if hits is None:
            raise ValueError(f"{which} accuracy was not measured in this run")
        return exact_interval(hits, self.n, confidence)

    @property
    def passes(self) -> Passes:
        return Passes(*(int(pc.sum(self.samples[c]).as_py() or 0) for c in ("forwards", "backwards")))

    @property
    def seconds(self) -> float:
        """Time spent on the samples, summed over interruptions."""
        return sum(float(t["seconds"]) for t in self.run.tallies())

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(Finding(**f) for f in self.run.manifest.get("findings", ()))

    def curve(self) -> Curve:
        """Return the robust accuracy as a step function of eps."""
        return Curve.of(self.samples["size"].to_numpy(), self.eps)

    def stages(self) -> list[dict[str, Any]]:
        """Return, stage by stage, how many samples entered and broke, and what that cost."""
        total: dict[str, dict[str, Any]] = {}
        for tally in self.run.tallies():
            for stage in tally["stages"]:
                row = total.setdefault(stage["name"], dict.fromkeys(stage, 0) | {"name": stage["name"]})
                for key in stage:
                    if key != "name":
                        row[key] += stage[key]
        return [*total.values()]

    def per_class(self) -> list[dict[str, Any]]:
        """Return clean and robust accuracy class by class."""
        label, status = (self.samples[c].to_numpy(zero_copy_only=False) for c in ("label", "status"))
        names = self.run.manifest["data"].get("class_names")
        rows = []
        for c in np.unique(label):
            mine = status[label == c]
            name = names[c] if names and c < len(names) else str(c)
            clean, robust = float((mine != "misclassified").mean()), float((mine == "robust").mean())
            rows.append({"class": int(c), "name": name, "n": len(mine), "clean": clean, "robust": robust})
        return rows

    def totals(self) -> dict[str, Any]:
        """Return all figures as plain JSON."""
        known = {w: list(self.interval(w)) for w in ("clean", "robust", "certified") if self._hits(w) is not None}
        tallies = [*self.run.tallies()]
        return {
            "n": self.n,
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "certified_accuracy": self.certified_accuracy,
            "interval": {"confidence": 0.95, **known},
            "passes": {"forwards": self.passes.forwards, "backwards": self.passes.backwards},
            "seconds": self.seconds,
            "claimed": sum(t["claimed"] for t in tallies),
            "rejected": sum(t["rejected"] for t in tallies),
            "survive_8bit": sum(t["survive_8bit"] for t in tallies),
            "per_class": self.per_class(),
            "stages": self.stages(),
        }

    def report(self, path: str | Path | None = None) -> Path:
        """Write the HTML report; by default into the run's folder."""
        if path is None and self.passing:
            raise RunError("a path for the report, or a run with out=...", "neither", "Call report('report.html').")
        return write_report(self.run, None if path is None else Path(path))
