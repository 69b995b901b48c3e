"""Common corruptions: what weather, cameras and compression do to images, at five severities.

The corruptions are those of Hendrycks & Dietterich (2019), arXiv:1903.12261, as the package imagecorruptions-imaug
makes them, with their parameters for ImageNet.
"""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from assay.core.optional import need

PACKAGE: Final = "imagecorruptions"

_LEAST = 32
"""The shortest side that the package takes; smaller images are mirrored at their edges for the time being."""


def corrupted(
    images: NDArray[np.uint8], indices: Sequence[int], name: str, severity: int, seed: int
) -> NDArray[np.uint8]:
    """Return 8-bit images (b, c, h, w), c = 1 or 3, under a corruption; grey ones are red channels of the coloured.

    Random numbers belong to (seed, index, severity) and the corruption.

    Raises:
        MissingExtraError: the package is not installed.
    """
    return np.stack(
        [_one(image, name, severity, (seed, at, severity)) for image, at in zip(images, indices, strict=True)]
    )


def _one(image: NDArray[np.uint8], name: str, severity: int, key: tuple[int, ...]) -> NDArray[np.uint8]:
    package = need(PACKAGE, "corruptions")
    channels, *sides = image.shape
    room = [max(0, _LEAST - side) for side in sides]
    around = [(0, 0), *((r // 2, r - r // 2) for r in room)]
    rows, columns = (slice(low, low + side) for (low, _), side in zip(around[1:], sides, strict=True))
    word = int(np.random.SeedSequence([*map(abs, key), *name.encode()]).generate_state(1)[0])
    takes = inspect.signature(package.corruption_dict[name]).parameters
    given: dict[str, Any] = {"seed": word} if "seed" in takes else {}
    with _seeded(word), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of the package's own, on images of one colour
        wide = np.pad(image, around, mode="symmetric").transpose(1, 2, 0)
        made = package.corrupt(np.ascontiguousarray(wide), severity, name, **given)
    return np.ascontiguousarray(made[rows, columns, :channels].transpose(2, 0, 1))


@contextlib.contextmanager
def _seeded(word: int) -> Iterator[None]:
    """Seed numpy's global generator, which the package draws from, and put it back as it was."""
    kept = np.random.get_state()  # noqa: NPY002
    np.random.seed(word)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(kept)  # noqa: NPY002
