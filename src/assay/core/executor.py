"""Where independent pieces of work run: here, one after the other, unless somebody brings a cluster."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

Task = TypeVar("Task")
Answer = TypeVar("Answer")


class Executor(Protocol):
    """Maps a function over tasks; answers may come in any order.

    It may have an attribute ``device``: where its workers compute, which need not be where the caller does. An iterator
    that it returns may have a ``close``, which frees the workers.
    """

    def __call__(self, work: Callable[[Task], Answer], tasks: Iterable[Task]) -> Iterator[Answer]: ...


def serial(work: Callable[[Task], Answer], tasks: Iterable[Task]) -> Iterator[Answer]:
    """Work through the tasks in this process, in order."""
    return map(work, tasks)


def device_of(executor: Executor | None, device: Any) -> Any:
    """Return where an executor's workers compute: its own device, or the one that was asked for."""
    return getattr(executor, "device", None) or device
