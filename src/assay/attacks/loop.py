"""The one step loop. Queries, best-so-far, the last iterate, the active set and the rules are handled here only."""

from abc import abstractmethod
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor

from assay.attacks.attack import Outcome, Runnable, needs_eps
from assay.core.errors import AssayError, ThreatError
from assay.core.types import Inputs, Mask, PerSample, Rows, choose
from assay.models.door import Decision, Door, Gradient, Loss, Score
from assay.threats.problem import Problem


@runtime_checkable
class HasX(Protocol):
    """A state: a NamedTuple of tensors, one row a sample; ``x`` is the next point to query."""

    @property
    def x(self) -> Inputs: ...


class Evidence(Protocol):
    """What a query tells: at least whether it met the goal."""

    @property
    def success(self) -> Mask: ...

    def take(self, rows: Rows) -> "Evidence": ...


S = TypeVar("S", bound=HasX)
E = TypeVar("E", bound=Evidence)


class StepAttack(Runnable, Generic[S, E]):
    """Hyper-parameters and two pure functions, ``init`` and ``update``; a subclass is final.

    ``norms`` are those that the attack is defined for, ``any_size`` says that it works without an eps.
    """

    __slots__ = ()
    norms: ClassVar[tuple[str, ...]]
    any_size: ClassVar[bool] = False
    steps: int

    @abstractmethod
    def init(self, p: Problem) -> S:
        """Return the state before the first query."""

    @abstractmethod
    def update(self, p: Problem, s: S, e: E, k: int) -> S:
        """Return the state after query ``k`` (0, 1, ...) of ``s.x`` was answered by ``e``."""

    @abstractmethod
    def query(self, door: Door, x: Inputs, p: Problem) -> E:
        """Ask what this kind of attack may ask."""

    @abstractmethod
    def rank(self, e: E) -> PerSample:
        """Return how good a point is, as far as this kind of attack can tell; among equals the first wins."""

    def last(self, door: Door, x: Inputs, p: Problem) -> E:
        """Ask about the last point, of which no gradient is needed."""
        return self.query(door, x, p)

    @final
    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        self._fits(p)
        out, live = Outcome.nothing(p), torch.arange(len(p), device=p.x0.device)
        s, best = self.init(p), Best.nothing(p)
        for k in range(self.steps + 1):
            e = self.query(door, s.x, p) if k < self.steps else self.last(door, s.x, p)
            best = best.or_better(p, s.x, e.success, self.rank(e))
            going = ~best.success
            if not full and not going.all():
                fallen, rows = best.success.nonzero()[:, 0], going.nonzero()[:, 0]
                out = out.updated(live[fallen], best.take(fallen).outcome(), by=0)
                live, p, best = live[rows], p.take(rows), best.take(rows)
                s, e = _take(s, rows), e.take(rows)  # type: ignore[assignment]
                if not len(live):
                    return out
            if k < self.steps:
                s = self.update(p, s, e, k)
        return out.updated(live, best.outcome(), by=0)

    def _fits(self, p: Problem) -> None:
        what = type(self).__name__
        if p.norm.name not in self.norms:
            raise ThreatError(f"one of {', '.join(self.norms)} for {what}", p.norm.name, "Choose another attack.")
        if not self.any_size:
            needs_eps(p, what)
        if self.steps < 1:
            raise AssayError(f"steps >= 1 for {what}", f"{self.steps}", "An attack that asks nothing finds nothing.")


class GradientAttack(StepAttack[S, Gradient]):
    """An attack that sees the gradient of its ``loss``."""

    __slots__ = ()
    loss: Loss

    @final
    def query(self, door: Door, x: Inputs, p: Problem) -> Gradient:
        return door.gradient(x, p, self.loss)

    @final
    def last(self, door: Door, x: Inputs, p: Problem) -> Gradient:
        e = door.score(x, p, self.loss)
        return Gradient(e.success, e.loss, e.logits, torch.zeros_like(x))

    @final
    def rank(self, e: Gradient) -> PerSample:
        return e.loss


class ScoreAttack(StepAttack[S, Score]):
    """An attack that sees logits, and so any loss of them."""

    __slots__ = ()
    loss: Loss

    @final
    def query(self, door: Door, x: Inputs, p: Problem) -> Score:
        return door.score(x, p, self.loss)

    @final
    def rank(self, e: Score) -> PerSample:
        return e.loss


class DecisionAttack(StepAttack[S, Decision]):
    """An attack that sees predicted labels only."""

    __slots__ = ()

    @final
    def query(self, door: Door, x: Inputs, p: Problem) -> Decision:
        return door.decide(x, p)

    @final
    def rank(self, e: Decision) -> PerSample:
        return e.success.float()


class Best(NamedTuple):
    """The best point so far of each sample: any that succeeds before any that does not, then the higher rank.

    Where the smallest perturbation is wanted, only points that succeed count, and the smallest is best.
    """

    x: Inputs
    success: Mask
    rank: PerSample

    @classmethod
    def nothing(cls, p: Problem) -> "Best":
        low = p.full(-torch.inf)
        return cls(p.x0, torch.zeros_like(low, dtype=torch.bool), low)

    def or_better(self, p: Problem, x: Inputs, success: Mask, rank: PerSample) -> "Best":
        allowed = p.allows(x)
        success = success & allowed
        rank = torch.where(success, -p.size(x), -torch.inf) if p.minimal else rank.to(x.dtype)
        better = allowed & ((success & ~self.success) | ((success == self.success) & (rank > self.rank)))
        if better.all():
            return Best(x, success, rank)
        return Best(choose(better, x, self.x), self.success | (success & better), torch.where(better, rank, self.rank))

    def take(self, rows: Rows) -> "Best":
        return Best(*(v[rows] for v in self))

    def outcome(self) -> Outcome:
        return Outcome(self.x, self.success, torch.where(self.success, 0, -1))


def _take(state: S, rows: Rows) -> S:
    tensors: tuple[Tensor, ...] = tuple(v[rows] for v in state)  # type: ignore[attr-defined]
    return type(state)(*tensors)
