"""A value as bytes: one walk over what it is made of, whichever way its parts are written."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, final


@final
@dataclass(frozen=True, slots=True)
class Inner:
    """A value inside another one, to be walked over in its place."""

    value: Any


Parts: TypeAlias = Callable[[Any], Iterable[bytes | Inner]]
"""From a value to what tells it from others: bytes, and the values that it is made of."""


def pieces(value: Any, parts: Parts, plain: tuple[type, ...], seen: set[int]) -> Iterator[bytes]:
    """Yield the bytes of a value and of all that is inside it, in order.

    Args:
        value: where to begin.
        parts: of any value.
        plain: types whose values are written each time. Another object that is met again adds nothing: it may hold
            itself.
        seen: the ids of what was met.
    """
    if not isinstance(value, plain):
        if id(value) in seen:
            return
        seen.add(id(value))
    for part in parts(value):
        if isinstance(part, Inner):
            yield from pieces(part.value, parts, plain, seen)
        else:
            yield part
