"""What a loader is asked; what it answers is a :class:`Loaded` or a :class:`Model`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, final

from torch import nn

Arch: TypeAlias = str | Callable[[], nn.Module]
"""``module:callable``, ``demo:NAME``, or the callable itself: without arguments it builds a network."""


@final
@dataclass(frozen=True, slots=True)
class Request:
    """``source`` is what the user wrote; ``rest`` is what follows the scheme, or the path."""

    source: str
    rest: str
    arch: Arch | None = None
    trust_pickle: bool = False

    @property
    def path(self) -> Path:
        return Path(self.rest)
