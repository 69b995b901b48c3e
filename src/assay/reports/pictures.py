"""Samples as pictures: images as PNG, everything else as a line, all of it as data URIs."""

import base64
import io
from typing import Final

import numpy as np
from PIL import Image

_LARGEST: Final = 176
"""Side in pixels beyond which pictures are reduced, so that a report stays small enough to be sent."""

_LEVELS: Final = 60
_POINTS: Final = 256
_COLD, _NEUTRAL, _WARM = (33, 102, 172), (247, 247, 247), (178, 24, 43)


def _palette() -> list[int]:
    """Return the colours of -1 .. 1: blue, nearly white, red (after ColorBrewer's RdBu)."""
    ramp = []
    for i in range(-_LEVELS, _LEVELS + 1):
        end, t = (_COLD if i < 0 else _WARM), abs(i) / _LEVELS
        ramp += [round(n + (e - n) * t) for n, e in zip(_NEUTRAL, end, strict=True)]
    return ramp


PALETTE: Final = _palette()


def as_image(x: np.ndarray) -> np.ndarray | None:
    """Return one sample as (h, w) or (h, w, 3), or ``None`` where its shape is not that of a picture."""
    if x.ndim == 3 and x.shape[0] in (1, 3) and min(x.shape[1:]) >= 4:
        x = np.moveaxis(x, 0, -1)
    elif not (x.ndim == 3 and x.shape[-1] in (1, 3) and min(x.shape[:2]) >= 4):
        return x if x.ndim == 2 and min(x.shape) >= 4 else None
    return x[..., 0] if x.shape[-1] == 1 else x


def picture(image: np.ndarray, low: float, high: float) -> str:
    """Return an image with values in [low, high] as a PNG data URI."""
    scaled = np.nan_to_num((image - low) / ((high - low) or 1.0)).clip(0, 1)
    return _uri(Image.fromarray((scaled * 255).round().astype(np.uint8)), Image.Resampling.LANCZOS)


def difference(change: np.ndarray, scale: float) -> str:
    """Return a signed change as a PNG data URI, full colour at ``scale``, of the channel most changed."""
    if change.ndim == 3:
        most = np.abs(change).argmax(axis=-1, keepdims=True)
        change = np.take_along_axis(change, most, axis=-1)[..., 0]
    level = np.nan_to_num(change / (scale or 1.0)).clip(-1, 1)
    drawn = Image.fromarray((level * _LEVELS + _LEVELS).round().astype(np.uint8))
    drawn.putpalette(PALETTE)
    return _uri(drawn, Image.Resampling.NEAREST)


def _uri(image: Image.Image, resample: Image.Resampling) -> str:
    if max(image.size) > _LARGEST:
        image.thumbnail((_LARGEST, _LARGEST), resample)
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode("ascii")


def _places(values: np.ndarray, low: float, high: float) -> list[tuple[float, float]]:
    """Return at most ``_POINTS`` of the values as points in a box of 100 by 40."""
    flat = np.nan_to_num(values.reshape(-1).astype(float))
    if len(flat) > _POINTS:
        flat = flat[np.linspace(0, len(flat) - 1, _POINTS).round().astype(int)]
    x = np.linspace(0.5, 99.5, len(flat)) if len(flat) > 1 else np.full(len(flat), 50.0)
    y = 39 - 38 * ((flat - low) / ((high - low) or 1.0)).clip(0, 1)
    return list(zip(x.tolist(), y.tolist(), strict=True))


def trace(values: np.ndarray, low: float, high: float) -> str:
    """Return the path of a line through the values, in a box of 100 by 40."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in _places(values, low, high))


def stems(change: np.ndarray, scale: float) -> str:
    """Return the path of a stem from zero to each value, full height at ``scale``, in a box of 100 by 40."""
    return "M0 20H100" + "".join(f"M{x:.1f} 20V{y:.1f}" for x, y in _places(change, -scale, scale))
