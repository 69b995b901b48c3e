"""One block of samples: the clean pass, the cascade, verification, and what is written down."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from assay.attacks import LOSSES, Outcome
from assay.attacks.attack import verify
from assay.attacks.combine import attack_rest
from assay.core.random import Draws
from assay.core.types import Inputs, Labels, Mask, choose, per_sample
from assay.data import Data
from assay.evaluation.efforts import Stage
from assay.models import Door, Live, Model
from assay.threats import Goal, Problem, Threat
from assay.threats.problem import exact_size

SHRINK_PASSES = 6
"""Halvings of the way from the clean input to an adversarial one, to find a smaller one."""


@final
@dataclass(frozen=True, slots=True)
class Job:
    """What a block needs besides its samples; can be sent to another process."""

    model: Model
    data: Data
    threat: Threat
    stages: tuple[Stage, ...]
    seed: int
    device: torch.device | str | None


@final
@dataclass(frozen=True, slots=True)
class Part:
    """What came of one block, ready to be stored."""

    rows: dict[str, list[Any]]
    adversarials: dict[str, np.ndarray]
    tally: dict[str, Any]


Tell: TypeAlias = Callable[[str, int], None]
"""Is told, after each question to the model, the stage and the number of passes."""


def ignore(stage: str, passes: int) -> None:
    """Tell nobody."""


def run_block(job: Job, rows: list[int], tell: Tell = ignore) -> Part:
    """Attack the samples ``rows`` of the job's data: all that one call of an executor does."""
    with job.model.frozen(job.device) as live:
        # The draws of attacks belong to samples; those of a model that is random can only belong to a block.
        torch.manual_seed(hash((job.seed, rows[0])) % 2**63)
        return _attack_block(job, live, rows, tell)


def _attack_block(job: Job, live: Live, rows: list[int], tell: Tell) -> Part:
    """Run the cascade on some samples, verify every success, shrink it, and write down what was found."""
    index = torch.tensor(rows)
    x, y = job.data.batch(index).to(live.device), job.data.labels[index].to(live.device)
    clock = _Clock(live, index, tell)
    door = clock.door
    truth = Problem.pose(x, y, job.threat, Draws.of(job.seed, index.to(live.device)))
    # Attacks get a copy of their own: what they do to it must not decide whether they succeeded.
    p = Problem.pose(x.clone(), y.clone(), job.threat, truth.draws)
    with clock.stage("clean", len(p)) as stage:
        z = door.logits(x, p.rows)
        wrong = p.goal.reached(z)
        stage["broken"] = int(wrong.sum())
    truth, p = replace(truth, clean_logits=z), replace(p, clean_logits=z)
    out = replace(Outcome.nothing(p), success=wrong)
    for number, part in enumerate(job.stages):
        if not out.success.all():
            out = _attack_stage(clock, truth, p, out, number, part)
    return _write_down(job, clock, truth, out, wrong, index)


def _attack_stage(clock: "_Clock", truth: Problem, p: Problem, out: Outcome, number: int, part: Stage) -> Outcome:
    """Run one stage on what is standing; only claims that verification confirms count as fallen."""
    with clock.stage(part.name, int((~out.success).sum())) as stage:
        new = attack_rest(part.attack, clock.door, p, out, number)
        fresh = new.success & ~out.success
        holds, x, _ = verify(clock.door, truth, replace(new, success=fresh))
        stage["broken"] = int(holds.sum())
        clock.claimed += int(fresh.sum())
        clock.rejected += int(fresh.sum() - holds.sum())
        return Outcome(x, out.success | holds, torch.where(holds, number, out.by))


class _Clock:
    """The door of a block, and what each stage asked of it."""

    def __init__(self, live: Live, index: Labels, tell: Tell) -> None:
        self.name = ""
        self.door = Door(live, len(index), lambda passes: tell(self.name, passes), index)
        self.stages: list[dict[str, Any]] = []
        self.claimed = self.rejected = 0

    @contextlib.contextmanager
    def stage(self, name: str, entered: int) -> Iterator[dict[str, Any]]:
        self.name = name
        before, begin = (self.door.forwards.sum(), self.door.backwards.sum()), time.perf_counter()
        row: dict[str, Any] = {"name": name, "entered": entered, "broken": 0}
        self.stages.append(row)
        yield row
        row["forwards"] = int(self.door.forwards.sum() - before[0])
        row["backwards"] = int(self.door.backwards.sum() - before[1])
        row["seconds"] = time.perf_counter() - begin


def _write_down(job: Job, clock: _Clock, p: Problem, out: Outcome, wrong: Mask, index: Labels) -> Part:
    door, fooled = clock.door, out.success & ~wrong
    at = fooled.nonzero()[:, 0]
    q, x, label = p.take(at), out.x[at], p.goal.label
    assert label is not None
    assert p.clean_logits is not None
    with clock.stage("shrink", len(at)):
        images = len(at) and x.ndim == 4
        survive = _after_rounding(door, q, x) if images else len(at)
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
        "index": index.to(at.device)[at],
        "x": x,
        "clean": q.x0,
        "label": label[at],
        "prediction": z.argmax(1),
        "clean_confidence": clean[at].softmax(1).amax(1).float(),
        "confidence": z.softmax(1).amax(1).float(),
    }
    tally = {
        "stages": clock.stages,
        "claimed": clock.claimed,
        "rejected": clock.rejected,
        "survive_8bit": survive,
        "seconds": sum(s["seconds"] for s in clock.stages),
    }
    return Part(rows, {k: v.cpu().numpy() for k, v in arrays.items()}, tally)


def _shrink(door: Door, p: Problem, x: Inputs) -> tuple[Inputs, Tensor]:
    """Halve the way from the clean inputs to verified adversarial ones x; return the smallest that fool, and logits.

    Each accepted point is the stored one, asked about in a fresh pass; so the result is as verified as x was.
    """
    best, z = x, door.logits(x, p.rows)
    near, far = p.full(0.0), p.full(1.0)
    for _ in range(SHRINK_PASSES):
        middle = (near + far) / 2
        point = p.snap((p.x0 + per_sample(middle, x) * (x - p.x0)).clamp(p.lower, p.upper))
        logits = door.logits(point, p.rows)
        holds = p.goal.clearly_reached(logits) & p.allows(point)
        best, z = choose(holds, point, best), choose(holds, logits, z)
        near, far = torch.where(holds, near, middle), torch.where(holds, middle, far)
    return best, z


def _after_rounding(door: Door, p: Problem, x: Inputs) -> int:
    """Count the adversarial inputs that still fool when saved as 8-bit images."""
    lo, width = p.box.lo, p.box.width
    levels = ((x - lo) / width * 255).round() / 255 * width + lo
    return int(p.goal.reached(door.logits(levels, p.rows)).sum())
