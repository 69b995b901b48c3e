"""Certified training: on upper bounds of the loss over the whole ball, by intervals and by lines."""

from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from assay.attacks import PGD
from assay.core.types import Inputs, per_sample
from assay.hardening.inner import strongest
from assay.hardening.intervals import Interval, Kink
from assay.hardening.intervals_linear import Bounded, ancestors, worst_logits
from assay.hardening.objective import OBJECTIVES, Objective, Step, Terms, mean_terms
from assay.hardening.objectives.checks import require

_TOLERANCE: Final = 0.5
_TINY: Final = 1e-12

_RAMP: Final = "0,0.4"
"""Without a ramp the first bounds are so loose that training collapses to a constant."""


def _ball(s: Step, x: Inputs) -> Interval:
    """Return points x with bounds that are those of box and ball around the clean inputs."""
    return Interval(x, s.problem.lower, s.problem.upper)


def _mixed(s: Step, found: Bounded, share: float, reg: float) -> Terms:
    """Return the loss at the points, ``share`` of it replaced by that of the bounds, and the regulariser of a warm-up.

    With soft labels the bounds are still those of differences to the label's logit.
    """
    logits, worst = found.logits.point, s.cross_entropy(found.worst)
    loss = worst if share == 1 else torch.lerp(s.cross_entropy(logits), worst, share)
    fading = reg * (1 - s.ramp)
    if fading == 0:
        return mean_terms(loss, logits, worst=worst)
    extra = fading * spread_and_balance(found.logits)
    return mean_terms(loss + extra, logits, worst=worst, reg=extra)


def spread_and_balance(z: Interval) -> Tensor:
    """Return how far intervals spread on their way to z, and how one-sided its ReLUs are, a mean over these, from 0.

    Let w be the mean width before a ReLU and w_0 that of the input, c the centres before it, a the active neurons
    (lower bound above 0), i the inactive ones. Three quotients are penalised where they are below a half: w_0 / w, and
    of the sums over a and over i (the smaller by the larger) those of abs(c) and of squared deviations of c from its
    mean.

    *Differs from the paper in*: a layer without active or without inactive neurons has the largest penalty, not none.

    References:
        Shi et al. 2021, arXiv:2103.17268 (regularisers for a short warm-up), with its tolerance 0.5.
    """
    chain = ancestors(z)
    first = next(v for v in chain if v.made is None)
    before = [v.inputs[0] for v in chain if isinstance(v.made, Kink)]
    terms = [_spread(first, v) + _one_sided(v) for v in before]
    return torch.stack(terms).mean() / _TOLERANCE if terms else z.lower.new_zeros(())


def _spread(first: Interval, v: Interval) -> Tensor:
    return (_TOLERANCE - first.radius.mean() / v.radius.mean().clamp_min(_TINY)).clamp_min(0)


def _one_sided(v: Interval) -> Tensor:
    centre, active, inactive = v.centre, v.lower > 0, v.upper < 0
    squares = (centre - centre.mean()).square()
    pairs = (((m * active).sum(), (m * inactive).sum()) for m in (centre.abs(), squares))
    ratios = torch.stack([torch.minimum(a, b) / torch.maximum(a, b).clamp_min(_TINY) for a, b in pairs])
    return (_TOLERANCE - ratios).clamp_min(0).sum()


@final
@OBJECTIVES.register("ibp")
@dataclass(frozen=True, slots=True, kw_only=True)
class IBP(Objective):
    """Training on interval bounds: (1 - k) CE(z) + k CE(worst logits in the ball), k growing to ``kappa`` as eps grows.

    *Cost* about 3 forwards and backwards.

    Args:
        kappa: share of the bounds at the end.
        reg: weight of what keeps the bounds useful while eps grows (:func:`spread_and_balance`); it fades to 0.

    References:
        Gowal et al. 2018, arXiv:1810.12715, sec. 3; ``reg``: Shi et al. 2021, arXiv:2103.17268.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    ramp: ClassVar[str] = _RAMP
    kappa: float = 0.7
    reg: float = 0.5

    def __post_init__(self) -> None:
        require("kappa", self.kappa, 0, 1)

    def loss(self, s: Step, x: Inputs) -> Terms:
        return _mixed(s, worst_logits(s.net, _ball(s, x), s.y), self.kappa * s.ramp, self.reg)


@final
@OBJECTIVES.register("crown-ibp")
@dataclass(frozen=True, slots=True, kw_only=True)
class CrownIBP(Objective):
    """Training on bounds of lines above intervals: as ``ibp``, its worst logits b CROWN-IBP + (1 - b) IBP.

    b falls from 1 to ``beta`` while eps grows. Its networks consist of affine layers, ReLU and leaky ReLU.
    *Cost* about 3 forwards and backwards, and while b > 0 about as many more as there are classes.

    Args:
        kappa: share of the bounds at the end.
        beta: share of the tighter bounds at the end.
        reg: see :class:`IBP`.

    References:
        Zhang et al. 2020, arXiv:1906.06316, sec. 3.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    ramp: ClassVar[str] = _RAMP
    kappa: float = 1.0
    beta: float = 0.0
    reg: float = 0.5

    def __post_init__(self) -> None:
        require("kappa", self.kappa, 0, 1)
        require("beta", self.beta, 0, 1)

    def loss(self, s: Step, x: Inputs) -> Terms:
        beta = 1 - s.ramp * (1 - self.beta)
        return _mixed(s, worst_logits(s.net, _ball(s, x), s.y, beta), self.kappa * s.ramp, self.reg)


@final
@OBJECTIVES.register("sabr")
@dataclass(frozen=True, slots=True, kw_only=True)
class SABR(Objective):
    """Training on the interval bounds of a small box of radius ``lam`` * eps, where an attack finds it to be worst.

    *Cost* ``steps`` + 3 forwards and backwards.

    Args:
        lam: radius of the small box as a share of eps; 1 is IBP, towards 0 adversarial training.
        steps: of projected gradient descent, for its centre, within (1 - ``lam``) * eps.
        rel_step: length of a step as a fraction of that radius.
        reg: see :class:`IBP`.

    References:
        Mueller et al. 2023, arXiv:2210.04871, sec. 3; statistics of batches are those of the clean samples.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    ramp: ClassVar[str] = _RAMP
    lam: float = 0.4
    steps: int = 8
    rel_step: float = 0.25
    reg: float = 0.5

    def __post_init__(self) -> None:
        require("lam", self.lam, 0, 1)

    def find(self, s: Step) -> Inputs:
        within = s.problem.with_radius((1 - self.lam) * s.problem.radius)
        return strongest(s.net, within, PGD(steps=self.steps, rel_step=self.rel_step))

    def loss(self, s: Step, x: Inputs) -> Terms:
        p, radius = s.problem, per_sample(self.lam * s.problem.radius, x)
        small = Interval(s.x, torch.maximum(x - radius, p.lower), torch.minimum(x + radius, p.upper))
        return _mixed(s, worst_logits(s.net, small, s.y), 1.0, self.reg)


@final
@OBJECTIVES.register("mtl-ibp")
@dataclass(frozen=True, slots=True, kw_only=True)
class MTLIBP(Objective):
    """Training on an attack and on interval bounds at once: (1 - ``alpha``) CE(z at the attack) + ``alpha`` CE(worst).

    *Cost* ``steps`` + 3 forwards and backwards.

    Args:
        alpha: share of the bounds.
        steps: of projected gradient descent.
        rel_step: length of a step as a fraction of eps.
        reg: see :class:`IBP`.

    *Differs from the paper in*: statistics of batches are those of the attacked samples, which saves a pass.

    References:
        De Palma et al. 2024, arXiv:2305.13991 (MTL-IBP).
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    ramp: ClassVar[str] = _RAMP
    alpha: float = 0.5
    steps: int = 8
    rel_step: float = 0.25
    reg: float = 0.5

    def __post_init__(self) -> None:
        require("alpha", self.alpha, 0, 1)

    def find(self, s: Step) -> Inputs:
        return strongest(s.net, s.problem, PGD(steps=self.steps, rel_step=self.rel_step))

    def loss(self, s: Step, x: Inputs) -> Terms:
        return _mixed(s, worst_logits(s.net, _ball(s, x), s.y), self.alpha, self.reg)
