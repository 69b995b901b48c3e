"""The evaluation: checks first, then block by block until every sample is stored, then what the whole shows."""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeAlias, final

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console

from assay.certification import Proof
from assay.certification.certify import check_threat
from assay.core.errors import ContradictionError, ThreatError
from assay.core.executor import Executor, device_of
from assay.core.progress import Progress, Snapshot, silent
from assay.core.registry import UsageError, closest
from assay.data import load_data
from assay.evaluation.block import Job, Part, SoFar, kept_in, run_block
from assay.evaluation.course import Course
from assay.evaluation.efforts import EFFORTS, plan_for
from assay.evaluation.manifest import finish, new_manifest
from assay.evaluation.natural import check_corruptible, look
from assay.evaluation.preflight import check_model
from assay.evaluation.reading import check_data
from assay.evaluation.rescue import examine
from assay.evaluation.result import Evaluation
from assay.evaluation.team import team_for
from assay.models import Model, as_model
from assay.models.door import metered
from assay.models.fingerprint import fingerprint
from assay.models.line import default_batch
from assay.models.loaders import load_model
from assay.reports import live as live_progress
from assay.runs import Run
from assay.runs.natural import corruptions
from assay.runs.schema import LATE, UNATTACKED
from assay.threats import Threat

Work: TypeAlias = Callable[..., Part]
"""Does a block: gets the positions of its samples; in this process also ``tell``, ``deadline`` and a ``journal``."""


def evaluate(
    model: Any,
    data: Any,
    threat: Threat | str,
    effort: str = "standard",
    prove: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    limit: int | None = None,
    progress: bool | Progress = True,
    executor: Executor | None = None,
    command: str | None = None,
    max_passes: int | None = None,
    max_seconds: float | None = None,
    until_interval: float | None = None,
    eps_list: Sequence[float] | None = None,
    prove_seconds: float = 30.0,
    arithmetic: str = "float32",
    natural: str | Sequence[str] | None = None,
) -> Evaluation:
    """Say how much a classifier can take: attack every sample, verify what was found, and keep it.

    Args:
        model: an :class:`assay.Model`, a network that takes inputs in [0, 1], or a MODEL form of the command line.
        data: ``(x, y)``, a dataset, a loader, :func:`assay.load_data`, or a DATA form of the command line.
        threat: what the adversary may do. Without an eps the smallest perturbation of each sample is searched.
        effort: ``quick``, ``standard``, ``thorough``, or ``reference``, the published ensemble; with ``prove`` also
            ``none``: then nothing is attacked, and there is no robust accuracy.
        prove: a method of proof, ``ibp``, ``crown-ibp``, ``crown``, ``alpha`` or ``complete``. It and those before it
            are tried on every sample that is right, and what is proven is not attacked; complete search is tried only
            on what attacks left standing. Without an eps the radius is searched up to which each sample is proven.
        seed: of all random numbers.
        batch_size: samples that are attacked together; changes no result.
        device: where to run; None for where the model is.
        out: the run's folder; None keeps it only as long as the returned object lives.
        resume: go on with a run of the same settings that is in ``out`` already.
        limit: use only the first samples.
        progress: show a live display, or call this with each :class:`Snapshot`; those of the stage ``checks``, before
            the race, have passes and seconds of their own.
        executor: where blocks run, such as :class:`assay.distributed.Processes` or ``RayExecutor``: each is a call of
            its own that can be pickled, but not as threads of one process, which would share the model; None for this
            process. Its ``device``, if it has one, is where attacks run; ``device`` is then for the checks before.
        command: what reproduces the run, for its manifest.
        max_passes: the most forward and backward passes, together, that attacks may spend on a sample.
        max_seconds: no attack begins later than this; what was found by then counts.
        until_interval: look at the samples in random order, a few hundred at a time, and stop when the interval of the
            robust accuracy is no wider than this. The interval is one that may be looked at again and again
            (:func:`assay.runs.statistics.sequential_interval`).
        eps_list: further eps at which the report says the robust accuracy; none above that of the threat.
        prove_seconds: for ``complete``: the time for each sample.
        arithmetic: of the deployed network, for proofs: ``float32``, ``tf32``, ``bfloat16`` or ``real``.
        natural: also ask about every image under these corruptions, at five severities: names and groups of them,
            ``common`` for the usual fifteen (:func:`assay.runs.natural.corruptions`); needs an extra.

    Returns:
        The result. After Ctrl-C the interruption is raised when nothing is stored, else the result so far is returned
        with ``complete`` False.

    Raises:
        DataError, ThreatError, ModelError: model, data and threat do not fit, or proofs are wanted of a model that has
            no bounds; raised before any attack.
        ContradictionError: a sample is proven and fooled at once: a bug, whose evidence is kept in the run's folder.
        RunError: ``out`` cannot be written or holds another run.
    """
    _check_request(effort, prove, {"limit": limit, "batch_size": batch_size, "max_passes": max_passes})
    harms = corruptions(natural) if natural else ()
    proof = Proof(prove, prove_seconds, arithmetic) if prove else None
    threat, course = _threat(threat, proof), Course(until_interval, max_seconds, tuple(eps_list or ()))
    levels, model, data = course.within(threat), _model(model), load_data(data, limit=limit)
    mark = fingerprint(model)  # before the model is asked anything: it may count its calls
    data = model.takes(data)
    if harms:
        check_corruptible(data.shape)
    with _shown(progress) as show:
        watch = _Watch(show, len(data))
        with metered(partial(watch.tell, "checks")) as before:
            findings = check_data(data, model.domain, executor, partial(watch.tell, "checks", 0))
            threat = threat.within(model.domain, int(np.prod(data.shape)))
            checked = check_model(model, data, threat, device, repair=effort != UNATTACKED)
            look_hard = effort not in (UNATTACKED, "quick")
            checked = examine(checked, data, threat, seed, device) if look_hard else checked
    findings += checked.findings
    prover = proof.prover(checked.model, data.shape, device) if proof else None
    plan = plan_for(effort, threat, checked.blind, doubt=checked.doubt)
    place = device_of(executor, device)
    limits = batch_size or default_batch(data.shape, place), max_passes, levels
    # What a network was converted from has been compared with it, and need not travel.
    asked = replace(checked.model, reference=None) if executor else checked.model
    job = Job(asked, data, threat, plan, seed, place, *limits, proof)
    manifest = new_manifest(job, course, mark, effort, checked.classes, findings, command)
    manifest["probe"] = asdict(before)
    work = partial(run_block, job) if executor else partial(run_block, job, prover=prover)
    first = partial(look, job=replace(job, device=device), names=harms) if harms else None
    return carry_out(job, course, manifest, work, out, resume=resume, progress=progress, executor=executor, first=first)


def carry_out(
    job: Job,
    course: Course,
    manifest: dict[str, Any],
    work: Work,
    out: str | Path | None,
    *,
    resume: bool,
    progress: bool | Progress,
    executor: Executor | None = None,
    first: Callable[..., None] | None = None,
) -> Evaluation:
    """Start the run of a manifest, or go on with it; do the ``work`` block by block, and say what the whole shows.

    What is to be done ``first`` gets the ``run``, and ``show``.
    """
    passing = None if out is not None else mkdtemp(prefix="assay-")
    run = Run.start(passing or str(out), manifest, resume=resume)
    try:
        with _shown(progress) as show:
            if first:
                first(run, show=show)
            complete = _work(run, job, course, work, show, executor)
        result = Evaluation(run, passing=out is None)
        finish(run, result, complete=complete)
    except BaseException as e:
        _give_up(run, e, passing)
        raise
    finally:
        run.close()
    return result


def _give_up(run: Run, error: BaseException, passing: str | None) -> None:
    """Keep the evidence of a contradiction, and remove a passing folder that holds none."""
    if isinstance(error, ContradictionError):
        path = run.path / f"contradiction-{int(error.evidence['index']):08d}.npz"
        np.savez_compressed(path, **error.evidence)
        error.remedy += f" It is in {path}."
    elif passing:
        shutil.rmtree(passing, ignore_errors=True)


def _model(model: Any) -> Model:
    if isinstance(model, str | Path):
        return load_model(model)
    return as_model(model)


def _threat(threat: Threat | str, proof: Proof | None) -> Threat:
    threat = Threat.parse(threat) if isinstance(threat, str) else threat
    if not isinstance(threat, Threat):
        raise ThreatError("a Threat, or text like linf:8/255", repr(threat), "Write assay.Threat('linf', eps=8 / 255).")
    if threat.targeted:
        raise ThreatError(
            "an untargeted threat to evaluate", "a targeted one", "Use an attack, or `assay attack --target`."
        )
    if proof is not None:
        check_threat(threat)
    return threat


def _check_request(effort: str, prove: str | None, counts: Mapping[str, int | None]) -> None:
    if effort not in (*EFFORTS, UNATTACKED):
        raise UsageError("an effort", repr(effort), closest(effort, [*EFFORTS]))
    if effort == UNATTACKED and not prove:
        raise UsageError("a method of proof with effort none", "neither proof nor attack", "Give prove='crown', say.")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{name} of at least 1", str(count), "Leave it out for the default.")


@contextlib.contextmanager
def _shown(progress: bool | Progress) -> Iterator[Progress]:
    if callable(progress):
        yield progress
    elif progress:
        with live_progress(Console(stderr=True)) as show:
            yield show
    else:
        yield silent


def _work(run: Run, job: Job, course: Course, work: Work, show: Progress, executor: Executor | None) -> bool:
    """Attack every sample that is not stored yet; return whether all are, or as many as were wanted."""
    every, done = course.blocks(len(job.data), job.seed), run.done() - run.late()
    blocks = [rows for rows in every if not done.issuperset(rows)]
    watch = _Watch(show, len(job.data), proven=None if run.manifest["identity"]["prove"] is None else 0)
    stored, again = run.samples(), {i for rows in blocks for i in rows}
    watch.add(stored.filter(pa.array([i not in again for i in stored["index"].to_pylist()], pa.bool_())).to_pydict())
    parts = _parts(run, job, course, work, blocks, watch, executor)
    try:
        with contextlib.closing(parts):
            while not course.enough(watch.standing, watch.done):
                if (part := next(parts, None)) is None:
                    return watch.done == len(job.data)
                run.add(part.rows, part.adversarials, part.tally)
                if part.tally["bounded"] != LATE:  # else the same command goes on from the journal
                    kept_in(_journal(run), part.rows["index"]).unlink(missing_ok=True)
                watch.add(part.rows)
    except KeyboardInterrupt:
        if not run.done():  # what is on disk counts: the interruption may have come right after a batch was stored
            raise
        return False
    return True


def _parts(
    run: Run,
    job: Job,
    course: Course,
    work: Work,
    blocks: list[list[int]],
    watch: "_Watch",
    executor: Executor | None,
) -> Generator[Part, None, None]:
    """Do the blocks, of which none but the first begins after the deadline; yield what comes of each."""
    seconds = math.inf if course.seconds is None else course.seconds
    deadline, wall = time.monotonic() + seconds, time.time() + seconds
    begun = (rows for i, rows in enumerate(blocks) if not i or time.monotonic() <= deadline)
    parts: Iterator[Part]
    if executor is None:
        # Only this process can watch inside a block, and keep a journal; to others the work must travel.
        here = partial(work, tell=watch.tell, journal=_journal(run), deadline=deadline)
        parts = team_for(job, course)(here, begun)
    else:
        parts = executor(work if course.seconds is None else partial(_until, work, wall), begun)
    try:
        # Those of which little stands end first: what is stored of a team must not be they alone.
        for part in _in_turn(parts, blocks) if executor is None or course.width is not None else parts:
            if executor is not None:
                watch.passes += sum(part.rows["forwards"]) + sum(part.rows["backwards"])
            yield part
    finally:
        if hasattr(parts, "close"):
            parts.close()


def _until(work: Work, wall: float, rows: list[int]) -> Part:
    """Do a block on a machine with a clock of its own, which agrees with ours about the time of day."""
    return work(rows, deadline=time.monotonic() + wall - time.time())


def _in_turn(parts: Iterator[Part], blocks: Iterable[list[int]]) -> Iterator[Part]:
    """Yield parts in the order of their blocks: where a run stops must not depend on which was done first."""
    early: dict[int, Part] = {}
    for rows in blocks:
        while rows[0] not in early:
            if (part := next(parts, None)) is None:
                return
            early[part.rows["index"][0]] = part
        yield early.pop(rows[0])


def _journal(run: Run) -> Path:
    """Return the folder that keeps the races of blocks under way."""
    return run.path / "race"


@final
@dataclass(slots=True)
class _Watch:
    """Turns what happens in a block into snapshots for whoever watches."""

    show: Progress
    total: int
    done: int = 0
    right: int = 0
    fooled: int = 0
    passes: int = 0
    proven: int | None = None
    under_way: dict[int, SoFar] = field(default_factory=dict)
    begin: float = field(default_factory=time.perf_counter)

    @property
    def standing(self) -> int:
        return self.right - self.fooled

    def add(self, rows: Mapping[str, Sequence[Any]]) -> None:
        states = rows["status"]
        for first in rows["index"][:1]:
            self.under_way.pop(first, None)
        self.done += len(states)
        self.right += sum(s != "misclassified" for s in states)
        self.fooled += sum(s == "fooled" for s in states)
        if self.proven is not None:
            self.proven += sum(v > 0 for v in rows["lower"])
        if states:
            self.tell("store", 0)

    def tell(self, stage: str, passes: int, so_far: SoFar | None = None, /) -> None:
        self.passes += passes
        if so_far is not None:
            self.under_way[so_far.first] = so_far
        seen, right, fooled, seconds = self.done, self.right, self.fooled, time.perf_counter() - self.begin
        for part in self.under_way.values():
            seen, right, fooled = seen + part.samples, right + part.right, fooled + part.fooled
        self.show(Snapshot(self.total, self.done, right, fooled, stage, self.passes, seconds, self.proven, seen))
