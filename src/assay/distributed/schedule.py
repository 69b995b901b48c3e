"""Who does what: the state of work that is spread over workers. It knows no clock, no process and no network."""

import math
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeAlias, TypeVar, final

from assay.core.errors import AssayError, RunError

Task = TypeVar("Task")

Worker: TypeAlias = int
"""The number of a worker; one that takes the place of another has a number of its own."""

Ticket: TypeAlias = int
"""The number of a task, in the order in which tasks were taken."""

_MEMORY: Final = 64
"""Answers from which is known how long a task takes."""


@final
@dataclass(frozen=True, slots=True)
class Rules:
    """How patient the schedule is.

    Args:
        tries: so many exceptions of one task are its own error.
        chance: so many workers that die over one task are its fault, unless by accident as many would have died, at the
            rate at which they die over the others, with more than this probability. Those of a cluster die of many
            things, and a long task has more of them.
        slow: times as long as is usual (the median) may a task take before an idle worker does it as well.
        copies: the most workers that have the same task.
    """

    tries: int = 3
    chance: float = 1e-6
    slow: float = 1.25
    copies: int = 2


PATIENT: Final = Rules()


@final
@dataclass(slots=True)
class _Open(Generic[Task]):
    """A task that is not answered yet."""

    task: Task
    holders: int = 0
    failures: int = 0
    deaths: int = 0
    held: float = 0.0  # by workers that died


@final
@dataclass(slots=True)
class Schedule(Generic[Task]):
    """Hands each worker one task at a time, until every task is answered once.

    Tasks are taken from the iterator when a worker is free for them, so that there are never more open than workers,
    those of dead workers aside. What a dead worker had is done by others. Once there is nothing else to do, free
    workers do what takes unusually long a second time; the first answer counts. All times are of the caller's clock.
    """

    tasks: Iterator[Task]
    rules: Rules = PATIENT
    redone: int = 0
    doubled: int = 0
    _open: dict[Ticket, _Open[Task]] = field(default_factory=dict)
    _back: deque[Ticket] = field(default_factory=deque)  # given to a worker that died or failed
    _busy: dict[Worker, tuple[Ticket, float]] = field(default_factory=dict)
    _idle: dict[Worker, None] = field(default_factory=dict)  # in the order in which they became so
    _took: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    _worked: float = 0.0  # by all workers together
    _deaths: int = 0
    _count: int = 0
    _exhausted: bool = False

    @property
    def over(self) -> bool:
        """Whether every task is answered."""
        return self._exhausted and not self._open

    @property
    def open(self) -> int:
        """The tasks that are taken and not answered."""
        return len(self._open)

    def joined(self, worker: Worker) -> None:
        """Hear that a worker is ready."""
        self._idle[worker] = None

    def assign(self, now: float) -> Iterator[tuple[Worker, Ticket, Task]]:
        """Yield what free workers shall do from ``now`` on."""
        while self._idle and (ticket := self._next(now)) is not None:
            worker = next(iter(self._idle))
            del self._idle[worker]
            self._busy[worker] = ticket, now
            self._open[ticket].holders += 1
            yield worker, ticket, self._open[ticket].task

    def _next(self, now: float) -> Ticket | None:
        while self._back:
            if (ticket := self._back.popleft()) in self._open:
                self.redone += 1
                return ticket
        if not self._exhausted:
            for task in self.tasks:
                self._open[self._count] = _Open(task)
                self._count += 1
                return self._count - 1
            self._exhausted = True
        begin, slowest = self._slowest()
        if slowest is None or now < begin + self._patience:
            return None
        self.doubled += 1
        return slowest

    @property
    def _patience(self) -> float:
        return self.rules.slow * statistics.median(self._took) if self._took else float("inf")

    def _slowest(self) -> tuple[float, Ticket | None]:
        """Return the task that somebody has had the longest, and since when, of those that may be doubled."""
        single = (
            (t, i) for i, t in self._busy.values() if i in self._open and self._open[i].holders < self.rules.copies
        )
        return min(single, default=(0.0, None))

    def due(self) -> float | None:
        """Return when a free worker shall look again for something to double; None where none ever will."""
        if not (self._idle and self._exhausted and self._took):
            return None
        begin, slowest = self._slowest()
        return None if slowest is None else begin + self._patience

    def answered(self, worker: Worker, ticket: Ticket, now: float) -> bool:
        """Hear an answer; return whether it is the first to this task, the one that counts."""
        took = self._free(worker, now)
        if ticket not in self._open:
            return False
        if took is not None:
            self._took.append(took)
        del self._open[ticket]
        return True

    def failed(self, worker: Worker, ticket: Ticket, error: Exception, now: float) -> None:
        """Hear that a task raised ``error``.

        Raises:
            Exception: that one, where it says what is wrong with the task, or has come too often to be an accident.
        """
        self._free(worker, now)
        if (task := self._open.get(ticket)) is None:
            return
        task.holders -= 1
        task.failures += 1
        if isinstance(error, AssayError) or task.failures >= self.rules.tries:
            raise error
        self._return(ticket, task)

    def died(self, worker: Worker, cause: str, now: float) -> None:
        """Hear that a worker is no more.

        Raises:
            RunError: over the same task that others died over: it is named.
        """
        self._idle.pop(worker, None)
        if (had := self._busy.pop(worker, None)) is None:
            return
        ticket, begin = had
        self._worked += now - begin
        self._deaths += 1
        if (task := self._open.get(ticket)) is None:
            return
        task.holders -= 1
        task.deaths += 1
        # When it died is not known, only when that was heard: perhaps it had not even begun.
        task.held += max(now - begin, statistics.median(self._took) if self._took else 0.0)
        if self._guilty(task):
            raise RunError(
                f"workers that live through task {ticket}, {shortened(task.task)}",
                f"{task.deaths} of them died over it, the last by {cause}",
                "Most often the memory is too small: use fewer workers on a machine, or a smaller --batch-size.",
            )
        self._return(ticket, task)

    def _guilty(self, task: _Open[Task]) -> bool:
        """Tell whether more workers died over a task than accidents explain."""
        rate = (self._deaths - task.deaths) / self._worked if self._worked > 0 else 0.0
        return task.deaths >= self.rules.tries and at_least(task.deaths, rate * task.held) < self.rules.chance

    def _return(self, ticket: Ticket, task: _Open[Task]) -> None:
        if not task.holders:
            self._back.append(ticket)

    def _free(self, worker: Worker, now: float) -> float | None:
        """Make a worker free, unless it has died meanwhile; return how long it was busy."""
        if worker not in self._busy:
            return None
        self._idle[worker] = None
        took = now - self._busy.pop(worker)[1]
        self._worked += took
        return took


def at_least(k: int, mean: float) -> float:
    """Return the chance that a Poisson number is at least k.

    Example:
        >>> at_least(3, 0.0), round(at_least(1, 1.0), 3)
        (0.0, 0.632)
    """
    return 1.0 - sum(math.exp(-mean) * mean**i / math.factorial(i) for i in range(k))


def shortened(task: object) -> str:
    """Write a task for a message; of many rows, the first and the last."""
    if isinstance(task, list) and len(task) > 2:
        return f"samples {task[0]} to {task[-1]}"
    text = repr(task)
    return text if len(text) <= 60 else text[:57] + "..."
