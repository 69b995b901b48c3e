"""What a loader is asked, and what it answers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, final

from torch import nn

from assay.models.model import Net

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


@final
@dataclass(frozen=True, slots=True)
class Loaded:
    """A network, and how many rows a call of it may have, as :class:`assay.Model` takes them."""

    net: Net
    rows: int | None = None
    fixed_rows: bool = False
