"""The one step loop. Queries, best-so-far, the last iterate, the active set and the rules are handled here only."""

from abc import abstractmethod
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor

from assay.attacks.attack import Outcome, Runnable, needs_eps
from assay.core.errors import ThreatError
from assay.core.registry import UsageError
from assay.core.types import Inputs, Logits, Mask, PerSample, Rows, choose
from assay.models.door import Decision, Door, Gradient, Loss, Score, Slopes
from assay.threats.problem import Goal, Problem


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
    ``minimal`` says that it looks for ever smaller perturbations: it gets a problem that only the box bounds, whatever
    the eps, and goes on after a success where there is no eps.
    """

    __slots__ = ()
    norms: ClassVar[tuple[str, ...]]
    any_size: ClassVar[bool] = False
    minimal: ClassVar[bool] = False
    steps: int

    @property
    def questions(self) -> int:
        """The number of queries, but for a last one that needs no gradient."""
        return self.steps

    @abstractmethod
    def init(self, p: Problem) -> S:
        """Return the state before the first query."""

    @abstractmethod
    def update(self, p: Problem, s: S, e: E, k: int) -> S:
        """Return the state after query ``k`` (0, 1, ...) of ``s.x`` was answered by ``e``."""

    @abstractmethod
    def query(self, door: Door, x: Inputs, p: Problem, k: int) -> E:
        """Ask what this kind of attack may ask."""

    @abstractmethod
    def rank(self, e: E) -> PerSample:
        """Return how good a point is, as far as this kind of attack can tell; among equals the first wins."""

    def done(self, s: S) -> Mask | None:
        """Tell which samples need no more queries (b,); None stands for no sample."""
        return None

    @final
    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        self._fits(p)
        if (can := door.affords(p.rows, self.cost(0))) is not None:
            return self._run_rows(door, p, can.nonzero()[:, 0], full=full)
        out, live = Outcome.nothing(p), torch.arange(len(p), device=p.x0.device)
        q = p.unbounded() if self.minimal else p
        s, best = self.init(q), Best.nothing(p)
        on = full or (self.minimal and p.minimal)  # after a success
        for k in range(self.questions + 1):
            x = q.snap(s.x)
            e = self.query(door, x, q, k)
            best = self._counted(door, p, x, e, best)
            if k == self.questions:
                break
            going = self._going(door, q, s, best, k, on=on)
            if going is not None:
                left, rows = (~going).nonzero()[:, 0], going.nonzero()[:, 0]
                out = out.updated(live[left], best.take(left).outcome(), by=0)
                if not len(rows):
                    return out
                live, p, q, best = live[rows], p.take(rows), q.take(rows), best.take(rows)
                s, e = _take(s, rows), e.take(rows)  # type: ignore[assignment]
            s = self.update(q, s, e, k)
        return out.updated(live, best.outcome(), by=0)

    def _counted(self, door: Door, p: Problem, x: Inputs, e: E, best: "Best") -> "Best":
        """Return the best points, x among them; a success seen in less precision counts if the network agrees."""
        rank, smallest = self.rank(e), self.minimal or p.minimal
        after = best.or_better(p, x, e.success, rank, smallest=smallest)
        if not door.live.model.narrow or isinstance(e, Decision):  # decisions are the network's own already
            return after
        new = after.success & (~best.success | (after.rank > best.rank))
        return best.or_better(p, x, e.success & (~new | door.agrees(x, p, new)), rank, smallest=smallest)

    def _run_rows(self, door: Door, p: Problem, rows: Rows, *, full: bool) -> Outcome:
        """Run on those samples only that can pay for the first query."""
        out = Outcome.nothing(p)
        return out.updated(rows, self.run(door, p.take(rows), full=full), by=0) if len(rows) else out

    def _going(self, door: Door, p: Problem, s: S, best: "Best", k: int, *, on: bool) -> Mask | None:
        """Tell which samples go on after query k; None stands for all."""
        stops = [] if on else [best.success]
        if (done := self.done(s)) is not None:
            stops.append(done)
        if (can := door.affords(p.rows, self.cost(k + 1))) is not None:
            stops.append(~can)
        stop = torch.stack(stops).any(0) if stops else None
        return ~stop if stop is not None and stop.any() else None

    def cost(self, k: int) -> int:
        """Return the number of passes that query k costs a sample."""
        return 1

    def _fits(self, p: Problem) -> None:
        what = type(self).__name__
        if p.norm.name not in self.norms:
            raise ThreatError(f"one of {', '.join(self.norms)} for {what}", p.norm.name, "Choose another attack.")
        if not self.any_size:
            needs_eps(p, what)
        if self.steps < 1:
            raise UsageError(f"steps >= 1 for {what}", f"{self.steps}", "An attack that asks nothing finds nothing.")


class GradientAttack(StepAttack[S, Gradient]):
    """An attack that sees the gradient of its ``loss``, at the queries for which ``differentiates`` says so."""

    __slots__ = ()
    loss: Loss

    def differentiates(self, k: int) -> bool:
        """Tell whether query k needs a gradient; where it does not, zeros stand for it."""
        return k < self.questions

    def blind(self, p: Problem, k: int) -> bool:
        """Tell whether, for this problem, query k does without a gradient; zeros stand for it."""
        return False

    def query(self, door: Door, x: Inputs, p: Problem, k: int) -> Gradient:
        if self.differentiates(k) and not self.blind(p, k):
            return door.gradient(x, p, self.loss)
        return without_gradient(door, x, p, self.loss)

    @final
    def rank(self, e: Gradient) -> PerSample:
        return e.loss

    def cost(self, k: int) -> int:
        return 2 if self.differentiates(k) else 1


def without_gradient(door: Door, x: Inputs, p: Problem, loss: Loss) -> Gradient:
    """Ask for the loss alone; zeros stand for its gradient."""
    e = door.score(x, p, loss)
    return Gradient(e.success, e.loss, e.logits, torch.zeros_like(x))


class Around:
    """What an attack around a gradient attack says of itself: what that attack says."""

    __slots__ = ()
    attack: GradientAttack[Any]

    @property
    def norms(self) -> tuple[str, ...]:
        return self.attack.norms

    @property
    def any_size(self) -> bool:
        return self.attack.any_size

    @property
    def minimal(self) -> bool:
        return self.attack.minimal

    @property
    def steps(self) -> int:
        return self.attack.steps

    @property
    def loss(self) -> Loss:
        return self.attack.loss


class SlopesAttack(StepAttack[S, Slopes]):
    """An attack that sees the gradients of several functions of the logits, its ``measure``, at every query."""

    __slots__ = ()

    @abstractmethod
    def measure(self, logits: Logits, goal: Goal) -> Tensor:
        """Return the functions (b, m) whose gradients are wanted; the largest grows as the goal is approached."""

    @property
    @abstractmethod
    def functions(self) -> int:
        """The largest m that ``measure`` returns: each costs a backward pass."""

    def differentiates(self, k: int) -> bool:
        """Tell whether query k needs gradients; where it does not, zeros stand for them."""
        return k < self.questions

    @final
    def query(self, door: Door, x: Inputs, p: Problem, k: int) -> Slopes:
        if self.differentiates(k):
            return door.slopes(x, p, self.measure, self.functions)
        e = door.score(x, p, lambda z, goal: self.measure(z, goal).amax(1))
        return Slopes(e.success, e.logits, e.loss[:, None], torch.zeros_like(x)[:, None])

    @final
    def rank(self, e: Slopes) -> PerSample:
        return e.values.amax(1)

    def cost(self, k: int) -> int:
        return 1 + self.functions if self.differentiates(k) else 1


class ScoreAttack(StepAttack[S, Score]):
    """An attack that sees logits, and so any loss of them."""

    __slots__ = ()
    loss: Loss

    @final
    def query(self, door: Door, x: Inputs, p: Problem, k: int) -> Score:
        return door.score(x, p, self.loss)

    @final
    def rank(self, e: Score) -> PerSample:
        return e.loss


class DecisionAttack(StepAttack[S, Decision]):
    """An attack that sees predicted labels only."""

    __slots__ = ()

    @final
    def query(self, door: Door, x: Inputs, p: Problem, k: int) -> Decision:
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

    def or_better(self, p: Problem, x: Inputs, success: Mask, rank: PerSample, *, smallest: bool) -> "Best":
        allowed = p.allows(x)
        success = success & allowed
        rank = torch.where(success, -p.size(x), -torch.inf) if smallest else rank.to(x.dtype)
        better = allowed & ((success & ~self.success) | ((success == self.success) & (rank > self.rank)))
        if better.all():
            return Best(x, success, rank)
        return Best(choose(better, x, self.x), self.success | (success & better), torch.where(better, rank, self.rank))

    def take(self, rows: Rows) -> "Best":
        return Best(*(v[rows] for v in self))

    def outcome(self) -> Outcome:
        return Outcome(self.x, self.success, torch.where(self.success, 0, -1))


def _take(state: S, rows: Rows) -> S:
    """Return the state of some samples; parts of a state may be states."""
    parts = (v[rows] if isinstance(v, Tensor) else _take(v, rows) for v in state)  # type: ignore[attr-defined]
    return type(state)(*parts)
