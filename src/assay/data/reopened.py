"""Samples of files that cannot be sent to another process, or not to another machine: there they are opened anew."""

import hashlib
from collections.abc import Iterator
from typing import final

from torch import Tensor

from assay.core.errors import DataError
from assay.core.types import Labels, Rows
from assay.data.data import Data, Samples
from assay.data.fit import Fit


def reopening(data: Data, source: str, limit: int | None, *, trust_pickle: bool) -> Data:
    """Return data that were loaded from ``source``, so that they can be sent: as that text."""
    recipe = source, limit, trust_pickle, _mark(data.labels)
    return data._with(_Reopened(data._samples, recipe), data.labels)


@final
class _Reopened:
    """Samples as they are; pickled, only where they come from is written, and what was done to them since.

    ``recipe`` is what was asked for, and a digest of the labels: what is opened elsewhere must be the same.
    """

    def __init__(
        self, samples: Samples, recipe: tuple[str, int | None, bool, str], n: int | None = None, fit: Fit | None = None
    ) -> None:
        self._samples, self._recipe, self._n, self._fit = samples, recipe, n, fit

    @property
    def shape(self) -> tuple[int, ...]:
        return self._samples.shape

    def __len__(self) -> int:
        return len(self._samples)

    def stored(self, rows: Rows) -> Tensor:
        return self._samples.stored(rows)

    def head(self, n: int) -> "_Reopened":
        return _Reopened(self._samples.head(n), self._recipe, n, self._fit)

    def fitted(self, fit: Fit) -> "_Reopened":
        return _Reopened(self._samples.fitted(fit), self._recipe, self._n, fit)

    def contents(self) -> Iterator[bytes]:
        return self._samples.contents()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, (self._recipe, self._n, self._fit)


def _reopened(recipe: tuple[str, int | None, bool, str], n: int | None, fit: Fit | None) -> Samples:
    from assay.data.load import opened

    source, limit, trust_pickle, mark = recipe
    data = opened(source, limit, trust_pickle=trust_pickle)
    if _mark(data.labels) != mark:
        raise DataError(
            f"{source} to be the same for every worker", "other labels", "Put it where all machines see the same."
        )
    samples = data._samples
    samples = samples if n is None else samples.head(n)
    return samples if fit is None else samples.fitted(fit)


def _mark(labels: Labels) -> str:
    return hashlib.sha256(labels.numpy().tobytes()).hexdigest()
