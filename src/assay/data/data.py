"""What every source becomes: labels, and inputs that are handed out by position."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol, final

import torch
from torch import Tensor

from assay.core.errors import DataError
from assay.core.levels import at_level
from assay.core.types import Inputs, Labels, Rows

_CHUNK = 16 * 2**20
"""Bytes that are copied at a time for a fingerprint."""


class Samples(Protocol):
    """Inputs by position, in the precision they are kept in."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""

    def __len__(self) -> int: ...

    def stored(self, rows: Rows) -> Tensor:
        """Return samples ``rows`` (b,) as uint8 or floats (b, *shape), never an alias of what is kept."""

    def head(self, n: int) -> "Samples":
        """Return the first n samples."""

    def contents(self) -> Iterator[bytes]:
        """Yield, piece by piece, bytes that tell these samples from any others."""


@final
class Data:
    """Samples with their labels.

    Args:
        samples: where the inputs come from.
        labels: (n,) int64, the class of each sample.
        name: how reports call the data.
        source: where it came from, as the manifest records it.
        class_names: the names of classes 0, 1, ..., where they are known.

    Raises:
        DataError: no samples (``empty-data``), or not one label for each sample.
    """

    def __init__(
        self,
        samples: Samples,
        labels: Labels,
        *,
        name: str,
        source: str,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if len(samples) != len(labels):
            raise DataError(
                "one label for each sample",
                f"{len(samples)} samples and {len(labels)} labels in {source}",
                "Check that x and y belong together.",
            )
        if not len(labels):
            raise DataError("at least one sample", f"none in {source}", "Give data with samples.", code="empty-data")
        self.labels, self.name, self.source = labels, name, source
        self.class_names = None if class_names is None else tuple(class_names)
        self._samples = samples
        self._range = (0.0, 1.0)
        self._fingerprint: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample: images have (c, h, w)."""
        return self._samples.shape

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Data({self.name!r}, {len(self)} samples of shape {self.shape})"

    def batch(self, rows: Rows | Sequence[int]) -> Inputs:
        """Return the samples at positions ``rows`` (b,) as float32 (b, *shape); 8-bit values are spread over [0, 1].

        Raises:
            DataError: a sample cannot be decoded, or does not have the shape of the others.
        """
        x = self._samples.stored(torch.as_tensor(rows, dtype=torch.int64))
        if x.dtype != torch.uint8:
            return x.float()
        return at_level(x.float(), *self._range)

    def batches(self, size: int = 256) -> Iterator[tuple[Inputs, Labels]]:
        """Yield (x, y) in order: x (b, *shape) float32, y (b,) int64, b = size but for the last batch."""
        for rows in torch.split(torch.arange(len(self)), size):
            yield self.batch(rows), self.labels[rows]

    def __iter__(self) -> Iterator[tuple[Inputs, Labels]]:
        return self.batches()

    def scaled(self, lo: float, hi: float) -> "Data":
        """Return the same data with 8-bit values spread over [lo, hi]; floats stay what they are."""
        same = Data(self._samples, self.labels, name=self.name, source=self.source, class_names=self.class_names)
        same._range, same._fingerprint = (lo, hi), self._fingerprint
        return same

    def head(self, n: int) -> "Data":
        """Return the first n samples (all, if there are no more); arrays are not copied.

        Raises:
            DataError: n is below 1 (``empty-data``).
        """
        if n < 1:
            raise DataError("a limit of at least 1", f"{n}", "Leave it out to take all samples.", code="empty-data")
        if n >= len(self):
            return self
        samples, labels = self._samples.head(n), self.labels[:n]
        first = Data(samples, labels, name=self.name, source=self.source, class_names=self.class_names)
        return first.scaled(*self._range)

    def take(self, rows: Rows | Sequence[int]) -> "Data":
        """Return the samples at positions ``rows`` (b,), decoded and in memory.

        Raises:
            DataError: see :meth:`batch`; no rows (``empty-data``).
        """
        at = torch.as_tensor(rows, dtype=torch.int64)
        values = [self._samples.stored(part) for part in torch.split(at, 256)] if len(at) else [torch.empty(0)]
        some = Arrays(torch.cat(values)), self.labels[at]
        return Data(*some, name=self.name, source=self.source, class_names=self.class_names).scaled(*self._range)

    def held(self, most: int = 4 * 2**30) -> "Data":
        """Return the data decoded and in memory, where that takes no more than ``most`` bytes; else as it is."""
        if isinstance(self._samples, Arrays):
            return self
        one = self._samples.stored(torch.tensor([0]))
        if one.numel() * one.element_size() * len(self) > most:
            return self
        kept = self.take(torch.arange(len(self)))
        kept._fingerprint = self._fingerprint
        return kept

    def check(self) -> None:
        """Read and decode every sample once, so that no later batch can fail.

        Raises:
            DataError: a sample, which is named, cannot be decoded, or does not have the shape of the others.
        """
        for row in range(len(self)):
            self._samples.stored(torch.tensor([row]))

    def fingerprint(self) -> str:
        """Return the SHA-256 in hex of labels and samples as they are kept (image files: as encoded)."""
        if self._fingerprint is None:
            digest = hashlib.sha256(f"{len(self)} {self.shape}".encode())
            digest.update(self.labels.numpy().tobytes())
            for piece in self._samples.contents():
                digest.update(piece)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


@final
class Arrays:
    """Samples that are in memory: ``values`` (n, *shape), uint8 or floats, kept as given."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self.shape = tuple(values.shape[1:])

    def __len__(self) -> int:
        return len(self._values)

    def stored(self, rows: Rows) -> Tensor:
        return self._values[rows.to(self._values.device)].cpu().contiguous()

    def head(self, n: int) -> "Arrays":
        return Arrays(self._values[:n])

    def contents(self) -> Iterator[bytes]:
        yield str(self._values.dtype).encode()
        each = max(1, self._values[:1].numel() * self._values.element_size())
        for part in torch.split(self._values, max(1, _CHUNK // each)):
            yield part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
