"""What is proven of the samples of a block, group by group; its state can be saved between any two groups."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Final, Protocol, final

import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.attacks import PGD
from assay.certification import Proof
from assay.certification.certify import TOGETHER, check_margins
from assay.certification.prover import Prover
from assay.certification.radius import BEYOND, bisect
from assay.core.types import Inputs, Labels, Logits, Mask, PerSample
from assay.evaluation.race import Round
from assay.threats import Threat

CHALLENGE: Final = (Round("challenge", "challenge", PGD(steps=1, rel_step=1.0, start="clean")),)
"""One step, straight to the rim of the ball, against what is proven: so that a proof that is wrong can show that it is.
It costs a few passes; without it nothing would ever be asked about what is proven, and an error would raise a score."""

STEPS: Final = 7
"""Of the bisection of a radius: an uncertainty of a hundredth of where it begins."""

COMPLETE: Final = "complete"


@final
@dataclass(slots=True)
class Proven:
    """What is known of n samples, on the CPU.

    ``margins`` (n, c) are lower bounds over the ball of the threat, -inf where none was asked for; ``lower`` (n,) is
    the size up to which a sample is proven; ``tried`` and ``searched`` (n,) say what is done: the cheap methods or the
    radius, and the complete search.
    """

    margins: Tensor
    lower: PerSample
    tried: Mask
    searched: Mask

    @classmethod
    def nothing(cls, n: int, classes: int) -> "Proven":
        margins, no = torch.full((n, classes), -torch.inf, dtype=torch.float64), torch.zeros(n, dtype=torch.bool)
        return cls(margins, torch.zeros(n, dtype=torch.float64), no, no.clone())

    @property
    def excluded(self) -> Mask:
        """Classes (n, c) that no point of the ball is taken for; and the label, of a sample that was asked about."""
        return self.margins > 0

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        return {f"proven.{f.name}": getattr(self, f.name).numpy() for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "Proven":
        return cls(*(torch.from_numpy(arrays[f"proven.{f.name}"]) for f in fields(cls)))


class Clock(Protocol):
    """Times stages, and tells whoever watches."""

    @property
    def tell(self) -> Callable[[str, int], None]: ...

    def stage(self, name: str, kind: str, entered: int) -> AbstractContextManager[dict[str, Any]]: ...


@final
@dataclass(slots=True)
class Proving:
    """Proves samples x (n, *f) with labels y (n,), group by group; ``save`` is called after each.

    No group begins after ``deadline``, on the clock ``time.monotonic``.
    """

    proof: Proof
    prover: Prover
    threat: Threat
    x: Inputs
    y: Labels
    index: Labels
    clock: Clock
    deadline: float
    save: Callable[[], None]
    clean: Logits | None = None  # to compare bounds with, once known
    late: bool = False  # the deadline has cut something off

    def cheaply(self, known: Proven, entered: Mask) -> None:
        """Try, in the ball of the threat, all methods that do not search."""
        self._prove(known, self.proof.cheap, entered & ~known.tried, known.tried)

    def completely(self, known: Proven, entered: Mask) -> None:
        """Search for what no other method proves."""
        self._prove(known, COMPLETE, entered & ~known.searched, known.searched)

    def _prove(self, known: Proven, method: str, entered: Mask, done: Mask) -> None:
        eps = self.threat.eps
        assert eps is not None
        prover = copy.copy(self.prover)
        prover.method = method
        for ids, stage in self._groups(f"proof: {method}", entered):
            margins = self._margins(prover, ids, torch.full((len(ids),), eps, dtype=torch.float64))
            known.margins[ids], done[ids] = torch.maximum(known.margins[ids], margins), True
            holds = known.margins[ids].amin(1) > 0
            known.lower[ids] = torch.where(holds, eps, known.lower[ids])
            stage["proven"] += int(holds.sum())

    def radius(self, known: Proven, entered: Mask, sizes: PerSample) -> None:
        """Search for the radius up to which each sample is proven, from the sizes (n,) at which they are broken."""
        assert self.threat.box is not None
        norm = self.threat.norm
        most = norm.diameter(self.threat.box.width, self.x[0].numel())
        for ids, stage in self._groups(f"radius: {self.proof.method}", entered & ~known.tried):

            def holds(at: Labels, radius: PerSample, step: int, ids: Labels = ids) -> Mask:
                return self._margins(self.prover, ids[at], radius, f" {step + 1}/{STEPS}").amin(1) > 0

            far = (sizes[ids] * BEYOND).clamp_max(most)
            known.lower[ids] = bisect(holds, far, STEPS, whole=norm.name == "l0")
            known.tried[ids] = True
            stage["proven"] += int((known.lower[ids] > 0).sum())

    def _groups(self, name: str, entered: Mask) -> Iterator[tuple[Labels, dict[str, Any]]]:
        """Yield, group by group, the samples that are to be proven, and the row of their stage."""
        rows = entered.nonzero()[:, 0]
        for ids in rows.split(TOGETHER) if len(rows) else ():  # type: ignore[no-untyped-call]
            if time.monotonic() >= self.deadline:
                self.late = True
                return
            with self.clock.stage(name, "proof", len(ids)) as stage:
                stage.setdefault("proven", 0)
                yield ids, stage
            self.save()

    def _margins(self, prover: Prover, ids: Labels, radius: PerSample, also: str = "") -> Tensor:
        def tell(method: str, left: int) -> None:
            self.clock.tell(f"proof: {method}{also}, {left} open", 0)

        x, y, norm = self.x[ids], self.y[ids], self.threat.norm.name
        found = prover.margins(x, y, radius, norm, tell).cpu()
        assert self.clean is not None
        check_margins(found, x, y, self.clean[ids], self.index[ids], norm, prover)
        return found
