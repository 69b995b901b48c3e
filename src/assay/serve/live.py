"""A walk to a class while it is under way: a thread that climbs, and what it has found so far."""

import secrets
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn

from assay.core.errors import AssayError
from assay.models import Door, Model
from assay.serve.sources import Sources
from assay.study.walk import Walk, climb, walk

UNWATCHED: Final = 15.0
"""Seconds after which a walk that nobody watches ends."""

_STEPS: Final = 200
_AT_ONCE: Final = 4
"""Walks that are remembered; the oldest is forgotten first."""


class _WalkEndedError(AssayError):
    """The walk was cancelled, or nobody watches it any more; raised out of the model."""


@final
@dataclass(slots=True)
class Climb:
    """A walk from a sample to a class: the steps so far, and at the end the smallest change that was found.

    ``state`` is ``climbing``, ``searching``, ``done``, ``cancelled`` or ``failed``.
    """

    x: Tensor
    target: int
    norm: str
    index: int
    box: tuple[float, float]
    state: str = "climbing"
    frames: list[np.ndarray] = field(default_factory=list)
    sure: list[np.ndarray] = field(default_factory=list)
    found: Walk | None = None
    error: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    seen: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return self.state in ("done", "cancelled", "failed")

    def check(self) -> None:
        """Raise where the walk is to end."""
        if self.stop.is_set() or time.monotonic() - self.seen > UNWATCHED:
            raise _WalkEndedError("somebody who watches the walk", "nobody", "Start it again.")


@final
class Walks:
    """The walks of a server. One is under way at a time: a new one ends the one before."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._walks: dict[str, Climb] = {}
        self._lock = threading.Lock()

    def start(self, model: Model, x: Tensor, target: int, norm: str, index: int = 0) -> str:
        """Begin a walk, and return by which name it is asked for."""
        box = (model.domain.lo, model.domain.hi)
        new, name = Climb(x, target, norm, index, box), secrets.token_hex(8)
        with self._lock:
            for other in self._walks.values():
                other.stop.set()
            while len(self._walks) >= _AT_ONCE:
                del self._walks[next(iter(self._walks))]
            self._walks[name] = new
        threading.Thread(target=self._go, args=(model, new), daemon=True).start()
        return name

    def get(self, name: Any) -> Climb | None:
        """Return a walk, and note that somebody watches it."""
        with self._lock:
            found = self._walks.get(name) if isinstance(name, str) else None
        if found is not None:
            found.seen = time.monotonic()
        return found

    def _go(self, model: Model, job: Climb) -> None:
        try:
            with self._sources.use, _Stopped(model, job):
                with closing(climb(model, job.x, job.target, job.norm, index=job.index)) as steps:
                    for x, sure in steps:
                        job.sure.append(sure)
                        job.frames.append(x)  # last: whoever sees a frame may ask how sure the model is
                        job.check()
                job.state = "searching"
                how: dict[str, Any] = {"index": job.index, "targets": (job.target,), "ascent": False, "slice_steps": 0}
                job.found = walk(model, job.x, job.target, job.norm, steps=_STEPS, **how)
            job.state = "done"
        except _WalkEndedError:
            job.state = "cancelled"
        except Exception as e:  # the user's model may raise anything, and the page must say it
            job.error = str(e) if isinstance(e, AssayError) else f"{type(e).__name__}: {e}"
            job.state = "failed"


@final
class _Stopped:
    """While it is open, a module whose walk is to end refuses to answer; another callable is asked to the end."""

    def __init__(self, model: Model, job: Climb) -> None:
        self._net = model.net if isinstance(model.net, nn.Module) else nn.Module()
        self._job = job

    def __enter__(self) -> None:
        self._job.check()
        self._handle = self._net.register_forward_pre_hook(lambda *_: self._job.check())

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def predicted(model: Model, x: Tensor, sources: Sources) -> np.ndarray:
    """Return the probabilities (c,) of one sample (*f)."""
    with sources.use, model.frozen() as live:
        rows = torch.zeros(1, dtype=torch.int64, device=live.device)
        sure: np.ndarray = Door(live, 1).logits(x[None].to(live.device), rows).softmax(1)[0].cpu().numpy()
    return sure
