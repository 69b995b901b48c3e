"""What an evaluation found: figures, table, findings, curve, report. A view of the run on disk."""

import copy
import shutil
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import pyarrow as pa

from assay.core.errors import RunError
from assay.core.registry import UsageError
from assay.evaluation.finding import Finding
from assay.reports import write_report
from assay.runs import Curve, Run, exact_interval, totals
from assay.runs.schema import UNATTACKED
from assay.runs.statistics import sequential_interval


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

    @cached_property
    def _totals(self) -> dict[str, Any]:
        names = self.run.manifest["data"].get("class_names")
        probe = self.run.manifest.get("probe")
        about = self.samples, self.run.tallies()
        found = totals(*about, eps=self.eps, class_names=names, attacked=self.attacked, probe=probe)
        if self._looked_again:
            hits, confidence = self._hits(found, "robust"), found["interval"]["confidence"]
            found["interval"]["robust"] = [*sequential_interval(hits, self.n, confidence)]
        return found

    @property
    def attacked(self) -> bool:
        """Whether anything was attacked; else the run is one of proofs only."""
        return bool(self.run.manifest["identity"].get("effort") != UNATTACKED)

    @property
    def _looked_again(self) -> bool:
        """Whether the run could stop by its interval, which must then hold however often it was looked at."""
        wanted = self.run.manifest["identity"].get("until_interval") is not None
        return wanted and self.eps is not None and self.attacked

    def _hits(self, found: dict[str, Any], which: str) -> int:
        return round((found[f"{which}_accuracy"] or 0) * self.n)

    @property
    def clean_accuracy(self) -> float:
        """Share of the samples that are classified correctly."""
        return self._totals["clean_accuracy"]  # type: ignore[no-any-return]

    @property
    def robust_accuracy(self) -> float | None:
        """Share that is right and not fooled, an upper bound on the truth; None without an eps, or without attacks."""
        return self._totals["robust_accuracy"]  # type: ignore[no-any-return]

    @property
    def certified_accuracy(self) -> float | None:
        """Share that is right and proven so; None unless proofs were asked for."""
        return self._totals["certified_accuracy"]  # type: ignore[no-any-return]

    def interval(self, which: str = "robust", confidence: float = 0.95) -> tuple[float, float]:
        """Return the exact binomial interval of the clean, robust or certified accuracy.

        Of a run that may stop by its interval (``until_interval``), the robust one is valid at every look.

        Raises:
            UsageError: that accuracy was not measured, or a confidence of no use.
        """
        if which not in ("clean", "robust", "certified"):
            raise UsageError("clean, robust or certified", repr(which), "Name one of them.")
        if which not in self._totals["interval"]:
            raise UsageError("an accuracy that this run measured", which, "Evaluate with an eps, or with a proof.")
        if not 0 < confidence < 1:
            raise UsageError("a confidence between 0 and 1", f"{confidence}", "0.95 is usual.")
        kind = sequential_interval if which == "robust" and self._looked_again else exact_interval
        return kind(self._hits(self._totals, which), self.n, confidence)

    @property
    def passes(self) -> Passes:
        return Passes(**self._totals["passes"])

    @property
    def seconds(self) -> float:
        """Time spent on the samples, summed over interruptions."""
        return self._totals["seconds"] or 0.0

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(Finding(**f) for f in self.run.manifest.get("findings", ()))

    @property
    def audit(self) -> dict[str, Any] | None:
        """What the full ladder did to some of the survivors: ``attacked``, ``broken``, ``missed_at_most``, a share."""
        return self.run.manifest.get("audit")

    @property
    def bounded(self) -> str | None:
        """What stopped the race before its end; None where nothing did."""
        return self.run.manifest.get("bounded")

    def curve(self) -> Curve:
        """Return the robust accuracy as a step function of eps."""
        return Curve.of(self.samples["size"].to_numpy(), self.eps)

    def stages(self) -> list[dict[str, Any]]:
        """Return, stage by stage, how many samples entered and broke, and what that cost."""
        return self.totals()["stages"]  # type: ignore[no-any-return]

    def per_class(self) -> list[dict[str, Any]]:
        """Return clean and robust accuracy class by class."""
        return self.totals()["per_class"]  # type: ignore[no-any-return]

    def totals(self) -> dict[str, Any]:
        """Return all figures as plain JSON."""
        return copy.deepcopy(self._totals)

    def report(self, path: str | Path | None = None) -> Path:
        """Write the HTML report; by default into the run's folder."""
        if path is None and self.passing:
            raise RunError("a path for the report, or a run with out=...", "neither", "Call report('report.html').")
        return write_report(self.run, None if path is None else Path(path))
