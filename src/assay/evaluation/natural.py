"""Natural robustness: how a model does when nobody is against it, but weather, camera and compression are."""

import time
from collections.abc import Sequence

import torch

from assay.core.errors import DataError
from assay.core.levels import at_level
from assay.core.optional import need
from assay.core.progress import Progress, Snapshot
from assay.core.types import Inputs
from assay.data.corruptions import PACKAGE, corrupted
from assay.evaluation.block import Job
from assay.models import Door
from assay.runs import Run
from assay.runs.natural import SEVERITIES, keep, kept


def check_corruptible(shape: Sequence[int]) -> None:
    """Refuse samples that cameras do not make.

    Raises:
        DataError: samples that are no images (c, h, w) with one or three channels.
        MissingExtraError: the package that makes the corruptions is not installed.
    """
    need(PACKAGE, "corruptions")
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise DataError(
            "images of shape (1, h, w) or (3, h, w) to corrupt",
            f"samples of shape {tuple(shape)}",
            "Leave the corruptions out: they are defined for images.",
        )


def look(run: Run, job: Job, names: Sequence[str], show: Progress) -> None:
    """Ask the model about every sample under each corruption at each severity; what is stored is not done again.

    Images are rounded to 8 bits first, as those that corruptions are made for. All samples count, also those that the
    model gets wrong without a corruption.

    Raises:
        RunError: it cannot be stored.
        MissingExtraError: the package that makes the corruptions is not installed.
        ModelOutputError, NonFiniteError: the model's answer to a corrupted image.
    """
    done = kept(run)
    for name in names:
        if name not in done:
            keep(run, name, _answers(job, name, show))


def _answers(job: Job, name: str, show: Progress) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {c: [] for c in ("index", "label", "severity", "prediction")}
    begin, passes, n = time.perf_counter(), 0, len(job.data)
    with job.model.frozen(job.device) as live:
        torch.manual_seed(job.seed)  # the draws of a model that is random
        for severity in SEVERITIES:
            stage = f"{name.replace('_', ' ')}, severity {severity}"
            for at in torch.split(torch.arange(n), job.batch):
                show(Snapshot(n, 0, 0, 0, stage, passes, time.perf_counter() - begin))
                x = _through(job, job.data.batch(at), at.tolist(), name, severity).to(live.device)
                told = Door(live, len(at), indices=at).logits(x, torch.arange(len(at), device=live.device))
                found = at, job.data.labels[at], torch.full_like(at, severity), told.argmax(1)
                for column, values in zip(rows, found, strict=True):
                    rows[column] += values.tolist()
                passes += len(at)
    return rows


def _through(job: Job, x: Inputs, indices: list[int], name: str, severity: int) -> Inputs:
    lo, hi = job.model.domain.lo, job.model.domain.hi
    levels = ((x - lo) / (hi - lo) * 255).round().clamp(0, 255).to(torch.uint8)
    made = corrupted(levels.numpy(), indices, name, severity, job.seed)
    return at_level(torch.from_numpy(made).float(), lo, hi)
