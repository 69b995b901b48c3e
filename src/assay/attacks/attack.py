"""What attacks and combinations of attacks have in common: one call, one result, one verification."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from assay.core.errors import DataError, ThreatError
from assay.core.random import Draws
from assay.core.registry import UsageError, check_numbers
from assay.core.types import Inputs, Labels, Mask, PerSample, choose
from assay.models.door import Door
from assay.models.model import Model, as_model
from assay.threats.norms import TINY
from assay.threats.problem import Problem, exact_size
from assay.threats.threat import Box, Threat, outside_box


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """What an attack claims. ``by`` says which part of a combination made the claim (-1: none)."""

    x: Inputs  # the best allowed point; the clean input where there is none
    success: Mask
    by: Labels

    @classmethod
    def nothing(cls, p: Problem) -> "Outcome":
        none = torch.zeros_like(p.rows, dtype=torch.bool)
        return cls(p.x0, none, torch.full_like(p.rows, -1))

    def take(self, rows: Tensor) -> "Outcome":
        return Outcome(self.x[rows], self.success[rows], self.by[rows])

    def updated(self, rows: Tensor, other: "Outcome", by: int) -> "Outcome":
        """Return this outcome with the rows of ``other`` put in; its successes are credited to part ``by``."""
        credit = torch.where(other.success, by, self.by[rows])
        return Outcome(
            self.x.index_copy(0, rows, other.x),
            self.success.index_copy(0, rows, other.success),
            self.by.index_copy(0, rows, credit),
        )


@final
@dataclass(frozen=True, slots=True)
class Result:
    """What an attack found, verified.

    ``x`` (b, *f) is the adversarial input where ``success`` (b,), elsewhere the strongest allowed point that was tried;
    ``size`` (b,) the norm of the perturbation in units of the box, inf without success;
    ``forwards`` and ``backwards`` (b,) int64 the passes spent on each sample, verification included.
    """

    x: Inputs
    success: Mask
    size: PerSample
    forwards: Labels
    backwards: Labels


class Runnable(ABC):
    """An attack, or a combination of attacks: hyper-parameters and one call."""

    __slots__ = ()

    @abstractmethod
    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        """Attack the samples of ``p``; with ``full``, go on with a sample after it has fallen."""

    @final
    def __call__(
        self,
        model: Model | nn.Module | Callable[[Tensor], Tensor],
        x: Inputs,
        y: Labels,
        threat: Threat | str,
        seed: int = 0,
        *,
        full: bool = False,
        indices: Tensor | None = None,
        device: torch.device | str | None = None,
        max_passes: int | None = None,
    ) -> Result:
        """Attack inputs x (b, *f), inside the box, with labels y (b,), the wanted ones when the threat is targeted.

        Every success is verified: a fresh forward pass, and box and ball measured again in float64; with
        ``threat.quantize``, of a point that is exactly what saving and reading gives.

        Args:
            model: an :class:`assay.Model`, or a network that takes inputs in [0, 1].
            x: the samples.
            y: their labels.
            threat: what is allowed.
            seed: of the random numbers; those of a sample depend on its index, and on nothing else.
            indices: (b,) of the samples in their data; None for their positions in x.
            full: take all steps, also after a sample has fallen, and return the strongest point instead of the first.
            device: where to run; None for where the model's parameters are.
            max_passes: the most forward and backward passes, together, that a sample may cost, verification included;
                the best point so far is returned when they are spent. None for no limit.

        Raises:
            DataError: labels or inputs that do not fit, inputs outside the box.
            ThreatError: an eps that does not fit the box, or that this attack needs and does not get.
            ModelError: what the model returns are not finite logits (b, c).
        """
        model = as_model(model)
        threat = Threat.parse(threat) if isinstance(threat, str) else threat
        check_numbers(self)
        _check(x, y)
        if max_passes is not None and max_passes < 1:
            raise UsageError("max_passes >= 1", f"{max_passes}", "Or none, for no limit.")
        threat = threat.within(model.domain, x[0].numel())
        _check_inside(x, threat.box or Box())
        with model.frozen(device) as live:
            place, x0 = x.device, x.detach().to(live.device).contiguous().clone()
            door = Door(live, len(x))
            keys = torch.arange(len(x)) if indices is None else indices
            p = Problem.pose(x0, y.to(live.device).long().clone(), threat, Draws.of(seed, keys.to(live.device)))
            with door.limited(None if max_passes is None else max_passes - live.model.deciding):  # one to verify
                able = door.affords(p.rows, 1) is None
                out = self.run(door, p, full=full) if able else Outcome.nothing(p)
            # Posed anew: what an attack did to its own copy of the problem must not decide whether it succeeded.
            truth = Problem.pose(x.detach().to(live.device).contiguous(), y.to(live.device).long(), threat, p.draws)
            found, points, size = verify(door, truth, out)
            size = torch.where(found, size, torch.inf).to(x0.dtype)
            return Result(*(v.to(place) for v in (points, found, size, door.forwards, door.backwards)))


def verify(door: Door, p: Problem, out: Outcome) -> tuple[Mask, Inputs, PerSample]:
    """Check the claims of an outcome: return which hold (b,), the points (b, *f) and their exact sizes (b,).

    A point that rounding carried out of the ball is first drawn back in. A claim holds when the stored point is inside
    box and ball, measured in float64, and a fresh pass of the model, alone with the other claims, meets the goal.
    """
    claimed = out.success.nonzero()[:, 0]
    size = exact_size(p.norm, out.x, p.x0)
    if not len(claimed):
        return out.success, out.x, size
    q = p.take(claimed)
    x = _draw_in(q, out.x[claimed])
    inside = ((x >= q.box.lo) & (x <= q.box.hi)).flatten(1).all(1)
    inside &= exact_size(q.norm, x, q.x0) <= q.radius.double()
    inside &= (x == q.unbounded().snap(x)).flatten(1).all(1)
    x = choose(inside, x, q.x0)  # a point that is not allowed is not shown to anybody
    holds = inside & door.decide(x, q).success
    points = out.x.index_copy(0, claimed, x)
    size = size.index_copy(0, claimed, exact_size(q.norm, x, q.x0))
    return out.success.index_copy(0, claimed, holds), points, size


def _draw_in(p: Problem, x: Inputs) -> Inputs:
    """Shrink perturbations of round norms that exceed the radius by a rounding error."""
    if p.norm.is_box or p.norm.name == "l0" or p.levels is not None:
        return x
    excess = exact_size(p.norm, x, p.x0) / p.radius.double().clamp_min(TINY)
    small = (excess > 1) & (excess < 1 + 1e-4)
    return choose(small, p.project(x), x)


def _check(x: Inputs, y: Labels) -> None:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise DataError(
            "torch tensors x and y", f"{type(x).__name__} and {type(y).__name__}", "Convert: torch.as_tensor(x)."
        )
    if x.ndim < 2 or y.ndim != 1 or not len(x) or len(x) != len(y):
        raise DataError(
            "inputs (b, *f) and as many labels (b,), b >= 1",
            f"{tuple(x.shape)} and {tuple(y.shape)}",
            "Pass class indices, one a sample.",
            code="empty-data" if x.ndim and not len(x) else None,
        )
    if not x.is_floating_point():
        raise DataError("floating-point inputs", f"{x.dtype}", "Convert: x = x.float() / 255 for 8-bit images.")
    if y.is_floating_point():
        raise DataError("integer labels", f"{y.dtype}", "Pass class indices, not one-hot rows or scores.")


def _check_inside(x: Inputs, box: Box) -> None:
    outside = ~((x >= box.lo) & (x <= box.hi)).flatten(1).all(1)
    if not x.isfinite().all():
        at = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise DataError("finite inputs", f"NaN or infinity in sample {at}", "Clean them.", code="non-finite-input")
    if outside.any():
        rows = outside.nonzero()[:, 0].tolist()
        raise outside_box(box, (float(x.min()), float(x.max())), rows, len(x))


def needs_eps(p: Problem, what: str) -> None:
    """Refuse a problem without a radius, for attacks that fill a given ball."""
    if p.minimal:
        raise ThreatError(
            f"an eps for {what}, which searches a ball of given size",
            f"{p.norm.name} without eps",
            "Write for example linf:8/255, or use a minimal-norm attack.",
        )
