"""How walks end in l0: changes are undone one after the other, while the others go all the way."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from assay.core.types import Inputs, PerSample, choose
from assay.models.door import Gradient
from assay.threats.problem import Problem


class Changes(NamedTuple):
    """The sparsest success so far, and what each of its changes brings to the margin, as the gradient there says."""

    best: Inputs
    size: PerSample  # of best; inf where nothing succeeded
    worth: Inputs  # of each change; inf where there is none, or where it was undone in vain

    @classmethod
    def none(cls, p: Problem) -> "Changes":
        return cls(p.x0, p.full(torch.inf), torch.full_like(p.x0, torch.inf))

    def seen(self, p: Problem, x: Inputs, e: Gradient) -> "Changes":
        """Return the changes after x was asked."""
        size, d = p.size(x), x - p.x0
        better = e.success & (size < self.size)
        worth = torch.where(d == 0, torch.inf, e.grad * d)
        return Changes(
            choose(better, x, self.best), torch.where(better, size, self.size), choose(better, worth, self.worth)
        )

    def undone(self, p: Problem) -> tuple[Inputs, "Changes"]:
        """Return the next point to ask, and the changes that are left to be undone.

        The least of them is undone. The others become as large as the box allows, which costs nothing in l0.
        """
        worth = self.worth.flatten(1)
        least = F.one_hot(worth.argmin(1), worth.shape[1]).bool().view(self.worth.shape)
        d = self.best - p.x0
        x = torch.where((d == 0) | least, p.x0, torch.where(d > 0, p.upper, p.lower))
        return x, self._replace(worth=self.worth.masked_fill(least, torch.inf))
