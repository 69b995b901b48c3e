"""The evaluation: checks first, then block by block until every sample is stored, then what the whole shows."""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
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
from assay.evaluation.efforts import EFFORTS, stages_for
from assay.evaluation.manifest import finish, new_manifest
from assay.evaluation.preflight import check_data, check_model
from assay.evaluation.result import Evaluation
from assay.models import Model
from assay.models.fingerprint import fingerprint
from assay.models.loaders import load_model
from assay.reports import live as live_progress
from assay.runs import Run
from assay.threats import Threat

BLOCK = 128
"""Samples that are attacked, and stored, together by default."""


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
) -> Evaluation:
    """Say how much a classifier can take: attack every sample, verify what was found, and keep it.

    Args:
        model: an :class:`assay.Model`, a network that takes inputs in [0, 1], or a MODEL form of the command line.
        data: ``(x, y)``, a dataset, a loader, :func:`assay.load_data`, or a DATA form of the command line.
        threat: what the adversary may do. Without an eps the smallest perturbation of each sample is searched.
        effort: ``quick``, ``standard`` or ``thorough``: see ``assay.evaluation.EFFORTS``.
        prove: certification comes in a later version; must be None.
        seed: of all random numbers.
        batch_size: samples that are attacked and stored together; changes no result.
        device: where to run; None for where the model is.
        out: the run's folder; None keeps it only as long as the returned object lives.
        resume: go on with a run of the same settings that is in ``out`` already.
        limit: use only the first samples.
        progress: show a live display, or call this with each :class:`Snapshot`.
        executor: where blocks run, each a call of its own that can be pickled, but not as threads of one process, which
            would share the model; None for this process.
        command: what reproduces the run, for its manifest.

    Returns:
        The result. After Ctrl-C the interruption is raised when nothing is stored, else the result so far is returned
        with ``complete`` False.

    Raises:
        DataError, ThreatError, ModelError: model, data and threat do not fit; raised before any attack.
        RunError: ``out`` cannot be written or holds another run.
    """
    _check_request(effort, prove, {"limit": limit, "batch_size": batch_size})
    model, data = _model(model), load_data(data, limit=limit)
    threat = Threat.parse(threat) if isinstance(threat, str) else threat
    if not isinstance(threat, Threat):
        raise ThreatError("a Threat, or text like linf:8/255", repr(threat), "Write assay.Threat('linf', eps=8 / 255).")
    if threat.targeted:
        raise ThreatError(
            "an untargeted threat to evaluate", "a targeted one", "Use an attack, or `assay attack --target`."
        )
    mark = fingerprint(model)  # before the model is asked anything: it may count its calls
    data = data.scaled(model.domain.lo, model.domain.hi)
    findings = check_data(data, model.domain)
    threat = threat.within(model.domain, int(np.prod(data.shape)))
    checked = check_model(model, data, threat, device)
    findings += checked.findings
    job = Job(checked.model, data, threat, stages_for(effort, threat, checked.blind), seed, device)
    manifest = new_manifest(job, mark, effort, checked.classes, findings, command)
    passing = None if out is not None else mkdtemp(prefix="assay-")
    run = Run.start(passing or str(out), manifest, resume=resume)
    try:
        with _shown(progress) as show:
            complete = _work(run, job, batch_size or BLOCK, show, executor)
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


def _work(run: Run, job: Job, block: int, show: Progress, executor: Executor | None) -> bool:
    """Attack every sample that is not stored yet; return whether all are."""
    stored = run.samples()
    done = set(stored["index"].to_pylist())
    rest = [i for i in range(len(job.data)) if i not in done]
    blocks = [rest[i : i + block] for i in range(0, len(rest), block)]
    watch = _Watch(show, len(job.data))
    watch.add(stored["status"].to_pylist())
    # Only this process can watch inside a block; to others the work must travel.
    work = partial(run_block, job) if executor else partial(run_block, job, tell=watch.tell)
    parts = (executor or serial)(work, blocks)
    try:
        for part in parts:
            run.add(part.rows, part.adversarials, part.tally)
            watch.add(part.rows["status"])
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
