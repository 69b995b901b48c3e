"""How walks end well: the places where the best of them ended, each refined in its turn."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from assay.core.types import Inputs, Mask, PerSample, Rows, choose
from assay.models.door import Gradient
from assay.threats.problem import Problem


class End(NamedTuple):
    """The smallest success of a walk and, in l0, what each of its changes brings to the margin."""

    x: Inputs
    size: PerSample  # inf where nothing succeeded
    worth: Inputs  # as the gradient there says; inf where nothing changed, or was undone in vain; (b, 0) but for l0

    @classmethod
    def none(cls, p: Problem) -> "End":
        worth = torch.full_like(p.x0, torch.inf) if p.norm.name == "l0" else p.x0.new_empty(len(p), 0)
        return cls(p.x0, p.full(torch.inf), worth)

    def seen(self, p: Problem, x: Inputs, e: Gradient) -> "End":
        """Return the end after the walk came to x, and its gradient was asked."""
        end, d = self.tried(p, x, e.success), x - p.x0
        if p.norm.name != "l0":
            return end
        worth = torch.where(d == 0, torch.inf, e.grad * d)
        return end._replace(worth=choose(end.size < self.size, worth, self.worth))

    def tried(self, p: Problem, x: Inputs, success: Mask) -> "End":
        """Return the end after x was asked: what is known of its changes stays."""
        size = p.size(x)
        smaller = success & (size < self.size)
        return self._replace(x=choose(smaller, x, self.x), size=torch.where(smaller, size, self.size))

    def undone(self, p: Problem) -> tuple[Inputs, "End"]:
        """Return the next point to ask in l0, and the end with the changes that are then left to be undone.

        The least of them is undone. The others become as large as the box allows, which costs nothing in l0.
        """
        worth = self.worth.flatten(1)
        least = F.one_hot(worth.argmin(1), worth.shape[1]).bool().view(self.worth.shape)
        d = self.x - p.x0
        x = torch.where((d == 0) | least, p.x0, torch.where(d > 0, p.upper, p.lower))
        return x, self._replace(worth=self.worth.masked_fill(least, torch.inf))

    @property
    def left(self) -> Tensor:
        """The number of changes (b,) that are left to be undone."""
        return self.worth.isfinite().flatten(1).sum(1)

    def take(self, rows: Rows) -> "End":
        return End(*(v[rows] for v in self))

    def replaced(self, where: Mask, by: "End") -> "End":
        return End(*(choose(where, new, old) for new, old in zip(by, self, strict=True)))


class Ends(NamedTuple):
    """Where walks ended: the best ones of each sample, in order of size."""

    x: Tensor  # (b, n, *f)
    size: Tensor  # (b, n); inf where fewer walks met the goal
    worth: Tensor  # (b, n, *f) or (b, n, 0)

    @classmethod
    def none(cls, p: Problem, n: int) -> "Ends":
        return cls(*(v[:, None].repeat_interleave(n, 1) for v in End.none(p)))

    def at(self, i: int | Tensor, elsewhere: Inputs) -> End:
        """Return end number i, the same or another (b,) of each sample; where there is none, at ``elsewhere``."""
        x, size, worth = (v[torch.arange(len(v), device=v.device), i] for v in self)
        return End(choose(size.isfinite(), x, elsewhere), size, worth)

    def joined(self, rows: Rows, end: End) -> "Ends":
        """Return the ends after walks of the samples ``rows`` (r,) ended at ``end`` (r): the largest one has to go.

        In l0 an end of the same changes as another says nothing new, and is left out.
        """
        if end.worth.shape[1]:
            known = (end.worth[:, None].isfinite() == self.worth[rows].isfinite()).flatten(2).all(2).any(1)
            end = end._replace(size=torch.where(known, torch.inf, end.size))
        pool = [torch.cat([new[:, None], old[rows]], 1) for new, old in zip(end, self, strict=True)]
        order = pool[1].argsort(dim=1, stable=True)[:, : self.size.shape[1]]
        at = torch.arange(len(rows), device=rows.device)[:, None]
        return Ends(*(old.index_copy(0, rows, new[at, order]) for old, new in zip(self, pool, strict=True)))

    def refined(self, i: int, end: End) -> "Ends":
        """Return the ends after number i became ``end`` (b)."""
        rows = torch.arange(len(end.x), device=end.x.device)
        gone = self.size.index_fill(1, torch.tensor([i], device=rows.device), torch.inf)
        return self._replace(size=gone).joined(rows, end)


class Round(NamedTuple):
    """A round in which the best ends are refined, one after the other."""

    share: float  # of all steps of the attack
    fewest: int  # steps for an end
    most: int = 1_000  # ends


class Turn(NamedTuple):
    """A step that refines an end."""

    end: int
    place: int
    length: int

    @property
    def last(self) -> bool:
        return self.place + 1 == self.length


@cache
def turns(rounds: tuple[Round, ...], steps: int) -> tuple[Turn, ...]:
    """Return what the last of ``steps`` steps do, one by one: nothing where a round has too few for one end."""
    out: list[Turn] = []
    for each in rounds:
        mine = each.share * steps
        count = min(each.most, int(mine / each.fewest))
        length = int(mine / max(count, 1))
        out += [Turn(end, place, length) for end in range(count) for place in range(length)]
    return tuple(out)
