"""What was found: a record for each sample, their quantiles, and the files that they are written to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from assay.reports.attribution import write_attribution
from assay.study.attribution.compare import Compared, plain_of
from assay.study.kept import keep
from assay.study.measures import Values

_LEVELS: Final = (0.1, 0.5, 0.9)
"""The quantiles over samples that sum a number up."""


@final
@dataclass(frozen=True, slots=True)
class Sample:
    """A sample that the model has right, and what the attack made of it.

    ``rival`` is the class other than the label with the largest logit at the attacked input: what it is taken for,
    where it ``fooled`` the model. ``size`` is that of the perturbation in the norm of the threat; ``steady`` says that
    the model is still right after a random change of the same sizes. ``sure`` (2, 2) are the probabilities of label
    and rival (rows) at the clean and the attacked input (columns). ``x`` and ``attacked`` (*f) are kept for the first
    samples only.
    """

    index: int
    label: int
    rival: int
    fooled: bool
    size: float
    steady: bool
    sure: Values
    by: dict[str, Compared]
    x: NDArray[np.float32] | None = None
    attacked: NDArray[np.float32] | None = None

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("index", "label", "rival", "fooled", "size", "steady")}
        return plain | {
            "sure": plain_of(self.sure),
            "methods": {name: found.to_json() for name, found in self.by.items()},
        }


@final
@dataclass(frozen=True, slots=True)
class Attribution:
    """What :func:`attribution` found: the samples that the model has right, in the order of the data.

    ``seen`` counts all samples that were looked at; ``pixels`` is the number of pixels (of values, where samples are no
    images), of which the ``k`` with the largest attributions are the top ones.
    """

    model: str
    data: str
    threat: str
    attack: dict[str, Any]
    methods: tuple[str, ...]
    baseline: str
    steps: int
    samples: tuple[Sample, ...]
    seen: int
    pixels: int
    k: int
    box: tuple[float, float]
    class_names: tuple[str, ...]
    seed: int
    forwards: int
    backwards: int

    def quantiles(self, method: str, what: str, at: tuple[int, int], *, fooled: bool) -> list[float] | None:
        """Return the 10 %, 50 % and 90 % quantiles of a number over the samples that were fooled, or were not.

        Args:
            method: ``integrated-gradients`` or ``saliency``.
            what: a number of :class:`Compared`.
            at: its row and column.
            fooled: which samples.

        Returns:
            None where no sample has that number.
        """
        values = np.array([getattr(s.by[method], what)[at] for s in self.samples if s.fooled is fooled])
        known = values[np.isfinite(values)]
        return list(np.quantile(known, _LEVELS).tolist()) if len(known) else None

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, without pictures; what is not a number is None."""
        names = ("model", "data", "threat", "attack", "baseline", "steps", "seen", "pixels", "k", "seed")
        return {
            **{name: getattr(self, name) for name in names},
            "fooled": sum(s.fooled for s in self.samples),
            "quantiles": list(_LEVELS),
            "summary": {name: {m: self._summary(m, fooled=way) for m in self.methods} for name, way in _GROUPS.items()},
            "passes": {"forwards": self.forwards, "backwards": self.backwards},
            "samples": [s.to_json() for s in self.samples],
        }

    def _summary(self, method: str, *, fooled: bool) -> dict[str, Any]:
        return {
            what: {
                f"{row}, {column}": self.quantiles(method, what, (i, j), fooled=fooled)
                for i, row in enumerate(("label", "rival"))
                for j, column in enumerate(columns)
            }
            for what, columns in _COLUMNS.items()
        }

    def report(self, path: Path | str, command: str = "") -> Path:
        """Write the page, one file that needs nothing else, and return where it is.

        Raises:
            RunError: it cannot be written.
        """
        return write_attribution(Path(path), self, command)

    def save(self, folder: Path | str, command: str = "") -> Path:
        """Write ``attribution.html``, ``attribution.json`` and, with the maps that were kept, ``attribution.npz``.

        Raises:
            RunError: the folder cannot be written.
        """
        folder = Path(folder)
        kept: dict[str, Any] = {f"{s.index}/{name}": v for s in self.samples for name, v in _arrays(s).items()}
        keep(folder, "attribution", self.to_json(), kept)
        self.report(folder / "attribution.html", command)
        return folder


_GROUPS: Final = {"fooled": True, "held": False}
_CHANGES, _INPUTS = ("attacked", "random"), ("clean", "attacked")
_COLUMNS: Final = {"rank": _CHANGES, "overlap": _CHANGES, "share": _INPUTS, "gap": _INPUTS}


def _arrays(s: Sample) -> dict[str, NDArray[np.float32]]:
    """Return the arrays of a sample that were kept, by name."""
    found = {"x": s.x, "attacked": s.attacked} | {name: c.maps for name, c in s.by.items()}
    return {name: v for name, v in found.items() if v is not None}
