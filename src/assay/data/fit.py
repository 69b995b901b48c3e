"""How images get the size that a model takes."""

from dataclasses import dataclass
from typing import Final, final

from PIL import Image

from assay.core.errors import DataError

FILTERS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

_LONGEST: Final = 2**14
"""Pixels of a side that an image is scaled to; files of models say these sizes, too."""

_MOST: Final = 2**28
"""Pixels that a scaled image may have before it is cropped; thin images would fill the memory."""


@final
@dataclass(frozen=True, slots=True)
class Fit:
    """Scale an image until its shorter side has ``shorter`` pixels, then take the centre of ``height`` x ``width``.

    ``filter`` is one of ``FILTERS``, with anti-aliasing, as Pillow has them; ``shorter`` 0 scales both sides whatever
    the proportions: to height and width, or to ``stretch`` (height, width), of which the centre is taken then.
    ``channels`` 1 makes images grey, 3 coloured; 0 leaves them. Where the centre lies between two pixels, it goes to
    the even one, as in torchvision; with ``floor`` to the first one, as in transformers. What a crop takes beyond the
    image is black.

    Raises:
        DataError: sides below 1 or senselessly long, another number of channels, or an unknown filter.
    """

    height: int
    width: int
    shorter: int = 0
    filter: str = "bicubic"
    channels: int = 0
    floor: bool = False
    stretch: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        sides = dict.fromkeys((self.height, self.width, *(self.stretch or ()), self.shorter or 1))
        wrong = [f"a side of {side}" for side in sides if not 1 <= side <= _LONGEST]
        wrong += [f"{c} channels" for c in (self.channels,) if c not in (0, 1, 3)]
        wrong += [f"the filter {f!r}" for f in (self.filter,) if f not in FILTERS]
        if wrong:
            raise DataError(
                f"sides from 1 to {_LONGEST}, 1 or 3 channels, and a filter out of {', '.join(FILTERS)}",
                ", ".join(wrong),
                "Give the size that the model takes, for example 224.",
            )

    @classmethod
    def of(cls, size: int | tuple[int, int]) -> "Fit":
        """Return the fit to a square of ``size``, which keeps proportions, or to exactly (height, width)."""
        return cls(size, size, size) if isinstance(size, int) else cls(*size)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return a grey (``L``) or coloured (``RGB``) image in the size.

        Raises:
            DataError: an image so thin that scaling it would fill the memory.
        """
        image = image.convert({0: image.mode, 1: "L", 3: "RGB"}[self.channels])
        size = self._scaled(image.size)
        if size[0] * size[1] > _MOST:
            found = f"{image.size[0]} x {image.size[1]} (width x height), {size[0]} x {size[1]} when scaled"
            raise DataError("an image of sane proportions", found, "Crop it.")
        if size != image.size:
            image = image.resize(size, FILTERS[self.filter])
        left, top = (self._start(of - to) for of, to in zip(size, (self.width, self.height), strict=True))
        return image.crop((left, top, left + self.width, top + self.height))

    def _scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        if not self.shorter:
            height, width = self.stretch or (self.height, self.width)
            return width, height
        longer = int(self.shorter * max(size) / min(size))
        return (self.shorter, longer) if size[0] <= size[1] else (longer, self.shorter)

    def _start(self, over: int) -> int:
        return int(over / 2) if self.floor else round(over / 2)
