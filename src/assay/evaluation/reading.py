"""Reading every sample once before anything is attacked: here, or where the work is shared for large data."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray

from assay.core.errors import DataError
from assay.core.executor import Executor, serial
from assay.data import Data
from assay.evaluation.finding import Finding
from assay.threats import Box
from assay.threats.threat import outside_box

SHARED_FROM: Final = 10**9
"""Values from which on it pays to start workers for it: so much does not stay in memory, and is read image by image."""

_AT_ONCE: Final = 256
"""Samples."""


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """What there is to say of some samples: their range, who is outside the box, and a digest (n,) of each."""

    low: float
    high: float
    outside: list[int]
    digests: NDArray[np.uint64]


def check_data(
    data: Data, box: Box, executor: Executor | None = None, tell: Callable[[], None] = lambda: None
) -> list[Finding]:
    """Read every sample once; with an executor, data of many values where it has its workers; tell of every block.

    Raises:
        DataError: no samples (``empty-data``), values outside the box (``input-outside-box``) or not finite
            (``non-finite-input``), or a sample that cannot be read.
    """
    if not len(data):
        raise DataError(
            "at least one sample", f"none in {data.source}", "Check the path and --limit.", code="empty-data"
        )
    far = executor is not None and len(data) * math.prod(data.shape) >= SHARED_FROM
    blocks = (rows.tolist() for rows in torch.split(torch.arange(len(data)), _AT_ONCE))
    seen = []
    for part in (executor if far and executor else serial)(partial(read, data, box), blocks):
        seen.append(part)
        tell()
    if outside := sorted(i for s in seen for i in s.outside):
        span = min(s.low for s in seen), max(s.high for s in seen)
        raise outside_box(box, span, outside, len(data), f" in {data.source}")
    different = len(np.unique(np.concatenate([s.digests for s in seen])))
    return [*_duplicates(len(data) - different, len(data))]


def read(data: Data, box: Box, rows: list[int]) -> Seen:
    """Look at the samples ``rows``.

    Raises:
        DataError: one cannot be read, or is not finite (``non-finite-input``).
    """
    x = data.batch(rows)
    bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero()[:, 0].tolist()
    if bad:
        raise DataError(
            "finite inputs",
            f"NaN or infinity in {len(bad)} samples (first: sample {rows[bad[0]]})",
            "Repair or remove these samples.",
            code="non-finite-input",
        )
    outside = ((x < box.lo) | (x > box.hi)).flatten(1).any(1).nonzero()[:, 0].tolist()
    marks = [hashlib.blake2b(row.numpy().tobytes(), digest_size=8).digest() for row in x]
    digests = np.frombuffer(b"".join(marks), dtype=np.uint64)
    return Seen(float(x.min()), float(x.max()), [rows[i] for i in outside], digests)


def _duplicates(twice: int, n: int) -> Iterator[Finding]:
    if twice:
        yield Finding(
            "duplicate-samples",
            "warning",
            f"{twice} of {n} samples are exact copies of another one.",
            {"duplicates": twice, "n": n},
            "Remove them: intervals count each sample as independent.",
        )
