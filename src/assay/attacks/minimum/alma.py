"""ALMA: an augmented Lagrangian whose multiplier follows every step."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.losses import dlr
from assay.attacks.minimum.descent import Descent, linear_size, reach, unit
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY
from assay.threats.problem import Problem

_TOLERANCE = 1e-6
"""How far beyond the boundary the constraint is set, so that rounding cannot undo a success."""

_HALVINGS = 30


class ALMAState(NamedTuple):
    """The next point, what RMSProp remembers, and the penalty of each sample."""

    x: Inputs
    square: Inputs
    momentum: Inputs
    rate: PerSample
    multiplier: PerSample
    penalty: PerSample
    reviewed: PerSample  # the constraint at the last review
    found: PerSample  # the query of the first success; inf before


@final
@ATTACKS.register("alma", norm=("l2", "l1"), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class ALMA(Descent[ALMAState]):
    """Augmented Lagrangian attack: descends |x - x0| + P(y; rho, mu), y = -DLR, with RMSProp and momentum.

    P = mu y + mu rho y^2 + rho^2 y^3 / 6 where y >= 0, else mu y / (1 - rho y). mu is a running mean of P'(y).
    At every review, rho grows where no success was found and y did not fall enough. The first rate takes one step of
    plain descent half of the way that a linear model would need; after the first success the rate falls geometrically.

    The last steps close in as :class:`Descent` says.

    *Sees* the gradient. *Cost* ``steps`` + ``closing`` + 1 forwards, ``steps`` + ``closing`` backwards.

    Args:
        steps: number of steps.
        start: size of that step, as a share of the way.
        last_step: last rate as a share of the first.
        keep: share that running means and momentum keep.
        review: steps between two reviews.
        enough: y must fall below this share of its value at the last review.
        grow: factor of rho.
        closing: further steps that close in; 0 for none, as in the paper.
        loss: the constraint is that it is positive.

    *Differs from the paper in*: the first step, which the paper gives one size a norm and data set; the small tolerance
    is added to the ratio, not to the difference of logits; closing in.

    References:
        Rony et al. 2021, arXiv:2011.11857, algorithm 1.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2", "l1")
    steps: int = 1000
    start: float = 0.5
    last_step: float = 0.01
    keep: float = 0.9
    review: int = 10
    enough: float = 0.95
    grow: float = 1.2
    closing: int = 10
    loss: Loss = dlr

    def first(self, p: Problem) -> ALMAState:
        x, zero, one = p.start("clean"), p.full(0.0), p.full(1.0)
        blank = torch.ones_like(x), torch.zeros_like(x)
        return ALMAState(x, *blank, zero, one, one, zero, p.full(torch.inf))

    def descend(self, p: Problem, s: ALMAState, e: Gradient, k: int) -> ALMAState:
        s = self._reviewed(s, e, k)
        y = _TOLERANCE - e.loss
        grad = -per_sample(_slope(y, s), e.grad) * e.grad * p.box.width
        if k == 0:
            grad = choose(grad.flatten(1).abs().amax(1) == 0, unit(p, grad, k), grad)
            first = (self.start * linear_size(p, e)).clamp_min(_TOLERANCE * p.box.width).minimum(reach(p) / 2)
            s = s._replace(rate=_rate(p, grad, first))
        else:
            grad = grad + _away(p, s.x)
        square = self.keep * s.square + (1 - self.keep) * grad**2
        momentum = self.keep * s.momentum + grad / (square.sqrt() + 1e-8)
        rate = s.rate * self._fade(s.found, k)
        x = (s.x - per_sample(rate, s.x) * p.box.width * momentum).clamp(p.lower, p.upper)
        return s._replace(x=x, square=square, momentum=momentum)

    def _reviewed(self, s: ALMAState, e: Gradient, k: int) -> ALMAState:
        """Return the state with penalty and multiplier set by what query k said."""
        y = _TOLERANCE - e.loss
        penalty = s.penalty
        if k and (k + 1) % self.review == 0:
            fine = s.found.isfinite() | (y < self.enough * s.reviewed)
            penalty = torch.where(fine, penalty, self.grow * penalty)
        s = s._replace(penalty=penalty, reviewed=y if k == 0 or (k + 1) % self.review == 0 else s.reviewed)
        if k:
            mean = self.keep * s.multiplier + (1 - self.keep) * _slope(y, s)
            s = s._replace(multiplier=mean.clamp(1e-6, 1e12))
        return s._replace(found=torch.where(e.success, s.found.clamp_max(k), s.found))

    def _fade(self, found: PerSample, k: int) -> PerSample:
        share = torch.where(found.isfinite(), (k - found) / (self.steps - found), 0)
        return self.last_step**share


def _slope(y: PerSample, s: ALMAState) -> PerSample:
    """Return P'(y)."""
    mu, rho = s.multiplier, s.penalty
    above = mu + 2 * mu * rho * y + rho**2 * y**2 / 2
    return torch.where(y >= 0, above, mu / (1 - rho * y.clamp_max(0)) ** 2)


def _away(p: Problem, x: Inputs) -> Inputs:
    """Return the gradient of the size of x."""
    d = x - p.x0
    return d.sign() if p.norm.name == "l1" else p.norm.steepest(d)


def _rate(p: Problem, grad: Inputs, size: PerSample) -> PerSample:
    """Return the rate at which one step of plain descent, clipped, has this size."""
    low = size / (p.norm.size(grad) * p.box.width).clamp_min(TINY)  # clipping can only shorten a step
    high = low * 1e4
    for _ in range(_HALVINGS):
        middle = (low * high).sqrt()
        x = (p.x0 - per_sample(middle, grad) * p.box.width * grad).clamp(p.lower, p.upper)
        short = p.size(x) < size
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return low
