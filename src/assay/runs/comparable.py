"""What of two runs can be compared when their threats or efforts differ."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import numpy as np
import pyarrow as pa

from assay.runs.paired import Flags
from assay.runs.schema import ROBUST, UNATTACKED, Status
from assay.runs.totals import number

Identity: TypeAlias = dict[str, Any]

_BALL: Final = ("norm", "box", "targeted", "quantize")
"""What two threats must share, beside eps, for anything but clean accuracy to be comparable."""


@final
@dataclass(frozen=True, slots=True)
class Terms:
    """What decides whether two runs are comparable: each has an own eps, effort and method of proof."""

    own: tuple[float | None, float | None]
    efforts: tuple[str, str]
    methods: tuple[str, str]
    unlike: tuple[str, ...]

    @classmethod
    def of(cls, a: Identity, b: Identity) -> "Terms":
        threats = [part(i, "threat") for i in (a, b)]
        return cls(
            own=(number(threats[0].get("eps")), number(threats[1].get("eps"))),
            efforts=(str(a.get("effort")), str(b.get("effort"))),
            methods=(str(part(a, "prove").get("method", "")), str(part(b, "prove").get("method", ""))),
            unlike=tuple(k for k in _BALL if threats[0].get(k) != threats[1].get(k)),
        )

    @property
    def ball(self) -> bool:
        """Whether the two balls are the same but for their size."""
        return not self.unlike

    @property
    def attacked(self) -> bool:
        return UNATTACKED not in self.efforts

    @property
    def proved(self) -> bool:
        """Whether both have proofs, of the same thing: smoothing proves something of another classifier."""
        return all(self.methods) and len({m == "smoothing" for m in self.methods}) == 1

    @property
    def eps(self) -> float | None:
        return min((v for v in self.own if v is not None), default=None) if self.ball else None

    @property
    def searched_alike(self) -> bool:
        return self.ball and self.attacked and self.own[0] == self.own[1]

    def robust(self, table: pa.Table, side: int) -> Flags:
        """Return (n,) which samples are right, and not known to fall within the common eps."""
        if self.own[side] == self.eps:
            return states(table, ROBUST)
        return _beyond(table, "size", np.nextafter(self.eps or 0.0, np.inf))

    def proven(self, table: pa.Table, side: int) -> Flags:
        """Return (n,) which samples are right, and proven so within the common eps."""
        if self.own[side] == self.eps:
            return np.array([v is True for v in table["certified"].to_pylist()])
        return _beyond(table, "lower", self.eps or 0.0)

    def notes(self) -> Iterator[str]:
        """Say what is comparable, and what is not."""
        if self.unlike:
            yield (
                f"The threats differ in {' and '.join(self.unlike)}: only clean accuracy is comparable. What is "
                "robust, proven or small under one of them says nothing about the other."
            )
            return
        yield from self._of_eps()
        if not self.attacked:
            yield "Not both runs attacked: robust accuracies and sizes are not compared."
        elif self.efforts[0] != self.efforts[1]:
            yield (
                f"The efforts differ ({' and '.join(self.efforts)}): a difference in robust accuracy or size may be "
                "one of the attacks, not of the models. Clean accuracy is comparable."
            )
        if any(self.methods) and not self.proved:
            said = "one of the two is about a smoothed classifier" if all(self.methods) else "only one run has proofs"
            yield f"Certified accuracies are not compared: {said}."

    def _of_eps(self) -> Iterator[str]:
        wider, eps = max((v is None, v or 0.0) for v in self.own), self.eps
        if eps is None or self.own[0] == self.own[1]:
            return
        upto = "without a limit" if wider[0] else f"up to {wider[1]:.6g}"
        yield (
            f"The runs are compared at eps {eps:.6g}, the smaller one. The other run searched {upto}: there a sample "
            f"counts as robust when no change of at most {eps:.6g} was found, and a search at that eps may find one. "
            "Clean accuracy is comparable; sizes are not, since one search went further."
        )


def _beyond(table: pa.Table, column: str, least: float) -> Flags:
    """Return (n,) which samples are right, with at least so much in a column."""
    enough: Flags = table[column].to_numpy() >= least
    return ~states(table, "misclassified") & enough


def states(table: pa.Table, status: Status) -> Flags:
    """Return (n,) which samples have this status."""
    return np.array([s == status for s in table["status"].to_pylist()], dtype=bool)


def part(value: Any, key: str) -> dict[str, Any]:
    """Return the object under a key, an empty one where there is none."""
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}
