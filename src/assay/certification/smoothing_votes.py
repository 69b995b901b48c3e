"""How a model votes on noisy copies of its inputs: counted draw by draw, in any batches, and kept where asked."""

import hashlib
import json
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from assay.certification.smoothing_noise import Noise
from assay.core.errors import DataError, RunError
from assay.core.files import replacing
from assay.core.progress import Progress, Snapshot
from assay.core.random import Draws
from assay.core.types import Inputs, Labels
from assay.models import Door, Model
from assay.models.fingerprint import fingerprint

_NOISE: Final = 0x5301
"""Names the random numbers that noise is drawn from."""

_SECONDS: Final = 5.0
"""Between two saves, at least."""


@final
@dataclass(frozen=True, slots=True)
class Poll:
    """A question to a model: which class it sees in each of many noisy copies of the inputs x (b, *f).

    Args:
        stages: how many copies in each stage, by the number that names the stage's own random numbers.
        keys: (b,) int64, the samples' indices in their data. Sample, stage, seed and the copy's number make its noise.
        label: (b,) int64, for progress; or None.
        batch: copies in one call of the model.
    """

    model: Model
    noise: Noise
    x: Inputs
    label: Labels | None
    keys: Labels
    stages: Mapping[int, int]
    seed: int
    batch: int
    device: torch.device | str | None

    def run(self, progress: Progress, journal: Path | None) -> tuple[Tensor, Labels]:
        """Return the votes (stages, b, c) int64, and the passes (b,) that they took in this call."""
        begin = time.perf_counter()
        kept = Journal(journal, self._settings() if journal else {})
        with self.model.frozen(self.device) as live:
            door = Door(live, len(self.x), indices=self.keys)
            votes = kept.load(live.device)
            try:
                for counted in self._ask(door, votes):
                    votes = counted
                    self._check_labels(votes.shape[2])
                    kept.save(votes)
                    progress(self._snapshot(votes, door, time.perf_counter() - begin))
            finally:
                kept.save(votes, now=True)
            assert votes is not None
            return votes.cpu(), door.forwards.cpu()

    def _ask(self, door: Door, votes: Tensor | None) -> Iterator[Tensor]:
        """Go on from these votes; yield all votes after each call of the model.

        Each copy has one vote, and copies come in their order: so the votes say how far we are. They are added in one
        operation, which an interruption cannot split.
        """
        x, place = self.x.to(door.live.device), door.live.device
        streams = Draws.of(self.seed, self.keys.to(place))
        for at, (stage, count) in enumerate(self.stages.items()):
            keys, total = streams.fold(stage).keys, len(x) * count
            for first in range(0 if votes is None else int(votes[at].sum()), total, self.batch):
                copy = torch.arange(first, min(first + self.batch, total), device=place)
                rows, number = copy // count, copy % count
                z = door.logits(self.noise.apply(x[rows], Draws.of(_NOISE, keys[rows] + number)), rows)
                if votes is None:
                    votes = torch.zeros(len(self.stages), len(x), z.shape[1], dtype=torch.int64, device=place)
                votes[at].view(-1).index_add_(0, rows * z.shape[1] + z.argmax(1), torch.ones_like(rows))
                yield votes

    def _snapshot(self, votes: Tensor, door: Door, seconds: float) -> Snapshot:
        done = int(votes[-1].sum()) // [*self.stages.values()][-1]
        guess = votes[0, :done].argmax(1).cpu()
        right = done if self.label is None else int((guess == self.label[:done]).sum())
        return Snapshot(len(self.x), done, right, 0, "smoothing", int(door.forwards.sum()), seconds)

    def _check_labels(self, classes: int) -> None:
        if self.label is not None and int(self.label.max()) >= classes:
            raise DataError(
                f"labels from 0 to {classes - 1}, for the model has {classes} classes",
                f"labels up to {int(self.label.max())}",
                "Check that model and data belong together, and the order of the classes.",
                code="bad-logits",
            )

    def _settings(self) -> dict[str, Any]:
        """Return all that the votes depend on, but for the machine."""
        return {
            "model": fingerprint(self.model),
            "noise": repr(self.noise),
            "inputs": f"{self.x.dtype} {tuple(self.x.shape)} {_digest(self.x)}",
            "indices": _digest(self.keys),
            "seed": self.seed,
            "draws": [*self.stages.values()],
        }


@final
class Journal:
    """A file for votes, replaced as a whole: a kill at any moment leaves a valid one. None keeps them nowhere.

    Raises:
        RunError: the file holds the votes of another poll, or cannot be written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self._next = time.monotonic() + _SECONDS

    def load(self, device: torch.device) -> Tensor | None:
        """Return the votes that were saved last; None where there are none."""
        if self.path is None or not self.path.exists():
            return None
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                settings, votes = json.loads(str(arrays["settings"])), arrays["votes"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
            found = f"{self.path}: {str(e).splitlines()[0]}"
            raise RunError("a journal of votes", found, "Name another file, or remove it.") from e
        if wrong := [k for k, v in self.settings.items() if settings.get(k) != v]:
            found = "; ".join(f"{k} {settings.get(k)} instead of {self.settings[k]}" for k in wrong)
            raise RunError(f"the votes of this call in {self.path}", found, "Name another journal for other settings.")
        return torch.from_numpy(votes).to(device)

    def save(self, votes: Tensor | None, *, now: bool = False) -> None:
        """Write the votes, if the last time is long enough ago."""
        if self.path is None or votes is None or not (now or time.monotonic() >= self._next):
            return
        try:
            with replacing(self.path) as f:
                np.savez(f, votes=votes.cpu().numpy(), settings=np.array(json.dumps(self.settings)))
        except OSError as e:
            raise RunError("a journal that can be written", f"{self.path}: {e.strerror}", "Name another file.") from e
        self._next = time.monotonic() + _SECONDS


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.cpu().contiguous().numpy().tobytes()).hexdigest()
