"""The race: rounds of attacks, each on those samples that are nearest to falling.

This file decides who is attacked next; ``block.py`` attacks. Which rounds there are is data, in ``efforts.py``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.attacks import Bisect, Cascade, Chain, Runnable, Targets, describe_attack
from assay.attacks.loop import ScoreAttack, StepAttack
from assay.core.random import Draws
from assay.core.types import Inputs, Labels, Logits, Mask, PerSample

SPREAD: Final = 0.05
"""A round goes on to the next samples as long as it breaks this share of those it was given."""

LEAST: Final = 4
"""Samples that a round is given at least, as long as there are so many."""

TRIAL: Final = 16
"""Samples on which an opener is tried. With fewer than six groups of that size, nothing is tried."""

CLEAR: Final = 0.5
"""Where the best opener breaks this share of its group, others that break less than half of that are left out."""

AHEAD: Final = 1.5
"""So many times as much as the opener that ``leads`` another one breaks, and ``CLEAR``, to lead in its place."""

FALLEN: Final = 12
"""Passes that are granted for a sample that has fallen; most fall within a few steps."""

CHEAP: Final = 2
"""A block that costs no more passes than this, on average over the samples that are right, is never too dear."""

HOT: Final = 0.1
"""A share of a block, or of a turn, whose fall shows that going on is worth what it costs."""


@final
@dataclass(frozen=True, slots=True)
class Round:
    """One attack of a race.

    Args:
        name: as tables and ``broken_by`` call it.
        kind: what it shows about the model (``diagnosis.judge``): ce, margin, outside, restart, targets or scores.
        attack: run on every sample that the round is given.
        share: of the survivors, those nearest to falling, to begin with. Where it breaks at least ``SPREAD`` of them,
            it is given as many more.
        repeat: the most turns; a turn that breaks nothing is the last.
        warm: start from the best point so far.
        opener: tried on a few samples first; the one that then leads is run on all samples, the others follow.
        leads: of the openers, unless another one is clearly ahead; where none does, the one that breaks most.
        full: take all steps of an attack with a sample that has fallen, too.
        block: the most samples that it is given at once (None: its share): the fewer, the sooner it stops where nothing
            falls.
    """

    name: str
    kind: str
    attack: Runnable
    share: float = 1.0
    repeat: int = 1
    warm: bool = False
    opener: bool = False
    leads: bool = False
    full: bool = False
    block: int | None = None

    def to_json(self) -> dict[str, Any]:
        how = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "attack"}
        return {**how, "attack": describe_attack(self.attack)}


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """Rounds, and after them the ``ladder``, all of it, for a random ``audit`` share of the survivors.

    A block of samples is passed over if it could make the race cost more than ``most`` passes for each sample that
    stands and ``FALLEN`` for each that fell (None: no limit); but not an opener, nor what follows a block or a turn of
    which ``HOT`` fell, nor, where ``SPREAD`` of all samples stand, the first block that is searched by scores: what no
    gradient led to may fall to it. Where the robust accuracy at smaller eps is wanted, too, ``tighten`` is run at each
    of them.
    """

    rounds: tuple[Round, ...]
    most: int | None = None
    ladder: tuple[Round, ...] = ()
    audit: float = 0.0
    tighten: tuple[Round, ...] = ()

    def to_json(self) -> dict[str, Any]:
        parts = {k: [r.to_json() for r in getattr(self, k)] for k in ("rounds", "ladder", "tighten")}
        return {**parts, "most": self.most, "audit": self.audit, "spread": SPREAD, "least": LEAST, "trial": TRIAL}


@final
@dataclass(slots=True)
class Race:
    """Where a race stands: plain tensors on the CPU and plain numbers, so that it can be saved between any two batches.

    n samples, c classes. ``near`` (n, c) says how near each class came to overtaking the label, at the clean input or
    at the best point of any round: a margin, negative; -inf for the label, and for what is proven out of reach. A
    sample's place in the race is its largest, over the square root of ``gap``, its margin at the clean input.
    ``best`` (n, *f) holds the best points; of a fallen sample, the one that fools.
    """

    standing: Mask
    near: Logits
    best: Inputs
    gap: PerSample
    by: Labels  # the round that broke it; -1: none
    trial: Labels  # the opener that is tried on the sample; -1: none
    order: list[int]  # rounds, as they are run
    trials: int  # openers that are still to be tried
    yields: list[float]  # share of its group that each opener broke
    waiting: Labels  # what is left of the block, best first
    seen: Mask  # in this turn
    turns: int = 0  # so far: names the random numbers
    leg: int = 0  # position in ``order``
    turn: int = 0  # of this round
    size: int = 0  # of the blocks of this turn
    given: int = 0  # samples in the block
    fell: int = 0  # of the block
    given_in_turn: int = 0
    fell_in_turn: int = 0
    yielded: float = 0.0  # share of the last block that fell, or, where a turn ended with it, of that turn

    @classmethod
    def start(cls, rounds: tuple[Round, ...], x: Inputs, near: Tensor, right: Mask, draws: Draws) -> "Race":
        """Line up the samples x (n, *f) that are ``right`` (n,); openers come first among the rounds.

        ``near`` (n, c) are the :func:`margins` at x.
        """
        none, far = torch.full((len(x),), -1), torch.finfo(near.dtype)
        openers, group = sum(r.opener for r in rounds), max(TRIAL, len(x) // 32)
        race = cls(
            standing=right.clone(),
            near=near,
            best=x.clone(),
            gap=(-near.amax(1)).clamp(far.tiny, far.max),
            by=none,
            trial=none.clone(),
            order=[*range(len(rounds))],
            trials=openers if openers > 1 and int(right.sum()) >= 2 * openers * group else 0,
            yields=[],
            waiting=none[:0],
            seen=torch.zeros_like(right),
        )
        if race.trials:
            lots = torch.where(right, draws.fold(_LOTS).uniform(), torch.inf).argsort(stable=True)
            race.trial[lots[: openers * group]] = torch.arange(openers).repeat_interleave(group)
        else:
            race.order.sort(key=lambda i: not rounds[i].leads)
        return race

    def to_arrays(self, prefix: str) -> dict[str, NDArray[Any]]:
        """Return the state as arrays, by names that begin with ``prefix``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {prefix + k: v.numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in values.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], prefix: str) -> "Race":
        """Return the state that :meth:`to_arrays` wrote."""

        def read(name: str, kind: Any) -> Any:
            v = arrays[prefix + name]
            if kind in (int, float):
                return v.item()
            return v.tolist() if kind in (list[int], list[float]) else torch.from_numpy(v)

        return cls(**{f.name: read(f.name, f.type) for f in fields(cls)})

    def next(self, rounds: tuple[Round, ...], most: int) -> tuple[Round, Labels] | None:
        """Return what is attacked next, at most ``most`` samples; None when the race is over."""
        while not len(self.waiting):
            if self.leg >= len(self.order) or not self.standing.any():
                return None
            self._advance(rounds[self.order[self.leg]], rounds)
        ids, self.waiting = self.waiting[:most], self.waiting[most:]
        return rounds[self.order[self.leg]], ids

    @property
    def in_first_block(self) -> bool:
        """Whether what is attacked now is the first block that its round is given."""
        return not self.turn and self.given == self.given_in_turn

    def pass_over(self) -> None:
        """Leave the block that was just given, and the rest of its round."""
        self.waiting = self.waiting[:0]
        self.leg += 1
        self._end(0)

    def settle(self, ids: Labels, fell: Mask, near: Tensor, x: Inputs) -> None:
        """Take note of what a round did to the samples ``ids`` (k,): who fell, and the margins (k, c) at the best x."""
        count = int(fell.sum())
        self.fell, self.fell_in_turn = self.fell + count, self.fell_in_turn + count
        self.standing[ids] &= ~fell
        self.by[ids] = torch.where(fell, self.order[self.leg], self.by[ids])
        better = fell | (near.amax(1) > self.near[ids].amax(1))
        self.near[ids] = torch.maximum(self.near[ids], near)
        self.best[ids[better]] = x[better]

    def _advance(self, now: Round, rounds: tuple[Round, ...]) -> None:
        """The block is done: go on to the next one, the next turn or the next round."""
        if not self.given:
            self._begin(now)
        elif self.trials:
            self._judge(rounds)
        elif self.fell >= SPREAD * self.given and self._block():
            return
        elif self.fell_in_turn and self.turn + 1 < now.repeat:
            self._end(self.turn + 1)
        else:
            self.leg += 1
            self._end(0)

    def _begin(self, now: Round) -> None:
        if self.trials:
            self._give((self.trial == self.leg).nonzero()[:, 0])
            return
        share = math.ceil((1 if now.leads and not self.leg else now.share) * int(self.standing.sum()))
        self.size = max(LEAST, min(share, now.block or share))
        if not self._block():
            self.leg += 1
            self._end(0)

    def _judge(self, rounds: tuple[Round, ...]) -> None:
        """An opener was tried; after the last one, let one of them begin, on all but those that it was tried on."""
        self.yields.append(self.fell / self.given)
        self.trials -= 1
        self.leg += 1
        self._end(0)
        if self.trials:
            return
        best = max(range(len(self.yields)), key=lambda i: (self.yields[i], -i))
        poor = self.yields[best] / 2 if self.yields[best] >= CLEAR else 0.0
        weak = {i for i, share in enumerate(self.yields) if share < poor}
        lead = next((i for i in range(len(self.yields)) if rounds[i].leads), best)
        if self.yields[best] >= max(CLEAR, AHEAD * self.yields[lead]):
            lead = best
        self.order = [lead, *(i for i in range(len(rounds)) if i != lead and i not in weak)]
        self.leg, self.size, self.seen = 0, len(self.standing), self.trial == lead
        if not self._block():
            self.leg += 1
            self._end(0)

    def _block(self) -> bool:
        """Give the round the next samples in the order of their places; tell whether there are any."""
        ids = (self.standing & ~self.seen).nonzero()[:, 0]
        place = (self.near.amax(1) / self.gap.sqrt())[ids]
        self._give(ids[place.argsort(descending=True, stable=True)[: self.size]])
        return bool(self.given)

    def _give(self, ids: Labels) -> None:
        if self.given:
            self.yielded = self.fell / self.given
        self.waiting, self.given, self.fell = ids, len(ids), 0
        self.given_in_turn += len(ids)
        self.seen[ids] = True

    def _end(self, turn: int) -> None:
        if self.given_in_turn:
            self.yielded = self.fell_in_turn / self.given_in_turn
        self.turn, self.turns = turn, self.turns + 1
        self.given = self.fell = self.given_in_turn = self.fell_in_turn = 0
        self.seen = torch.zeros_like(self.seen)


_LOTS = 11
"""Names the random numbers that say on which samples openers are tried."""


def sees_scores(attack: Runnable) -> bool:
    """Tell whether an attack begins with a search by scores, without gradients."""
    return isinstance(attack.attacks[0] if isinstance(attack, Chain) else attack, ScoreAttack)


def passes_of(attack: Runnable) -> int:
    """Return the forward and backward passes of a sample that withstands an attack."""
    match attack:
        case Targets():
            return attack.count * passes_of(attack.attack)
        case Cascade() | Chain():
            return sum(map(passes_of, attack.attacks))
        case Bisect():
            return attack.rounds * passes_of(attack.attack)
        case StepAttack():
            return sum(attack.cost(k) for k in range(attack.questions + 1))
        case _:
            raise NotImplementedError(f"the cost of {type(attack).__name__} is not known")


def margins(logits: Logits, labels: Labels, excluded: Mask) -> Tensor:
    """Return how far each class is ahead of the label (n, c); -inf for the label and what is ``excluded`` (n, c)."""
    own = labels[:, None]
    return (logits - logits.gather(1, own)).scatter(1, own, -torch.inf).masked_fill(excluded, -torch.inf)
