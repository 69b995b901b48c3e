"""Where channels stand: images are (c, h, w) here, and what other frameworks' networks take them as is decided here."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, final

from torch import Tensor

from assay.core.errors import ModelError
from assay.core.types import Inputs

Shape: TypeAlias = tuple[int | None, ...]
"""Of one sample; None stands for any length."""


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """What a network takes a sample as.

    Args:
        shape: what the network declares, without the batch axis; None where it declares nothing.
        channels_last: what decides where (c, h, w) and (h, w, c) would both fit, as for (3, 3, 3), and where nothing is
            declared.
    """

    shape: Shape | None = None
    channels_last: bool = False

    def __call__(self, x: Inputs) -> Tensor:
        """Return samples (b, *f) as the network takes them: a view of x.

        Raises:
            ModelError: they do not fit, or it is unclear how (``bad-shape``).
        """
        return _WAYS[self.way(tuple(x.shape[1:]))](x)

    def way(self, found: tuple[int, ...]) -> str:
        """Name the way in which samples of a shape are handed over: a key of the table below.

        Raises:
            ModelError: there is none (``bad-shape``).
        """
        way = next(self._ways(found), None)
        if way is None:
            raise ModelError(
                f"samples that fit the model's input {written(self.shape)}",
                f"samples of shape {written(found)}",
                _remedy(self.shape, found),
                code="bad-shape",
            )
        return way

    def _ways(self, found: tuple[int, ...]) -> Iterator[str]:
        """Yield the ways that fit, that of the data format first where it can say something."""
        images = [_LAST, _SAME] if self.channels_last else [_SAME, _LAST]
        for way in images if len(found) == 3 else [_SAME]:
            if fits(_after(way, found), self.shape):
                yield way
        if self.shape is None:
            return
        for way, fit in ((_GREY, found[:1] == (1,)), (_ONE, len(found) == 2), (_FLAT, _ordered(found))):
            if fit and fits(_after(way, found), self.shape):
                yield way

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said about images, a sentence at most."""
        if not self.channels_last or (self.shape is not None and len(self.shape) != 3):
            return ()
        declares = "no input shape" if self.shape is None else f"the input {written(self.shape)}"
        return (f"The model declares {declares}, channels last: images (c, h, w) are handed to it as (h, w, c).",)


_SAME, _LAST, _GREY, _ONE, _FLAT = "as they are", "channels last", "without the channel", "with a channel", "flattened"

_WAYS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    _SAME: lambda x: x,
    _LAST: lambda x: x.permute(0, 2, 3, 1),
    _GREY: lambda x: x.squeeze(1),
    _ONE: lambda x: x.unsqueeze(-1),
    _FLAT: lambda x: x.flatten(1),
}
"""From samples (b, *f) to what a network takes, by the name of the way."""


def _after(way: str, f: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a sample after a way."""
    return {_SAME: f, _LAST: (*f[1:], *f[:1]), _GREY: f[1:], _ONE: (*f, 1), _FLAT: (math.prod(f),)}[way]


def _ordered(found: tuple[int, ...]) -> bool:
    """Tell whether there is one order only in which the values of a sample can be written one after another."""
    return len(found) < 3 or found[0] == 1


def fits(found: Sequence[int], declared: Shape | None) -> bool:
    """Tell whether samples of a shape are what a network declares."""
    if declared is None:
        return True
    return len(found) == len(declared) and all(d in (None, n) for n, d in zip(found, declared, strict=True))


def written(shape: Shape | None) -> str:
    """Write a shape; ``?`` stands for any length."""
    if shape is None:
        return "(?)"
    return f"({', '.join('?' if n is None else str(n) for n in shape)}{',' if len(shape) == 1 else ''})"


def _remedy(declared: Shape | None, found: tuple[int, ...]) -> str:
    if declared is not None and len(declared) == 1 and len(found) == 3:
        return "Flatten the images yourself, in the order in which the model was trained: (h, w, c) or (c, h, w)."
    return "Bring the samples to the size that the model was made for."
