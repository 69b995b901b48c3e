"""What every source becomes: labels, and inputs that are handed out by position."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from assay.core.errors import DataError
from assay.core.levels import at_level
from assay.core.types import Inputs, Labels, Rows
from assay.data.fit import Fit

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

    def fitted(self, fit: Fit) -> "Samples":
        """Return the samples in the size of a fit; those that are in that size stay as they are."""

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
        self._fit: Fit | None = None
        self._fingerprint: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample: images have (c, h, w).

        Raises:
            DataError: the images have different sizes, and nothing says to which they are to be fitted.
        """
        return self._samples.shape

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        try:
            return f"Data({self.name!r}, {len(self)} samples of shape {self.shape})"
        except DataError:
            return f"Data({self.name!r}, {len(self)} samples of different sizes)"

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
        same = self._with(self._samples, self.labels)
        same._range, same._fingerprint = (lo, hi), self._fingerprint
        return same

    def fitted(self, fit: Fit | None) -> "Data":
        """Return the same data, its 8-bit images in the size of a fit; None, or a second fit, changes nothing.

        So a size that was asked for when the data were loaded stands, whatever a model would have them fitted to.

        Raises:
            DataError: float samples of another size: their values are nobody's to change.
        """
        if fit is None or self._fit is not None:
            return self
        same = self._with(self._samples.fitted(fit), self.labels)
        same._fit = fit
        return same

    def head(self, n: int) -> "Data":
        """Return the first n samples (all, if there are no more); arrays are not copied.

        Raises:
            DataError: n is below 1 (``empty-data``).
        """
        if n < 1:
            raise DataError("a limit of at least 1", f"{n}", "Leave it out to take all samples.", code="empty-data")
        return self if n >= len(self) else self._with(self._samples.head(n), self.labels[:n])

    def take(self, rows: Rows | Sequence[int]) -> "Data":
        """Return the samples at positions ``rows`` (b,), decoded and in memory.

        Raises:
            DataError: see :meth:`batch`; no rows (``empty-data``).
        """
        at = torch.as_tensor(rows, dtype=torch.int64)
        values = [self._samples.stored(part) for part in torch.split(at, 256)] if len(at) else [torch.empty(0)]
        return self._with(Arrays(torch.cat(values)), self.labels[at])

    def _with(self, samples: Samples, labels: Labels) -> "Data":
        """Return other samples of the same data."""
        other = Data(samples, labels, name=self.name, source=self.source, class_names=self.class_names)
        other._range, other._fit = self._range, self._fit
        return other

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
        """Return the SHA-256 in hex of labels and samples as they are kept (image files: as encoded, with the fit)."""
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

    def fitted(self, fit: Fit) -> Samples:
        size, channels = (fit.height, fit.width), self.shape[:1]
        right = self.shape[1:] == size
        if self._values.dtype == torch.uint8 and channels in ((1,), (3,)):
            return self if right and (fit.channels,) in ((0,), channels) else _Resized(self, fit)
        if right or self.shape[:2] == size or len(self.shape) != 3:
            return self  # of other channels, channels last, or no images: whether that fits is for the model to say
        own = self.shape[1] if self.shape[1] == self.shape[2] else self.shape[1:]
        raise DataError(
            f"images of the size that the model takes, {fit.height} x {fit.width} (height x width)",
            f"{self._values.dtype} samples of shape {self.shape}",
            "Resize them, or give 8-bit images, which are resized. If the model takes the size that they have: "
            f"--size, in Python load_data(..., size={own}).",
        )

    def contents(self) -> Iterator[bytes]:
        yield str(self._values.dtype).encode()
        each = max(1, self._values[:1].numel() * self._values.element_size())
        for part in torch.split(self._values, max(1, _CHUNK // each)):
            yield part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@final
class _Resized:
    """8-bit images (c, h, w) in memory, c = 1 or 3, that get another size when they are asked for."""

    def __init__(self, images: Arrays, fit: Fit) -> None:
        self._images, self._fit = images, fit
        self.shape = (fit.channels or images.shape[0], fit.height, fit.width)

    def __len__(self) -> int:
        return len(self._images)

    def stored(self, rows: Rows) -> Tensor:
        pictures = (self._fit(picture(image)) for image in self._images.stored(rows))
        values = [planes(p) for p in pictures]
        return torch.stack(values) if values else torch.empty((0, *self.shape), dtype=torch.uint8)

    def head(self, n: int) -> "_Resized":
        return _Resized(self._images.head(n), self._fit)

    def fitted(self, fit: Fit) -> Samples:
        return _Resized(self._images, fit)

    def contents(self) -> Iterator[bytes]:
        yield repr(self._fit).encode()
        yield from self._images.contents()


def picture(image: Tensor) -> Image.Image:
    """Return uint8 (1, h, w) or (3, h, w) as a grey or coloured image."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy())


def planes(image: Image.Image) -> Tensor:
    """Return a grey (``L``) or coloured (``RGB``) image as uint8 (1, h, w) or (3, h, w)."""
    a = np.array(image)
    return torch.from_numpy(a).view(*a.shape[:2], -1).permute(2, 0, 1)
