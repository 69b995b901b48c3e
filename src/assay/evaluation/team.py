"""Blocks that race at the same time, so that the few survivors of each fill the calls of the network together."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Final

from assay.core.executor import Executor, serial
from assay.core.together import together
from assay.evaluation.block import Desk, Job, Part
from assay.evaluation.course import Course
from assay.models.line import Line

_MOST: Final = 8
"""Blocks at a time. From here on calls are full, and results would come late."""

_VALUES: Final = 2**26
"""Input values of all of them: what each keeps of its samples is a few times as much."""


def team_for(job: Job, course: Course) -> Executor:
    """Return what does the blocks of a job in this process: several at a time, where that is possible.

    It is not where nothing is attacked; where the network is random, whose draws can only belong to a block; where
    samples are proven, for a proof does not ask, and would keep the others waiting; and where the run may stop after
    any block.
    """
    random = max(job.model.samples, job.model.deciding) > 1
    alone = not job.plan.rounds or random or job.proof is not None or course.width is not None
    most = min(_MOST, _VALUES // (course.block * math.prod(job.data.shape)), math.ceil(len(job.data) / course.block))
    return serial if alone or most < 2 else partial(_side_by_side, job, most)  # type: ignore[return-value]


def _side_by_side(job: Job, most: int, work: Any, blocks: Iterable[list[int]]) -> Iterator[Part]:
    """Do blocks, ``most`` at a time; the questions of all of them are answered in calls of up to a full batch."""
    with job.model.frozen(job.device) as live:
        works = (partial(_seated, work, rows, live) for rows in blocks)
        yield from together(works, Line(live).answers, most)


def _seated(work: Any, rows: list[int], live: Any, seat: Any) -> Part:
    part: Part = work(rows, desk=Desk(live, seat))
    return part
