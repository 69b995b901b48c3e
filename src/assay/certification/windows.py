"""Coefficients of few entries only: a neuron of an early convolution sees a small window of each map before it.

Rows that start from single entries of a convolutional map are kept as windows and spread over the whole map only
where a step is not local. (auto_LiRPA has the same idea as its "patches" mode.)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from assay.certification.rules import Affine, Band, Conv, Lines, Relaxed


class Windows(NamedTuple):
    """Coefficients ``a`` (n, s, c, h, w) at rows ``top .. top + h - 1`` and columns ``left ..`` of maps of ``size``.

    ``top`` and ``left`` (n, s) may be negative: what lies outside the map is zero.
    """

    a: Tensor
    top: Tensor
    left: Tensor
    size: tuple[int, int]

    @classmethod
    def single(cls, entries: Tensor, sign: Tensor, shape: tuple[int, ...]) -> "Windows":
        """Return one entry a row: ``entries`` (n, s) number those of a map (1, c, h, w), with factors ``sign``."""
        _, c, h, w = shape
        channel, place = entries // (h * w), entries % (h * w)
        a = functional.one_hot(channel, c).to(sign.dtype) * sign[..., None]
        return cls(a[..., None, None], place // w, place % w, (h, w))

    def to(self, dtype: torch.dtype) -> "Windows":
        return self._replace(a=self.a.to(dtype))

    @property
    def wide(self) -> bool:
        """Whether the windows are hardly smaller than the map."""
        return self.a.shape[-1] * self.a.shape[-2] * 2 > self.size[0] * self.size[1]

    def spread(self) -> Tensor:
        """Return the coefficients of the whole map, (n, s, 1, c, h, w)."""
        n, s, c, h, w = self.a.shape
        # A margin around the map takes what lies outside of it.
        places = self._places()
        out = torch.zeros(n, s, c, self._area, dtype=self.a.dtype, device=self.a.device)
        out = out.scatter(3, places[:, :, None].expand(n, s, c, h * w), self.a.flatten(3))
        high, wide = self.size[0] + 2 * self._margin, self.size[1] + 2 * self._margin
        m = self._margin
        return out.view(n, s, 1, c, high, wide)[..., m : high - m, m : wide - m]

    @property
    def _margin(self) -> int:
        return max(self.a.shape[-1], self.a.shape[-2])

    @property
    def _area(self) -> int:
        return (self.size[0] + 2 * self._margin) * (self.size[1] + 2 * self._margin)

    def _places(self) -> Tensor:
        """Return where the entries of each window lie in a map with a margin, (n, s, h * w)."""
        h, w = self.a.shape[-2:]
        m, device = self._margin, self.a.device
        rows = self.top[..., None] + torch.arange(h, device=device) + m
        columns = self.left[..., None] + torch.arange(w, device=device) + m
        wide = self.size[1] + 2 * m
        return (rows[..., :, None] * wide + columns[..., None, :]).flatten(2)

    def cut(self, t: Tensor) -> Tensor:
        """Return what these windows see of maps t (n, 1, c, h, w): (n, s, c, h', w'), zero outside."""
        n, s, c, h, w = self.a.shape
        m = self._margin
        wide = functional.pad(t.reshape(-1, *t.shape[-3:]), (m, m, m, m)).flatten(2).expand(n, c, -1)
        places = self._places().view(n, 1, s * h * w).expand(n, c, -1)
        return wide.gather(2, places).view(n, c, s, h, w).transpose(1, 2)

    def dot(self, t: Tensor) -> Tensor:
        """Return <a, t> (n, s) for maps t."""
        return (self.a * self.cut(t)).flatten(2).sum(2)

    def joined(self, other: "Windows") -> "Windows | Tensor":
        """Return the sum of two sets of windows on the same maps: spread, if their distance differs from row to row."""
        apart = other.top - self.top, other.left - self.left
        if any((t != t.flatten()[0]).any() for t in apart):
            return self.spread() + other.spread()
        tops, lefts = (int(t.flatten()[0]) for t in apart)
        (h, w), (oh, ow) = self.a.shape[-2:], other.a.shape[-2:]
        up, side = max(0, -tops), max(0, -lefts)
        high, wide = max(h, tops + oh) + up, max(w, lefts + ow) + side
        mine = functional.pad(self.a, (side, wide - w - side, up, high - h - up))
        theirs = functional.pad(other.a, (lefts + side, wide - ow - lefts - side, tops + up, high - oh - tops - up))
        return Windows(mine + theirs, self.top - up, self.left - side, self.size)

    def passes(self, rule: Affine | Relaxed) -> bool:
        """Whether a step leaves windows windows: convolutions, lines, and what is affine entry by entry."""
        if not isinstance(rule, Affine):
            return isinstance(rule, Lines | Band)
        maps = [tuple(rule.offset.shape), *rule.shapes]
        alike = len(maps[0]) == 4 and maps[0][0] == 1 and all(shape == maps[0] for shape in maps)
        return rule.conv is not None or (rule.signs == "vertex" and alike)

    def through(self, rule: Affine | Lines | Band, slopes: Tensor | None) -> "tuple[tuple[Windows, ...], Tensor]":
        """Return windows for each input of a step that they pass, and a constant (n, s)."""
        if isinstance(rule, Lines):
            return self._lines(rule, slopes)
        if isinstance(rule, Band):
            return (self._replace(a=self.a * self.cut(rule.slope)),), self.dot(rule.middle)
        if rule.conv is not None:
            return self._convolution(rule.conv, rule)
        parts = tuple(self._replace(a=self.a * self.cut(f[None])) for f in rule.factors)
        return parts, self._shift(rule)

    def _lines(self, lines: Lines, slopes: Tensor | None) -> "tuple[tuple[Windows, ...], Tensor]":
        plus = self.a.clamp(min=0)
        minus = self.a - plus
        low = self.cut(lines.low)
        if slopes is not None and lines.free is not None:
            low = torch.where(self.cut(lines.free), slopes, low)
        constant = (minus * self.cut(lines.high0)).flatten(2).sum(2)
        if lines.low0 is not None:
            constant = constant + (plus * self.cut(lines.low0)).flatten(2).sum(2)
        return (self._replace(a=plus * low + minus * self.cut(lines.high)),), constant

    def _convolution(self, conv: Conv, rule: Affine) -> "tuple[tuple[Windows, ...], Tensor]":
        n, s, c, h, w = self.a.shape
        flat = self.a.reshape(n * s, c, h, w)
        a = functional.conv_transpose2d(
            flat, conv.weight, stride=conv.stride, groups=conv.groups, dilation=conv.dilation
        )
        top = self.top * conv.stride[0] - conv.padding[0]
        left = self.left * conv.stride[1] - conv.padding[1]
        size = (rule.shapes[0][2], rule.shapes[0][3])
        grown = Windows(a.view(n, s, *a.shape[1:]), top, left, size)
        inside = grown.cut(torch.ones(1, 1, a.shape[1], *size, dtype=a.dtype, device=a.device))
        return (grown._replace(a=grown.a * inside),), self._shift(rule)

    def _shift(self, rule: Affine) -> Tensor:
        return self.dot(rule.offset[None]) if rule.shifts else self.a.new_zeros(self.a.shape[:2])


def chosen(entries: Tensor, sign: Tensor, shape: tuple[int, ...]) -> Tensor | Windows:
    """Return coefficients of a step's value (*shape), of which each row has one entry: ``entries`` (n, s), ``sign``."""
    if len(shape) == 4 and shape[0] == 1 and shape[-1] * shape[-2] > 1:
        return Windows.single(entries, sign, shape)
    none = torch.zeros(*entries.shape, math.prod(shape), dtype=sign.dtype, device=entries.device)
    return none.scatter(2, entries[..., None], sign[..., None]).view(*entries.shape, *shape)
