"""What a run's manifest says: before it begins, and what the whole of it showed."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from assay.attacks.taxonomy import tags
from assay.evaluation.about import about
from assay.evaluation.block import Job
from assay.evaluation.course import Course
from assay.evaluation.diagnosis import judge
from assay.evaluation.finding import Finding
from assay.evaluation.preflight import check_accuracy
from assay.evaluation.result import Evaluation
from assay.runs import Run
from assay.runs.natural import natural
from assay.runs.schema import ROBUST
from assay.runs.statistics import upper_bound

_TOLERANCE = (
    "Random numbers belong to samples, so batches, workers and interruptions change nothing but the rounding of "
    "float32 kernels. On a CPU full blocks of rows make even that the same for the usual layers (layer widths that are "
    "multiples of 4); elsewhere single samples near the boundary may differ."
)


def new_manifest(
    job: Job, course: Course, mark: str, effort: str, classes: int, findings: Sequence[Finding], command: str | None
) -> dict[str, Any]:
    """Return the manifest of a run that has not begun. ``identity`` is what decides its numbers."""
    from assay import __version__

    now = datetime.now(UTC).isoformat(timespec="seconds")
    model, data = job.model, job.data
    return {
        "assay": __version__,
        "complete": False,
        "created": now,
        "updated": now,
        "command": command,
        "identity": {
            "threat": job.threat.to_json(),
            "effort": effort,
            "plan": job.plan.to_json(),
            "max_passes": job.max_passes,
            "levels": [*job.levels],
            **course.to_json(),
            "seed": job.seed,
            "prove": job.proof.to_json() if job.proof else None,
            "model": mark,
            "data": data.fingerprint(),
            "n": len(data),
            "assay": __version__,
            "samples": model.samples,
            "probabilities": model.probabilities,
        },
        **about(model, data, mark, classes, job.device),
        "taxonomy": tags(r.attack for r in (*job.plan.rounds, *job.plan.ladder)),
        "eps_list": [*course.eps_list] or None,
        "tolerance": _TOLERANCE,
        "totals": None,
        "findings": [f.to_json() for f in findings],
    }


def finish(run: Run, result: Evaluation, *, complete: bool) -> None:
    """Write what the whole run showed into its manifest, which holds what was found before it began."""
    findings, classes = result.findings, run.manifest["model"]["classes"]
    totals, tallies = result.totals(), [*run.tallies()]
    right = result.n - sum(s == "misclassified" for s in result.samples["status"].to_pylist())
    known = {f.code for f in findings}
    judged = (f for f in judge(totals["stages"], result.n) if f.code not in known)
    late = (*check_accuracy(right, result.n, classes), *judged, *_after_work(totals), *_too_early(run, result))
    width = run.manifest["identity"]["until_interval"]
    bounds = [t["bounded"] for t in tallies if t.get("bounded")]
    if width is not None and result.n < run.manifest["data"]["n"]:
        bounds.append("until-interval")
    run.save(
        complete=complete,
        updated=datetime.now(UTC).isoformat(timespec="seconds"),
        totals=totals,
        audit=_audit(tallies, totals),
        natural=natural(run),
        bounded=_BOUNDS[bounds[0]].format(width) if bounds else None,
        findings=[f.to_json() for f in (*findings, *late)],
    )


_BOUNDS = {
    "max-passes": "samples had spent --max-passes before the race was over",
    "max-seconds": "--max-seconds was over before the race was",
    "until-interval": "the interval of the robust accuracy is no wider than {:g}",
}


def _audit(tallies: Sequence[dict[str, Any]], totals: dict[str, Any]) -> dict[str, Any] | None:
    """Add up the audits of all blocks, and bound the share of the other survivors that the race missed."""
    told = [t["audit"] for t in tallies if t.get("audit")]
    attacked, broken = (sum(a[k] for a in told) for k in ("attacked", "broken"))
    if not attacked:
        return None
    confidence = totals["interval"]["confidence"]
    survivors = sum(a.get("survivors", 0) for a in told)
    missed = upper_bound(broken, attacked, confidence)
    found = {"attacked": attacked, "broken": broken, "missed_at_most": missed, "confidence": confidence}
    return found | ({"survivors": survivors} if survivors else {})


def _too_early(run: Run, result: Evaluation) -> Iterator[Finding]:
    """Report samples that stand because nobody went on attacking them."""
    late, states = run.late(), result.samples.select(["index", "status"]).to_pylist()
    if late:
        standing = sum(s["index"] in late and s["status"] == ROBUST for s in states)
        yield Finding(
            "stopped-early",
            "warning",
            f"--max-seconds was over before the race of {standing} samples was, which stand: some may hardly have been "
            "attacked.",
            {"standing": standing, "samples": result.n},
            "Repeat the command, with more time or none set: it goes on where it was.",
        )


def _after_work(totals: dict[str, Any]) -> Iterator[Finding]:
    """Report claims that failed verification, and adversarial inputs that 8-bit storage undoes."""
    if totals["rejected"]:
        yield Finding(
            "unverified-claims",
            "warning",
            f"{totals['rejected']} of {totals['claimed']} claims did not hold in a fresh pass and do not count.",
            {"claimed": totals["claimed"], "rejected": totals["rejected"]},
            "Look for randomness or dependence on the batch in the model.",
        )
    fooled = totals["claimed"] - totals["rejected"]
    if totals["survive_8bit"] < fooled:
        yield Finding(
            "lost-at-8-bit",
            "info",
            f"{fooled - totals['survive_8bit']} of {fooled} adversarial inputs, as found, no longer fool when "
            "rounded to 8 bits, as an image file does. The figures hold for inputs of full precision.",
            {"fooled": fooled, "survive": totals["survive_8bit"]},
            "Store adversarial inputs as floats (.npz).",
        )
