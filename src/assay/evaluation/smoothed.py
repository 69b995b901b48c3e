"""A run of randomized smoothing: what is proven about the smoothed classifier, kept like any other run."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from assay.certification import Smoothed
from assay.core.errors import ThreatError
from assay.core.executor import Executor, device_of
from assay.core.progress import Progress, Snapshot
from assay.data import load_data
from assay.evaluation.block import Job, Part, Tell, ignore
from assay.evaluation.course import Course
from assay.evaluation.engine import carry_out
from assay.evaluation.manifest import new_manifest
from assay.evaluation.preflight import check_labels
from assay.evaluation.race import Plan
from assay.evaluation.reading import check_data
from assay.evaluation.result import Evaluation
from assay.models import Door, Model
from assay.models.fingerprint import fingerprint
from assay.models.line import default_batch
from assay.runs.schema import UNATTACKED
from assay.threats import Threat


def certify_smoothed(
    smoothed: Smoothed,
    data: Any,
    threat: Threat,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    limit: int | None = None,
    progress: bool | Progress = True,
    command: str | None = None,
    executor: Executor | None = None,
) -> Evaluation:
    """Certify the smoothed classifier on every sample, and keep it in a run; see :meth:`Smoothed.certify`.

    In the table ``prediction`` is that of the smoothed classifier, -1 where it abstains, which counts as wrong;
    ``lower`` is the proven radius, and ``margin`` how far the proven share of votes is from one half, negative where
    they are for a wrong class.

    Raises:
        ThreatError: a norm that the noise proves nothing in.
        DataError, ModelError, UsageError, RunError: as of :meth:`Smoothed.certify` and :func:`assay.evaluate`.
    """
    model, course = smoothed.base, Course()
    if threat.norm.name != smoothed.law.norm:
        found = f"{threat.norm.name} with {smoothed.noise} noise"
        raise ThreatError(f"a threat in {smoothed.law.norm}", found, "Gaussian noise is for l2, uniform for l1.")
    data, mark = load_data(data, limit=limit), fingerprint(model)
    data = model.takes(data)
    findings = check_data(data, model.domain, executor)
    threat = threat.within(model.domain, math.prod(data.shape))
    classes = _classes(model, data.batch([0]), device)
    check_labels(data, classes)
    place = device_of(executor, device)
    job = Job(model, data, threat, Plan(()), seed, place, batch_size or default_batch(data.shape, place))
    manifest = new_manifest(job, course, mark, UNATTACKED, classes, findings, command)
    noise = {"noise": smoothed.noise, "sigma": smoothed.sigma, "kept": smoothed.kept, "null": smoothed.null}
    draws = {"n0": n0, "n": n, "alpha": alpha}
    manifest["identity"]["prove"] = {"method": "smoothing", **noise, **draws}
    manifest["model"]["name"] = f"{model.name}, smoothed"
    work = partial(smooth_block, job, smoothed, draws)
    return carry_out(job, course, manifest, work, out, resume=resume, progress=progress, executor=executor)


def smooth_block(
    job: Job,
    smoothed: Smoothed,
    draws: dict[str, Any],
    rows: list[int],
    tell: Tell = ignore,
    journal: Path | None = None,
    **_: Any,
) -> Part:
    """Certify the samples ``rows``. The votes are kept in ``journal``, so that an interrupted block goes on."""
    index, begin = torch.tensor(rows), time.perf_counter()
    x, y, passes = job.data.batch(index), job.data.labels[index], 0

    def show(snapshot: Snapshot) -> None:
        nonlocal passes
        tell(f"smoothing, {snapshot.done} of {snapshot.total}", snapshot.passes - passes)
        passes = snapshot.passes

    how: dict[str, Any] = {"seed": job.seed, "batch_size": job.batch, "device": job.device, "indices": index}
    c = smoothed.certify(x, y, progress=show, journal=_votes(journal, rows[0]), **draws, **how)
    right = c.prediction == y
    ahead, each = torch.where(c.guess == y, 1.0, -1.0) * (c.share - 0.5), draws["n0"] + draws["n"]
    size = torch.where(right, torch.inf, 0.0).tolist()
    nothing: list[Any] = [None] * len(rows)
    columns: dict[str, list[Any]] = {
        "index": rows,
        "label": y.tolist(),
        "prediction": c.prediction.tolist(),
        "margin": ahead.tolist(),
        "fooled": [False] * len(rows),
        "adversarial_prediction": nothing,
        "size": size,
        "broken_by": nothing,
        "certified": nothing if job.threat.eps is None else c.certified(job.threat.eps).tolist(),
        "lower": c.lower.tolist(),
        "upper": size,
        "forwards": [each] * len(rows),  # also of an interrupted block, whose votes are not asked for again
        "backwards": [0] * len(rows),
        "status": ["robust" if r else "misclassified" for r in right.tolist()],
    }
    counts = {"entered": len(rows), "broken": int((~right).sum()), "proven": int((c.lower > 0).sum())}
    seconds = time.perf_counter() - begin
    cost = {"forwards": each * len(rows), "backwards": 0, "seconds": seconds}
    stage = {"name": "smoothing", "kind": "proof", **counts, **cost}
    told = dict.fromkeys(("claimed", "rejected", "survive_8bit"), 0)
    return Part(columns, {}, {"stages": [stage], **told, "audit": None, "bounded": None, "seconds": seconds})


def _votes(journal: Path | None, first: int) -> Path | None:
    """Return the file for the votes of the block that begins with sample ``first``; remove those of other blocks."""
    if journal is None:
        return None
    journal.mkdir(exist_ok=True)
    mine = journal / f"votes-{first:08d}.npz"
    for other in set(journal.glob("votes-*.npz")) - {mine}:
        other.unlink(missing_ok=True)
    return mine


def _classes(model: Model, x: torch.Tensor, device: torch.device | str | None) -> int:
    with model.frozen(device) as live:
        return Door(live, len(x)).logits(x.to(live.device), torch.arange(len(x), device=live.device)).shape[1]
