"""A check for tests and scripts: evaluate, hold the result to what is asked for, and fail with all that explains it."""

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, Final, final

import torch

from assay.core.plain import printable
from assay.core.registry import UsageError
from assay.evaluation.engine import evaluate
from assay.evaluation.result import Evaluation
from assay.reports.summary import Summary, read, summarize
from assay.reports.text import count, duration, percent, plural
from assay.runs import Run
from assay.runs.policy import Check, Judgement, Policy, Sample, hold
from assay.threats import Threat

_SAMPLES: Final = 5
"""How many samples a failure names for each check."""


@final
class CheckError(AssertionError):
    """A model did not hold what was asked of it.

    ``evaluation`` is what was measured, ``judgement`` which of the checks held.
    """

    def __init__(self, text: str, evaluation: Evaluation | None = None, judgement: Judgement | None = None) -> None:
        super().__init__(text)
        self.evaluation, self.judgement = evaluation, judgement


def check(
    model: Any,
    data: Any,
    threat: Threat | str,
    *,
    min_robust: float | None = None,
    min_certified: float | None = None,
    max_drop: float | None = None,
    baseline: Evaluation | Run | str | Path | None = None,
    no_finding: Sequence[str] = (),
    max_seconds: float | None = None,
    effort: str = "quick",
    prove: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Evaluate a model, and fail where it does not hold what is asked of it.

    Floors are held by the figures of these very samples, a drop by a paired test
    (:func:`assay.runs.policy.hold`); the same settings and seed give the same answer.

    Args:
        model: as for :func:`assay.evaluate`.
        data: as for :func:`assay.evaluate`.
        threat: what the adversary may do, with an eps.
        min_robust: the least robust accuracy, between 0 and 1.
        min_certified: the least certified accuracy; proofs are by ``crown`` unless ``prove`` says otherwise.
        max_drop: by how much the robust accuracy may be below that of ``baseline``.
        baseline: a run, or its folder, on the same data with the same threat and effort.
        no_finding: codes of findings that there must not be; ``error`` or ``warning`` means all at least as grave.
        max_seconds: the longest time that the run may take.
        effort: how hard to attack.
        prove: a method of proof.
        seed: of all random numbers.
        limit: use only the first samples.
        out: the folder where the run is kept; None keeps it as long as the returned object, or the error, lives.
        resume: go on with a run of the same settings that is in ``out`` already.
        batch_size: samples that are attacked together; changes no result.
        device: where to run; None for where the model is.

    Returns:
        The evaluation, when everything holds.

    Raises:
        CheckError: something does not; the text says what was wanted and found, which attacks broke how many, the first
            samples that fell, the findings, where the run is, and how to repeat it.
        UsageError: nothing is asked for, or a drop without a baseline.
        AssayError: whatever :func:`assay.evaluate` and :func:`assay.runs.policy.hold` raise.
    """
    __tracebackhide__ = methodcaller("errisinstance", CheckError)  # pytest then shows the test, and not this
    policy = Policy(min_robust, min_certified, max_drop, tuple(no_finding), max_seconds)
    against = _baseline(baseline)
    _check_asked(policy, against)
    proof = prove or (None if min_certified is None else "crown")
    repeat = _repeat(model, data, threat, {"effort": effort, "prove": proof, "seed": seed, "limit": limit})
    evaluation = evaluate(
        model,
        data,
        threat,
        effort,
        proof,
        seed,
        batch_size,
        device,
        out,
        resume,
        limit,
        progress=False,
        command=repeat.get("command"),
    )
    judgement = hold(policy, evaluation.run, against)
    if not judgement.held:
        raise CheckError("\n".join(_explained(evaluation, judgement, repeat)), evaluation, judgement)
    return evaluation


def outcome(evaluation: Evaluation) -> str:
    """Say in one line what was found: ``mnist-robust, linf:0.3: robust 90.0 %, clean 100.0 %; 240 passes, 1.2 s``."""
    s, passes = summarize(evaluation.run.manifest), evaluation.passes
    rates = (("robust", s.robust.value), ("proven", s.certified.value), ("clean", s.clean.value))
    told = ", ".join(f"{name} {percent(value)}" for name, value in rates if value is not None)
    cost = f"{count(passes.forwards + passes.backwards)} passes, {duration(evaluation.seconds)}"
    return printable(f"{s.model}, {s.threat}, {plural(s.n, s.noun)}: {told}; {cost}")


def _baseline(given: Evaluation | Run | str | Path | None) -> Run | None:
    if isinstance(given, Evaluation):
        return given.run
    return given if given is None or isinstance(given, Run) else Run.read(given)


def _check_asked(policy: Policy, baseline: Run | None) -> None:
    """Refuse, before anything is evaluated, what could not be held afterwards."""
    if policy.empty:
        raise UsageError("a check that asks for something", "nothing", "Give for example min_robust=0.4.")
    if policy.max_drop is not None and baseline is None:
        raise UsageError("a baseline for max_drop", "none", "Give baseline=, a run or its folder.")


def _repeat(model: Any, data: Any, threat: Threat | str, settings: dict[str, Any]) -> dict[str, str]:
    """Return the lines that repeat an evaluation: ``python``, and ``command`` where model and data are names."""
    named = [isinstance(v, str | Path) for v in (model, data)]
    what = [
        repr(str(v)) if is_name else word
        for v, is_name, word in zip((model, data), named, ("model", "data"), strict=True)
    ]
    bits = threat.quantize if isinstance(threat, Threat) else None
    within = repr(str(threat)) if bits is None else f"assay.Threat({_ball(threat)}, quantize={bits})"
    given = {k: v for k, v in settings.items() if v is not None}
    lines = {"python": f"assay.evaluate({', '.join([*what, within, *(f'{k}={v!r}' for k, v in given.items())])})"}
    if not all(named):
        return lines
    options = {"threat": str(threat), **given} | ({} if bits is None else {"quantize": bits})
    flags = [word for k, v in options.items() for word in (f"--{k}", str(v))]
    return lines | {"command": shlex.join(["assay", "evaluate", str(model), str(data), *flags])}


def _ball(threat: Threat | str) -> str:
    norm, _, eps = str(threat).partition(":")
    return f"{norm!r}, eps={eps}" if eps else repr(norm)


def _explained(evaluation: Evaluation, judgement: Judgement, repeat: dict[str, str]) -> Iterator[str]:
    """Yield the lines of a failure."""
    s = summarize(read(evaluation.run)[0])
    failed = ", ".join(f"{c.name} found {c.found}" for c in judgement.failed)
    yield printable(f"{len(judgement.failed)} of {plural(len(judgement.checks), 'check')} failed: {failed}")
    yield f"  {outcome(evaluation)}"
    for c in judgement.checks:
        yield from _of_check(c, s)
    yield from ("", f"  broken by   {_broken_by(evaluation)}")
    for note in s.findings:
        yield printable(f"  {note.severity:<10}  {note.code}: {note.message}")
    for name, line in (_place(evaluation) | repeat).items():
        yield printable(f"  {name:<10}  {line}")


def _of_check(c: Check, s: Summary) -> Iterator[str]:
    yield ""
    if c.held:
        yield f"  {c.name} held: {c.wanted}, found {printable(c.found)}"
        return
    yield f"  {c.name} failed"
    for name, value in (("wanted", c.wanted), ("found", c.found), ("", c.why)):
        yield printable(f"    {name:<8}{value}")
    if c.concerned:
        yield f"    {plural(c.concerned, s.noun)}{', the first:' if c.concerned > _SAMPLES else ':'}"
    for sample in c.samples[:_SAMPLES]:
        yield printable(f"      #{sample.index:<6}{_fell(sample, s)}")


def _fell(x: Sample, s: Summary) -> str:
    """Say what became of a sample: ``7 -> 3, size 0.0891, by ce-15``."""
    if x.prediction == x.label:
        return f"{s.label(x.label)}, right, and not proven"
    how = "wrong as it is" if x.broken_by is None else f"size {s.units.show(x.size)}, by {x.broken_by}"
    return f"{s.label(x.label)} -> {s.label(x.prediction)}, {how}"


def _broken_by(evaluation: Evaluation) -> str:
    """Say how many samples each attack broke, and how many need none."""
    fallen = Counter(name for name in evaluation.samples["broken_by"].to_pylist() if name is not None)
    wrong = sum(status == "misclassified" for status in evaluation.samples["status"].to_pylist())
    told = [f"{name} {count(n)}" for name, n in fallen.most_common()]
    return printable(", ".join([*told, f"wrong as they are {count(wrong)}"]))


def _place(evaluation: Evaluation) -> dict[str, str]:
    """Return where the run is, and the line that makes a page of it."""
    if evaluation.passing:
        return {"run": "not kept; out=FOLDER keeps it"}
    place = str(evaluation.run.path)
    return {"run": place, "page": shlex.join(["assay", "report", place])}
