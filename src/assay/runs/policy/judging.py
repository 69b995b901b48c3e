"""A policy held against a run: one rule for each thing that can be asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import pyarrow as pa

from assay.core.errors import RunError
from assay.core.plain import plain
from assay.core.registry import UsageError
from assay.runs.comparable import part, states
from assay.runs.paired import Flags, difference_interval
from assay.runs.policy.judgement import Check, Judgement, Sample
from assay.runs.policy.wanted import SEVERITIES, Policy
from assay.runs.schema import ROBUST, UNATTACKED
from assay.runs.statistics import exact_interval, sequential_interval
from assay.runs.store import Run, differences
from assay.runs.totals import number, rows

SHOWN: Final = 10
"""How many of the samples concerned a check names."""

ALIKE: Final = ("data", "n", "threat", "effort", "max_passes", "until_interval")
"""What decides how hard a run was: a run and its baseline agree in it."""


@final
@dataclass(frozen=True, slots=True)
class _Case:
    """A run whose table is read, and where it is needed its baseline."""

    run: Run
    table: pa.Table
    baseline: Run | None
    confidence: float

    @property
    def robust(self) -> Flags:
        """Return which samples (n,) are robust."""
        return _robust(self.run, self.table)


def hold(policy: Policy, run: Run, baseline: Run | None = None, confidence: float = 0.95) -> Judgement:
    """Hold a policy against a run.

    A floor is held by the exact figure of the run's samples, so that the same run always gives the same answer; ``why``
    says the interval. A drop fails only where it is significant: the exact one-sided McNemar test rejects that there is
    none, and the lower end of the one-sided interval of the drop (Newcombe 1998, method 10) is above ``max_drop``. If
    the true drop is no larger than that, the check fails with a probability of at most ``1 - confidence``: exactly so
    for 0, and for what else is usual as far as was counted (``docs/ci.md``).

    Args:
        policy: what is asked for.
        run: a run that went to its end, or to a bound that it was given.
        baseline: another on the same data, with the same threat and effort; by default that of the policy.
        confidence: of the test and of the intervals.

    Raises:
        UsageError: the policy is empty, or limits a drop and there is no baseline; or a confidence of no use.
        RunError: a run was interrupted, has not measured what the policy is about, or was harder or easier than its
            baseline.
    """
    if not 0.5 < confidence < 1:
        raise UsageError("a confidence between 0.5 and 1", f"{confidence}", "0.95 is usual.")
    if policy.empty:
        raise UsageError("a policy that asks for something", "nothing", "Give for example --min-robust 0.45.")
    if policy.max_drop is None:
        baseline = None
    elif baseline is None:
        if policy.baseline is None:
            raise UsageError("a baseline for max-drop", "none", "Give --baseline RUN.")
        baseline = Run.read(policy.baseline)
    case = _Case(run, finished(run), baseline, confidence)
    return Judgement(str(run.path), str(baseline.path) if baseline else None, confidence, tuple(_checks(policy, case)))


def _checks(policy: Policy, case: _Case) -> Iterator[Check]:
    rules: tuple[tuple[float | None, Callable[[float, _Case], Check]], ...] = (
        (policy.min_robust, _min_robust),
        (policy.min_certified, _min_certified),
        (policy.max_drop, _max_drop),
        (policy.max_seconds, _max_seconds),
    )
    for limit, rule in rules:
        if limit is not None:
            yield rule(limit, case)
    for code in policy.no_finding:
        yield _no_finding(code, case.run)


def _min_robust(floor: float, case: _Case) -> Check:
    return _least("min-robust", "robust", floor, case.robust, case)


def _min_certified(floor: float, case: _Case) -> Check:
    proven = case.table["certified"]
    if proven.null_count == len(proven):
        raise RunError("a run with proofs, for min-certified", f"none in {case.run.path}", "Evaluate with --prove.")
    return _least("min-certified", "certified", floor, np.array([v is True for v in proven.to_pylist()]), case)


def _least(name: str, what: str, floor: float, holds: Flags, case: _Case) -> Check:
    """Hold a floor against the share of samples for which something holds (n,)."""
    n, hits = len(holds), int(holds.sum())
    share = hits / n
    # A run that could stop when it pleased needs an interval for that.
    sequential = what == "robust" and _identity(case.run).get("until_interval") is not None
    low, high = (sequential_interval if sequential else exact_interval)(hits, n, case.confidence)
    where = "at" if share == floor else f"{_points(abs(share - floor))} {'above' if share > floor else 'below'}"
    sure = "which is within" if low <= floor <= high else "which is outside"
    interval = f"the {_percent(case.confidence)} interval, {_percent(low)} to {_percent(high)}"
    late = what == "robust" and bool(case.run.late())
    stopped = " Time was over before all of them were attacked, so the floor does not hold." if late else ""
    return Check(
        name,
        held=share >= floor and not late,
        wanted=f"{what} accuracy of at least {_percent(floor)}",
        found=f"{_percent(share)} ({hits:,} of {n:,})",
        why=f"The {what} accuracy of these samples is {where} the floor, {sure} {interval}.{stopped}",
        **_concerned(case.table, ~holds),
    )


def _max_drop(limit: float, case: _Case) -> Check:
    baseline = case.baseline
    assert baseline is not None
    others = finished(baseline)
    for run in (baseline, case.run):
        if run.late():
            raise RunError("runs whose races ended", f"{run.path}, which --max-seconds cut short", "Give it more time.")
    _check_alike(baseline, case.run)
    before, now, table = _paired(_robust(baseline, others), others, case)
    lost, gained = before & ~now, now & ~before
    n, k, m = len(now), int(lost.sum()), int(gained.sum())
    low, high, p = drop(int((before & now).sum()), k, m, int((~before & ~now).sum()), case.confidence)
    held = not (p <= 1 - case.confidence and low > limit)
    sure = _percent(case.confidence)
    return Check(
        "max-drop",
        held=held,
        wanted=f"robust accuracy at most {_points(limit)} below the baseline",
        found=f"{_points(abs(k - m) / n)} {'below' if k >= m else 'above'} "
        f"({_percent(before.mean())} then, {_percent(now.mean())} now)",
        why=f"Of {n:,} samples {k:,} were robust in the baseline and are not now, and {m:,} the other way round. With "
        f"{sure} confidence either way the true drop is above {_digits(low)} and below {_points(high)} (exact "
        f"one-sided McNemar test of no drop, p = {p:.2g}). "
        f"A drop beyond {_points(limit)} is {'not ' if held else ''}significant.{_apart(baseline, case.run)}",
        **_concerned(table, lost),
    )


def drop(both: int, lost: int, gained: int, neither: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the one-sided bounds of a drop, lower and upper, and the exact p-value of there being none.

    The bounds are the ends of Newcombe's interval at twice the error, the test McNemar's: of the samples that changed
    sides, half go either way if there is no drop.

    Args:
        both: samples that are robust in the baseline and now.
        lost: those that were and are not.
        gained: those that were not and are.
        neither: the others.
        confidence: of each bound.

    References: Newcombe (1998), Statistics in Medicine 17, 2635-2650, method 10; McNemar (1947), Psychometrika 12(2),
    153-157.
    """
    from scipy.stats import binom

    low, high = difference_interval(both, gained, lost, neither, 2 * confidence - 1)
    return low, high, float(binom.sf(lost - 1, lost + gained, 0.5))


def _max_seconds(limit: float, case: _Case) -> Check:
    seconds = number(part(case.run.manifest, "totals").get("seconds"))
    if seconds is None:
        raise RunError("a run that tells its time, for max-seconds", f"none in {case.run.path}", "Evaluate anew.")
    return Check(
        "max-seconds",
        held=seconds <= limit,
        wanted=f"at most {limit:g} s",
        found=f"{seconds:.1f} s",
        why="The time that the run spent on its samples; it depends on the machine.",
    )


def _no_finding(code: str, run: Run) -> Check:
    graver = SEVERITIES[: SEVERITIES.index(code) + 1] if code in SEVERITIES else ()
    found = [f for f in rows(run.manifest.get("findings")) if f.get("code") == code or f.get("severity") in graver]
    about = f"of severity {code}{'' if code == 'error' else ' or graver'}" if graver else code
    return Check(
        f"no-finding {code}",
        held=not found,
        wanted=f"no finding {about}",
        found=", ".join(f"{f.get('code')} ({f.get('severity')})" for f in found) or "none",
        why=" ".join(str(f.get("message")) for f in found) or "No check or diagnostic of the run raised it.",
    )


def finished(run: Run) -> pa.Table:
    """Return the samples of a run that came to its end, or to a bound that it was given.

    Raises:
        RunError: it was interrupted, or has no samples, or lost some.
    """
    if run.manifest.get("complete") is not True and not run.manifest.get("bounded"):
        raise RunError("a run that is finished", f"{run.path}, which was interrupted", "Let it go on; then gate it.")
    table = run.samples()
    if not len(table):
        raise RunError("a run with samples", f"none in {run.path}", "Start the run anew.")
    n = part(run.manifest, "data").get("n")
    if run.manifest.get("complete") is True and n is not None and len(table) != n:
        raise RunError(f"{n} samples in {run.path}", f"{len(table)}", "Repeat the evaluation: it does what is missing.")
    return table


def _robust(run: Run, table: pa.Table) -> Flags:
    """Return which samples (n,) are robust.

    Raises:
        RunError: nothing was attacked within an eps.
    """
    identity = _identity(run)
    if part(identity, "threat").get("eps") is None or identity.get("effort") == UNATTACKED:
        found = f"{run.path}, which attacked nothing within an eps"
        raise RunError("a run with a robust accuracy", found, "Evaluate with a threat such as linf:8/255.")
    return states(table, ROBUST)


def _check_alike(baseline: Run, run: Run) -> None:
    """Refuse a baseline that was harder or easier."""
    old, new = ({key: _identity(r).get(key) for key in ALIKE} for r in (baseline, run))
    if found := list(differences(old, new)):
        raise RunError(
            f"a baseline like {run.path}: the same {', '.join(ALIKE)}",
            plain(f"in {baseline.path} {'; '.join(found)}"),
            "Evaluate with its settings, or remove it and make another with --update-baseline.",
        )


def _apart(baseline: Run, run: Run) -> str:
    """Say in what else, apart from the model, two runs are not the same."""
    old, new = _identity(baseline), _identity(run)
    found = [key for key in sorted({*old, *new}) if key != "model" and old.get(key) != new.get(key)]
    return f" The runs also differ in: {', '.join(found)}." if found else ""


def _paired(before: Flags, others: pa.Table, case: _Case) -> tuple[Flags, Flags, pa.Table]:
    """Return what was robust before and now, and the rows of now, of the samples (k,) that both runs hold."""
    then, now = (t["index"].to_numpy() for t in (others, case.table))
    _, at, to = np.intersect1d(then, now, assume_unique=True, return_indices=True)
    if not len(at):
        raise RunError("samples that both runs hold", "none", "Evaluate both on the same data.")
    return before[at], case.robust[to], case.table.take(to)


def _concerned(table: pa.Table, which: Flags) -> dict[str, Any]:
    """Return how many samples (n,) a check is about, and the first of them."""
    first = table.take(np.flatnonzero(which)[:SHOWN]).to_pylist()
    return {"concerned": int(which.sum()), "samples": tuple(map(_sample, first))}


def _sample(row: Mapping[str, Any]) -> Sample:
    fooled_as = row["adversarial_prediction"]
    taken = row["prediction"] if fooled_as is None else fooled_as
    return Sample(row["index"], row["label"], taken, row["size"], row["broken_by"])


def _identity(run: Run) -> dict[str, Any]:
    return part(run.manifest, "identity")


def _percent(share: float) -> str:
    """Write a share so that it is told apart from a floor that is near: ``44.96 %``."""
    return f"{_digits(share)} %"


def _points(share: float) -> str:
    digits = _digits(share)
    return f"{digits} point{'' if digits == '1' else 's'}"


def _digits(share: float) -> str:
    return f"{round(100 * share, 2) + 0.0:.2f}".rstrip("0").rstrip(".")
