"""Where attacks that see labels only begin: at candidates, one after the other, until one meets the goal."""

import hashlib
from collections.abc import Callable
from typing import Final, TypeAlias, final

import torch

from assay.attacks.outside import smooth_noise
from assay.core.errors import DataError
from assay.core.registry import one_of
from assay.core.types import Inputs, Labels
from assay.threats.problem import Problem

Start: TypeAlias = Callable[[Problem, int], Inputs]
"""From the problem and the number of the candidate (0, 1, ...) to one point a sample (b, *f) inside the box.

Any such function will do; ``lambda p, i: given[p.rows]`` starts every sample at a point of its own.
"""


def uniform(p: Problem, i: int) -> Inputs:
    """Draw every value from the whole box."""
    return p.box.lo + p.box.width * p.stage(i).draws.uniform(p.x0.shape[1:], p.x0.dtype)


def smooth(p: Problem, i: int) -> Inputs:
    """Draw a smooth random image, of which networks name more classes than of uniform noise."""
    share = (smooth_noise(p.stage(i)) - p.box.lo) / p.box.width
    # To 12 bits, for the last bit of a sigmoid in float32 depends on the place in the batch.
    return p.box.lo + p.box.width * (share * 4096).round() / 4096


def noise(p: Problem, i: int) -> Inputs:
    """Draw uniform and smooth noise in turns."""
    return smooth(p, i) if i % 2 else uniform(p, i)


def largest(p: Problem, i: int) -> Inputs:
    """Return the largest values of the box, then smooth and uniform noise in turns."""
    return noise(p, i) if i else torch.full_like(p.x0, p.box.hi)


def sparse(p: Problem, i: int) -> Inputs:
    """Set some values, chosen at random, to either end of the box, half as many again each time; then noise."""
    share = max(0.004, 1 / p.x0[0].numel()) * 1.5**i
    u = p.stage(i).draws.uniform(p.x0.shape[1:], p.x0.dtype)
    salted = torch.where(u < share, torch.where(u < share / 2, p.box.lo, p.box.hi), p.x0)
    return salted if share < 1 else noise(p, i)


STARTS: Final[dict[str, Start]] = {
    "noise": noise,
    "uniform": uniform,
    "smooth": smooth,
    "largest": largest,
    "sparse": sparse,
}
"""The starts that have a name."""


@final
class Pool:
    """Starts at samples from data: at the nearest (in l2), then at the second nearest, and so on; then at noise.

    With their labels, only those are asked about that carry the wanted label or, where the goal is to leave a label,
    another one; without labels, all are. A targeted attack needs such a pool: noise is of few classes.

    Args:
        x: samples (m, *f) inside the model's box.
        y: their labels (m,), if they are known.

    Raises:
        DataError: no samples, or not one label for each.

    Example:
        >>> import torch
        >>> from assay.attacks import HopSkipJump
        >>> attack = HopSkipJump(start=Pool(torch.rand(100, 4), torch.arange(100) % 2))
    """

    def __init__(self, x: Inputs, y: Labels | None = None) -> None:
        if not len(x) or (y is not None and y.shape != (len(x),)):
            found = f"{tuple(x.shape)} and {None if y is None else tuple(y.shape)}"
            raise DataError("samples (m, *f), m >= 1, and as many labels (m,) or none", found, "Pass x and y.")
        self._x, self._y = x.detach().clone(), None if y is None else y.detach().clone()
        kept = [v.cpu().contiguous().numpy().tobytes() for v in (self._x, self._y) if v is not None]
        self.__name__ = f"pool of {len(x)}, SHA-256 {hashlib.sha256(b''.join(kept)).hexdigest()}"

    def __call__(self, p: Problem, i: int) -> Inputs:
        if p.x0.shape[1:] != self._x.shape[1:]:
            found = f"{tuple(self._x.shape[1:])} for samples {tuple(p.x0.shape[1:])}"
            raise DataError("a pool of samples of the attacked ones' shape", found, "Resize the pool.")
        x = self._x.to(p.x0)
        # Not torch.cdist over the batch: a sample's distances must not depend, to the last bit, on its batch.
        away = torch.stack([(x - v).flatten(1).double().square().sum(1) for v in p.x0])
        if self._y is not None:
            away = torch.where(self._fits(p, self._y.to(p.rows.device)), away, torch.inf)
        nearest = away.argsort(dim=1, stable=True)[:, min(i, len(x) - 1)]
        left = away.gather(1, nearest[:, None])[:, 0].isfinite() & (i < len(x))
        return torch.where(left.view(-1, *[1] * (x.ndim - 1)), x[nearest].clamp(p.lower, p.upper), noise(p, i))

    def _fits(self, p: Problem, y: Labels) -> torch.Tensor:
        """Tell which of the pool's labels meet the goal: (b, m)."""
        if p.goal.label is not None:
            return y[None] != p.goal.label[:, None]
        assert p.goal.target is not None
        return y[None] == p.goal.target[:, None]


def start_of(start: "Start | str") -> Start:
    """Return the start of that name, or the function itself.

    Raises:
        UsageError: there is none of that name.
    """
    if not isinstance(start, str):
        return start
    one_of("start", start, [*STARTS])
    return STARTS[start]
