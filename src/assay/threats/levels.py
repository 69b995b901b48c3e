"""Points that can be saved: every value one of evenly spaced levels, as in an 8-bit image."""

import torch

from assay.core.levels import at_level
from assay.core.types import Inputs, PerSample
from assay.threats.threat import Box

_MARGIN = 1 - 1e-6
"""Round balls are filled a millionth short, so that no rounding of sums leaves them."""


def snapped(
    x: Inputs, x0: Inputs, bounds: tuple[Inputs, Inputs], radius: PerSample, power: int | None, box: Box, levels: int
) -> Inputs:
    """Return the points of the grid that are nearest to x within ``bounds`` and, for lp balls, within ``radius``.

    Args:
        x: the points.
        x0: the clean inputs.
        bounds: least and largest value of each coordinate.
        radius: of the ball around x0.
        power: p of an lp ball; None where bounds are all there is.
        box: whose ends are the first and the last level.
        levels: the number of steps between them.
    """
    low, high = (_last(b, up, box, levels) for b, up in ((bounds[0], False), (bounds[1], True)))
    k = torch.minimum(torch.maximum(_place(x, box, levels).round(), low), high)
    if power is None:
        return at_level(k, box.lo, box.hi, levels)
    return _inside(k, x, x0, radius, power, box, levels)


def _place(x: Inputs, box: Box, levels: int) -> Inputs:
    return (x - box.lo) / box.width * levels


def _last(bound: Inputs, up: bool, box: Box, levels: int) -> Inputs:
    """Return the last level that does not pass a bound; the formula alone may err by one level."""
    way = 1 if up else -1
    k = _place(bound, box, levels).round() + way
    for _ in range(2):
        value = at_level(k, box.lo, box.hi, levels)
        k = torch.where(value > bound if up else value < bound, k - way, k)
    return k


def _inside(k: Inputs, x: Inputs, x0: Inputs, radius: PerSample, power: int, box: Box, levels: int) -> Inputs:
    """Draw levels k one step towards x0 in as few coordinates as the ball asks for, those first that it costs least."""
    near, inner = (
        at_level(v, box.lo, box.hi, levels) for v in (k, k - (at_level(k, box.lo, box.hi, levels) - x0).sign())
    )
    size, less = (((v.double() - x0.double()).abs() ** power).flatten(1) for v in (near, inner))
    excess = size.sum(1, keepdim=True) - (radius.double() * _MARGIN)[:, None] ** power
    if not (excess > 0).any():
        return near
    gain = size - less
    price = ((inner - x).abs() - (near - x).abs()).double().flatten(1) / gain.clamp_min(1e-300)
    order = price.masked_fill(gain <= 0, torch.inf).argsort(dim=1, stable=True)
    saved = gain.clamp_min(0).gather(1, order).cumsum(1)
    before = saved - gain.clamp_min(0).gather(1, order)
    drawn = torch.zeros_like(gain, dtype=torch.bool).scatter(1, order, before < excess)
    return torch.where((drawn & (gain > 0)).view(x.shape), inner, near)
