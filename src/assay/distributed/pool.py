"""The seam between the schedule and whatever carries tasks to workers, and the one loop that drives both."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol, TypeAlias, TypeVar, final

from assay.core.errors import RunError
from assay.distributed.schedule import PATIENT, Rules, Schedule, Ticket, Worker
from assay.distributed.worker import outcome

Task = TypeVar("Task")


@final
@dataclass(frozen=True, slots=True)
class Ready:
    """A worker can begin."""

    worker: Worker


@final
@dataclass(frozen=True, slots=True)
class Answered:
    """A worker has done a task."""

    worker: Worker
    ticket: Ticket
    answer: Any


@final
@dataclass(frozen=True, slots=True)
class Failed:
    """A task raised an exception; the worker lives."""

    worker: Worker
    ticket: Ticket
    error: Exception


@final
@dataclass(frozen=True, slots=True)
class Died:
    """A worker is no more, or never came to be."""

    worker: Worker
    cause: str


Event: TypeAlias = Ready | Answered | Failed | Died


def heard(worker: Worker, ticket: Ticket, content: Any) -> Answered | Failed:
    """Return what a worker's answer, as :func:`attempt` packs it, says of its task."""
    worked, value = outcome(content)
    return Answered(worker, ticket, value) if worked else Failed(worker, ticket, value)


class Pool(Protocol):
    """Workers, somewhere. Each does one task at a time."""

    def start(self) -> Worker:
        """Begin to make one more worker; it says itself when it is ready, or that it will never be."""

    def give(self, worker: Worker, ticket: Ticket, task: Any) -> None:
        """Send a task to a worker that is ready; one that has died meanwhile says so later."""

    def wait(self, until: float | None) -> Iterable[Event]:
        """Yield what has happened, at least one event unless it is ``until`` on the clock; None for no end."""

    def close(self) -> None:
        """End all workers, whatever they do."""


def drive(
    pool: Pool,
    tasks: Iterable[Any],
    workers: int,
    rules: Rules = PATIENT,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Any]:
    """Yield the answer to each task once, in the order in which they come.

    The tasks are taken one by one. A worker that is free gets its next task before an answer is handed on, so that it
    does not wait for whoever takes the answer. When the iterator is closed, all workers are ended.

    Raises:
        Exception: what a task raises again and again.
        RunError: workers die over the same task, or before they can begin.
    """
    tasks = iter(tasks)
    head = [*islice(tasks, workers)]  # no more workers than tasks
    plan: Schedule[Any] = Schedule(chain(head, tasks), rules)
    births = _Births(rules.tries, len(head))
    with closing(pool):
        for _ in head:
            pool.start()
        while head:
            _hand_out(pool, plan, clock)
            if plan.over:
                return
            for event in pool.wait(plan.due()):
                births.hear(event)
                first = _take(plan, event, clock)
                if isinstance(event, Died) and not plan.over:
                    pool.start()
                _hand_out(pool, plan, clock)
                if isinstance(event, Answered) and first:
                    yield event.answer


def _hand_out(pool: Pool, plan: Schedule[Any], clock: Callable[[], float]) -> None:
    for worker, ticket, task in plan.assign(clock()):
        pool.give(worker, ticket, task)


def _take(plan: Schedule[Any], event: Event, clock: Callable[[], float]) -> bool:
    """Tell the schedule what happened; return whether it is an answer that counts."""
    if isinstance(event, Answered):
        return plan.answered(event.worker, event.ticket, clock())
    if isinstance(event, Ready):
        plan.joined(event.worker)
    elif isinstance(event, Failed):
        plan.failed(event.worker, event.ticket, event.error, clock())
    else:
        plan.died(event.worker, event.cause, clock())
    return False


@final
class _Births:
    """Workers that never came to be: a few in a row, and something is wrong with all of them."""

    def __init__(self, tries: int, workers: int) -> None:
        self.tries, self.workers = tries, workers
        self.ready: set[Worker] = set()
        self.stillborn, self.ever = 0, False

    def hear(self, event: Event) -> None:
        """Count.

        Raises:
            RunError: too many ended before they could begin.
        """
        if isinstance(event, Ready):
            self.ready.add(event.worker)
            self.stillborn, self.ever = 0, True
        elif isinstance(event, Died):
            self.stillborn += event.worker not in self.ready
            self.ready.discard(event.worker)
        if self.stillborn >= self.tries * (self.workers if self.ever else 1):
            assert isinstance(event, Died)
            raise RunError(
                "workers that can begin",
                f"{self.stillborn} in a row ended before, the last by {event.cause}",
                "See that each can import assay and the model's code, read the data, and has memory and its GPU.",
            )
