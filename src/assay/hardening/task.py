"""What a training is to do, and what it tells whoever watches."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from assay.data import Data
from assay.hardening.objective import Objective
from assay.hardening.settings import Settings
from assay.hardening.source import Source
from assay.threats import Threat

Tell = Callable[["Moment"], None]


@final
@dataclass(frozen=True, slots=True)
class Moment:
    """Where a training stands, for whoever watches: steps, and the latest row of the history, if there is one."""

    what: str
    done: int
    total: int
    steps: int  # an epoch
    loss: float | None
    row: dict[str, Any] | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be done: all that decides the weights."""

    objective: Objective
    threat: Threat  # its box settled
    settings: Settings
    epochs: int
    seed: int
    classes: int
    source: Source
    valid: Data
    helpers: tuple[nn.Module, ...] = ()
    what: str = ""


@final
@dataclass(slots=True)
class Clock:
    """The time spent on training and validation, all interruptions taken out: on the wall, and of this processor."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    begun: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        self.begun = time.monotonic() - self.seconds, time.process_time() - self.cpu_seconds

    def read(self) -> dict[str, float]:
        if any(self.begun):
            self.seconds, self.cpu_seconds = time.monotonic() - self.begun[0], time.process_time() - self.begun[1]
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
