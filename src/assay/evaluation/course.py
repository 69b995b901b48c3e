"""In which order a run goes through its samples, and when it has seen enough of them."""

from dataclasses import dataclass
from typing import Any, Final, final

import torch

from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.runs.statistics import sequential_interval
from assay.threats import Threat

BLOCK: Final = 1024
"""Samples that race against each other, and are stored together. It is part of what decides the numbers."""

_SIP: Final = 256
"""The same, where the run may stop as soon as the interval is narrow enough."""


@final
@dataclass(frozen=True, slots=True)
class Course:
    """When a run stops, besides at its end; all as in :func:`assay.evaluate`.

    Raises:
        UsageError: a width outside (0, 1), a negative time, or an eps that is not positive.
    """

    width: float | None = None
    seconds: float | None = None
    eps_list: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.width is not None and not 0 < self.width < 1:
            raise UsageError("until_interval between 0 and 1", f"{self.width}", "0.02 is a width of two points.")
        if self.seconds is not None and not self.seconds >= 0:
            raise UsageError("max_seconds of at least 0", f"{self.seconds}", "Leave it out for no limit.")
        if not all(eps > 0 for eps in self.eps_list):
            raise UsageError("positive eps_list", f"{self.eps_list}", "Give the eps in units of the box.")

    def within(self, threat: Threat) -> tuple[float, ...]:
        """Return the listed eps that are smaller than the threat's.

        Raises:
            UsageError: one of them is larger.
        """
        if threat.eps is not None and max(self.eps_list, default=0.0) > threat.eps:
            raise UsageError(
                f"eps_list up to the eps of the threat, {threat.eps:g}, which is what is attacked",
                f"{max(self.eps_list):g}",
                "Give the threat the largest of them.",
            )
        return tuple(eps for eps in self.eps_list if threat.eps is None or eps < threat.eps)

    def to_json(self) -> dict[str, Any]:
        """Return what of it decides the numbers."""
        return {"until_interval": self.width, "block": self.block}

    @property
    def block(self) -> int:
        """Samples that race against each other."""
        return BLOCK if self.width is None else _SIP

    def blocks(self, n: int, seed: int) -> list[list[int]]:
        """Return the positions of the samples of each block: in order, or at random where the run may stop early."""
        order = torch.arange(n)
        if self.width is not None:
            order = Draws.of(seed, order).fold(_LOTS).uniform((), torch.float64).argsort(stable=True)
        return [sorted(part.tolist()) for part in order.split(self.block)]  # type: ignore[no-untyped-call]

    def enough(self, standing: int, n: int) -> bool:
        """Tell whether the share of those standing is known well enough."""
        if self.width is None or not n:
            return False
        low, high = sequential_interval(standing, n)
        return high - low <= self.width


_LOTS = 13
"""Names the random numbers that order the samples."""
