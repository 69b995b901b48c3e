"""Where batches come from: an order that depends on seed and epoch only, and samples that are decoded once."""

from dataclasses import dataclass
from typing import final

import torch

from assay.core.errors import DataError
from assay.core.random import Draws
from assay.core.types import Inputs, Labels, Rows
from assay.data import Data

_EXTRA = 0x45585452
"""The stream of random numbers that orders the second source."""


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """Samples to learn from: ``indices`` (b,) name them among all that are trained on."""

    x: Inputs
    y: Labels
    indices: Labels


@final
class Source:
    """Batches of one or two sources of data.

    An epoch goes once through the first source, without the few samples that fill no batch. ``extra_share`` of each
    batch comes from the second source, which is gone through at its own pace.

    Raises:
        DataError: fewer samples than one batch has, or two sources that do not fit together.
    """

    def __init__(self, data: Data, extra: Data | None, batch_size: int, extra_share: float, seed: int) -> None:
        self.data, self.extra, self.seed = data.held(), None if extra is None else extra.held(), seed
        self._others = 0 if extra is None else round(batch_size * extra_share)
        self._own = batch_size - self._others
        if self._own < 1 or (extra is not None and extra.shape != data.shape):
            found = (
                f"{self._own} of {batch_size} samples" if self._own < 1 else f"{data.shape}, {extra and extra.shape}"
            )
            raise DataError("a second source of samples of the same shape, and a part of each batch from the first",
                            found, "Lower extra_share, or give other data.")  # fmt: skip
        if len(data) < self._own:
            raise DataError(f"at least one batch, {self._own} samples, to train on", f"{len(data)}",
                            "Give more data, or a smaller batch_size.")  # fmt: skip
        self.steps = len(data) // self._own
        """Batches an epoch."""

    def order(self, epoch: int) -> Rows:
        """Return the order of the first source in an epoch."""
        return _shuffled(len(self.data), self.seed, epoch)

    def batch(self, order: Rows, epoch: int, step: int) -> Batch:
        """Return batch ``step`` of an epoch with this order."""
        rows = order[step * self._own : (step + 1) * self._own]
        x, y = self.data.batch(rows), self.data.labels[rows]
        if self.extra is None or not self._others:
            return Batch(x, y, rows)
        more = self._more(epoch * self.steps + step)
        parts = (x, self.extra.batch(more)), (y, self.extra.labels[more]), (rows, len(self.data) + more)
        return Batch(*(torch.cat(p) for p in parts))

    def _more(self, k: int) -> Rows:
        """Return the rows of the second source in batch k of the whole training; it may end in the middle of one."""
        assert self.extra is not None
        n, at = len(self.extra), torch.arange(k * self._others, (k + 1) * self._others)
        laps = range(int(at[0]) // n, int(at[-1]) // n + 1)
        return torch.cat([_shuffled(n, self.seed ^ _EXTRA, lap)[at[at // n == lap] % n] for lap in laps])

    def draws(self, indices: Labels, epoch: int) -> Draws:
        """Return the random numbers of samples in an epoch."""
        return Draws.of(self.seed, indices).fold(epoch)


def _shuffled(n: int, seed: int, lap: int) -> Rows:
    return Draws.of(seed, torch.arange(n)).fold(1 << 20).fold(lap).keys.argsort(stable=True)


def split_off(data: Data, share: float = 0.05, most: int = 2000) -> tuple[Data, Data]:
    """Return the data without, and with only, the last samples, for training and for validation.

    Raises:
        DataError: too few samples to have both.
    """
    n = min(most, round(len(data) * share))
    if n < 1:
        raise DataError("at least 10 samples, to hold some back for validation", f"{len(data)}", "Give valid=.")
    return data.head(len(data) - n), data.take(range(len(data) - n, len(data)))
