"""Workers that are actors of Ray, on this machine or on a cluster."""

import contextlib
import itertools
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar, final

from assay.core.errors import RunError
from assay.core.optional import need
from assay.distributed.pool import Died, Event, Ready, drive, heard
from assay.distributed.schedule import PATIENT, Rules, Ticket, Worker
from assay.distributed.sizes import check_sizes, device_with
from assay.distributed.worker import attempt, received, sent

Task = TypeVar("Task")
Answer = TypeVar("Answer")

_QUIET: Final = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""For a Ray of our own, which nobody else on this machine is to talk to, and which is to report to nobody."""

_PATIENCE: Final = 600.0
"""Seconds in which the first worker of a cluster must be there: it may have to start a machine for it."""

_KNOCK: Final = 10.0
"""Seconds for a cluster to say that it is there."""


@final
@dataclass(frozen=True, slots=True)
class RayExecutor:
    """An executor: ``workers`` actors of Ray; results are those of one process.

    Where Ray is in use already, that is used; else one is started on this machine, or the one at ``address`` is joined.
    What was started or joined is left at the end, what was there stays. The work (model, data and settings) goes to
    each machine once, through Ray's object store.

    Args:
        workers: how many.
        gpus_per_worker: GPUs of each; 0 for CPUs, less than 1 where several shall share one.
        address: of a cluster: ``ray://host:10001``, ``host:6379`` or ``auto``; None for this machine.
        threads: CPU threads of each; Ray counts them as its CPUs.
        rules: how patient the schedule is.

    Raises:
        UsageError: fewer than one worker or thread, or a negative number of GPUs.
    """

    workers: int = 2
    gpus_per_worker: float = 0
    address: str | None = None
    threads: int = 1
    rules: Rules = PATIENT

    def __post_init__(self) -> None:
        check_sizes(self.workers, self.gpus_per_worker, self.threads)

    @property
    def device(self) -> str:
        """Where workers compute."""
        return device_with(self.gpus_per_worker)

    def __call__(self, work: Callable[[Task], Answer], tasks: Iterable[Task]) -> Iterator[Answer]:
        """Send the work to all workers, then yield the answers to the tasks as they come.

        Raises:
            MissingExtraError: Ray is not installed.
            ModelError: the work cannot be sent to another process.
            RunError: there is no cluster at the address, or it has no room for a worker.
        """
        ray = need("ray", "ray")
        content = sent(work, need("ray.cloudpickle", "ray").dumps)
        return self._driven(ray, content, tasks)

    def _driven(self, ray: Any, content: bytes, tasks: Iterable[Any]) -> Iterator[Any]:
        with self._joined(ray):
            pool = _RayPool(ray, content, self.gpus_per_worker, self.threads)
            yield from drive(pool, tasks, self.workers, self.rules)

    @contextlib.contextmanager
    def _joined(self, ray: Any) -> Iterator[None]:
        """Have Ray for a while, and leave it as it was."""
        if ray.is_initialized():
            yield
            return
        kept = {name: os.environ.get(name) for name in _QUIET}
        try:
            if self.address is None:
                os.environ.update({k: v for k, v in _QUIET.items() if kept[k] is None})
            else:
                _knock(self.address)
            ray.init(**self._where())
        except (AssertionError, ConnectionError, RuntimeError, ValueError, OSError) as e:
            ray.shutdown()
            remedy = "Check the address, and that it runs the same version of Ray (ray start --head)."
            raise RunError(f"a cluster of Ray at {self.address or 'this machine'}", _said(e), remedy) from e
        finally:
            for name, value in kept.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        try:
            # Ray prints what befalls its workers where one JSON object may be wanted and nothing else.
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            ray.shutdown()

    def _where(self) -> dict[str, Any]:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is not None:
            far = self.address.startswith("ray://")  # then all but the address is for a process on the other side
            return {"address": self.address, **({"log_to_driver": False} if far else quiet)}
        cpus = self.workers * self.threads
        local: dict[str, Any] = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        return {**local, "_node_ip_address": "127.0.0.1", **quiet}


@final
class _RayPool:
    """Actors; each asks for what it needs, and Ray finds the place."""

    def __init__(self, ray: Any, work: bytes, gpus: float, threads: int) -> None:
        self._ray, self._threads = ray, threads
        self._check_room(gpus)
        self._make = ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=0)(_Actor)
        self._work = ray.put(work)
        self._actors: dict[Worker, Any] = {}
        self._asked: dict[Any, tuple[Worker, Ticket | None]] = {}  # by reference to the answer
        self._numbers = itertools.count()
        self._deadline: float | None = time.monotonic() + _PATIENCE  # until the first worker is there

    def _check_room(self, gpus: float) -> None:
        """Refuse GPUs where there are none: Ray would wait for them for ever."""
        there = self._ray.cluster_resources()
        if gpus and not there.get("GPU"):
            raise RunError(f"{gpus:g} GPUs for each worker", "none that Ray knows", "Use --gpus-per-worker 0.")

    def start(self) -> Worker:
        worker = next(self._numbers)
        actor = self._actors[worker] = self._make.remote(self._work, self._threads)
        self._asked[actor.ready.remote()] = worker, None
        return worker

    def give(self, worker: Worker, ticket: Ticket, task: Any) -> None:
        self._asked[self._actors[worker].do.remote(task)] = worker, ticket

    def wait(self, until: float | None) -> Iterator[Event]:
        """Fetch one answer: the others stay where they were made, so that memory here holds one at a time."""
        ends = [t for t in (until, self._deadline) if t is not None]
        seconds = max(0.0, min(ends) - time.monotonic()) if ends else None
        found, _ = self._ray.wait([*self._asked], num_returns=1, timeout=seconds, fetch_local=False)
        for reference in found:
            yield self._hear(reference)
        if not found and self._deadline is not None and time.monotonic() >= self._deadline:
            raise RunError(
                "room for a worker on the cluster",
                f"none in {_PATIENCE:g} s; it has {_resources(self._ray)}",
                "Ask for fewer GPUs or threads a worker, or add machines.",
            )

    def _hear(self, reference: Any) -> Event:
        worker, ticket = self._asked.pop(reference)
        try:
            content = self._ray.get(reference)
        except self._ray.exceptions.RayError as e:
            del self._actors[worker]
            return Died(worker, _said(e))
        if ticket is None:
            self._deadline = None
            return Ready(worker)
        return heard(worker, ticket, content)

    def close(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        self._asked.clear()


@final
class _Actor:
    """A worker; Ray gives it the work itself for the reference to it."""

    def __init__(self, work: bytes, threads: int) -> None:
        self._do = received(work, threads)

    def ready(self) -> None:
        """Answer when the work has arrived."""

    def do(self, task: Any) -> bytes:
        return attempt(self._do, task)


def _knock(address: str) -> None:
    """Raise an OSError where nobody listens: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK).close()


def _resources(ray: Any) -> str:
    there = ray.cluster_resources()
    return ", ".join(f"{there.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))


def _said(error: Exception) -> str:
    """Return the last line of what Ray says, which has the cause; all before it is about Ray."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no more is known'}"
