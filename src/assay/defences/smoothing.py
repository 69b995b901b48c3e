"""Defences that smooth: windows, and the minimum of a variation. They act along all axes after the channels."""

import math
from typing import Final, final

import torch
from torch import Tensor

from assay.core.registry import UsageError
from assay.core.types import Inputs
from assay.defences.defence import Defence, along, check_range, check_spatial, held_by, reflected

_CUT: Final = 4
"""Standard deviations after which a Gaussian window ends."""

_TINY: Final = 1e-12


@final
class Median(Defence):
    """Each value replaced by the median of the window around it, mirrored at the edges.

    A window of an even size reaches one further to the left and above, and the upper of the two middle values is taken.

    *Gradient*: its own, which goes to the one value that is the median. Of several equal ones it is the first in the
    window's order; attacks get further by it than by the identity or by the window's mean.

    *Broken by* attacks on the squeezed network: He et al. 2017, arXiv:1706.04701; Sharma & Chen 2018, arXiv:1803.09868.
    A median undoes lone pixels (l0), and little of a perturbation that is spread out.

    Args:
        size: of the window along each axis, in pixels, 2 or more.

    Example:
        >>> import torch
        >>> from assay.defences import Median
        >>> x = torch.zeros(1, 1, 5, 5)
        >>> x[..., 2, 2] = 1
        >>> Median(3)(x).max().item()
        0.0

    Raises:
        UsageError: a size below 2.
        DataError: (in use) inputs without an axis after the channels.

    References:
        Xu, Evans & Qi 2018, arXiv:1704.01155, sec. III-B.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        check_range("the size of a window", size, 2, 31, "For example 3.")
        self.size = size

    def forward(self, x: Inputs) -> Inputs:
        check_spatial(x, "Median")
        windows = x
        for axis in range(2, x.ndim):
            n = x.shape[axis]
            mirror = torch.eye(n, dtype=x.dtype, device=x.device)[reflected(n, self.size // 2, (self.size - 1) // 2)]
            windows = along(windows, axis, mirror).unfold(axis, self.size, 1)
        windows = windows.flatten(x.ndim)
        return windows.sort(stable=True, dim=-1).values[..., windows.shape[-1] // 2]


@final
class GaussianBlur(Defence):
    """Each image convolved with a Gaussian, mirrored at the edges: g(x) = k * x, k(d) ~ exp(-d^2 / 2 sigma^2).

    The window ends after four standard deviations.

    *Gradient*: its own; the step is linear.

    *Broken by* any attack that differentiates through it: Carlini & Wagner 2017, arXiv:1705.07263 (a window of
    equal weights). A network behind a linear step is a network.

    Args:
        sigma: the standard deviation, in pixels.

    Example:
        >>> import torch
        >>> from assay.defences import GaussianBlur
        >>> round(GaussianBlur(1.0)(torch.eye(9)[None, None])[0, 0, 4, 4].item(), 2)
        0.28

    Raises:
        UsageError: a sigma that is not positive, or above 100.
        DataError: (in use) inputs without an axis after the channels.

    References:
        Li & Li 2017, arXiv:1612.07767 (a window of equal weights, before a detector).
    """

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        check_range("sigma in pixels", sigma, _TINY, 100, "For example 1.")
        self.sigma = sigma

    def forward(self, x: Inputs) -> Inputs:
        check_spatial(x, "GaussianBlur")
        y = x
        for axis in range(2, x.ndim):
            y = along(y, axis, self._window(x.shape[axis]).to(x))
        return held_by(x, y)

    def _window(self, n: int) -> Tensor:
        """Return the weights (n, n) of all values of a row in each value of the blurred row."""
        reach = int(_CUT * self.sigma + 0.5)
        away = torch.arange(-reach, reach + 1, dtype=torch.float64)
        kernel = (-0.5 * (away / self.sigma).square()).softmax(0)
        sources = reflected(n, reach, reach).unfold(0, len(kernel), 1)  # (n, taps)
        return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, sources, kernel.expand(n, -1))


@final
class TotalVariation(Defence):
    """The image that varies least near x: g(x) = argmin_u |u - x|^2 / 2 + weight TV(u), TV(u) the sum of |grad u|.

    A fixed number of steps of a projection of the dual, p <- (p + t v) / (1 + t |v|), v = grad(div p - x / weight),
    t = 1 / (4 axes); then u = x - weight div p. Each channel by itself.

    *Gradient*: its own, through all steps.

    *Broken by* BPDA with the identity: Athalye, Carlini & Wagner 2018, arXiv:1802.00420 (on input transformations);
    these steps can be differentiated and need no stand-in.

    *Cost*: ``steps`` rounds of differences over the image, forward and backward.

    Args:
        weight: of the variation, in units of the box: an edge between two large flat areas loses nothing, detail below
            about this height is gone.
        steps: of the projection; for weights above 0.1 more are needed until it has converged.

    Example:
        >>> import torch
        >>> from assay.defences import TotalVariation
        >>> noise = 0.05 * torch.rand(1, 1, 8, 8)
        >>> bool(TotalVariation(weight=0.1)(noise).std() < 0.3 * noise.std())
        True

    *Differs from the paper in*: Guo et al. also drop pixels at random, and use another solver.

    Raises:
        UsageError: a weight that is not positive, or fewer than one step.
        DataError: (in use) inputs without an axis after the channels.

    References:
        Rudin, Osher & Fatemi 1992 (the minimum); Chambolle 2004, J. Math. Imaging Vis. 20, sec. 3 (the steps);
        Guo et al. 2018, arXiv:1711.00117, sec. 4.1 (as a defence).
    """

    def __init__(self, weight: float = 0.1, steps: int = 20) -> None:
        super().__init__()
        check_range("steps", steps, 1, math.inf, "For example 20.")
        if not 0 < weight < math.inf:
            raise UsageError("a weight > 0 in units of the box", f"{weight:g}", "For example 0.1.")
        self.weight, self.steps = weight, steps

    def forward(self, x: Inputs) -> Inputs:
        check_spatial(x, "TotalVariation")
        axes = range(2, x.ndim)
        t, p = 1 / (4 * len(axes)), [torch.zeros_like(x) for _ in axes]
        for _ in range(self.steps):
            u = _divergence(p) - x / self.weight
            v = [u.diff(dim=axis, append=u.narrow(axis, -1, 1)) for axis in axes]  # the last difference is zero
            length = (sum((part.square() for part in v), torch.full_like(x, _TINY))).sqrt()
            p = [(q + t * part) / (1 + t * length) for q, part in zip(p, v, strict=True)]
        return held_by(x, x - self.weight * _divergence(p))


def _divergence(p: list[Tensor]) -> Tensor:
    """Return the adjoint of minus the differences, of one field (b, c, ...) an axis from 2 on."""
    parts = [q.diff(dim=axis, prepend=torch.zeros_like(q.narrow(axis, 0, 1))) for axis, q in enumerate(p, 2)]
    return torch.stack(parts).sum(0)
