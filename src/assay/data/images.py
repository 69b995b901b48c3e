"""Encoded images, decoded when they are asked for; folders of them."""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import final

import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from assay.core.errors import DataError
from assay.core.types import Rows
from assay.data.data import Data, planes
from assay.data.fit import Fit

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"))

# Only these decoders, whatever the file's name says: Pillow would start Ghostscript for an EPS file.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
_GREY = ("1", "L", "LA")
_COLOUR = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV")
_PEEK = 64
"""Images whose headers are read to decide whether the set is grey or coloured."""
_KEEP = 10**9
"""Bytes up to which decoded images stay in memory."""


@final
@dataclass(frozen=True, slots=True)
class _Look:
    """What the headers of the first images say.

    Whether one is coloured; the size (width, height) of the first one; position and size of one that has another.
    """

    colour: bool
    size: tuple[int, int]
    odd: tuple[int, tuple[int, int]] | None = None


@final
class Images:
    """Encoded images, as (c, h, w): c = 1 if grey, 3 if coloured; alpha channels are dropped.

    If a coloured one is among the first images, all are coloured: grey ones are repeated over the channels. Without a
    fit, all must have the size of the first one.

    Args:
        read: from a position to the encoded bytes.
        where: from a position to what messages call this image.
        n: how many there are.
        fit: how they get one size.
        look: at the first images, if that was taken.

    Raises:
        DataError: one of the first images is damaged, or has more than 8 bits a channel.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        where: Callable[[int], str],
        n: int,
        fit: Fit | None = None,
        look: _Look | None = None,
    ) -> None:
        self._read, self._where, self._n, self._fit = read, where, n, fit
        self._look = look or self._peek()
        self._kept: Tensor | None = None
        self._have = torch.zeros(n, dtype=torch.bool)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one decoded image.

        Raises:
            DataError: they have different sizes, and there is no fit.
        """
        channels = 3 if self._look.colour else 1
        if self._fit is not None:
            return self._fit.channels or channels, self._fit.height, self._fit.width
        if self._look.odd is not None:
            raise self._sizes(*self._look.odd)
        return channels, *self._look.size[::-1]

    def __len__(self) -> int:
        return self._n

    def stored(self, rows: Rows) -> Tensor:
        shape = self.shape
        if self._n * math.prod(shape) > _KEEP:
            out = torch.empty((len(rows), *shape), dtype=torch.uint8)
            for i, row in enumerate(rows.tolist()):
                out[i] = self._decode(row, shape[0])
            return out
        if self._kept is None:
            self._kept = torch.empty((self._n, *shape), dtype=torch.uint8)
        for row in rows[~self._have[rows]].tolist():
            self._kept[row] = self._decode(row, shape[0])
            self._have[row] = True
        return self._kept[rows]

    def head(self, n: int) -> "Images":
        odd = self._look.odd if self._look.odd and self._look.odd[0] < n else None
        return Images(self._read, self._where, n, self._fit, replace(self._look, odd=odd))

    def fitted(self, fit: Fit) -> "Images":
        return Images(self._read, self._where, self._n, fit, self._look)

    def contents(self) -> Iterator[bytes]:
        if self._fit is not None:
            yield repr(self._fit).encode()
        for row in range(self._n):
            encoded = self._read(row)
            yield len(encoded).to_bytes(8, "little")
            yield encoded

    def _peek(self) -> _Look:
        look = _Look(colour=False, size=(0, 0))
        for row in range(min(self._n, _PEEK)):
            with _opened(self._read(row), self._where(row)) as image:
                look = replace(look, colour=look.colour or is_colour(image, self._where(row)))
                if not row:
                    look = replace(look, size=image.size)
                elif look.odd is None and image.size != look.size:
                    look = replace(look, odd=(row, image.size))
        return look

    def _decode(self, row: int, channels: int) -> Tensor:
        with _opened(self._read(row), self._where(row)) as image:
            if self._fit is None and image.size != self._look.size:
                raise self._sizes(row, image.size)
            wanted = self._fit.channels if self._fit else 0
            if is_colour(image, self._where(row)) and channels == 1 and not wanted:
                raise DataError(
                    "grey images, as the first ones are",
                    f"a coloured one, {self._where(row)} (mode {image.mode})",
                    "Convert all images to grey, or all to RGB.",
                )
            converted = image.convert("RGB" if channels == 3 else "L")
            return planes(converted if self._fit is None else self._fit(converted))

    def _sizes(self, row: int, size: tuple[int, int]) -> DataError:
        width, height = self._look.size
        return DataError(
            f"images of one size, or the size that the model takes: {self._where(0)} is {width} x {height} "
            "(width x height)",
            f"{self._where(row)} with {size[0]} x {size[1]}",
            "Resize them by --size 224, in Python load_data(..., size=224), with the size that the model takes; "
            "models that know their size need nothing.",
        )


def is_colour(image: Image.Image, where: str) -> bool:
    """Return whether an image is coloured.

    Raises:
        DataError: it has more than 8 bits a channel.
    """
    if image.mode not in _GREY + _COLOUR:
        raise DataError("an image of 8 bits a channel", f"{where} of mode {image.mode}", "Convert it, or use .npz.")
    return image.mode in _COLOUR


@contextmanager
def _opened(encoded: bytes, where: str) -> Iterator[Image.Image]:
    """Open an image for decoding; whatever is wrong with it is an error, never a guess.

    Raises:
        DataError: not an image, a damaged or cut one, or one so large that it must be meant to fill memory.
    """
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False  # another library's
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
                yield image
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as e:
        raise DataError("an image of a sane size", f"{where}: {e}", "Remove it, or scale it down.") from e
    except Exception as e:  # a decoder given hostile bytes may raise anything
        said = "no image that Pillow can read" if isinstance(e, UnidentifiedImageError) else str(e)
        raise DataError("a readable image", f"{where}: {said}", "Replace the image, or remove it.") from e
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def folder(path: Path) -> Data:
    """Load a folder that has one folder of images for each class.

    Folders whose names are all numbers are the classes of those numbers; others are numbered in the order of their
    names. Samples are dealt in turn from all classes,
    so that the first ones are balanced. Hidden files, and those without the suffix of an image, are ignored.

    Raises:
        DataError: no class folders, no images in them, or a folder that cannot be read.
    """
    try:
        classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        files = [sorted(p for p in c.iterdir() if _is_image(p)) for c in classes]
        if not any(files):
            raise _not_classes(path, classes)
    except OSError as e:
        raise DataError("a folder that can be read", f"{e.filename}: {e.strerror}", "Check its permissions.") from e
    names = [c.name for c in classes]
    numbered = all(n.isdecimal() for n in names)
    numbers = [int(n) for n in names] if numbered else [*range(len(names))]
    labelled = [[(p, label) for p in group] for label, group in zip(numbers, files, strict=True)]
    dealt = [pair for pair in chain.from_iterable(zip_longest(*labelled)) if pair is not None]
    paths, labels = [p for p, _ in dealt], torch.tensor([label for _, label in dealt])
    if numbered:
        names = [str(i) for i in range(max(numbers) + 1)]
    samples = Images(_Files(paths), _Names(paths), len(paths))
    return Data(samples, labels, name=path.resolve().name, source=str(path), class_names=names)


def _is_image(p: Path) -> bool:
    return p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and not p.is_dir()


def _not_classes(path: Path, classes: list[Path]) -> DataError:
    expected = f"one folder of images for each class in {path}"
    if any(".tfrecord" in p.name for p in path.iterdir()):
        return DataError(
            expected,
            "records of TensorFlow Datasets",
            "Save them as .parquet with image and label, as class folders of images, or as x and y in .npz.",
        )
    if any(_is_image(p) for p in path.iterdir()):
        return DataError(expected, "images directly in it", "Make a folder of each class's images.")
    if any(p.is_dir() and not p.name.startswith(".") for c in classes for p in c.iterdir()):
        within = ", ".join(str(path / c.name) for c in classes[:3])
        return DataError(expected, "folders of folders", f"Name the one that holds the classes, perhaps {within}.")
    found = f"{len(classes)} folders without images" if classes else f"{len([*path.iterdir()])} files, no folders"
    return DataError(expected, found, f"Images end in {' '.join(sorted(SUFFIXES))}.", code="empty-data")


@final
class _Files:
    """From a position to the bytes of a file."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __call__(self, row: int) -> bytes:
        try:
            return self._paths[row].read_bytes()
        except OSError as e:
            raise DataError("a file that can be read", f"{self._paths[row]}: {e.strerror}", "Mend or remove it.") from e


@final
class _Names:
    """From a position to the name of a file."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __call__(self, row: int) -> str:
        return str(self._paths[row])
