"""Workers that are processes of this machine, each with CPU cores or GPUs of its own. Needs nothing but Python."""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Final, TypeVar, final

from assay.core.registry import UsageError
from assay.distributed.pool import Died, Event, Ready, drive, heard
from assay.distributed.schedule import PATIENT, Rules, Ticket, Worker
from assay.distributed.sizes import check_sizes, device_with
from assay.distributed.worker import attempt, received, sent

Task = TypeVar("Task")
Answer = TypeVar("Answer")

_READY: Final = b"ready"
_SECONDS: Final = 5.0
"""For a process to end after its pipe did."""


@final
@dataclass(frozen=True, slots=True)
class Processes:
    """An executor: ``workers`` processes, started anew for each call; results are those of one process.

    Args:
        workers: how many.
        gpus_per_worker: GPUs of each; 0 for CPUs, less than 1 where several shall share one. A worker sees its own
            alone, as ``cuda:0`` and so on.
        threads: CPU threads of each.
        rules: how patient the schedule is.

    Raises:
        UsageError: fewer than one worker or thread, or a negative number of GPUs.

    Example:
        >>> Processes(2, gpus_per_worker=1).device
        'cuda'
    """

    workers: int = 2
    gpus_per_worker: float = 0
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
            ModelError: the work cannot be sent to another process.
            UsageError: this machine has fewer GPUs than the workers are to have.
        """
        places = _places(self.workers, self.gpus_per_worker)
        pool = _ProcessPool(sent(work), places, self.threads)
        return drive(pool, tasks, self.workers, self.rules)


def _places(workers: int, gpus: float) -> list[str]:
    """Return what each worker finds in CUDA_VISIBLE_DEVICES."""
    if not gpus:
        return [""] * workers
    import torch

    count = torch.cuda.device_count()
    if count < workers * gpus:
        raise UsageError(
            f"{workers * gpus:g} GPUs on this machine, {gpus:g} for each of {workers} workers",
            f"{count}",
            "Use fewer workers, fewer GPUs for each, or a cluster (--executor ray --address).",
        )
    return shares([v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v], count, workers, gpus)


def shares(visible: list[str], count: int, workers: int, gpus: float) -> list[str]:
    """Deal out the GPUs that are visible, or all of ``count``.

    Example:
        >>> shares([], 4, workers=2, gpus=2), shares(["3", "7"], 2, workers=4, gpus=0.5)
        (['0,1', '2,3'], ['3', '3', '7', '7'])
    """
    names, each = visible or [str(i) for i in range(count)], max(1, int(gpus))
    fitting = max(1, int(1 / gpus))  # workers of one GPU
    return [",".join(names[(i // fitting) * each :][:each]) for i in range(workers)]


@final
@dataclass(frozen=True, slots=True)
class _Hand:
    """A worker: its process, the pipe to it, and its place."""

    process: SpawnProcess
    pipe: Connection
    place: str


@final
class _ProcessPool:
    """Processes that get the work from a file, then tasks through pipes."""

    def __init__(self, work: bytes, places: list[str], threads: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="assay-workers-"))
        self._work, self._threads = self._folder / "work", threads
        self._work.write_bytes(work)
        self._places, self._numbers = places, itertools.count()
        self._hands: dict[Worker, _Hand] = {}
        self._context = multiprocessing.get_context("spawn")

    def start(self) -> Worker:
        worker, place = next(self._numbers), self._places.pop()
        ours, theirs = self._context.Pipe()
        about = theirs, self._work, self._threads, place
        process = self._context.Process(target=_serve, args=about, daemon=True, name=f"assay-worker-{worker}")
        process.start()
        theirs.close()  # so that ours ends with the process
        self._hands[worker] = _Hand(process, ours, place)
        return worker

    def give(self, worker: Worker, ticket: Ticket, task: Any) -> None:
        with contextlib.suppress(OSError):  # it has died: its pipe will say so
            self._hands[worker].pipe.send((ticket, task))

    def wait(self, until: float | None) -> Iterator[Event]:
        """Read from whoever has something to say, one answer after the other: they may be large."""
        pipes: list[Any] = [h.pipe for h in self._hands.values()]
        owner = {id(h.pipe): w for w, h in self._hands.items()}
        for pipe in wait(pipes, None if until is None else max(0.0, until - time.monotonic())):
            yield self._hear(owner[id(pipe)])

    def _hear(self, worker: Worker) -> Event:
        pipe = self._hands[worker].pipe
        try:
            content = pipe.recv_bytes()
            if content == _READY:
                return Ready(worker)
            ticket = int.from_bytes(content, "little")
            return heard(worker, ticket, pipe.recv_bytes())
        except (EOFError, OSError):  # it ended, perhaps in the middle of an answer
            return Died(worker, self._buried(worker))

    def _buried(self, worker: Worker) -> str:
        """Let go of a process that ended, and say how it did."""
        hand = self._hands.pop(worker)
        hand.pipe.close()
        hand.process.join(_SECONDS)
        if hand.process.exitcode is None:
            hand.process.kill()
            hand.process.join()
        self._places.append(hand.place)
        code = hand.process.exitcode or 0
        known = -code in {int(s) for s in signal.Signals}
        last = self._folder / f"last-words-{hand.process.pid}"
        said = f": {last.read_text(encoding='utf-8')}" if last.exists() else ""
        return (f"signal {signal.Signals(-code).name}" if known else f"exit code {code}") + said

    def close(self) -> None:
        for hand in self._hands.values():
            hand.process.kill()
        for hand in self._hands.values():
            hand.process.join()
            hand.pipe.close()
        self._hands.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


def _serve(pipe: Connection, work: Path, threads: int, place: str) -> None:
    """Be a worker, until the pipe or the one who started it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["CUDA_VISIBLE_DEVICES"] = place
    try:
        do = received(work.read_bytes(), threads)
    except Exception as e:
        work.with_name(f"last-words-{os.getpid()}").write_text(f"{type(e).__name__}: {e}", encoding="utf-8")
        raise SystemExit(1) from None
    pipe.send_bytes(_READY)
    with contextlib.suppress(EOFError):
        while True:
            ticket, task = pipe.recv()
            content = attempt(do, task)
            pipe.send_bytes(ticket.to_bytes(8, "little"))
            pipe.send_bytes(content)


def _end_with_parent() -> None:
    """End at once when the process that started this one has ended, however it did: nobody waits for an answer."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
