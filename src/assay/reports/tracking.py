"""A run, sent to where experiments are tracked."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from assay.core.trackers import tracking
from assay.reports.html import write_report
from assay.reports.summary import Manifest, Summary, dig, points, read, summarize
from assay.runs import Curve, Run

_STEPS: Final = 20
"""Of the curve, where no list of eps was asked for."""


def track(names: Sequence[str], run: Run) -> tuple[str, ...]:
    """Send the figures of a run to trackers, and return where they are now, a sentence for each.

    Step 0 has the accuracies, each with its interval, and the cost; the steps from 0 on have the curve, one point
    each: ``curve/eps`` and ``curve/robust_accuracy``. Findings are tags; settings are settings; the report and the
    manifest are files.

    Args:
        names: of trackers: ``mlflow``, ``tensorboard``, ``wandb``; each may be a list with commas.
        run: finished or not.

    Raises:
        UsageError: an unknown tracker.
        MissingExtraError: the package of one is not installed.
        RunError: the run cannot be read, or a tracker cannot be reached.
    """
    manifest, samples = read(run)
    s = summarize(manifest)
    tags = {f"assay.finding.{n.code}": f"{n.severity}: {n.message}" for n in s.findings}
    with tracking(names, run.path, run.path.resolve().name, _settings(manifest, s), tags) as send:
        if not send.trackers:
            return ()
        send.log(_figures(s), 0)
        for i, point in enumerate(_curve(manifest, samples)):
            send.log(point, i)
        report = run.path / "report.html"
        for file in (report if report.exists() else write_report(run), run.path / "manifest.json"):
            send.artifact(file)
    return send.where


def _settings(manifest: Manifest, s: Summary) -> dict[str, Any]:
    """Return what decides the numbers of a run, but for the rounds, which are many: the manifest has them."""
    identity = dig(manifest, "identity")
    plain = {k: v for k, v in identity.items() if k != "plan"} if isinstance(identity, dict) else {}
    names = {"model_name": s.model, "data_name": s.data}
    return {**plain, **names, "command": manifest.get("command"), "complete": s.complete}


def _figures(s: Summary) -> dict[str, float]:
    rates = {"clean": s.clean, "robust": s.robust, "certified": s.certified}
    shares = {
        f"{which}_accuracy{end}": value
        for which, r in rates.items()
        for end, value in (("", r.value), ("_low", r.low), ("_high", r.high))
    }
    cost = {"forwards": s.forwards, "backwards": s.backwards, "seconds": s.seconds}
    found = {"n": s.n, "findings": len(s.findings), **shares, **cost}
    return {name: float(value) for name, value in found.items() if value is not None}


def _curve(manifest: Manifest, samples: pa.Table) -> Iterator[dict[str, float]]:
    """Yield points of the curve: the eps that were asked for, or even steps up to the eps of the threat."""
    asked = points(manifest, samples)
    if asked:
        rates = [(p.eps, p.rate.value, p.certified.value) for p in asked]
    else:
        rates = [(eps, value, None) for eps, value in _even(manifest, samples)]
    for eps, robust, certified in rates:
        found = {"curve/eps": eps, "curve/robust_accuracy": robust, "curve/certified_accuracy": certified}
        yield {name: value for name, value in found.items() if value is not None}


def _even(manifest: Manifest, samples: pa.Table) -> Iterator[tuple[float, float]]:
    s, size = summarize(manifest), samples["size"].to_numpy()
    found = size[np.isfinite(size)]
    last = s.eps if s.eps is not None else float(found.max()) if len(found) else 0.0
    if not s.attacked or not last:
        return
    curve = Curve.of(size, s.eps)
    for eps in np.linspace(0, last, _STEPS + 1):
        yield float(eps), curve(float(min(eps, last)))
