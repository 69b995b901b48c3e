"""Straight-through gradients for rounding, thresholds, and casts: the values stay, the backward pass is another."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from assay.models.repairs.calls import (
    Function,
    grad_wanted,
    has_slope,
    is_float,
    is_in_place,
    mapped,
    name_of,
    straight,
    tensors,
)

_DRIVEN: Final = 2.0
"""The mean size of what enters a sigmoid, from which on it is a step; units that are trained stay about there."""

Rule: TypeAlias = Callable[[Function, tuple[Any, ...], dict[str, Any]], Any]


@final
@dataclass(frozen=True, slots=True)
class StraightThrough:
    """Steps get the gradient of what they step along: rounding that of the identity, ``x > t`` that of x - t.

    Values are the network's own to the last bit. A tensor of truth values or integers that came from a tensor with a
    gradient remembers a *soft* companion, of which only the gradient counts; shapes, sums and logic carry it along,
    and the first floating-point result takes its gradient.

    References:
        Bengio, Leonard & Courville 2013, arXiv:1308.3432, sec. 4; as an attack Athalye, Carlini & Wagner 2018,
        arXiv:1802.00420, sec. 4.1.
    """

    def opened(self, x: Tensor) -> AbstractContextManager[Any]:
        return _Mode() if grad_wanted(x) else nullcontext()


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():  # so does a step that brings a gradient of its own
            return func(*args, **kwargs)
        return _RULES.get(name_of(func), _carried)(func, args, kwargs)


def _soft(v: Tensor) -> Tensor | None:
    soft: Tensor | None = getattr(v, "_soft", None)
    return soft


def _remember(value: Tensor, soft: Tensor) -> Tensor:
    value._soft = soft  # type: ignore[attr-defined]
    return value


def _softened(v: Any) -> Any:
    """Return an argument in which tensors with a soft companion are floats with its gradient."""

    def change(t: Tensor) -> Tensor:
        soft = _soft(t)
        return t if soft is None else straight(t.to(soft.dtype), soft)

    return mapped(change, v)


def _carried(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call any function; where an argument has a soft companion, so has the result, or it gets the gradient."""
    value = func(*args, **kwargs)
    hidden = any(_soft(t) is not None for t in tensors((args, kwargs)))
    if not hidden or not isinstance(value, Tensor) or is_in_place(name_of(func)):
        return value
    try:
        shadow = func(*_softened(args), **_softened(kwargs))
    except (RuntimeError, TypeError, IndexError):  # not defined for floats
        return value
    if not has_slope(shadow) or shadow.shape != value.shape:
        return value
    return _with(value, shadow)


def _with(value: Tensor, shadow: Tensor) -> Tensor:
    return straight(value, shadow) if value.is_floating_point() else _remember(value, shadow)


def _written(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], shadow: Tensor) -> Any:
    """Call a function for its value, and give it the gradient of ``shadow``; in place where the function is."""
    if not is_in_place(name_of(func)):
        return _with(func(*mapped(torch.Tensor.detach, args), **kwargs), shadow)
    target, value = args[0], args[0].detach().clone()
    func(value, *mapped(torch.Tensor.detach, args[1:]), **kwargs)
    return target.copy_(straight(value, shadow))


def _rounded(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not has_slope(args[0]):
        return _carried(func, args, kwargs)
    return _written(func, args, kwargs, args[0])


def _remainder(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cut what rounding takes away: x - x % step is a rounding too."""
    if not has_slope(args[0]) or is_in_place(name_of(func)):
        return _carried(func, args, kwargs)
    return func(*args, **kwargs).detach()


def _divided(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    whole = "floor" in name_of(func) or kwargs.get("rounding_mode") is not None
    if not whole or is_in_place(name_of(func)):
        return _carried(func, args, kwargs)
    shadow = _softened(args[0]) / _softened(args[1])
    return _written(func, args, kwargs, shadow) if has_slope(shadow) else func(*args, **kwargs)


def _compared(soften: Callable[[Tensor], Tensor]) -> Rule:
    """Compare two values: the soft companion is a function of their difference."""

    def rule(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value, soft = func(*args, **kwargs), _softened(args)
        known = isinstance(value, Tensor) and any(map(has_slope, soft[:2]))
        return _remember(value, soften(soft[0] - soft[1])) if known else value

    return rule


def _negated(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value, soft = func(*args, **kwargs), _soft(args[0])
    return value if soft is None else _remember(value, -soft)


def _shifted(sign: int) -> Rule:
    """Move bits: a multiplication by a power of two."""

    def rule(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value, soft = func(*args, **kwargs), _soft(args[0])
        return value if soft is None else _remember(value, soft * 2.0 ** (sign * args[1]))

    return rule


def _combined(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Join two conditions: each pushes in its own direction."""
    value = func(*args, **kwargs)
    softs = [s for s in map(_soft, tensors(args[:2])) if s is not None]
    if not softs:
        return value
    return _remember(value, sum(softs[1:], softs[0]).expand(value.shape))


def _cast(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = func(*args, **kwargs)
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        soft = _soft(args[0])
        return value if soft is None else straight(value, soft.to(value.dtype))
    soft = args[0] if has_slope(args[0]) else _soft(args[0])
    return value if soft is None or value is args[0] else _remember(value, soft)


def _selected(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Choose between two values by a condition: its gradient is their difference."""
    if len(args) < 3:
        return _carried(func, args, kwargs)
    condition, a, b = (args[1], args[0], args[2]) if is_float(args[0]) else args[:3]
    value, soft = func(*args, **kwargs), _soft(condition)
    if soft is None or not is_float(value):
        return value
    return straight(value, value + _leap(a, b, value) * soft)


def _filled(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Overwrite some values by a constant: where the condition comes true, x leaps there."""
    x, condition = args[:2]
    soft = _soft(condition) if isinstance(condition, Tensor) else None
    if soft is None or not is_float(x) or kwargs or len(args) != 3:
        return func(*args, **kwargs)
    if isinstance(args[2], Tensor) and args[2].ndim:
        return func(*args, **kwargs)
    new = torch.where(condition, args[2], x)
    filled = straight(new, new + _leap(args[2], x, new) * soft)
    return x.copy_(filled) if is_in_place(name_of(func)) else filled


def _leap(a: Any, b: Any, like: Tensor) -> Tensor:
    a, b = (torch.as_tensor(v, dtype=like.dtype, device=like.device).detach() for v in (a, b))
    gap: Tensor = (a - b).nan_to_num(0.0)
    return gap


def _chosen(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Remember what an argmax chose from, for a one-hot code of it."""
    value = func(*args, **kwargs)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if has_slope(args[0]) and dim is not None and value.ndim == args[0].ndim - 1:
        value._choice = args[0].movedim(dim, -1)
    return value


def _one_hot(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = func(*args, **kwargs)
    choice = getattr(args[0], "_choice", None)
    return value if choice is None or choice.shape != value.shape else _remember(value, choice)


def _counted(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Count how many bounds x passes: one for each of their mean distance."""
    value = func(*args, **kwargs)
    x, bounds = args[:2] if name_of(func) == "bucketize" else args[1::-1]
    if not has_slope(x) or not isinstance(bounds, Tensor) or bounds.shape[-1:] <= (1,):
        return value
    width = (bounds[..., -1:] - bounds[..., :1]).abs().clamp_min(torch.finfo(x.dtype).tiny)
    return _remember(value, x * ((bounds.shape[-1] - 1) / width).to(x.dtype))


def _saturated(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Soften a curve that is driven so far that it is a step: its argument gets a mean size of ``_DRIVEN``."""
    x = args[0]
    if not has_slope(x) or x.ndim < 2 or is_in_place(name_of(func)):
        return _carried(func, args, kwargs)
    size = x.detach().abs().flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1))
    return straight(func(x.detach(), *args[1:], **kwargs), func(x / (size / _DRIVEN).clamp_min(1), *args[1:], **kwargs))


def _named(rule: Rule, *names: str) -> dict[str, Rule]:
    """Return the rule for each name, and for that of the function that does the same in place."""
    return dict.fromkeys([*names, *(f"{n}_" for n in names if not n.endswith("_"))], rule)


_RULES: Final[dict[str, Rule]] = {
    **_named(_rounded, "round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside"),
    **_named(_remainder, "remainder", "fmod", "frac", "__mod__"),
    **_named(_divided, "floor_divide", "__floordiv__", "div", "divide"),
    **_named(_compared(torch.Tensor.clone), "gt", "ge", "greater", "greater_equal", "__gt__", "__ge__"),
    **_named(_compared(torch.neg), "lt", "le", "less", "less_equal", "__lt__", "__le__"),
    **_named(_compared(lambda d: -d.abs()), "eq", "__eq__"),
    **_named(_compared(torch.abs), "ne", "not_equal", "__ne__"),
    **_named(_negated, "logical_not", "bitwise_not", "__invert__"),
    **_named(_shifted(1), "__lshift__", "bitwise_left_shift"),
    **_named(_shifted(-1), "__rshift__", "bitwise_right_shift"),
    **_named(_combined, "logical_and", "bitwise_and", "__and__", "logical_or", "bitwise_or", "__or__"),
    **_named(
        _cast, "to", "type", "int", "long", "short", "byte", "char", "bool", "float", "double", "half", "_to_copy"
    ),
    **_named(_selected, "where"),
    **_named(_filled, "masked_fill", "__setitem__"),
    **_named(_chosen, "argmax"),
    **_named(_one_hot, "one_hot"),
    **_named(_counted, "bucketize", "searchsorted"),
    **_named(_saturated, "sigmoid", "tanh", "erf", "softsign"),
}
