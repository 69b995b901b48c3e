"""Attacks made of attacks. A combination has the call of an attack, so combinations nest."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from assay.attacks.attack import Outcome, Runnable
from assay.attacks.gradient.pgd import PGD
from assay.attacks.losses import along
from assay.core.registry import UsageError
from assay.core.types import Labels, Logits, Mask, choose
from assay.models.door import Door
from assay.threats.norms import TINY
from assay.threats.problem import Goal, Problem


@final
@dataclass(frozen=True, slots=True)
class Cascade(Runnable):
    """Runs each attack on the samples that every earlier one left standing.

    Without an eps, runs all attacks on all samples and keeps the smallest perturbation of each; likewise
    :class:`Restarts`, :class:`Targets` and :class:`Chain`.

    The published ensemble is a value: ``Cascade((APGD(), Targets(APGD(loss=dlr), 9), ...))``
    (Croce & Hein 2020, arXiv:2003.01690, sec. 6).
    """

    attacks: tuple[Runnable, ...]

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        out = Outcome.nothing(p)
        for i, attack in enumerate(self.attacks):
            out = attack_rest(attack, door, p, out, i, full=full)
        return out


@final
@dataclass(frozen=True, slots=True)
class Restarts(Runnable):
    """Runs an attack up to ``count`` times with fresh random numbers, each time on what is still standing."""

    attack: Runnable
    count: int = 5

    def __post_init__(self) -> None:
        _at_least_one(self.count, "Restarts.count")

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        out = Outcome.nothing(p)
        for i in range(self.count):
            out = attack_rest(self.attack, door, p, out, i, full=full)
        return out


@final
@dataclass(frozen=True, slots=True)
class Targets(Runnable):
    """Runs an attack toward each of the ``count`` nearest classes, on what is still standing.

    Near is what has a large clean logit, or what an earlier attack came near to (``Problem.order``). With ``among``
    more classes than that, these many are compared by the distance to the boundary between class and label, as the
    gradient at the clean input tells it: where there are hundreds of classes, large logits are not what is near
    (Melamed et al. 2024, arXiv:2407.02240, sec. 3). That costs one forward and ``among`` backward passes.

    Success is to leave the label, by way of whichever class. Under a targeted threat the target is given, and the
    attack runs once. Nothing is spent on a -1 in ``Problem.order``: it stands for a class that is proven out of reach.
    """

    attack: Runnable
    count: int = 9
    among: int = 0

    def __post_init__(self) -> None:
        _at_least_one(self.count, "Targets.count")

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        if p.goal.label is None:
            return self.attack.run(door, p, full=full)
        out = Outcome.nothing(p)
        for i, target in enumerate(self._ranked(door, p, p.goal.label)):
            out = attack_rest(self.attack, door, p.toward(target), out, i, full=full, entered=target >= 0)
        return out

    def _ranked(self, door: Door, p: Problem, label: Labels) -> Iterator[Labels]:
        order = p.order
        if order is None:
            z = _clean_logits(door, p)
            order = z.scatter(1, label[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
        others = order.shape[1] - 1
        if min(self.among, others) > self.count:
            order = order[:, : min(self.among, others)]
            many = ((order >= 0).sum(1) > self.count).nonzero()[:, 0]  # of few, all are tried
            if len(many):
                order = order.index_copy(0, many, _by_distance(door, p.take(many), order[many]))
        return iter(order[:, : min(self.count, others)].T)


def _by_distance(door: Door, p: Problem, candidates: Labels) -> Labels:
    """Sort candidate classes (b, m) by the distance to their boundaries with the label, as the gradient tells it.

    What is no class, -1, comes last.
    """

    def gaps(z: Logits, goal: Goal) -> Tensor:
        assert goal.label is not None
        assert goal.weights is not None
        return z.gather(1, goal.weights) - z.gather(1, goal.label[:, None])

    q = p.along(candidates.clamp_min(0))  # the goal carries them, so that they are cut with it
    e = door.slopes(p.x0, q, gaps, candidates.shape[1])
    steep = torch.stack([p.norm.dual(e.slopes[:, i]) for i in range(candidates.shape[1])], 1)
    away = (-e.values / steep.clamp_min(TINY)).masked_fill(candidates < 0, torch.inf)
    return candidates.gather(1, away.argsort(dim=1, stable=True))


def _at_least_one(count: int, what: str) -> None:
    if count < 1:
        raise UsageError(f"{what} >= 1", f"{count}", "An attack that never runs finds nothing.")


@final
@dataclass(frozen=True, slots=True)
class Chain(Runnable):
    """Runs each attack from where the one before it stopped, on what is still standing."""

    attacks: tuple[Runnable, ...]

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        out = Outcome.nothing(p)
        for i, attack in enumerate(self.attacks):
            out = attack_rest(attack, door, p.starting(out.x) if i else p, out, i, full=full)
        return out


@final
@dataclass(frozen=True, slots=True)
class OutputDiversified(Runnable):
    """Runs an attack from a point that random directions in output space lead to.

    Each sample draws w ~ U(-1, 1)^c and takes ``steps`` steps of eps up <w, z>; the attack starts where that is
    largest. A step that succeeds already ends it. With :class:`Restarts` every restart draws anew.

    *Cost* on top of the attack's: ``steps`` + 1 forwards and ``steps`` backwards; where the clean logits are not known,
    one more forward.

    Args:
        attack: any attack that can start from a given point.
        steps: number of steps in output space.

    *Differs from the paper in*: of the points visited, the one with the largest <w, z> is the start, not the last.

    References:
        Tashiro et al. 2020, arXiv:2003.06878, sec. 3.
    """

    attack: Runnable
    steps: int = 2

    def __post_init__(self) -> None:
        _at_least_one(self.steps, "OutputDiversified.steps")

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        z = _clean_logits(door, p)
        w = 2 * p.stage(_DIRECTION).draws.uniform(z.shape[1:], z.dtype) - 1
        out = attack_rest(PGD(steps=self.steps, rel_step=1.0, loss=along), door, p.along(w), Outcome.nothing(p), 0)
        return attack_rest(self.attack, door, p.starting(out.x), out, 1, full=full)


_DIRECTION = 2
"""Names the random numbers of directions, beside those of the two parts."""


def _clean_logits(door: Door, p: Problem) -> Logits:
    return p.clean_logits if p.clean_logits is not None else door.logits(p.x0, p.rows)


def attack_rest(
    attack: Runnable,
    door: Door,
    p: Problem,
    out: Outcome,
    number: int,
    *,
    full: bool = False,
    entered: Mask | None = None,
) -> Outcome:
    """Run part ``number`` of a combination on the samples that have not fallen yet; return the joint outcome.

    Where the smallest perturbation is wanted, on all samples; the smallest success so far is kept. Only samples that
    ``entered`` (b,) are attacked; None stands for all.
    """
    wanted = ~out.success | p.minimal
    rows = (wanted if entered is None else wanted & entered).nonzero()[:, 0]
    if not len(rows):
        return out
    new, old = attack.run(door, p.take(rows).stage(number), full=full), out.success[rows]
    if p.minimal:
        q = p.take(rows)
        worse = old & ~(new.success & (q.size(new.x) < q.size(out.x[rows])))
        rows, new = rows[~worse], new.take((~worse).nonzero()[:, 0])
    # Where all parts fail, the point of the last one is left: losses differ, so there is no strongest.
    return out.updated(rows, new, by=number)


@final
@dataclass(frozen=True, slots=True)
class Bisect(Runnable):
    """Finds small perturbations with an attack of fixed budget, by bisection over the radius of each sample.

    Doubles the radius until the attack succeeds, then halves the gap between the largest radius that failed and the
    smallest success. Works for problems with and without an eps, which then bounds the search.

    Args:
        attack: run once a round, each sample at a radius of its own.
        rounds: number of rounds.
        first: first radius as a fraction of the largest that makes sense.
    """

    attack: Runnable
    rounds: int = 10
    first: float = 0.05

    def __post_init__(self) -> None:
        _at_least_one(self.rounds, "Bisect.rounds")

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        most = p.full(p.norm.diameter(p.box.width, p.x0[0].numel())).minimum(p.radius)
        low, high, out = p.full(0.0), p.full(torch.inf), Outcome.nothing(p)
        for i in range(self.rounds):
            wanted = torch.where(high.isinf(), (2 * low).clamp_min(self.first * most), (low + high) / 2).minimum(most)
            new = self.attack.run(door, p.with_radius(wanted).stage(i), full=full)
            size = torch.where(new.success, p.size(new.x), torch.inf)
            smaller = size < high
            out = Outcome(choose(smaller, new.x, out.x), out.success | new.success, torch.where(smaller, 0, out.by))
            low, high = torch.where(new.success, low, torch.maximum(low, wanted)), torch.minimum(high, size)
        return out
