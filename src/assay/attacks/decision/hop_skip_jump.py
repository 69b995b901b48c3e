"""HopSkipJump: the boundary's normal from random probes, a jump along it, and back to the boundary."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch

from assay.attacks.decision.probes import Tally, directions
from assay.attacks.decision.start import Start
from assay.attacks.decision.walk import Bracket, Opening, Walk, merged, toward
from assay.attacks.registry import ATTACKS
from assay.core.types import Inputs, Labels, PerSample, choose, per_sample
from assay.models.door import Decision
from assay.threats.problem import Problem

PROBE, JUMP, CLOSE = 0, 1, 2
"""What the next answer is for: the normal, a point farther inside, the way back to the boundary."""

_SHORTEST = 1e-4
"""A jump of less than this share of the distance is given up, and more probes are made."""


class HopSkipJumpState(NamedTuple):
    """The point of the boundary; the phase that a sample is in, and what it has learned in it."""

    base: Inputs
    turn: Labels  # 1, 2, ...
    phase: Labels
    tally: Tally
    length: PerSample  # of the next jump, in the threat's norm
    end: Inputs  # where the last jump met the goal
    on: Bracket  # of shares of the way there


@final
@ATTACKS.register("hop-skip-jump", norm=("l2", "linf"), access="decision", kind="minimal")
@dataclass(frozen=True, slots=True, kw_only=True)
class HopSkipJump(Walk[HopSkipJumpState]):
    """At a point x_t of the boundary, estimates its normal v, jumps along it, and bisects back toward the clean input.

    v = sum_i (phi_i - mean phi) u_i over B_t = ``probes`` sqrt(t) directions u_i of length 1, phi_i = 1 where
    x_t + delta u_i meets the goal, else -1; delta = size(x_t) / d in a space of d dimensions. The jump goes to
    x_t + e v / ||v||_2 (linf: x_t + e sign(v)) with e = size(x_t) / sqrt(t), halved until the goal is met.
    The bisection ends at a share of d^-3/2 of the distance.

    *Sees* the predicted label. *Cost* ``steps`` + 1 forwards.

    Args:
        steps: number of queries.
        probes: B_1; no B_t is larger than 10,000.
        band: share of the frequencies of every axis of an image that the u_i have, the lowest, in every other turn from
            the first one on; vectors, and the turns between, have all.
        start: the candidates for a start: ``noise`` (uniform and smooth in turns), ``uniform``, ``smooth``, ``largest``
            (the largest values of the box, then noise), ``sparse`` (more and more values at the ends of the box), or a
            function such as a pool (:class:`assay.attacks.Pool`).

    Example:
        >>> import torch
        >>> from assay import Threat
        >>> line = lambda x: torch.stack([0.5 - x.mean(1), x.mean(1) - 0.5], 1)
        >>> r = HopSkipJump(steps=400)(line, torch.full((1, 4), 0.6), torch.tensor([1]), Threat("l2"))
        >>> round(r.size.item(), 2)
        0.2

    *Differs from the paper in*: half as many probes, in every other turn of low frequencies where there are images, as
    in Li et al. 2020, arXiv:2005.14137 (``probes`` = 100 and ``band`` = 1 are the paper's). Where no jump meets the
    goal, the probes are made again. For linf, delta and the end of the bisection are as for l2 (the paper's end is
    d^-2 of the distance).

    References:
        Chen, Jordan & Wainwright 2020, arXiv:1904.02144, algorithm 2.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2", "linf")
    steps: int = 1000
    probes: int = 50
    band: float = 0.5
    start: Start | str = "noise"

    def within(self, p: Problem) -> float:
        return float(max(p.x0[0].numel() ** -1.5, torch.finfo(p.x0.dtype).eps))

    def enter(self, p: Problem, o: Opening) -> HopSkipJumpState:
        first = torch.ones_like(p.rows)
        nothing = Bracket(p.full(0.0), p.full(1.0))
        return HopSkipJumpState(o.point(p), first, first * PROBE, Tally.empty(p), p.full(0.0), p.x0, nothing)

    def learn(self, p: Problem, w: HopSkipJumpState, x: Inputs, e: Decision, k: int) -> HopSkipJumpState:
        new = w
        for phase, learned in ((PROBE, self._probed), (JUMP, self._jumped), (CLOSE, self._closed)):
            here = w.phase == phase
            if here.any():
                new = merged(here, learned(p, w, x, e), new)
        return new

    def _probed(self, p: Problem, w: HopSkipJumpState, x: Inputs, e: Decision) -> HopSkipJumpState:
        tally = w.tally.seen((x - w.base) / per_sample(self._delta(p, w), x), e.success)
        wanted = (self.probes * w.turn.to(x.dtype).sqrt()).clamp_max(10_000).floor()
        length = p.size(w.base) / w.turn.to(x.dtype).sqrt()
        return w._replace(tally=tally, length=length, phase=torch.where(tally.asked >= wanted, JUMP, PROBE))

    def _jumped(self, p: Problem, w: HopSkipJumpState, x: Inputs, e: Decision) -> HopSkipJumpState:
        length = w.length / 2
        lost = length < _SHORTEST * p.size(w.base)
        return w._replace(
            length=length,
            end=x,
            on=Bracket(p.full(0.0), p.full(1.0)),
            tally=merged(lost & ~e.success, Tally.empty(p), w.tally),
            phase=torch.where(e.success, CLOSE, torch.where(lost, PROBE, JUMP)),
        )

    def _closed(self, p: Problem, w: HopSkipJumpState, x: Inputs, e: Decision) -> HopSkipJumpState:
        on = w.on.narrowed(e.success)
        over = on.closed(self.within(p))
        return w._replace(
            base=choose(over, toward(p, w.end, on.met), w.base),
            turn=w.turn + over.long(),
            on=on,
            tally=merged(over, Tally.empty(p), w.tally),
            phase=torch.where(over, PROBE, CLOSE),
        )

    def ask(self, p: Problem, w: HopSkipJumpState, k: int) -> Inputs:
        x = toward(p, w.end, w.on.middle())
        if (w.phase == JUMP).any():
            normal = w.tally.normal()
            normal = normal.sign() if p.norm.name == "linf" else normal
            x = choose(w.phase == JUMP, w.base + per_sample(w.length, normal) * normal, x)
        if (w.phase == PROBE).any():
            u, odd = directions(p.stage(k), self.band), w.turn % 2 == 1
            if self.band < 1 and not odd.all():
                u = choose(odd, u, directions(p.stage(k)))
            x = choose(w.phase == PROBE, w.base + per_sample(self._delta(p, w), u) * u, x)
        return x

    def _delta(self, p: Problem, w: HopSkipJumpState) -> PerSample:
        """Return how far probes go: a tenth of the box at first, for the first point is not near."""
        later = p.size(w.base) / p.x0[0].numel()
        return torch.where(w.turn == 1, 0.1 * p.box.width, later).clamp_min(1e-7 * p.box.width)
