"""Primal-dual proximal gradient descent: for distances that have no useful gradient."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from assay.attacks.losses import margin
from assay.attacks.minimum.descent import Descent
from assay.attacks.minimum.pdgd import PrimalDualState, broken, linear
from assay.attacks.registry import ATTACKS
from assay.core.registry import one_of
from assay.core.types import Inputs, PerSample, choose, per_sample
from assay.models.door import Gradient, Loss
from assay.threats.norms import TINY, toward_zero
from assay.threats.problem import Problem


@final
@ATTACKS.register("pdpgd", norm=("linf", "l1", "l0"), access="gradient", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class PDPGD(Descent[PrimalDualState]):
    """Primal-dual proximal gradient descent: as :class:`PDGD`, but the distance acts by its proximal operator.

    Adam descends softplus(-margin) alone, to r, dividing by h. Then a few times z <- clip(prox(z - (h / max h) (z - r),
    (w0 / w1) rate / max h)), which solves for the distance in the metric of Adam (Melchior et al. 2019,
    arXiv:1910.10094).

    The last steps close in as :class:`Descent` says.

    *Sees* the gradient. *Cost* ``steps`` + ``closing`` + 1 forwards, ``steps`` + ``closing`` backwards.

    Args:
        steps: number of steps.
        step: first rate of Adam, in widths of the box; None for 0.1 in linf, else 0.2.
        last_step: last rate as a share of the first.
        ratio: first w0 / w1.
        dual_step: first rate of log(w1 / w0); None for 0.2 in l1, else 0.1.
        last_dual_step: last one, as a share of the first.
        inner: most times that the proximal operator is applied.
        settled: relative change of z below which it is not applied again.
        surrogate: for l0: ``l2/3``, the sum of |d|^(2/3), or ``l0`` itself.
        closing: further steps that close in; 0 for none, as in the paper.
        loss: the goal must be met where it is positive.

    *Differs from the paper in*: starts at the clean input; rates for each norm (the paper has 0.1 for all); closing in.

    References:
        Matyasko & Chau 2021, arXiv:2106.01538, algorithm 2.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l1", "l0")
    steps: int = 500
    step: float | None = None
    last_step: float = 0.01
    ratio: float = 0.01
    dual_step: float | None = None
    last_dual_step: float = 0.1
    closing: int = 10
    inner: int = 5
    settled: float = 0.01
    surrogate: str = "l2/3"
    loss: Loss = margin

    def __post_init__(self) -> None:
        one_of("surrogate", self.surrogate, ("l2/3", "l0"))

    def first(self, p: Problem) -> PrimalDualState:
        return PrimalDualState.start(p, self.ratio)

    def descend(self, p: Problem, s: PrimalDualState, e: Gradient, k: int) -> PrimalDualState:
        width = p.box.width
        adam = s.adam.seen(broken(e, width))
        first, dual_step = self._rates(p)
        rate = first * self.last_step ** (k / self.steps)
        scale = adam.scale(k)
        largest = scale.flatten(1).amax(1)
        x = (s.x - rate * width * adam.step(k)).clamp(p.lower, p.upper)
        r = (x - p.x0) / width
        weight = s.dual.distance / s.dual.constraint.clamp_min(TINY) * rate / largest
        z = self._nearest(p, r, scale / per_sample(largest, r), weight)
        x = torch.where(z == 0, p.x0, p.x0 + z * width).clamp(p.lower, p.upper)
        dual = s.dual.after(e, linear(k, self.steps, dual_step, dual_step * self.last_dual_step))
        return PrimalDualState(x, adam, dual)

    def _rates(self, p: Problem) -> tuple[float, float]:
        """Return the first rates of Adam and of the dual."""
        norm = p.norm.name
        step = (0.1 if norm == "linf" else 0.2) if self.step is None else self.step
        dual_step = (0.2 if norm == "l1" else 0.1) if self.dual_step is None else self.dual_step
        return step, dual_step

    def _nearest(self, p: Problem, r: Inputs, metric: Inputs, weight: PerSample) -> Inputs:
        """Return what the proximal operator makes of r in this metric, inside the box."""
        low, high = ((v - p.x0) / p.box.width for v in (p.lower, p.upper))
        z, moves = r, weight >= 0
        for _ in range(self.inner):
            new = choose(moves, self._proximal(p, z - metric * (z - r), weight).clamp(low, high), z)
            moves = moves & (_length(new - z) > self.settled * _length(new))
            z = new
        return z

    def _proximal(self, p: Problem, d: Inputs, weight: PerSample) -> Inputs:
        if p.norm.name == "linf":
            return proximal_linf(d, weight)
        if p.norm.name == "l1":
            return proximal_l1(d, weight)
        return (proximal_l0 if self.surrogate == "l0" else proximal_two_thirds)(d, weight)


def _length(d: Inputs) -> PerSample:
    length: PerSample = torch.linalg.vector_norm(d.flatten(1), dim=1)
    return length


def proximal_linf(d: Inputs, weight: PerSample) -> Inputs:
    """Return argmin over z of |z - d|^2 / 2 + weight * max |z|.

    It clips d at the level that takes off ``weight`` in all.
    """
    u = d.flatten(1).abs().sort(1, descending=True).values
    excess = u.cumsum(1) - weight[:, None]
    level = (excess / torch.arange(1, u.shape[1] + 1, device=u.device)).amax(1)  # the new largest |z|
    top = per_sample(level.clamp_min(0), d)
    return d.clamp(-top, top)


def proximal_l1(d: Inputs, weight: PerSample) -> Inputs:
    """Return argmin over z of |z - d|^2 / 2 + weight * sum |z|."""
    return toward_zero(d, per_sample(weight, d))


def proximal_l0(d: Inputs, weight: PerSample) -> Inputs:
    """Return argmin over z of |z - d|^2 / 2 + weight * (number of z other than 0)."""
    return torch.where(d**2 >= 2 * per_sample(weight, d), d, 0)


def proximal_two_thirds(d: Inputs, weight: PerSample) -> Inputs:
    """Return argmin over z of |z - d|^2 / 2 + weight * sum |z|^(2/3).

    With z = t^3 the stationary points are the roots of t^4 - |d| t + 2 weight / 3; the largest one is wanted, where
    the objective is below that at 0 (Cao, Sun & Xu 2013).
    """
    w, a = 2 * per_sample(weight, d).double().clamp_min(TINY), d.abs().double()
    angle = (27 / 16 * a**2 * w**-1.5).clamp_min(1).acosh() / 3
    u = 2 / 3**0.5 * w**0.25 * angle.cosh().sqrt()
    t = (u + (2 * a / u - u**2).clamp_min(0).sqrt()) / 2
    return torch.where(a > 2 / 3 * (3 * w**3) ** 0.25, t**3, 0).to(d.dtype) * d.sign()
