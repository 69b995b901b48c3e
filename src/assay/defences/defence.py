"""What defences in front of a network share: a base, linear steps along an axis, values that stay in range."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from assay.core.errors import DataError
from assay.core.registry import UsageError
from assay.core.types import Inputs
from assay.models.repairs.calls import straight
from assay.threats.threat import Box


class Defence(nn.Module):
    """A step in front of a network: from inputs (b, *f) inside a box to inputs, or codes, for the network behind it.

    A subclass is final; its hyper-parameters are plain attributes, and ``forward`` is all that it does. Whatever has no
    useful gradient carries a stand-in (:class:`assay.BPDA`), so that an attack on the whole is adaptive. What needs to
    know the valid range keeps it in ``box``.

    ``random`` says that every pass draws random numbers. They come from torch's global generator, one draw a sample
    and pass, in eval mode too; :func:`defended` then asks for means over passes.
    """

    random: ClassVar[bool] = False

    def extra_repr(self) -> str:
        """Write the hyper-parameters; a run's fingerprint reads them here."""
        own = {name: v for name, v in vars(self).items() if not name.startswith("_") and name != "training"}
        return ", ".join(f"{name}={v!r}" for name, v in own.items())


def boxed(box: Box | tuple[float, float]) -> Box:
    """Return a box given as such or as (lo, hi)."""
    return box if isinstance(box, Box) else Box(*box)


def check_range(what: str, value: float, low: float, high: float, remedy: str) -> None:
    """Refuse a parameter outside [low, high].

    Raises:
        UsageError: naming the parameter.
    """
    if not low <= value <= high:
        raise UsageError(f"{what} from {low:g} to {high:g}", f"{value:g}", remedy)


def check_spatial(x: Inputs, what: str) -> None:
    """Refuse inputs without an axis behind the channels.

    Raises:
        DataError: naming the defence.
    """
    if x.ndim < 3:
        raise DataError(
            f"images (b, c, h, w) or sequences (b, c, t) for {what}",
            f"inputs {tuple(x.shape)}",
            "Reshape the inputs, or leave this defence out.",
        )


def along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Apply a matrix (m, n), or one a sample (b, m, n), along an axis >= 2 of length n.

    A product instead of gathering: its gradient is summed in the same order every time.
    """
    if matrix.ndim == 3:
        matrix = matrix.view(len(matrix), *[1] * (x.ndim - 3), *matrix.shape[1:])
    return (x.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)


def reflected(n: int, before: int, after: int) -> Tensor:
    """Return the positions (before + n + after,) in a row of n values, mirrored at its edges: b a | a b c | c b."""
    at = torch.arange(-before, n + after) % (2 * n)
    return torch.where(at < n, at, 2 * n - 1 - at)


def held(y: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Return y limited to [low, high], with the gradient of y: for what only rounding takes out of its range."""
    limits = (torch.as_tensor(v, dtype=y.dtype, device=y.device) for v in (low, high))
    return straight(y.detach().clamp(*limits), y)


def held_by(x: Inputs, y: Tensor) -> Tensor:
    """Limit y (b, ...) to the range of values of each sample of x: no average is beyond what it is taken of."""
    shape = (len(x), *[1] * (y.ndim - 1))
    low, high = (v.view(shape) for v in x.detach().flatten(1).aminmax(dim=1))
    return held(y, low, high)
