"""Around a head that hides the gradient: where an inner tensor decides the classes already, it is attacked instead."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from assay.models.repairs.calls import is_float, straight
from assay.models.repairs.numbered import Call, Numbered, is_data

_AGREE = 0.9
_HAIR = 1e-5


@final
@dataclass(frozen=True, slots=True)
class Tapped:
    """The result of an earlier call stands for that of the last one: both are scores (b, c), nearly always of one mind.

    Where the last one picks another class, that class is put in front by a hair: what succeeds is always what succeeds
    against the output itself, whatever the gradient is taken from.

    References:
        Carlini & Wagner 2017, arXiv:1608.04644, sec. V-B: attack the logits, not what is computed from them.
    """

    source: Call
    last: Call

    def opened(self, x: Tensor) -> AbstractContextManager[Any]:
        kept: dict[Call, Tensor] = {}

        def leave(call: Call, out: Any) -> Any:
            if call == self.source:
                kept[call] = out
            return _led(kept[self.source], out) if call == self.last and self.source in kept else out

        return Numbered(_unchanged, leave, transparent=False)


def _led(scores: Tensor, output: Tensor) -> Tensor:
    """Return scores, with the winner of the output as theirs."""
    winner = output.argmax(1, keepdim=True)
    top = scores.detach().amax(1, keepdim=True)
    lead = top + _HAIR * scores.detach().abs().amax(1, keepdim=True)
    value = scores.detach().scatter(1, winner, lead)
    return torch.where(scores.argmax(1, keepdim=True) == winner, scores, straight(value, scores))


@final
@dataclass(slots=True)
class Plumber:
    """Watches one pass and notes, in ``scores``, every result that may hold one score a class."""

    scores: list[tuple[Call, Tensor]] = field(default_factory=list)

    def opened(self, x: Tensor) -> AbstractContextManager[Any]:
        def leave(call: Call, out: Any) -> Any:
            if is_float(out) and out.ndim == 2 and is_data(out, x):
                self.scores.append((call, out))
            return out

        return Numbered(_unchanged, leave, transparent=False)

    def taps(self) -> list[Tapped]:
        """Return what can stand for the last result: other scores for as many classes, that pick the same ones."""
        if not self.scores:
            return []
        last, z = self.scores[-1]
        same = [(c, s) for c, s in self.scores[:-1] if s.shape == z.shape and s is not z]
        return [Tapped(c, last) for c, s in same if float((s.argmax(1) == z.argmax(1)).double().mean()) >= _AGREE]


def _unchanged(_: int, value: Tensor) -> Tensor:
    return value
