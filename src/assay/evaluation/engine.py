"""The evaluation: checks first, then block by block until every sample is stored, then what the whole shows."""

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, final

import numpy as np
import torch
from rich.console import Console

from assay.core.errors import ThreatError
from assay.core.executor import Executor, serial
from assay.core.progress import Progress, Snapshot, silent
from assay.core.registry import UsageError, closest
from assay.data import load_data
from assay.evaluation.block import Job, run_block
from assay.evaluation.course import Course
from assay.evaluation.diagnosis import MASKING, probe
from assay.evaluation.efforts import EFFORTS, plan_for
from assay.evaluation.manifest import finish, new_manifest
from assay.evaluation.preflight import check_data, check_model
from assay.evaluation.result import Evaluation
from assay.models import Model
from assay.models.door import default_batch
from assay.models.fingerprint import fingerprint
from assay.models.loaders import load_model
from assay.reports import live as live_progress
from assay.runs import Run
from assay.threats import Threat


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
) -> Evaluation:
    """Say how much a classifier can take: attack every sample, verify what was found, and keep it.

    Args:
        model: an :class:`assay.Model`, a network that takes inputs in [0, 1], or a MODEL form of the command line.
        data: ``(x, y)``, a dataset, a loader, :func:`assay.load_data`, or a DATA form of the command line.
        threat: what the adversary may do. Without an eps the smallest perturbation of each sample is searched.
        effort: ``quick``, ``standard``, ``thorough``, or ``reference``, the published ensemble.
        prove: certification comes in a later version; must be None.
        seed: of all random numbers.
        batch_size: samples that are attacked together; changes no result.
        device: where to run; None for where the model is.
        out: the run's folder; None keeps it only as long as the returned object lives.
        resume: go on with a run of the same settings that is in ``out`` already.
        limit: use only the first samples.
        progress: show a live display, or call this with each :class:`Snapshot`.
        executor: where blocks run, each a call of its own that can be pickled, but not as threads of one process, which
            would share the model; None for this process.
        command: what reproduces the run, for its manifest.
        max_passes: the most forward and backward passes, together, that attacks may spend on a sample.
        max_seconds: no attack begins later than this; what was found by then counts.
        until_interval: look at the samples in random order, a few hundred at a time, and stop when the interval of the
            robust accuracy is no wider than this. The interval is one that may be looked at again and again
            (:func:`assay.runs.statistics.sequential_interval`).
        eps_list: further eps at which the report says the robust accuracy; none above that of the threat.

    Returns:
        The result. After Ctrl-C the interruption is raised when nothing is stored, else the result so far is returned
        with ``complete`` False.

    Raises:
        DataError, ThreatError, ModelError: model, data and threat do not fit; raised before any attack.
        RunError: ``out`` cannot be written or holds another run.
    """
    _check_request(effort, prove, {"limit": limit, "batch_size": batch_size, "max_passes": max_passes})
    threat, course = _threat(threat), Course(until_interval, max_seconds, tuple(eps_list or ()))
    levels, model, data = course.within(threat), _model(model), load_data(data, limit=limit)
    mark = fingerprint(model)  # before the model is asked anything: it may count its calls
    data = data.scaled(model.domain.lo, model.domain.hi)
    findings = check_data(data, model.domain)
    threat = threat.within(model.domain, int(np.prod(data.shape)))
    checked = check_model(model, data, threat, device)
    probed = None if effort == "quick" else probe(checked.model, data, threat, seed, device)
    findings += (*checked.findings, *(probed.findings if probed else ()))
    plan = plan_for(effort, threat, checked.blind, masked=any(f.code in MASKING for f in findings))
    together = batch_size or default_batch(data.shape, device)
    job = Job(checked.model, data, threat, plan, seed, device, together, max_passes, levels)
    manifest = new_manifest(job, course, mark, effort, checked.classes, findings, command)
    manifest["probe"] = {"forwards": probed.forwards, "backwards": probed.backwards} if probed else None
    passing = None if out is not None else mkdtemp(prefix="assay-")
    run = Run.start(passing or str(out), manifest, resume=resume)
    try:
        with _shown(progress) as show:
            complete = _work(run, job, course, show, executor)
        result = Evaluation(run, passing=out is None)
        finish(run, result, findings, checked.classes, complete=complete)
    except BaseException:
        if passing:
            shutil.rmtree(passing, ignore_errors=True)
        raise
    finally:
        run.close()
    return result


def _model(model: Any) -> Model:
    if isinstance(model, str | Path):
        return load_model(model)
    return model if isinstance(model, Model) else Model(model)


def _threat(threat: Threat | str) -> Threat:
    threat = Threat.parse(threat) if isinstance(threat, str) else threat
    if not isinstance(threat, Threat):
        raise ThreatError("a Threat, or text like linf:8/255", repr(threat), "Write assay.Threat('linf', eps=8 / 255).")
    if threat.targeted:
        raise ThreatError(
            "an untargeted threat to evaluate", "a targeted one", "Use an attack, or `assay attack --target`."
        )
    return threat


def _check_request(effort: str, prove: str | None, counts: Mapping[str, int | None]) -> None:
    if effort not in EFFORTS:
        raise UsageError("an effort", repr(effort), closest(effort, [*EFFORTS]))
    if prove is not None:
        raise UsageError("prove=None", repr(prove), "Certification is not part of this version yet.")
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


def _work(run: Run, job: Job, course: Course, show: Progress, executor: Executor | None) -> bool:
    """Attack every sample that is not stored yet; return whether all are, or as many as were wanted."""
    stored = run.samples()
    done = set(stored["index"].to_pylist())
    blocks = [rows for rows in course.blocks(len(job.data), job.seed) if not done.issuperset(rows)]
    watch = _Watch(show, len(job.data))
    watch.add(stored["status"].to_pylist())
    # Only this process can watch inside a block, and keep a journal; to others the work must travel.
    deadline = time.monotonic() + (course.seconds if course.seconds is not None else math.inf)
    journal = run.path / "race" / "block.npz"
    here = partial(run_block, job, tell=watch.tell, journal=journal, deadline=deadline)
    parts = (executor or serial)(partial(run_block, job) if executor else here, blocks)
    try:
        while not course.enough(watch.standing, watch.done):
            if (part := next(parts, None)) is None:
                return True
            run.add(part.rows, part.adversarials, part.tally)
            journal.unlink(missing_ok=True)
            watch.add(part.rows["status"])
            if time.monotonic() > deadline:
                return watch.done == len(job.data)
    except KeyboardInterrupt:
        if not run.done():  # what is on disk counts: the interruption may have come right after a batch was stored
            raise
        return False
    return True


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
    begin: float = field(default_factory=time.perf_counter)

    @property
    def standing(self) -> int:
        return self.right - self.fooled

    def add(self, states: list[str]) -> None:
        self.done += len(states)
        self.right += sum(s != "misclassified" for s in states)
        self.fooled += sum(s == "fooled" for s in states)
        if states:
            self.tell("store", 0)

    def tell(self, stage: str, passes: int) -> None:
        self.passes += passes
        seconds = time.perf_counter() - self.begin
        self.show(Snapshot(self.total, self.done, self.right, self.fooled, stage, self.passes, seconds))
