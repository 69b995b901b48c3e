"""Where independent pieces of work run: here, one after the other, unless somebody brings a cluster."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Task = TypeVar("Task")
Answer = TypeVar("Answer")


class Executor(Protocol):
    """Maps a function over tasks; answers may come in any order."""

    def __call__(self, work: Callable[[Task], Answer], tasks: Iterable[Task]) -> Iterator[Answer]: ...


def serial(work: Callable[[Task], Answer], tasks: Iterable[Task]) -> Iterator[Answer]:
    """Work through the tasks in this process, in order."""
    return map(work, tasks)
