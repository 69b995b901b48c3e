"""Pieces of work side by side: what each of them asks is collected, and answered together.

Each piece is a plain function in a thread of its own, of which only one runs at a time: until it asks. So nothing needs
a lock, and which questions meet depends on the pieces alone, not on the clock.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import copy_context
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, final


class Sized(Protocol):
    """A question, whose length says how much of an answer's time is its own."""

    def __len__(self) -> int: ...


Q = TypeVar("Q", bound=Sized)
A = TypeVar("A")
T = TypeVar("T")


@final
class Seat(Generic[Q, A]):
    """Where one piece of work asks; ``waited`` are the seconds that others took of its time so far."""

    def __init__(self, put: Callable[[Q], A]) -> None:
        self.ask = put
        self.waited = 0.0


Work: TypeAlias = Callable[[Seat[Q, A]], T]


def together(works: Iterable[Work[Q, A, T]], answer: Callable[[Sequence[Q]], Sequence[A]], most: int) -> Iterator[T]:
    """Do pieces of work, at most ``most`` at a time; yield what each returns, as soon as it has ended.

    ``answer`` gets the questions of all pieces that are under way, in the order in which these were begun, and is
    called where the results are consumed. What a piece or ``answer`` raises is raised there, too; then, and when this
    is closed or interrupted, the other pieces end at their next question.
    """
    waiting, running = iter(works), list[_Worker[Q, A, T]]()
    try:
        while True:
            while len(running) < most and (work := next(waiting, None)) is not None:
                running.append(_Worker(work))
                running[-1].go(None)
            if not running:
                return
            if ended := [w for w in running if w.ended]:
                running = [w for w in running if not w.ended]
                yield from (w.result() for w in ended)
                continue
            begin, asked = time.perf_counter(), [w.question for w in running]
            answers = answer(asked)
            each = (time.perf_counter() - begin) / max(1, sum(map(len, asked)))
            for worker, question, told in zip(running, asked, answers, strict=True):
                worker.go((told, each * len(question)))
    finally:
        for worker in running:
            worker.stop()


class _Stopped(BaseException):
    """Ends a piece of work from within."""


@final
class _Worker(Generic[Q, A, T]):
    """One piece of work, its seat and its thread: whoever calls ``go`` waits until it asks or ends."""

    question: Q

    def __init__(self, work: Work[Q, A, T]) -> None:
        self.ended, self._seat = False, Seat(self._put)
        self._told: SimpleQueue[Any] = SimpleQueue()
        self._asked: SimpleQueue[bool] = SimpleQueue()  # whether the work has ended
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._thread = Thread(target=copy_context().run, args=(self._run, work), daemon=True)

    def go(self, told: Any) -> None:
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._told.put(told)
        self.ended = self._asked.get()

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._found[0]

    def stop(self) -> None:
        self._told.put(_Stopped())
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self, work: Work[Q, A, T]) -> None:
        try:
            self._found.append(work(self._seat))
        except BaseException as e:  # an interruption, too, is for whoever waits for the result
            self._error = e
        self._asked.put(True)

    def _put(self, question: Q) -> A:
        begin, self.question = time.perf_counter(), question
        self._asked.put(False)
        told = self._told.get()
        if isinstance(told, _Stopped):
            raise told
        answer, own = told
        self._seat.waited += time.perf_counter() - begin - own
        return answer  # type: ignore[no-any-return]
