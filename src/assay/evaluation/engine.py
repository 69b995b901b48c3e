"""The evaluation engine: preflight, then block by block the clean pass, the cascade, verification, and the store."""

import contextlib
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, final

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from assay.attacks import LOSSES, Bisect, Outcome
from assay.attacks.attack import verify
from assay.attacks.combine import attack_rest
from assay.core.errors import ThreatError
from assay.core.executor import Executor, serial
from assay.core.progress import Progress, Snapshot, silent
from assay.core.random import Draws
from assay.core.registry import UnknownNameError, closest
from assay.core.types import Inputs, Labels, Mask, PerSample, choose, per_sample
from assay.data import Data, load_data
from assay.evaluation.efforts import EFFORTS, Stage, stages_for
from assay.evaluation.finding import Finding
from assay.evaluation.preflight import Preflight, check_accuracy, check_data, check_model
from assay.evaluation.result import Evaluation
from assay.models import Door, Live, Model
from assay.models.fingerprint import fingerprint
from assay.models.loaders import load_model
from assay.reports import live as live_progress
from assay.runs import Run
from assay.threats import Goal, Problem, Threat
from assay.threats.problem import exact_size

SHRINK_PASSES = 6
"""Halvings of the way from the clean input to an adversarial one, to find a smaller one."""

BLOCK = 128
"""Samples that are attacked, and stored, together by default."""

_TOLERANCE = (
    "Random numbers belong to samples, so batches, workers and interruptions change nothing but the rounding of float32 "
    "kernels. On a CPU full blocks of rows make that exact for the usual layers; elsewhere single samples near the "
    "boundary may differ."
)


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
        raise ThreatError("an untargeted threat to evaluate", "a targeted one", "Use an attack, or `assay attack --target`.")
    findings = check_data(data, model.domain)
    threat = threat.within(model.domain, int(np.prod(data.shape)))
    checked = check_model(model, data, threat, device)
    stages = _stages(effort, threat, checked.blind)
    manifest = _manifest(model, checked, data, threat, effort, stages, seed, device, command)
    run = Run.start(out if out is not None else mkdtemp(prefix="assay-"), manifest, resume=resume)
    job = _Job(checked.model, data, threat, stages, seed, device)
    try:
        with _shown(progress) as show:
            complete = _work(run, job, batch_size or BLOCK, show, executor or serial)
        result = Evaluation(run, passing=out is None)
        _finish(run, result, [*findings, *checked.findings], checked, complete=complete)
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


def _manifest(
    model: Model, checked: Preflight, data: Data, threat: Threat, effort: str, stages: tuple[Stage, ...], seed: int,
    device: torch.device | str | None, command: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the manifest of a run that has not begun. ``identity`` is what decides its numbers."""
    from assay import __version__

    now = datetime.now(UTC).isoformat(timespec="seconds")
    norm = {"box": [model.domain.lo, model.domain.hi], "mean": model.mean, "std": model.std}
    marks = {"model": fingerprint(model), "data": data.fingerprint()}
    module = model.module
    return {
        "assay": __version__,
        "complete": False,
        "created": now,
        "updated": now,
        "command": command,
        "identity": {
            "threat": threat.to_json(), "effort": effort, "stages": [s.to_json() for s in stages], "seed": seed,
            "prove": None, **marks,
        },
        "model": {
            "name": model.name, "fingerprint": marks["model"], "classes": checked.classes, **_plain(norm),
            "parameters": sum(p.numel() for p in module.parameters()) if module else None,
            "samples": checked.model.samples, "probabilities": checked.model.probabilities,
        },
        "data": {
            "name": data.name, "source": data.source, "fingerprint": marks["data"], "n": len(data),
            "shape": list(data.shape), "class_names": list(data.class_names) if data.class_names else None,
        },
        "machine": {
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "platform": f"{platform.system()} {platform.machine()}", "device": str(device or "as the model"),
            "threads": torch.get_num_threads(),
        },
        "tolerance": _TOLERANCE,
        "totals": None,
        "findings": [],
    }  # fmt: skip


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, Tensor | np.ndarray) else v for k, v in values.items()}


@final
@dataclass(frozen=True, slots=True)
class _Job:
    """What a block needs besides its samples; can be sent to another process."""

    model: Model
    data: Data
    threat: Threat
    stages: tuple[Stage, ...]
    seed: int
    device: torch.device | str | None


@final
@dataclass(frozen=True, slots=True)
class _Part:
    """What came of one block, ready to be stored."""

    rows: dict[str, list[Any]]
    adversarials: dict[str, np.ndarray]
    tally: dict[str, Any]


def _work(run: Run, job: _Job, block: int, show: Progress, executor: Executor) -> bool:
    """Attack every sample that is not stored yet; return whether all are."""
    done = run.done()
    rest = [i for i in range(len(job.data)) if i not in done]
    blocks = [rest[i : i + block] for i in range(0, len(rest), block)]
    watch = _Watch.of(run, len(job.data), show)
    try:
        with job.model.frozen(job.device) as live:
            torch.manual_seed(job.seed)
            for part in executor(lambda rows: _attack_block(job, live, rows, watch), blocks):
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
    stage: str = ""
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

    def stored(self, part: _Part) -> None:
        self._add(part.rows["status"])
        self.tell(0)

    def tell(self, passes: int) -> None:
        self.passes += passes
        seconds = time.perf_counter() - self.begin
        self.show(Snapshot(self.total, self.done, self.right, self.fooled, self.stage, self.passes, seconds))


def _attack_block(job: _Job, live: Live, rows: list[int], watch: _Watch) -> _Part:
    """Run the cascade on some samples, verify every success, shrink it, and write down what was found."""
    index = torch.tensor(rows)
    x, y = job.data.batch(index).to(live.device), job.data.labels[index].to(live.device)
    door = Door(live, len(x), watch.tell)
    clock = _Clock(door, watch)
    p = Problem.pose(x, y, job.threat, Draws.of(job.seed, index.to(live.device)))
    with clock.stage("clean", len(p)) as stage:
        z = door.logits(x, p.rows)
        wrong = p.goal.reached(z)
        stage["broken"] = int(wrong.sum())
    p = replace(p, clean_logits=z)
    out = replace(Outcome.nothing(p), success=wrong)
    for number, part in enumerate(job.stages):
        if not out.success.all():
            out = _attack_stage(door, clock, p, out, number, part)
    return _write_down(job, door, clock, p, out, wrong, index)


def _attack_stage(door: Door, clock: "_Clock", p: Problem, out: Outcome, number: int, part: Stage) -> Outcome:
    """Run one stage on what is standing; only claims that verification confirms count as fallen."""
    with clock.stage(part.name, int((~out.success).sum())) as stage:
        new = attack_rest(part.attack, door, p, out, number)
        fresh = new.success & ~out.success
        holds, x, _ = verify(door, p, replace(new, success=fresh))
        stage["broken"] = int(holds.sum())
        clock.claimed += int(fresh.sum())
        clock.rejected += int(fresh.sum() - holds.sum())
        return Outcome(x, out.success | holds, torch.where(holds, number, out.by))


class _Clock:
    """What each stage of a block cost."""

    def __init__(self, door: Door, watch: _Watch) -> None:
        self.door, self.watch = door, watch
        self.stages: list[dict[str, Any]] = []
        self.claimed = self.rejected = 0

    @contextlib.contextmanager
    def stage(self, name: str, entered: int) -> Iterator[dict[str, Any]]:
        self.watch.stage = name
        before, begin = (self.door.forwards.sum(), self.door.backwards.sum()), time.perf_counter()
        row: dict[str, Any] = {"name": name, "entered": entered, "broken": 0}
        self.stages.append(row)
        yield row
        row["forwards"] = int(self.door.forwards.sum() - before[0])
        row["backwards"] = int(self.door.backwards.sum() - before[1])
        row["seconds"] = time.perf_counter() - begin


def _write_down(
    job: _Job, door: Door, clock: _Clock, p: Problem, out: Outcome, wrong: Mask, index: Labels
) -> _Part:
    fooled = out.success & ~wrong
    at = fooled.nonzero()[:, 0]
    q, x, label = p.take(at), out.x[at], p.goal.label
    assert label is not None
    assert p.clean_logits is not None
    with clock.stage("shrink", len(at)):
        survive = _after_rounding(door, q, x) if len(at) else 0
        x, z = _shrink(door, q, x) if len(at) else (x, p.clean_logits[:0])
    sizes = torch.full(wrong.shape, torch.inf, dtype=torch.float64, device=x.device)
    sizes[wrong] = 0.0
    sizes[at] = exact_size(p.norm, x, q.x0).double()
    after = torch.full_like(label, -1).index_copy(0, at, z.argmax(1))
    clean = p.clean_logits
    rows = {
        "index": index.tolist(),
        "label": label.tolist(),
        "prediction": clean.argmax(1).tolist(),
        "margin": (-LOSSES["margin"](clean, Goal(label))).double().tolist(),
        "fooled": fooled.tolist(),
        "adversarial_prediction": [a if a >= 0 else None for a in after.tolist()],
        "size": sizes.tolist(),
        "broken_by": [job.stages[b].name if b >= 0 else None for b in out.by.tolist()],
        "certified": [None] * len(index),
        "lower": [0.0] * len(index),
        "upper": sizes.tolist(),
        "forwards": door.forwards.tolist(),
        "backwards": door.backwards.tolist(),
        "status": [
            "misclassified" if w else "fooled" if f else "robust"
            for w, f in zip(wrong.tolist(), fooled.tolist(), strict=True)
        ],
    }
    arrays = {
        "index": index.to(at.device)[at], "x": x, "clean": q.x0, "label": label[at], "prediction": z.argmax(1),
        "clean_confidence": clean[at].softmax(1).amax(1).float(), "confidence": z.softmax(1).amax(1).float(),
    }  # fmt: skip
    tally = {
        "stages": clock.stages, "claimed": clock.claimed, "rejected": clock.rejected, "survive_8bit": survive,
        "seconds": sum(s["seconds"] for s in clock.stages),
    }  # fmt: skip
    return _Part(rows, {k: v.cpu().numpy() for k, v in arrays.items()}, tally)


def _shrink(door: Door, p: Problem, x: Inputs) -> tuple[Inputs, Tensor]:
    """Halve the way from the clean inputs to verified adversarial ones x; return the smallest that fool, and logits.

    Each accepted point is the stored one, asked about in a fresh pass; so the result is as verified as x was.
    """
    best, z = x, door.logits(x, p.rows)
    near, far = p.full(0.0), p.full(1.0)
    for _ in range(SHRINK_PASSES):
        middle = (near + far) / 2
        point = (p.x0 + per_sample(middle, x) * (x - p.x0)).clamp(p.lower, p.upper)
        logits = door.logits(point, p.rows)
        holds = _clearly(p, logits)
        best, z = choose(holds, point, best), choose(holds, logits, z)
        near, far = torch.where(holds, near, middle), torch.where(holds, middle, far)
    return best, z


def _clearly(p: Problem, logits: Tensor) -> Mask:
    """Tell which points fool by more than rounding: another machine, or another batch, must see the same."""
    gap: PerSample = LOSSES["margin"](logits, p.goal)
    return gap > 1e-4 * logits.abs().amax(1)


def _after_rounding(door: Door, p: Problem, x: Inputs) -> int:
    """Count the adversarial inputs that still fool when saved as 8-bit images."""
    lo, width = p.box.lo, p.box.width
    levels = ((x - lo) / width * 255).round() / 255 * width + lo
    return int(p.goal.reached(door.logits(levels, p.rows)).sum())


def _finish(
    run: Run, result: Evaluation, findings: list[Finding], checked: Preflight, *, complete: bool
) -> None:
    """Write what the whole run showed into its manifest."""
    totals = result.totals()
    right = result.n - sum(s == "misclassified" for s in result.samples["status"].to_pylist())
    findings += [*check_accuracy(right, result.n, checked.classes), *_after_work(totals)]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    run.save(complete=complete, updated=now, totals=totals, findings=[f.to_json() for f in findings])


def _after_work(totals: dict[str, Any]) -> Iterator[Finding]:
    """Report claims that failed verification, and adversarial inputs that 8-bit storage undoes."""
    if totals["rejected"]:
        yield Finding(
            "unverified-claims", "warning",
            f"{totals['rejected']} of {totals['claimed']} claimed successes did not hold in a fresh pass and do not count.",
            {"claimed": totals["claimed"], "rejected": totals["rejected"]},
            "Look for randomness or dependence on the batch in the model.",
        )  # fmt: skip
    fooled = totals["claimed"] - totals["rejected"]
    if totals["survive_8bit"] < fooled:
        yield Finding(
            "lost-at-8-bit", "info",
            f"{fooled - totals['survive_8bit']} of {fooled} adversarial inputs no longer fool when rounded to 8 bits, "
            "as an image file does. The figures hold for inputs of full precision.",
            {"fooled": fooled, "survive": totals["survive_8bit"]}, "Store adversarial inputs as floats (.npz).",
        )  # fmt: skip



