"""Intervals as values: a network called with one computes a point and bounds around it in one pass, with gradients.

This is for training: nothing is rounded outwards and nothing is claimed. Claims are made by :func:`assay.certify`.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias, final

import torch
from torch import Tensor

from assay.core.errors import ModelError

Call: TypeAlias = Callable[..., Tensor]


@final
@dataclass(frozen=True, slots=True)
class Affine:
    """An affine function of the inputs, row by row."""

    call: Call


@final
@dataclass(frozen=True, slots=True)
class Kink:
    """max(x, slope * x) for a slope in [0, 1]: ReLU and leaky ReLU."""

    slope: float


@final
@dataclass(frozen=True, slots=True)
class Other:
    """A function that has interval bounds only."""

    name: str


Operation: TypeAlias = Affine | Kink | Other


def _operator(f: Callable[[Any, Any], Any]) -> tuple[Callable[[Any, Any], "Interval"], ...]:
    """Return the method of an operator, and the one with the operands swapped."""
    return (lambda self, other: apply(f, self, other)), (lambda self, other: apply(f, other, self))


@final
class Interval:
    """A tensor at a point and its bounds over a box of inputs; ordinary modules and functions take it for a tensor.

    Args:
        point: (b, *f), at the point that was put in, clean or attacked; statistics of a batch are taken from it.
        lower: (b, *f), at most the value anywhere in the box.
        upper: (b, *f), at least the value anywhere in the box.
        made: by what it was made, and of which ``inputs``; None for what is put in. Backward bounds go back along it.
        inputs: see ``made``.

    An affine layer carries centre and half width, the latter by the absolute values of its weights; monotone functions
    carry the ends. Batch normalisation takes its statistics from ``point``. In-place forms of modules return new
    values: a network that reads what it has overwritten through another name is not followed.

    Example:
        >>> x = Interval(torch.zeros(1, 2), -torch.ones(1, 2), torch.ones(1, 2))
        >>> y = torch.relu(x @ torch.tensor([[1.0], [-2.0]]))
        >>> y.point.item(), y.lower.item(), y.upper.item()
        (0.0, 0.0, 3.0)

    Raises:
        ModelError: a function has no rule here (``no-interval``), or mixes samples.

    References:
        Gowal et al. 2018, arXiv:1810.12715, sec. 3.1; statistics of the clean batch: Shi et al. 2021,
        arXiv:2103.17268.
    """

    # Not a dataclass: what wraps networks looks into those for tensors to convert.
    __slots__ = ("inputs", "lower", "made", "point", "upper")
    passes: Final = 3  # of a network, in place of one with a tensor

    def __init__(
        self,
        point: Tensor,
        lower: Tensor,
        upper: Tensor,
        made: Operation | None = None,
        inputs: "tuple[Interval, ...]" = (),
    ) -> None:
        self.point, self.lower, self.upper, self.made, self.inputs = point, lower, upper, made, inputs

    @classmethod
    def __torch_function__(cls, func: Call, _: Any, args: Any = (), kwargs: Any = None) -> "Interval":
        return apply(func, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in _FACTS:
            return getattr(self.point, name)
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} has no {name!r}")
        method = getattr(Tensor, name)
        if not callable(method):
            raise refused(name)
        return partial(apply, method, self)

    def __len__(self) -> int:
        return len(self.point)

    def __getitem__(self, where: Any) -> "Interval":
        return apply(operator.getitem, self, where)

    def __neg__(self) -> "Interval":
        return apply(operator.neg, self)

    __add__, __radd__ = _operator(operator.add)
    __sub__, __rsub__ = _operator(operator.sub)
    __mul__, __rmul__ = _operator(operator.mul)
    __truediv__, __rtruediv__ = _operator(operator.truediv)
    __matmul__, __rmatmul__ = _operator(operator.matmul)
    __pow__, __rpow__ = _operator(operator.pow)

    @property
    def centre(self) -> Tensor:
        """The middle of the bounds (b, *f)."""
        return (self.upper + self.lower) / 2

    @property
    def radius(self) -> Tensor:
        """Half the width of the bounds (b, *f)."""
        return (self.upper - self.lower) / 2


_FACTS: Final = frozenset(
    ["shape", "size", "dim", "ndim", "ndimension", "dtype", "device", "numel", "is_floating_point", "is_cuda"]
)
"""What an interval shares with the tensor at its point."""


def apply(func: Call, *args: Any, **kwargs: Any) -> Interval:
    """Call a function of torch, of ``operator`` or of ``Tensor`` with intervals among its arguments.

    Raises:
        ModelError: it has no rule, or not for these arguments, or the first axis is not that of the samples any more.
    """
    kwargs.pop("inplace", None)
    name, found = func.__name__, _intervals(args, kwargs)
    rule = RULES.get(name)
    if rule is None:
        raise refused(name)
    if rule not in _JOINT and (len(found) > 1 or not isinstance(args[0], Interval)):
        raise refused(name, "its first argument alone may depend on the input")
    out = rule(func, *args, **kwargs)
    if out.shape[:1] != found[0].shape[:1]:
        raise ModelError(
            f"samples along the first axis throughout: ({len(found[0])}, ...)",
            f"{name}, which returns {tuple(out.shape)}",
            "Rewrite this step so that every sample keeps its row, or train by another method.",
            code="no-interval",
        )
    return out


def _intervals(args: Any, kwargs: Mapping[str, Any]) -> list[Interval]:
    flat = [a for arg in (*args, *kwargs.values()) for a in (arg if isinstance(arg, list | tuple) else (arg,))]
    return [a for a in flat if isinstance(a, Interval)]


def refused(name: str, why: str = "it has no rule") -> ModelError:
    """Return the error for a function that intervals cannot pass."""
    return ModelError(
        "functions that intervals can pass",
        f"{name}: {why}",
        "Replace it (affine layers, pooling, batch norm and the usual activations have rules), or train by a method "
        "without bounds, such as pgd.",
        code="no-interval",
    )


# ---------------------------------------------------------------------------------------------------------- rules


def _rising(made: Operation, call: Call, *x: Interval) -> Interval:
    """A function that falls in no entry of any input takes the ends to the ends."""
    point, lower, upper = (call(*(getattr(i, end) for i in x)) for end in ("point", "lower", "upper"))
    return Interval(point, lower, upper, made, x)


def _entrywise(call: Call, x: Interval) -> Interval:
    """An affine function of one entry each, rising or falling."""
    point, first, second = call(x.point), call(x.lower), call(x.upper)
    return Interval(point, torch.minimum(first, second), torch.maximum(first, second), Affine(call), (x,))


def _positive(f: Call, x: Interval, *args: Any, **kwargs: Any) -> Interval:
    """Copies of entries, and sums with weights that are not negative."""
    call = _filled(f, args, kwargs)
    return _rising(Affine(call), call, x)


def _filled(f: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    return lambda t: f(t, *args, **kwargs)


def _joined(f: Call, parts: Any, *args: Any, **kwargs: Any) -> Interval:
    """Concatenation of intervals and constants."""

    def call(*found: Tensor) -> Tensor:
        rest = iter(found)
        return f([next(rest) if isinstance(p, Interval) else p for p in parts], *args, **kwargs)

    return _rising(Affine(call), call, *_intervals(parts, {}))


def _weighted(f: Call, x: Interval, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Interval:
    """Linear and convolutional layers: the centre by the weights, the half width by their absolute values."""
    call = _filled(f, (weight, bias, *args), kwargs)
    centre, radius = call(x.centre), f(x.radius, weight.abs(), None, *args, **kwargs)
    return Interval(call(x.point), centre - radius, centre + radius, Affine(call), (x,))


def _product(f: Call, x: Interval, weight: Tensor) -> Interval:
    return _weighted(lambda t, w, _: f(t, w), x, weight)


def _arithmetic(f: Call, a: Any, b: Any = None) -> Interval:
    """Sums and differences; products with constants, quotients by constants."""
    name = f.__name__
    if isinstance(a, Interval) and isinstance(b, Interval):
        if name not in ("add", "sub"):
            raise refused(name, "both its arguments depend on the input")
        return _rising(Affine(torch.add), torch.add, a, b if name == "add" else -b)
    if isinstance(a, Interval):
        return _entrywise(f if b is None else (lambda t: f(t, b)), a)
    if name in ("div", "divide", "truediv", "true_divide"):
        raise refused(name, "its denominator depends on the input")
    return _entrywise(lambda t: f(a, t), b)


def _batch_norm(
    f: Call,
    x: Interval,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    """In training mode the statistics are those of the point, and it alone moves the running ones."""
    point = f(x.point, mean, var, weight, bias, training, momentum, eps)
    if training or mean is None or var is None:
        var, mean = torch.var_mean(x.point, [k for k in range(x.ndim) if k != 1], correction=0)
    scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    factor, offset = (t.view(1, -1, *[1] * (x.ndim - 2)) for t in (scale, shift))
    bounds = _entrywise(lambda t: t * factor + offset, x)
    return Interval(point, bounds.lower, bounds.upper, bounds.made, (x,))


def _dropout(f: Call, x: Interval, p: float = 0.5, training: bool = True) -> Interval:
    """One mask for the point and its bounds."""
    if not training or p == 0:
        return x
    mask = f(torch.ones_like(x.point), p, training)
    call = partial(torch.mul, mask)
    return _rising(Affine(call), call, x)


def _monotone(f: Call, x: Interval, *args: Any, **kwargs: Any) -> Interval:
    return _rising(Other(f.__name__), _filled(f, args, kwargs), x)


def _kinked(f: Call, x: Interval, negative_slope: float = 0.01) -> Interval:
    name = f.__name__
    slope = 0.0 if name == "relu" else negative_slope
    if not 0 <= slope <= 1:
        raise refused(name, f"its slope below 0 is {slope:g}, not between 0 and 1")
    return _rising(Kink(slope), f if name == "relu" else _filled(f, (slope,), {}), x)


def _elu(f: Call, x: Interval, alpha: float = 1.0) -> Interval:
    if alpha < 0:
        raise refused(f.__name__, f"it falls below 0 (alpha {alpha:g})")
    return _monotone(f, x, alpha)


def _dipping(f: Call, x: Interval, **kwargs: str) -> Interval:
    """A function that falls up to one place and rises from there: its least value is at the nearest point to that."""
    call, place = _filled(f, (), kwargs), _DIPS[f.__name__, kwargs.get("approximate", "none")]
    most = torch.maximum(call(x.lower), call(x.upper))
    return Interval(
        call(x.point), call(torch.maximum(x.lower, x.upper.clamp_max(place))), most, Other(f.__name__), (x,)
    )


_DIPS: Final = {
    ("gelu", "none"): -0.7517915990,
    ("gelu", "tanh"): -0.7524613500,
    ("silu", "none"): -1.2784645427,
    ("mish", "none"): -1.1924312146,
    ("hardswish", "none"): -1.5,
}
"""Where these functions are least."""

_COPIES: Final = (
    "flatten unflatten view view_as reshape permute transpose movedim swapaxes squeeze unsqueeze getitem narrow select "
    "flip roll pad pixel_shuffle pixel_unshuffle channel_shuffle contiguous clone float to"
)
_SUMS: Final = "mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
_LAYERS: Final = "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
_MONOTONE: Final = (
    "sigmoid tanh softplus log_sigmoid softsign selu hardtanh relu6 hardsigmoid clamp clip clamp_min clamp_max "
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
)
_OPERATORS: Final = "add sub subtract mul multiply div divide truediv true_divide neg negative"

RULES: Final[Mapping[str, Callable[..., Interval]]] = {
    **dict.fromkeys((_COPIES + " " + _SUMS).split(), _positive),
    **dict.fromkeys(_LAYERS.split(), _weighted),
    **dict.fromkeys(_MONOTONE.split(), _monotone),
    **dict.fromkeys(_OPERATORS.split(), _arithmetic),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), _dropout),
    **dict.fromkeys(("relu", "leaky_relu"), _kinked),
    **dict.fromkeys(("elu", "celu"), _elu),
    **dict.fromkeys(("gelu", "silu", "mish", "hardswish"), _dipping),
    **dict.fromkeys(("cat", "concat"), _joined),
    "batch_norm": _batch_norm,
    "matmul": _product,
}
"""Rules by the names of functions."""

_JOINT: Final = (_arithmetic, _joined)
"""Rules for more than one interval, at any place."""
