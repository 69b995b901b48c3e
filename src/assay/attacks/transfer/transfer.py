"""Transfer: a gradient attack on networks of one's own, whose result the attacked model is asked about."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.attack import Outcome, Runnable
from assay.attacks.decision.walk import Bracket, toward
from assay.attacks.loop import DecisionAttack
from assay.attacks.transfer.surrogates import MEANS, as_surrogates, joint
from assay.core.errors import ModelError
from assay.core.registry import UsageError, one_of
from assay.core.types import Inputs, Rows, choose
from assay.models.door import Decision, Door
from assay.models.loaded import Net
from assay.models.model import Model
from assay.threats.problem import Problem


@final
@dataclass(frozen=True, slots=True)
class Transfer(Runnable):
    """Runs an attack on surrogates to its end, and asks the model about the point that it leaves: once a sample.

    Perturbations carry over from network to network, the more so the farther they go into the other class; so the
    attack goes on after the surrogates are fooled, and its strongest point is taken. An attack of a given budget
    therefore carries over better than one that stops just beyond the surrogates' boundary; without an eps, take
    ``Bisect(Transfer(PGD(), nets))``. With more ``queries`` than one, the way from the clean input to a point that
    fools the model is halved, again and again, for a smaller one.

    *Sees* the predicted label. *Cost* at most ``queries`` forwards. What the surrogates compute is no query of the
    model: it is not among the passes of a result, and no limit of passes bounds it.

    Args:
        attack: any attack or combination, for example :class:`assay.attacks.PGD` or one of ``presets``.
        surrogates: a network, an :class:`assay.Model`, or several of them; in the box of the attacked model.
        by: several answer as the mean of their ``logits``, or of their ``probabilities``.
        queries: the most questions to the model about a sample.

    Example:
        >>> import torch
        >>> from assay.attacks import PGD
        >>> line = lambda x: torch.stack([0.5 - x.mean(1), x.mean(1) - 0.5], 1)
        >>> tilted = lambda x: line(x * torch.tensor([1.3, 0.7]))
        >>> x, y = torch.full((1, 2), 0.6), torch.tensor([1])
        >>> r = Transfer(PGD(), tilted)(line, x, y, "linf:0.3")
        >>> bool(r.success), int(r.forwards), int(r.backwards)  # one question, and one to verify
        (True, 2, 0)

    Raises:
        UsageError: no surrogate, an unknown mean, or no query.
        ModelError: surrogates of another box, or of other numbers of classes.

    References:
        Papernot, McDaniel & Goodfellow 2016, arXiv:1605.07277; ensembles: Liu et al. 2017, arXiv:1611.02770;
        means of logits: Dong et al. 2018, arXiv:1710.06081.
    """

    attack: Runnable
    surrogates: "Model | Net | Sequence[Model | Net]"
    by: str = "logits"
    queries: int = 1

    def __post_init__(self) -> None:
        one_of("by", self.by, [*MEANS])
        if self.queries < 1:
            raise UsageError("queries >= 1", f"{self.queries}", "The model has to be asked whether it is fooled.")
        object.__setattr__(self, "surrogates", as_surrogates(self.surrogates))

    @property
    def norms(self) -> tuple[str, ...]:
        return getattr(self.attack, "norms", ("linf", "l2"))

    @property
    def any_size(self) -> bool:
        return getattr(self.attack, "any_size", False)

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        able = door.affords(p.rows, 1)
        if able is not None:
            rows, out = able.nonzero()[:, 0], Outcome.nothing(p)
            return out.updated(rows, self.run(door, p.take(rows), full=full), by=0) if len(rows) else out
        x = p.snap(self.candidates(p))
        allowed = p.allows(x)
        success = door.decide(x, p).success & allowed
        out = Outcome(choose(allowed, x, p.x0), success, torch.where(success, 0, -1))
        rows = success.nonzero()[:, 0]
        return out if self.queries == 1 or not len(rows) else self._closed(door, p, out, rows)

    def _closed(self, door: Door, p: Problem, out: Outcome, rows: Rows) -> Outcome:
        """Look for smaller perturbations of the samples ``rows``, which have fallen."""
        q = replace(p.take(rows), warm=out.x[rows])
        smaller = Closing(self.queries - 1).run(door, q, full=True)
        kept = smaller.success.nonzero()[:, 0]
        return out.updated(rows[kept], smaller.take(kept), by=0)

    def candidates(self, p: Problem) -> Inputs:
        """Return the strongest point (b, *f) that the attack finds on the surrogates for each sample.

        Raises:
            ModelError: the surrogates have another box than the model.
        """
        own = joint(as_surrogates(self.surrogates), self.by)
        if own.domain != p.box:
            raise ModelError(f"surrogates with the model's {p.box}", f"{own.domain}", "Pass assay.Model(net, box=...).")
        rows = torch.arange(len(p), device=p.x0.device)
        unseen = replace(p, rows=rows, clean_logits=None, order=None)  # these tell of the attacked model
        with own.frozen(p.x0.device) as live:
            return self.attack.run(Door(live, len(p)), unseen, full=True).x


class ClosingState(NamedTuple):
    """The next point; one that fools the model, and where between the clean input and it the boundary is."""

    x: Inputs
    end: Inputs
    on: Bracket


@final
@dataclass(frozen=True, slots=True)
class Closing(DecisionAttack[ClosingState]):
    """Halves the way from the clean input to a given point that meets the goal, where the boundary is."""

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    any_size: ClassVar[bool] = True
    minimal: ClassVar[bool] = True
    steps: int = 1

    @property
    def questions(self) -> int:
        return self.steps - 1  # the loop asks once more, about the last point

    def init(self, p: Problem) -> ClosingState:
        return _next(p, p.start("clean"), Bracket(p.full(0.0), p.full(1.0)))

    def update(self, p: Problem, s: ClosingState, e: Decision, k: int) -> ClosingState:
        return _next(p, s.end, s.on.narrowed(e.success))


def _next(p: Problem, end: Inputs, on: Bracket) -> ClosingState:
    return ClosingState(toward(p, end, on.middle()), end, on)
