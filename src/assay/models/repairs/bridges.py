"""Bridges over steps that cut the gradient: what enters such a step goes straight to the layer behind it (BPDA)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, final

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F

from assay.models.bpda import _Straight
from assay.models.repairs.calls import grad_wanted, has_slope, straight
from assay.models.repairs.numbered import Call, Numbered, is_data

Link: TypeAlias = tuple[Call, int]
"""The call whose result is taken, and the number of the layer whose input gets its gradient."""

_INPUT: Final = (-1, 0)
_OURS: Final = _Straight._backward_cls


@final
@dataclass(frozen=True, slots=True)
class Bridges:
    """``no_grad`` and ``detach`` are undone, and layers whose input has no gradient take that of an earlier tensor.

    ``links`` say which; :class:`Scout` finds them. Values are the network's own to the last bit.

    References:
        Athalye, Carlini & Wagner 2018, arXiv:1802.00420, sec. 4.1 (the step's stand-in is the identity).
    """

    links: tuple[Link, ...] = ()

    def opened(self, x: Tensor) -> AbstractContextManager[Any]:
        if not grad_wanted(x):
            return nullcontext()
        sources, kept = {layer: source for source, layer in self.links}, {_INPUT: x}
        wanted = set(sources.values())

        def enter(layer: int, value: Tensor) -> Tensor:
            shadow = kept.get(sources[layer]) if layer in sources else None
            shadow = None if shadow is None else fitted(shadow, value)
            return value if shadow is None else straight(value, shadow)

        def leave(call: Call, out: Any) -> Any:
            if call in wanted and has_slope(out):
                kept[call] = out
            return out

        return Numbered(enter, leave, transparent=True)


@final
@dataclass(slots=True)
class Scout:
    """Walks through a network once, with a gradient wanted, and notes the bridges that it needs in ``links``.

    A layer needs one when no derivative of its input with respect to x is other than zero, or none can be computed.
    Unless it is ``trusting``, also when a backward pass that the network brings along has a part in that derivative:
    such a pass may say anything. The bridge comes from the tensor whose values are nearest to those that the layer
    sees. The derivatives that it takes on its way, one a layer, are not counted as passes.
    """

    links: list[Link] = field(default_factory=list)
    trusting: bool = True

    def opened(self, x: Tensor) -> AbstractContextManager[Any]:
        if not grad_wanted(x):
            return nullcontext()
        seen: list[tuple[Call, Tensor]] = [(_INPUT, x)]

        def enter(layer: int, value: Tensor) -> Tensor:
            if not is_data(value, x) or self._sound(value, x):
                return value
            near = sorted(_alike(seen, value), key=lambda found: float((found[2] - value).detach().abs().mean()))
            for source, tensor, shadow in near:
                if self._sound(tensor, x):
                    self.links.append((source, layer))
                    return straight(value, shadow)
            return value

        def leave(call: Call, out: Any) -> Any:
            if has_slope(out) and is_data(out, x):
                seen.append((call, out))
            return out

        return Numbered(enter, leave, transparent=True)

    def _sound(self, t: Tensor, x: Tensor) -> bool:
        return _reached(t, x) and (self.trusting or not _brought(t))


def _brought(t: Tensor) -> bool:
    """Tell whether a backward pass written in Python, other than that of a repair, lies behind t."""
    seen: set[Any] = set()
    todo: list[Any] = [t.grad_fn]
    while todo:
        node = todo.pop()
        if isinstance(node, BackwardCFunction) and not isinstance(node, _OURS):
            return True
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return False


def _alike(seen: list[tuple[Call, Tensor]], like: Tensor) -> Iterator[tuple[Call, Tensor, Tensor]]:
    for call, tensor in seen:
        shadow = fitted(tensor, like)
        if shadow is not None:
            yield call, tensor, shadow


def _reached(t: Tensor, x: Tensor) -> bool:
    """Tell whether some derivative of t with respect to x is not zero."""
    if t is x:
        return True
    if not t.requires_grad:
        return False
    weights = torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype, device=t.device).view(t.shape)
    try:
        (grad,) = torch.autograd.grad(t, x, weights, retain_graph=True, allow_unused=True)
    except Exception:  # whatever a backward pass of the user's raises
        return False
    return grad is not None and bool((grad.nan_to_num(0.0) != 0).any())


def fitted(source: Tensor, like: Tensor) -> Tensor | None:
    """Return the source in the shape of another tensor: reshaped, or as an image of another size; else None."""
    if source.shape == like.shape:
        return source.to(like.dtype)
    if source[0].numel() == like[0].numel():
        return source.reshape(like.shape).to(like.dtype)
    if source.ndim == like.ndim == 4 and source.shape[1] == like.shape[1]:
        return F.interpolate(source, like.shape[2:], mode="bilinear", align_corners=False).to(like.dtype)
    return None
