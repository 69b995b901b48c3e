"""What all noise shares: as strong as the ball lets it be, several draws of it, and the smallest that is enough."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, TypeAlias, final, runtime_checkable

import torch

from assay.attacks.attack import Outcome, Runnable
from assay.attacks.combine import Bisect
from assay.attacks.loop import DecisionAttack
from assay.core.registry import UsageError
from assay.core.types import Inputs, PerSample
from assay.models.door import Decision, Door
from assay.threats.problem import Problem

_HALVINGS = 30
"""Of the range of strengths, which costs no query."""

Way: TypeAlias = Callable[[PerSample], Inputs]
"""From strengths (b,) between 0, the clean inputs, and 1 to points (b, *f) inside the box. Sizes grow along it,
but for ripples that blur has in linf: there a larger point inside the ball than the one taken may exist."""


@runtime_checkable
class Kind(Protocol):
    """A kind of noise: how it grows with its strength."""

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of the norms in which sizes grow with the strength."""
        ...

    @property
    def keeps_mean(self) -> bool:
        """The mean of an input never changes, so that there are linear models which cannot be fooled."""
        ...

    def way(self, p: Problem, draw: int) -> Way:
        """Return the way that draw number ``draw`` takes."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Noise(Runnable):
    """Asks about noise that fills the ball; without an eps, bisects over its size.

    Of each size there are up to ``draws`` independent ones, until one meets the goal. The strength of a draw is the
    largest whose point, after clipping into the box, is inside the ball; finding it asks the model nothing.

    *Sees* the predicted label. *Cost* with an eps at most ``draws`` forwards; without one at most ``rounds`` as many.

    Args:
        kind: of noise.
        draws: of a size, at least one (else a UsageError is raised).
        rounds: sizes that are tried where there is no eps (:class:`assay.attacks.Bisect`).

    Example:
        >>> import torch
        >>> from assay.attacks.noise.images import Contrast
        >>> first = lambda x: torch.stack([0.7 - x[:, 0], x[:, 0] - 0.7], 1)
        >>> x, y = torch.tensor([[0.9, 0.1]]), torch.tensor([1])
        >>> round(float(Noise(Contrast(), draws=1, rounds=16)(first, x, y, "linf").size), 2)
        0.2

    References:
        Rauber & Bethge 2020, arXiv:2007.07677 (noise whose size is exact after clipping).
    """

    any_size: ClassVar[bool] = True
    kind: Kind
    draws: int = 20
    rounds: int = 10

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise UsageError("draws >= 1", f"{self.draws}", "For example 20.")

    @property
    def norms(self) -> tuple[str, ...]:
        return self.kind.norms

    @property
    def sizeless(self) -> bool:
        """Say that this is not asked to find what a norm calls easy."""
        return self.kind.keeps_mean

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        filling = Filling(self.kind, self.draws)
        attack = Bisect(filling, self.rounds) if p.minimal else filling
        return attack.run(door, p, full=full)


class FillingState(NamedTuple):
    """The next point."""

    x: Inputs


@final
@dataclass(frozen=True, slots=True)
class Filling(DecisionAttack[FillingState]):
    """Asks about ``draws`` draws of noise, each as strong as the ball of a given eps lets it be."""

    kind: Kind
    draws: int

    @property
    def norms(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.kind.norms

    @property
    def steps(self) -> int:  # type: ignore[override]
        return self.draws

    @property
    def questions(self) -> int:
        return self.draws - 1  # the loop asks once more, about the last point

    def init(self, p: Problem) -> FillingState:
        return FillingState(strongest(p, self.kind.way(p, 0)))

    def update(self, p: Problem, s: FillingState, e: Decision, k: int) -> FillingState:
        return FillingState(strongest(p, self.kind.way(p, k + 1)))


def strongest(p: Problem, way: Way) -> Inputs:
    """Return the last point of a way that is inside the ball."""
    whole = p.full(1.0)
    low = torch.where(p.size(way(whole)) <= p.radius, whole, 0)
    high = whole
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        inside = p.size(way(middle)) <= p.radius
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return p.project(way(low))
