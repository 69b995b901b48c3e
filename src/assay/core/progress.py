"""What long work tells whoever watches, and nothing about how that is shown."""

from dataclasses import dataclass
from typing import Protocol, final


@final
@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of an evaluation at one moment; counts are samples, ``proven`` None where nothing is to be proven.

    ``done`` are stored; ``right`` and ``fooled`` are of all that were ``seen``, where that is more.
    """

    total: int
    done: int
    right: int
    fooled: int
    stage: str
    passes: int
    seconds: float
    proven: int | None = None
    seen: int = 0


class Progress(Protocol):
    """Receives snapshots, often; must be quick."""

    def __call__(self, snapshot: Snapshot) -> None: ...


def silent(snapshot: Snapshot) -> None:
    """Show nothing."""
