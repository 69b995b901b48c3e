"""Gradients estimated from scores: they make a score attack of any gradient attack."""

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch

from assay.attacks.gradient.pgd import PGD
from assay.attacks.loop import Around, GradientAttack, HasX, ScoreAttack
from assay.attacks.losses import margin
from assay.attacks.registry import ATTACKS
from assay.attacks.transforms import Momentum, Seen, Transformed
from assay.core.registry import UsageError, one_of
from assay.core.types import Inputs, Mask, PerSample, per_sample
from assay.models.door import Gradient, Loss, Score
from assay.threats.problem import Problem

ESTIMATORS = ("spsa", "nes")
"""By what directions are drawn: spsa signs, nes a normal distribution."""

_STREAM = 0xE57A
"""Names the random numbers of directions, so that they are none of the attack's own."""


class EstimatedState(NamedTuple):
    """The point to ask about; the attack's own state; what has been learnt about its gradient."""

    x: Inputs
    inner: Any
    seen: Seen
    ahead: PerSample  # the loss on the one side of a pair
    total: Inputs  # of differences times directions


@final
@dataclass(frozen=True, slots=True)
class Estimated(Around, ScoreAttack[EstimatedState]):  # type: ignore[override]
    """A gradient attack that sees scores only: mean of (f(x + s u) - f(x - s u)) u / 2 s stands for the gradient.

    Every step of the attack asks about its point, and then about ``draws`` pairs of points on both sides of it, each
    pair in a direction u of its own. Both are drawn into the box, and the difference is set against that part of the
    way which the box leaves on average, P: 1 inside, 1/2 at its ends. So for a linear f the mean is its gradient, also
    on a black background. A point of a pair that succeeds, inside the ball, is a success as well.

    *Sees* scores. *Cost* a step of the attack: 1 + 2 ``draws`` forwards; and one for the last point.

    Args:
        attack: a gradient attack that asks for the gradient of its loss at every query, for example
            :class:`assay.attacks.PGD`.
        by: ``spsa``, u of random signs, or ``nes``, u normal.
        draws: pairs of a step.
        sigma: s, in widths of the box.

    Example:
        >>> import torch
        >>> from assay import Threat
        >>> line = lambda x: torch.stack([0.5 - x.mean(1), x.mean(1) - 0.5], 1)
        >>> attack = Estimated(PGD(steps=10), by="nes", draws=4)
        >>> r = attack(line, torch.full((1, 4), 0.6), torch.tensor([1]), Threat("linf", 0.2))
        >>> bool(r.success), int(r.backwards)
        (True, 0)

    *Differs from the paper in*: points are drawn into the box, and P makes up for it; signs are their own inverses, so
    that both kinds of direction have one formula.

    References:
        SPSA: Spall 1992 ("Multivariate stochastic approximation using a simultaneous perturbation gradient
        approximation", IEEE TAC 37), eq. 2.2; Uesato et al. 2018, arXiv:1802.05666, algorithm 1. NES: Ilyas et al.
        2018, arXiv:1804.08598, algorithm 1.
    """

    attack: GradientAttack[Any]
    by: str = "spsa"
    draws: int = 16
    sigma: float = 0.01

    def __post_init__(self) -> None:
        one_of("by", self.by, ESTIMATORS)
        if not _is_plain(self.attack):
            what = type(self.attack).__name__
            raise UsageError("an attack that asks for one gradient at every query", what, "For example pgd or apgd.")
        if self.draws < 1 or self.sigma <= 0:
            raise UsageError("draws >= 1 and sigma > 0", f"{self.draws} and {self.sigma}", "For example 16 and 0.01.")

    @property
    def questions(self) -> int:
        return self.attack.questions * self._round

    @property
    def _round(self) -> int:
        """The number of queries of a step."""
        return 1 + 2 * self.draws

    def init(self, p: Problem) -> EstimatedState:
        inner: HasX = self.attack.init(p)
        nothing = Seen(p.full(0.0) > 0, p.full(-torch.inf), p.x0.new_zeros(len(p), 0))
        return EstimatedState(inner.x, inner, nothing, p.full(0.0), torch.zeros_like(p.x0))

    def update(self, p: Problem, s: EstimatedState, e: Score, k: int) -> EstimatedState:
        step, at = divmod(k, self._round)
        pair, second = divmod(at - 1, 2)  # of the query that was answered, after the first of a step
        x: Inputs = s.inner.x
        if at == 0:
            seen = Seen(e.success, e.loss, e.logits)
            return s._replace(x=self._aside(p, x, step, 0), seen=seen, total=torch.zeros_like(x))
        if not second:
            return s._replace(x=self._aside(p, x, step, pair, side=-1), ahead=e.loss)
        total = s.total + per_sample(s.ahead - e.loss, x) * self.direction(p, step, pair)
        if pair + 1 < self.draws:
            return s._replace(x=self._aside(p, x, step, pair + 1), total=total)
        inner = self.attack.update(p, s.inner, Gradient(*s.seen, self._gradient(p, x, total)), step)
        return s._replace(x=inner.x, inner=inner)

    def done(self, s: EstimatedState) -> Mask | None:
        return self.attack.done(s.inner)

    def direction(self, p: Problem, step: int, pair: int) -> Inputs:
        """Draw u of one pair of a step."""
        draws = p.stage(_STREAM).stage(step).stage(pair).draws
        return (draws.signs if self.by == "spsa" else draws.normal)(p.x0.shape[1:], p.x0.dtype)

    def _aside(self, p: Problem, x: Inputs, step: int, pair: int, side: int = 1) -> Inputs:
        u = self.direction(p, step, pair)
        return (x + side * self.sigma * p.box.width * u).clamp(p.box.lo, p.box.hi)

    def _gradient(self, p: Problem, x: Inputs, total: Inputs) -> Inputs:
        length = self.sigma * p.box.width
        return total / (2 * length * self.draws * self._left((x - p.box.lo) / length, (p.box.hi - x) / length))

    def _left(self, below: Inputs, above: Inputs) -> Inputs:
        """Return P = E[v u] of each coordinate, v half of the way between two points drawn into the box, over s.

        Below and above x the box has room for this many s. For normal u it follows from Stein's lemma.
        """
        if self.by == "spsa":
            return (below.clamp_max(1) + above.clamp_max(1)) / 2
        left: Inputs = torch.special.ndtr(below) + torch.special.ndtr(above) - 1
        return left


def _is_plain(attack: GradientAttack[Any]) -> bool:
    """Say whether every query of an attack is one for the gradient of its loss, at the point itself."""
    one = type(attack).query is GradientAttack.query
    if isinstance(attack, Transformed):
        one = attack.questions == attack.attack.questions  # its transforms only look at gradients
    return one and all(attack.differentiates(k) for k in range(attack.questions))


def _with_momentum(steps: int, rel_step: float, decay: float, loss: Loss) -> GradientAttack[Any]:
    return Transformed(PGD(steps=steps, rel_step=rel_step, start="clean", loss=loss), (Momentum(decay=decay),))


@ATTACKS.register("spsa", norm=("linf", "l2"), access="score", kind="budget")
def spsa(
    steps: int = 100,
    rel_step: float = 0.2,
    decay: float = 0.9,
    draws: int = 32,
    sigma: float = 0.01,
    loss: Loss = margin,
) -> Estimated:
    """PGD with momentum, instead of Adam, on gradients from random signs (Uesato et al. 2018, arXiv:1802.05666)."""
    return Estimated(_with_momentum(steps, rel_step, decay, loss), "spsa", draws, sigma)


@ATTACKS.register("nes", norm=("linf", "l2"), access="score", kind="budget")
def nes(
    steps: int = 100,
    rel_step: float = 0.2,
    decay: float = 0.9,
    draws: int = 25,
    sigma: float = 0.001,
    loss: Loss = margin,
) -> Estimated:
    """PGD with momentum on gradients from normal directions (Ilyas et al. 2018, arXiv:1804.08598)."""
    return Estimated(_with_momentum(steps, rel_step, decay, loss), "nes", draws, sigma)
