"""What is measured of a minimal-norm attack: verified sizes, the area under its curve, its optimality.

Sizes have shape (n,), one a sample: inf where nothing was found, 0 where the network is wrong without any attack.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

OVERSHOOT = 1e-6
"""How far a returned value may lie outside the box, and how small a change still counts as rounding for l0."""


@torch.no_grad()
def verified_sizes(net: nn.Module, x: Tensor, y: Tensor, points: Tensor, norm: str) -> Tensor:
    """Return the sizes (b,) in float64 of the returned points (b, *f); inf where a point is no adversarial one.

    A point counts when it is finite, inside the box [0, 1], and misclassified in a fresh pass.
    """
    points = torch.as_tensor(points).detach().to(x.dtype).reshape(x.shape)
    boxed = points.clamp(0, 1)
    inside = ((points - boxed).abs() <= OVERSHOOT).flatten(1).all(1)
    if norm == "l0":  # x + (x' - x) and tanh(atanh(x)) are not x to the last bit
        boxed = torch.where((boxed - x).abs() <= OVERSHOOT, x, boxed)
    wrong = net(boxed).argmax(1) != y
    return torch.where(inside & wrong, size(boxed.double() - x.double(), norm), torch.inf)


def size(d: Tensor, norm: str) -> Tensor:
    """Return the norms (b,) of the perturbations (b, *f).

    Example:
        >>> size(torch.tensor([[3.0, 0.0, -4.0]]), "l2")
        tensor([5.])
    """
    order = {"linf": torch.inf, "l2": 2, "l1": 1, "l0": 0}[norm]
    out: Tensor = torch.linalg.vector_norm(d.flatten(1), ord=order, dim=1)
    return out


def area(sizes: Tensor, d_max: float) -> float:
    """Return the area under robust accuracy against eps, from 0 to d_max: the mean of min(size, d_max).

    Example:
        >>> area(torch.tensor([0.0, 1.0, 3.0, torch.inf]), 4.0)
        2.0
    """
    return float(sizes.double().clamp_max(d_max).mean())


@dataclass(frozen=True)
class Best:
    """The smallest size of each sample over all attacks, and what follows from it.

    ``known`` marks the samples that some attack fooled or that are wrong from the start; the others have no smallest
    size and are left out of areas. ``d_max`` is where the curve of the best attack reaches zero.
    """

    sizes: Tensor

    @property
    def known(self) -> Tensor:
        return self.sizes.isfinite()

    @property
    def unknown(self) -> int:
        return int((~self.known).sum())

    @property
    def d_max(self) -> float:
        return float(self.sizes[self.known].max()) if self.known.any() else 0.0

    def area(self, sizes: Tensor) -> float:
        """Return the area under the curve of an attack over the known samples."""
        return area(sizes[self.known], self.d_max) if self.known.any() else 0.0

    def optimality(self, sizes: Tensor) -> float:
        """Return 1 for an attack as good as the best on every sample, 0 for one that finds nothing below d_max.

        1 - (area - best area) / (clean accuracy * d_max - best area) (Cina et al. 2024, arXiv:2404.19460, eq. 6).
        """
        clean = float((self.sizes[self.known] > 0).double().mean()) if self.known.any() else 0.0
        least = self.area(self.sizes)
        gap = clean * self.d_max - least
        return 1 - (self.area(sizes) - least) / gap if gap > 0 else 1.0


def best_of(sizes: list[Tensor]) -> Best:
    """Return the per-sample minimum over attacks."""
    return Best(torch.stack(sizes).amin(0))
