"""The only door between an attack and a model: it counts every pass, keeps limits, and checks what comes back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from assay.core.errors import DataError, NonFiniteError
from assay.core.random import Draws
from assay.core.types import Inputs, Labels, Logits, Mask, PerSample, Rows
from assay.models.line import Answer, Line, Question, Through, narrowed
from assay.models.model import Live, Smoothing
from assay.threats.problem import Goal, Problem

_SMOOTHING = 0x5300
"""The stream of random numbers that estimated gradients draw their directions from."""

Loss: TypeAlias = Callable[[Logits, Goal], PerSample]
"""What an attack ascends: from logits (b, c) and the goal to one number a sample."""

Measure: TypeAlias = Callable[[Logits, Goal], Tensor]
"""Several functions of the logits at once: from logits (b, c) and the goal to (b, m)."""


@final
@dataclass(slots=True)
class Passes:
    """How many passes there were, all samples together."""

    forwards: int = 0
    backwards: int = 0


_METERS: ContextVar[tuple[Callable[[int, int], None], ...]] = ContextVar("meters", default=())


@contextmanager
def metered(listen: Callable[[int], None] | None = None) -> Iterator[Passes]:
    """Count what goes through all doors meanwhile, whoever opens them; tell ``listen`` the passes of each question."""
    passes = Passes()

    def count(forwards: int, backwards: int) -> None:
        passes.forwards += forwards
        passes.backwards += backwards
        if listen:
            listen(forwards + backwards)

    token = _METERS.set((*_METERS.get(), count))
    try:
        yield passes
    finally:
        _METERS.reset(token)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a query tells an attack that sees predicted labels only."""

    success: Mask
    label: Labels

    def take(self, rows: Rows) -> "Decision":
        return Decision(self.success[rows], self.label[rows])


@dataclass(frozen=True, slots=True)
class Score:
    """What a query tells an attack that sees the model's scores."""

    success: Mask
    loss: PerSample
    logits: Logits

    def take(self, rows: Rows) -> "Score":
        return Score(self.success[rows], self.loss[rows], self.logits[rows])


@dataclass(frozen=True, slots=True)
class Gradient:
    """What a query tells an attack that also sees the model's inside."""

    success: Mask
    loss: PerSample
    logits: Logits
    grad: Inputs  # d loss / d x

    def take(self, rows: Rows) -> "Gradient":
        return Gradient(self.success[rows], self.loss[rows], self.logits[rows], self.grad[rows])


@dataclass(frozen=True, slots=True)
class Slopes:
    """What a query tells an attack that asks for the gradients of several functions of the logits at once."""

    success: Mask
    logits: Logits
    values: Tensor  # (b, m)
    slopes: Tensor  # (b, m, *f): d values / d x

    def take(self, rows: Rows) -> "Slopes":
        return Slopes(self.success[rows], self.logits[rows], self.values[rows], self.slopes[rows])


@final
class Door:
    """Asks a frozen model about samples numbered 0 .. n - 1, and counts every pass of each.

    ``forwards`` and ``backwards`` (n,) int64 hold the passes so far; a network that averages m random passes counts m,
    and a smoothed gradient (``Smoothing``) all passes that it takes.
    Rows added to fill a batch are not counted. ``listen`` is told the number of passes after each call of the network.
    Scores and gradients come from layers tuned for speed and may differ by rounding (``patches.py``); ``logits``
    and ``decide`` ask the network exactly as it is. So a success that scores and gradients report is one that is clear.
    ``differentiable`` says, after a question for a gradient, whether the model had one.

    Raises (from every question):
        ModelOutputError: what came back is not (b, c) with c >= 2.
        NonFiniteError: NaN or infinity among the logits.
        ModelError: a handful of samples does not fit into memory.
        DataError: labels that the model has no class for.
    """

    def __init__(
        self,
        live: Live,
        n: int,
        listen: Callable[[int], None] | None = None,
        indices: Labels | None = None,
        ask: Callable[[Question], Answer] | None = None,
    ) -> None:
        self.live, self._put = live, ask or Line(live).ask
        self.forwards = torch.zeros(n, dtype=torch.int64, device=live.device)
        self.backwards = torch.zeros(n, dtype=torch.int64, device=live.device)
        self.differentiable = True
        self._limit: int | None = None
        self._classes = 2  # until a first answer tells
        self._listen = listen
        self._indices = torch.arange(n) if indices is None else indices.cpu()  # how errors call the samples

    @contextmanager
    def limited(self, passes: int | None) -> Iterator[None]:
        """Let no sample spend more than ``passes``, forwards and backwards together; None lifts the limit.

        A question that a sample cannot pay for is not asked: it gets no success, and zero for all numbers.
        """
        kept, self._limit = self._limit, passes
        try:
            yield
        finally:
            self._limit = kept

    def affords(self, rows: Rows, cost: int, samples: int | None = None) -> Mask | None:
        """Tell which samples can pay for a question of ``cost`` passes; None stands for all.

        ``samples`` is the number of random passes in each, where it is not the model's.
        """
        if self._limit is None:
            return None
        each = self.live.model.samples if samples is None else samples
        can = (self.forwards + self.backwards)[rows] + cost * each <= self._limit
        return None if can.all() else can

    def logits(self, x: Inputs, rows: Rows, goal: Goal | None = None) -> Logits:
        """Return the logits (b, c) of x (b, *f), counted for the samples ``rows`` (b,); with a goal, joint ones.

        See :meth:`assay.Model.joint`. All other questions are answered by joint logits.
        """
        z = self._ask(x, rows, self.live.model.deciding, searching=False)
        return z if goal is None else self.live.model.joint(z, goal)

    def searched(self, x: Inputs, rows: Rows) -> Logits:
        """Return the logits (b, c) of x (b, *f) as a search sees them: with repairs and faster layers."""
        return self._ask(x, rows, self.live.model.samples, searching=True)

    def decide(self, x: Inputs, p: Problem) -> Decision:
        can = self.affords(p.rows, 1, self.live.model.deciding)
        z = self.logits(x, p.rows)
        self._check_labels(p.goal, z)
        reached = p.goal.reached(self.live.model.joint(z, p.goal))
        return Decision(reached if can is None else reached & can, z.argmax(1))

    def agrees(self, x: Inputs, p: Problem, asked: Mask) -> Mask:
        """Tell for which of the points ``asked`` (b,) the network as it is meets the goal, too.

        *Cost*: a forward pass of each; where it cannot be paid for, the answer is yes, and verification has the word.
        """
        at = asked.nonzero()[:, 0]
        if (can := self.affords(p.rows[at], 1, self.live.model.deciding)) is not None:
            at = at[can]
        return asked.index_copy(0, at, self.decide(x[at], p.take(at)).success) if len(at) else asked

    def score(self, x: Inputs, p: Problem, loss: Loss) -> Score:
        z = self._ask(x, p.rows, self.live.model.samples, searching=True)
        self._check_labels(p.goal, z)
        z = self.live.model.joint(z, p.goal)
        return Score(p.goal.clearly_reached(z, self.live.model.rounding), loss(z, p.goal).to(x.dtype), z)

    def _ask(self, x: Inputs, rows: Rows, samples: int, *, searching: bool) -> Logits:
        def ask(x: Inputs, rows: Rows) -> Logits:
            def check(z: Logits, at: slice) -> None:
                self._check(z, rows[at])

            return self._put(Question(x, searching, check, lambda at, _: self._count(rows[at], samples))).logits

        can = self.affords(rows, 1, samples)
        if can is None:
            return ask(x, rows)
        at = can.nonzero()[:, 0]
        z = ask(x[at], rows[at]) if len(at) else x.new_zeros(0, self._classes)
        return _spread(z, at, len(x))

    def gradient(self, x: Inputs, p: Problem, loss: Loss, through: Through | None = None) -> Gradient:
        """Return logits, loss and input gradient at x; a model without a gradient gives zero.

        With ``through``, the model is asked about ``through(x)``; the gradient is that with respect to x all the same.
        """
        e = self.slopes(x, p, lambda z, goal: loss(z, goal)[:, None], 1, through)
        return Gradient(e.success, e.values[:, 0], e.logits, e.slopes[:, 0])

    def slopes(self, x: Inputs, p: Problem, measure: Measure, most: int, through: Through | None = None) -> Slopes:
        """Return the m <= ``most`` values (b, m) of a measure and their gradients (b, m, *f), in m backward passes.

        Under a :class:`Smoothing` they are those of a mean over noise, for its number of passes more.
        """
        smoothing = self.live.model.smoothing
        can = self.affords(p.rows, 1 + most if smoothing is None else smoothing.cost(most))
        if can is not None:
            at = can.nonzero()[:, 0]
            shapes = ((self._classes,), (most,), (most, *x.shape[1:]))
            blank = Slopes(can[at], *(x.new_zeros(0, *shape) for shape in shapes))
            part = None if through is None else lambda v, rows: through(v, at[rows])
            e = self.slopes(x[at], p.take(at), measure, most, part) if len(at) else blank
            return Slopes(*(_spread(v, at, len(x)) for v in (e.success, e.logits, e.values, e.slopes)))
        if smoothing is not None:
            return self._smoothed(x, p, measure, smoothing, through)
        return self._exact(x, p, measure, through)

    def _exact(self, x: Inputs, p: Problem, measure: Measure, through: Through | None) -> Slopes:
        def read(z: Logits, at: slice) -> tuple[Logits, Tensor]:
            goal = p.goal.take(at)
            self._check_labels(goal, z)
            z = self.live.model.joint(z, goal)
            return z, measure(z, goal)

        def check(z: Logits, at: slice) -> None:
            self._check(z, p.rows[at])

        def count(at: slice, functions: int) -> None:
            self._count(p.rows[at], each, each * functions)

        each = self.live.model.samples
        a = self._put(Question(x, True, check, count, read, through))
        assert a.values is not None
        assert a.slopes is not None
        self.differentiable &= a.differentiable
        reached = p.goal.clearly_reached(a.logits, self.live.model.rounding)
        return Slopes(reached, a.logits, a.values.to(x.dtype), a.slopes)

    def _smoothed(
        self, x: Inputs, p: Problem, measure: Measure, smoothing: Smoothing, through: Through | None
    ) -> Slopes:
        """Average over Gaussian directions u: gradients at x + s u, or (f(x + s u) - f(x - s u)) u / 2 s."""
        every, s = torch.arange(len(x), device=x.device), smoothing.sigma

        def ask(x: Inputs) -> tuple[Logits, Tensor]:
            seen = x if through is None else through(x, every).detach()
            z = self._ask(seen, p.rows, self.live.model.samples, searching=True)
            self._check_labels(p.goal, z)
            z = self.live.model.joint(z, p.goal)
            return z, measure(z, p.goal)

        def along(u: Inputs) -> Tensor:
            if smoothing.exact:
                return self._exact(x + s * u, p, measure, through).slopes
            rise = (ask(x + s * u)[1] - ask(x - s * u)[1]) / (2 * s)
            return rise.view(*rise.shape, *[1] * (x.ndim - 1)) * u[:, None]

        draws = Draws.of(_SMOOTHING, p.draws.keys + self.forwards[p.rows])  # other directions at every question
        z, values = ask(x)
        total = values.new_zeros(*values.shape, *x.shape[1:])
        for i in range(smoothing.count):
            total += along(draws.fold(i).normal(x.shape[1:], x.dtype))
        return Slopes(
            p.goal.clearly_reached(z, self.live.model.rounding),
            z,
            values.to(x.dtype),
            narrowed(total / smoothing.count, x.dtype),
        )

    def _check(self, z: Logits, rows: Rows) -> None:
        """Refuse logits (r, c) of the samples ``rows`` (r,) that are not finite."""
        self._classes = z.shape[1]
        if not torch.isfinite(z).all():
            bad = self._indices[rows[(~torch.isfinite(z)).any(1)].cpu()]
            raise NonFiniteError(
                "finite logits",
                f"NaN or infinity for {len(bad)} of {len(z)} inputs of a batch (first: sample {int(bad[0])})",
                "Look for overflow, log(0), or a division by zero in the network.",
                code="bad-logits",
            )

    def _check_labels(self, goal: Goal, z: Logits) -> None:
        for labels in (goal.label, goal.target):
            if labels is not None and not ((labels >= 0) & (labels < z.shape[1])).all():
                raise DataError(
                    f"labels from 0 to {z.shape[1] - 1}, for the model has {z.shape[1]} classes",
                    f"labels from {int(labels.min())} to {int(labels.max())}",
                    "Check that model and data belong together, and the order of the classes.",
                    code="bad-logits",
                )

    def _count(self, rows: Rows, forwards: int, backwards: int = 0) -> None:
        """Count some forward and backward passes for each of these samples."""
        self.forwards.index_add_(0, rows, torch.full_like(rows, forwards))
        if backwards:
            self.backwards.index_add_(0, rows, torch.full_like(rows, backwards))
        for count in _METERS.get():
            count(len(rows) * forwards, len(rows) * backwards)
        if self._listen:
            self._listen(len(rows) * (forwards + backwards))


def _spread(values: Tensor, at: Rows, n: int) -> Tensor:
    """Return values (n, ...) with those given in the rows ``at``, and zero elsewhere."""
    return values.new_zeros(n, *values.shape[1:]).index_copy(0, at, values)
