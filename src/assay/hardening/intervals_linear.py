"""Bounds of differences of logits, for training: backward from them to where intervals are, or to the input."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from assay.core.errors import ModelError
from assay.core.types import Labels, Logits
from assay.hardening.intervals import Affine, Interval, Kink, refused

_TINY = 1e-12


class Bounded(NamedTuple):
    """What one pass with an interval gave.

    ``logits`` is the interval of the logits (b, c), made by all that came before; ``worst`` (b, c) are upper bounds of
    ``z_j - z_y``, 0 at j = y.
    """

    logits: Interval
    worst: Logits


def worst_logits(net: nn.Module | Callable[[Any], Any], x: Interval, y: Labels, backward: float = 0.0) -> Bounded:
    """Return bounds of all logits minus the label's over the box of an interval, and the logits at its point.

    The affine layers at the end act on the differences, which is tighter than to subtract bounds of logits
    (Gowal et al. 2018, arXiv:1810.12715, sec. 3). For training: no allowance for rounding, and so no claim.

    Args:
        net: a network that is called with ``x`` as if with a tensor.
        x: the inputs (b, *f) and the box around each.
        y: labels (b,).
        backward: weight, from 0 to 1, of the bounds of CROWN-IBP, the rest being that of intervals.

    Raises:
        ModelError: the network has a function that intervals (``no-interval``), or lines, cannot pass, or does not
            return logits.
    """
    z = net(x)
    if not isinstance(z, Interval) or z.ndim != 2:
        raise ModelError(
            "one interval of logits (b, c) from the network",
            f"{tuple(z.shape)}" if isinstance(z, Interval) else type(z).__name__,
            "Return the logits alone, computed from the input by functions of torch.",
            code="bad-logits",
        )
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    others = torch.arange(z.shape[1] - 1, device=z.device).expand(len(y), -1)
    others = others + (others >= y[:, None]).long()  # (b, c - 1): all classes but the label
    rows = eye[y][:, None] - eye[others]
    shares = {through: share for through, share in ((False, 1 - backward), (True, backward)) if share > 0}
    bound = sum(share * least(z, rows, through) for through, share in shares.items())
    return Bounded(z, torch.zeros_like(z.point).scatter(1, others, -bound))


def least(z: Interval, a: Tensor, through: bool = False) -> Tensor:
    """Return lower bounds (b, s) of <a, z>, a (b, s, *f): back through affine functions, to intervals.

    With ``through`` it passes ReLUs as well, between two lines, up to the input: CROWN-IBP.

    References:
        Zhang et al. 2020, arXiv:1906.06316; on graphs: Xu et al. 2020, arXiv:2002.12920.
    """
    order = {v: k for k, v in enumerate(ancestors(z))}
    carried, total = {z: a}, a.new_zeros(())
    while carried:
        v = max(carried, key=order.__getitem__)
        a = carried.pop(v)
        if v.made is None or not (through or isinstance(v.made, Affine)):
            total = total + dot(a, v.centre) - dot(a.abs(), v.radius)
            continue
        parts, constant = _pull(v, a)
        total = total + constant
        for x, part in zip(v.inputs, parts, strict=True):
            carried[x] = carried[x] + part if x in carried else part
    return total


def ancestors(z: Interval) -> list[Interval]:
    """Return all that an interval was made of, and itself, each after its inputs."""
    done: dict[Interval, None] = {}
    waiting = [z]
    while waiting:
        v = waiting[-1]
        missing = [x for x in v.inputs if x not in done]
        waiting.extend(missing)
        if not missing:
            done[waiting.pop()] = None
    return list(done)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return <a, b> (b, s) for a (b, s, *f) and b (b, *f)."""
    return (a.flatten(2) @ b.flatten(1)[..., None]).squeeze(2)


def _pull(v: Interval, a: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return coefficients for each input and a constant (b, s): with these, no more than <a, v>."""
    match v.made:
        case Affine(call):
            return _transposed(call, a, v.inputs)
        case Kink(slope):
            return _below(v.inputs[0], slope, a)
        case _:
            name = getattr(v.made, "name", "")
            raise refused(name, "bounds go back through affine functions and ReLUs only (train by ibp instead)")


def _transposed(
    call: Callable[..., Tensor], a: Tensor, inputs: tuple[Interval, ...]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """An affine function, by its vector-Jacobian products at 0."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        zeros = [torch.zeros_like(x.point, requires_grad=True) for x in inputs]
        value = call(*zeros)
        parts = torch.autograd.grad(value, zeros, a.transpose(0, 1), create_graph=keep, is_grads_batched=True)
    with torch.set_grad_enabled(keep):
        offset = call(*(t.detach() for t in zeros))
    return tuple(p.transpose(0, 1) for p in parts), dot(a, offset)


def _below(x: Interval, slope: float, a: Tensor) -> tuple[tuple[Tensor], Tensor]:
    """max(x, slope * x): its chord from above; from below the side of the kink that is longer."""
    low, high = x.lower, x.upper
    crossed = (low < 0) & (high > 0)
    side = torch.where(high > -low, 1.0, slope)
    chord = torch.where(crossed, (high - slope * low) / (high - low).clamp_min(_TINY), side)
    lift = torch.where(crossed, high * (1 - chord), 0.0)
    minus = a.clamp_max(0)
    return (torch.addcmul(a * side[:, None], minus, (chord - side)[:, None]),), dot(minus, lift)
