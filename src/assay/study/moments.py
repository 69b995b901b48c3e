"""Sparseness of responses, and the sums from which it is computed: one pass over the samples, whatever their number.

References:
    Rolls & Tovee 1995, Journal of Neurophysiology 73(2), 713-726 (the measure a); Vinje & Gallant 2000, Science 287,
    1273-1276 (scaled to 0 .. 1); Willmore & Tolhurst 2001, Network 12(3), 255-270 (population and lifetime).
"""

from typing import final

import torch
from torch import Tensor

from assay.core.types import Labels, PerSample


def index_of(mean: Tensor, square: Tensor, n: int) -> Tensor:
    """Return the index of sparseness (1 - a) / (1 - 1/n), a = mean**2 / square, elementwise.

    Args:
        mean: the mean of n responses.
        square: the mean of their squares.
        n: how many responses there are.

    Returns:
        0 where all responses are alike, 1 where one alone is not 0; NaN where all are 0, or where n is 1. Responses of
        both signs are taken as they are, and may give as much as n / (n - 1).
    """
    if n < 2:
        return torch.full_like(mean, torch.nan)
    silent = square == 0
    a = mean.square() / torch.where(silent, 1, square)  # no 0 / 0, whose gradient would spoil that of other samples
    return torch.where(silent, torch.nan, (1 - a) / (1 - 1 / n))


def population_sparseness(r: Tensor) -> Tensor:
    """Return the population sparseness index (PSI) of responses (..., n), shape (...), in float64.

    Differentiable. The same for any multiple of the responses: each row is divided by its largest one first.

    Example:
        >>> population_sparseness(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [7.0, 0.0, 0.0, 0.0]]))
        tensor([0.0000, 0.6667, 1.0000], dtype=torch.float64)
    """
    r = _scaled(r.double())
    return index_of(r.mean(-1), r.square().mean(-1), r.shape[-1])


def _scaled(r: Tensor) -> Tensor:
    """Divide rows (..., n) by their largest magnitude, so that no square over- or underflows; rows of 0 stay 0."""
    top = r.detach().abs().amax(-1, keepdim=True)
    return r / torch.where(top > 0, top, 1)


@final
class Moments:
    """What one layer answered to a stream of samples, in memory that grows by two numbers a sample only.

    Per sample it keeps the PSI and the share of active units (those whose response is not 0); for everything else there
    are sums: of responses by class and unit, of their squares and of activity by unit. All are float64.

    Args:
        units: responses a sample.
        classes: number of classes.
        device: where the responses are.
    """

    def __init__(self, units: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.units, self.classes = units, classes
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)
        self.sums = torch.zeros(classes, units, dtype=torch.float64, device=device)
        self.squares = torch.zeros(units, dtype=torch.float64, device=device)
        self.ever = torch.zeros(units, dtype=torch.bool, device=device)
        self.signed = False
        self._psi: list[Tensor] = []
        self._active: list[Tensor] = []

    def add(self, r: Tensor, y: Labels) -> None:
        """Take the responses r (b, units) to samples of the classes y (b,)."""
        r = r.detach().double()
        self._psi.append(population_sparseness(r).cpu())
        self._active.append((r != 0).double().mean(1).cpu())
        self.counts.index_add_(0, y, torch.ones_like(y))
        self.sums.index_add_(0, y, r)
        self.squares += r.square().sum(0)
        self.ever |= (r != 0).any(0)
        self.signed |= bool((r < 0).any())

    @property
    def n(self) -> int:
        return int(self.counts.sum())

    @property
    def last(self) -> PerSample:
        """The PSI of the samples that were added last (b,)."""
        return self._psi[-1]

    @property
    def psi(self) -> PerSample:
        """The PSI of each sample (n,), NaN where no unit answered."""
        return torch.cat(self._psi)

    @property
    def active(self) -> PerSample:
        """The share of units that answered each sample (n,)."""
        return torch.cat(self._active)

    @property
    def class_psi(self) -> Tensor:
        """The PSI of each class's mean responses (classes,), NaN for classes without a sample."""
        means = self.sums / self.counts.clamp_min(1)[:, None]
        return population_sparseness(means).cpu()

    @property
    def lifetime(self) -> Tensor:
        """The lifetime sparseness of each unit (units,): the same index, over samples; NaN where it never answers."""
        return index_of(self.sums.sum(0) / max(self.n, 1), self.squares / max(self.n, 1), self.n).cpu()


def by_class(values: Tensor, y: Labels, classes: int) -> Tensor:
    """Return the mean of values (n,) over the samples of each class (classes,); NaN values are left out."""
    known = ~values.isnan()
    total = torch.zeros(classes, dtype=torch.float64).index_add_(0, y[known], values[known].double())
    return total / torch.bincount(y[known], minlength=classes)  # 0 / 0 is NaN
