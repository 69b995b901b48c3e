"""How walks end well: the places where the best of them ended, each refined in its turn."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from assay.core.types import Inputs, PerSample, choose
from assay.threats.problem import Problem


class Ends(NamedTuple):
    """Where walks ended: the smallest success of each of the best ones, in order of size."""

    x: Tensor  # (b, n, *f)
    size: Tensor  # (b, n); inf where fewer walks met the goal

    @classmethod
    def none(cls, p: Problem, n: int) -> "Ends":
        return cls(p.x0[:, None].repeat_interleave(n, 1), p.x0.new_full((len(p), n), torch.inf))

    def at(self, i: int, elsewhere: Inputs) -> Inputs:
        """Return end number i; where there is none, the point ``elsewhere``."""
        return choose(self.size[:, i].isfinite(), self.x[:, i], elsewhere)

    def joined(self, rows: Tensor, x: Inputs, size: PerSample) -> "Ends":
        """Return the ends after walks of the samples ``rows`` (r,) ended at x (r, *f): the largest one has to go."""
        points = torch.cat([x[:, None], self.x[rows]], 1)
        sizes = torch.cat([size[:, None], self.size[rows]], 1)
        order = sizes.argsort(dim=1, stable=True)[:, : self.size.shape[1]]
        points = points[torch.arange(len(rows), device=rows.device)[:, None], order]
        return Ends(self.x.index_copy(0, rows, points), self.size.index_copy(0, rows, sizes.gather(1, order)))

    def refined(self, i: int, x: Inputs, size: PerSample) -> "Ends":
        """Return the ends after number i became x (b, *f)."""
        rows = torch.arange(len(x), device=x.device)
        gone = self.size.index_fill(1, torch.tensor([i], device=x.device), torch.inf)
        return self._replace(size=gone).joined(rows, x, size)


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
