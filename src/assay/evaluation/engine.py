"""The evaluation: checks first, then block by block until every sample is stored, then what the whole shows."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, final

import numpy as np
import torch
from rich.console import Console

from assay.attacks import Bisect
from assay.core.errors import ThreatError
from assay.core.executor import Executor, serial
from assay.core.progress import Progress, Snapshot, silent
from assay.core.registry import UnknownNameError, closest
from assay.data import Data, load_data
from assay.evaluation.block import Job, Part, attack_block
from assay.evaluation.efforts import EFFORTS, Stage, stages_for
from assay.evaluation.manifest import finish, new_manifest
from assay.evaluation.preflight import check_data, check_model
from assay.evaluation.result import Evaluation
from assay.models import Model
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
        executor: where blocks run; None for this process.
        command: what reproduces the run, for its manifest.

    Returns:
        The result. After Ctrl-C the interruption is raised when nothing is stored, else the result so far is returned
        with ``complete`` False.

    Raises:
        DataError, ThreatError, ModelError: model, data and threat do not fit; raised before any attack.
        RunError: ``out`` cannot be written or holds another run.
    """
    if effort not in EFFORTS:
        raise UnknownNameError("an effort", repr(effort), closest(effort, [*EFFORTS]))
    if prove is not None:
        raise UnknownNameError("prove=None", repr(prove), "Certification is not part of this version yet.")
    model, data = _model(model), _data(data, limit)
    threat = Threat.parse(threat) if isinstance(threat, str) else threat
    if threat.targeted:
        raise ThreatError(
            "an untargeted threat to evaluate", "a targeted one", "Use an attack, or `assay attack --target`."
        )
    findings = check_data(data, model.domain)
    threat = threat.within(model.domain, int(np.prod(data.shape)))
    checked = check_model(model, data, threat, device)
    stages = _stages(effort, threat, checked.blind)
    manifest = new_manifest(model, checked, data, threat, effort, stages, seed, device, command)
    run = Run.start(out if out is not None else mkdtemp(prefix="assay-"), manifest, resume=resume)
    job = Job(checked.model, data, threat, stages, seed, device)
    try:
        with _shown(progress) as show:
            complete = _work(run, job, batch_size or BLOCK, show, executor or serial)
        result = Evaluation(run, passing=out is None)
        finish(run, result, [*findings, *checked.findings], checked, complete=complete)
    finally:
        run.close()
    return result


def _model(model: Any) -> Model:
    if isinstance(model, str | Path):
        return load_model(model)
    return model if isinstance(model, Model) else Model(model)


def _data(data: Any, limit: int | None) -> Data:
    if limit is not None and limit < 1:
        raise UnknownNameError("a limit of at least 1", str(limit), "Leave it out to use all samples.")
    loaded = load_data(data, limit=limit)
    loaded.check()
    return loaded


def _stages(effort: str, threat: Threat, blind: float) -> tuple[Stage, ...]:
    stages = stages_for(effort, threat.norm.name, blind)
    if threat.eps is not None:
        return stages
    return tuple(Stage(f"{s.name}-bisect", Bisect(s.attack)) for s in stages[:2])


@contextlib.contextmanager
def _shown(progress: bool | Progress) -> Iterator[Progress]:
    if callable(progress):
        yield progress
    elif progress:
        with live_progress(Console(stderr=True)) as show:
            yield show
    else:
        yield silent


def _work(run: Run, job: Job, block: int, show: Progress, executor: Executor) -> bool:
    """Attack every sample that is not stored yet; return whether all are."""
    done = run.done()
    rest = [i for i in range(len(job.data)) if i not in done]
    blocks = [rest[i : i + block] for i in range(0, len(rest), block)]
    watch = _Watch.of(run, len(job.data), show)
    try:
        with job.model.frozen(job.device) as live:
            torch.manual_seed(job.seed)
            for part in executor(lambda rows: attack_block(job, live, rows, watch.tell), blocks):
                run.add(part.rows, part.adversarials, part.tally)
                watch.stored(part)
    except KeyboardInterrupt:
        if not watch.done:
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

    @classmethod
    def of(cls, run: Run, total: int, show: Progress) -> "_Watch":
        watch = cls(show, total)
        watch._add(run.samples().column("status").to_pylist())
        return watch

    def _add(self, states: list[str]) -> None:
        self.done += len(states)
        self.right += sum(s != "misclassified" for s in states)
        self.fooled += sum(s == "fooled" for s in states)

    def stored(self, part: Part) -> None:
        self._add(part.rows["status"])
        self.tell("store", 0)

    def tell(self, stage: str, passes: int) -> None:
        self.passes += passes
        seconds = time.perf_counter() - self.begin
        self.show(Snapshot(self.total, self.done, self.right, self.fooled, stage, self.passes, seconds))
