"""What the pages of one server share, and what they can be about: a sample of a run, or an image that was uploaded."""

import secrets
import threading
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from assay.core.errors import AssayError, DataError, RunError
from assay.models import Model
from assay.reports.summary import Summary, dig
from assay.serve.catalogue import Arrays, Catalogue, Kept
from assay.serve.live import Walks
from assay.serve.sources import Sources
from assay.threats.norms import NORMS

_UPLOADS: Final = 8
"""Images that are remembered; the oldest is forgotten first."""


@final
@dataclass(frozen=True, slots=True)
class Shelf:
    """The runs of a folder, the models and data that they may be looked at with, and the walks under way."""

    catalogue: Catalogue
    sources: Sources
    walks: Walks
    uploads: "Uploads"

    def clean(self, run: Kept, index: int, stored: Arrays) -> np.ndarray | None:
        """Return the clean input (*f) of a sample: as the run has it, else out of its data; None where neither has."""
        if "clean" in stored:
            return np.asarray(stored["clean"])
        try:
            data = self.sources.data(run)
            return data.batch([index])[0].numpy() if 0 <= index < len(data) else None
        except AssayError:
            return None

    def subject(self, where: Any) -> "Subject":
        """Return what a walk is to start from: ``run`` with ``index`` or ``upload``.

        Raises:
            RunError, ModelError, DataError: it is not there.
        """
        run = self.catalogue.open(str(dig(where, "run")))
        model, upload = self.sources.model(run), dig(where, "upload")
        if upload is not None:
            return Subject(run, model, self.uploads.get(upload), 0)
        index = dig(where, "index")
        if not isinstance(index, int) or run.row(index) is None:
            raise RunError(f"a sample of {run.name}", repr(index)[:40], "Choose one from the run's page.")
        x = self.clean(run, index, run.arrays([index]).get(index, {}))
        if x is None:
            raise DataError("the clean input", "neither the run nor its data have it", "Name the data with --data.")
        return Subject(run, model, torch.from_numpy(np.ascontiguousarray(x)).float(), index)


@final
@dataclass(frozen=True, slots=True)
class Subject:
    """An input (*f) of a model, of a run."""

    run: Kept
    model: Model
    x: Tensor
    index: int

    @property
    def norm(self) -> str:
        """The norm of the run's threat; l2 where it has another measure."""
        return self.run.summary.norm if self.run.summary.norm in NORMS else "l2"

    def label(self, number: int) -> str:
        """Return the name of a class, or its number."""
        return class_name(self.run.summary, self.model, number)


def class_name(s: Summary, model: Model | None, number: int) -> str:
    """Return what the run calls a class, else what the model does."""
    named = model.class_names if model is not None and not s.names else None
    return named[number] if named and 0 <= number < len(named) else s.label(number)


@final
@dataclass(slots=True)
class Uploads:
    """Images that were uploaded, by a name that cannot be guessed."""

    _kept: dict[str, Tensor] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, x: Tensor) -> str:
        """Keep an input, and return its name."""
        name = secrets.token_hex(8)
        with self._lock:
            while len(self._kept) >= _UPLOADS:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = x
        return name

    def get(self, name: Any) -> Tensor:
        """Return an input.

        Raises:
            DataError: it is not there any more.
        """
        with self._lock:
            found = self._kept.get(name) if isinstance(name, str) else None
        if found is None:
            raise DataError("an image that was uploaded", "it is not remembered any more", "Upload it again.")
        return found
