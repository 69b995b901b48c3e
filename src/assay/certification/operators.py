"""How each operator of a recorded program becomes steps. What is not here is refused by name.

Affine operators need no rule of their own beyond what interval arithmetic must know (``rules.Affine``). Piecewise
linear ones are written with ReLU where that loses nothing, so that all that is known about ReLU (slopes, splits) holds.

A lowering is called with all positional arguments of the operator, defaults filled in, and with those keywords that
are not at their default; a keyword that it does not know is refused before (``KEYWORDS``), never ignored.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from assay.certification.composite import COMPOSITE
from assay.certification.graph import IDENTITIES, Absent, Builder, Shape, Var
from assay.certification.rules import Conv, MaxPool
from assay.certification.smooth import ROUGH, SMOOTH
from assay.certification.steps import (
    Args,
    Lowering,
    absolute_of,
    between,
    calls,
    entrywise,
    larger,
    many,
    name_of,
    negated,
    plus,
    product,
    refused,
    relu,
    rounding,
    variables,
    zeros,
)  # fmt: skip
from assay.core.errors import ModelError


def lower(build: Builder, target: Any, args: Args, **kwargs: Any) -> Any:
    """Return what an operator gives on constants, or the :class:`Var` of the step that was appended for it.

    Raises:
        ModelError: the operator has no rule, or is random.
    """
    name = name_of(target)
    if name == "getitem" and isinstance(args[0], list | tuple):
        return args[0][args[1]]
    if not variables([args, kwargs]):
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) or name.startswith(("empty", "new_empty")):
            raise ModelError(
                "a network that is one fixed function",
                f"{target}",
                "Randomized smoothing (assay.Smoothed) certifies random networks.",
                code="random-network",
            )
        return target(*args, **kwargs)
    if name not in LOWERINGS:
        raise refused(target, f"Known are: {', '.join(sorted(LOWERINGS))}.")
    args, keywords = _arguments(target, args, kwargs)
    return LOWERINGS[name](build, target, args, **keywords)


_STORAGE = ("memory_format", "layout", "device", "pin_memory", "non_blocking", "dtype", "generator")
"""Keywords that say how a result is kept; a dtype other than float32 and float64 is refused when steps are read."""

KEYWORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("add", "sub", "subtract", "rsub"), ("alpha",)),
    **dict.fromkeys(("addmm", "baddbmm"), ("beta", "alpha")),
    **dict.fromkeys(("var", "std"), ("correction", "keepdim")),
    "gelu": ("approximate",),
    "scaled_dot_product_attention": ("scale",),
}
"""Keywords that lowerings know. Any other that is given, and is not its default, is refused."""


def _arguments(target: Any, args: Args, kwargs: Mapping[str, Any]) -> tuple[Args, Mapping[str, Any]]:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return args, kwargs
    places = [a for a in schema.arguments if not a.kwarg_only and a.name != "generator"]
    full = tuple(args[i] if i < len(args) else kwargs.get(a.name, a.default_value) for i, a in enumerate(places))
    usual = {a.name: a.default_value for a in schema.arguments if a.kwarg_only and a.name not in _STORAGE}
    rest = {k: v for k, v in kwargs.items() if k in usual and v != usual[k]}
    if unknown := rest.keys() - {*KEYWORDS.get(name_of(target), ())}:
        raise refused(target, f"Its {', '.join(sorted(unknown))} has no rule.")
    return full, rest


def _spatial(target: Any, x: Any) -> None:
    """Refuse layers on maps whose batch axis is missing."""
    axes = re.search(r"(\d)d", name_of(target))
    if not isinstance(x, Var) or (axes and len(x.shape) != int(axes[1]) + 2):
        raise refused(target, "It has a rule on one batch of maps only.")


# ------------------------------------------------------------------------------------------------ affine operators


def _copy(build: Builder, target: Any, args: Args) -> Var:
    """Views, slices, paddings, concatenations: each entry is one of an input, or a constant."""
    call = calls(build, target, args)
    return build.affine(name_of(target), call, *variables([args]), absolute=absolute_of(call))


def _identity(_: Builder, __: Any, args: Args) -> Any:
    return args[0]


def _dropout(_: Builder, target: Any, args: Args) -> Any:
    """Dropout(x, p, train), also of whole channels."""
    if args[2] and args[1]:
        raise ModelError("dropout in eval mode", "dropout in training mode", "Call .eval() on the network.")
    return (args[0], Absent("the mask of dropout")) if name_of(target) == "native_dropout" else args[0]


def _alike(build: Builder, target: Any, args: Args, **keywords: Any) -> Any:
    """A constant of the shape of a variable."""
    return target(zeros(build, args[0]), *args[1:], **keywords)


def _parts(build: Builder, target: Any, args: Args) -> Any:
    """Split a tensor: one step for each part."""
    whole = args[0]

    def part(x: Tensor, k: int) -> Tensor:
        found: Tensor = target(x, *args[1:])[k]
        return found

    count = len(target(zeros(build, whole), *args[1:]))
    return tuple(build.affine(name_of(target), partial(part, k=k), whole) for k in range(count))


def _copied(build: Builder, target: Any, args: Args) -> Any:
    """Copy(to, of): what is written over all of a tensor."""
    shape, of = tuple(args[0].shape), args[1]
    if not isinstance(of, Var):
        return of.to(build.dtype).expand(shape)
    return build.affine(name_of(target), partial(torch.Tensor.expand, size=shape), of)


def _unfold(build: Builder, target: Any, args: Args) -> Var:
    """Windows along one axis, by index: of the operator itself no batch can be differentiated at once."""
    x, axis, size, step = args
    places = torch.arange(0, x.shape[axis] - size + 1, step)[:, None] + torch.arange(size)
    axis, places = axis % len(x.shape), places.to(build.device)
    return build.affine(name_of(target), lambda t: t.movedim(axis, -1)[..., places].movedim(-2, axis), x)


def _positive(build: Builder, target: Any, args: Args) -> Var:
    """Sums, means, average pooling: weights that are not negative, and no bias."""
    if "pool" in name_of(target):
        _spatial(target, args[0])
    if name_of(target) in ("avg_pool2d", "avg_pool3d") and (args[6] or 1) < 0:
        raise refused(target, "Its divisor is negative.")
    call = calls(build, target, args)
    terms = _TERMS.get(name_of(target), _ratio)(args, tuple(call(zeros(build, args[0])).shape))
    return build.affine(name_of(target), call, args[0], signs="positive", terms=terms + 2)


def _ratio(args: Args, shape: Shape) -> int:
    return int(math.prod(args[0].shape) // math.prod(shape))


def _window(args: Args, shape: Shape) -> int:
    return math.prod(many(args[1], len(shape) - 2, 1))


def _adaptive(args: Args, shape: Shape) -> int:
    return math.prod(math.ceil(i / o) + 1 for i, o in zip(args[0].shape[2:], shape[2:], strict=True))


_TERMS: dict[str, Callable[[Args, Shape], int]] = {
    **{f"avg_pool{d}d": _window for d in (1, 2, 3)},
    **{f"{head}adaptive_avg_pool{d}d": _adaptive for head in ("", "_") for d in (1, 2, 3)},
    "cumsum": lambda args, shape: int(shape[args[1]]),
    "col2im": lambda args, _: math.prod(args[2]),
}


def _interpolation(build: Builder, target: Any, args: Args) -> Var:
    """Weights that are computed, in the precision of the network, from places on the map.

    So a weight that should be 0 may be a few units in the last place of a place: each entry may be wrong by that share
    of the largest one.
    """
    _spatial(target, args[0])
    axes = tuple(range(2, len(args[0].shape)))
    call = calls(build, target, args)
    shape = call(zeros(build, args[0])).shape
    size = max(*shape[2:], *args[0].shape[2:])
    return build.affine(
        name_of(target),
        call,
        args[0],
        signs="positive",
        absolute=lambda x: x.amax(axes, keepdim=True).expand(shape),
        terms=8 * (size + 2),
    )


def _bicubic(build: Builder, target: Any, args: Args) -> Var:
    """Weights of both signs: one matrix for each axis, which the operator tells of unit vectors; as rough as above."""
    _spatial(target, args[0])
    call, (*_, high, wide) = calls(build, target, args), args[0].shape
    shape = tuple(call(zeros(build, args[0])).shape)
    scales = args[3:] if len(args) > 4 else args[3] or (None, None)
    of = partial(torch.ops.aten.upsample_bicubic2d.default, align_corners=args[2])
    units = [torch.eye(n, dtype=build.dtype, device=build.device) for n in (high, wide)]
    rows = of(units[0].view(high, 1, high, 1), [shape[2], 1], scales_h=scales[0]).view(high, -1).abs()
    columns = of(units[1].view(wide, 1, 1, wide), [1, shape[3]], scales_w=scales[1]).view(wide, -1).abs()
    size = max(*shape[2:], high, wide)
    rough = 8 * (size + 2) * torch.finfo(torch.float32).eps

    def absolute(x: Tensor) -> Tensor:
        found: Tensor = rows.T @ x @ columns + rough * x.amax((2, 3), keepdim=True)
        return found

    return build.affine(name_of(target), call, args[0], signs="weighted", absolute=absolute, terms=40)


def _weighted(build: Builder, target: Any, args: Args, **keywords: Any) -> Any:
    """Linear and convolutional layers, products with a constant matrix."""
    name, found = name_of(target), variables([args])
    if len(found) > 1:
        if name in ("matmul", "mm", "bmm"):
            return COMPOSITE["matmul"](build, target, args)
        raise refused(target, "It has a rule where one argument depends on the input, and the others are constants.")
    if "conv" in name:
        _spatial(target, args[0])
    (var,) = found
    sizes = {k: abs(v) for k, v in keywords.items()}
    ones = dict.fromkeys(keywords, 1)
    count = calls(build, target, args, torch.ones_like, **ones)  # of ones, a sum is the number of its terms
    terms = int(count(zeros(build, var) + 1).max())
    absolute = calls(build, target, args, torch.abs, **sizes)
    call = calls(build, target, args, **keywords)
    conv = _conv(build, name, args) if len(var.shape) == 4 and var.shape[0] == 1 else None
    return build.affine(name, call, var, signs="weighted", absolute=absolute, terms=terms + 4, conv=conv)


def _conv(build: Builder, name: str, args: Args) -> Conv | None:
    """Return the weights of a two-dimensional convolution that is not transposed."""
    if name not in ("conv2d", "convolution", "_convolution") or (name != "conv2d" and args[6]):
        return None
    stride, padding, dilation = args[3:6]
    if isinstance(padding, str):
        return None
    weight = args[1].to(build.device, build.dtype)
    groups = args[6 if name == "conv2d" else 8]
    return Conv(weight, many(stride, 2, 1), many(padding, 2, 0), many(dilation, 2, 1), groups)


def _add(build: Builder, target: Any, args: Args, alpha: float | None = None) -> Var:
    first, second = args[:2] if name_of(target) != "rsub" else args[1::-1]
    scale = alpha if alpha is not None else args[2] if len(args) > 2 else 1
    return plus(build, first, second, scale if name_of(target) == "add" else -scale)


def _mul(build: Builder, target: Any, args: Args) -> Var:
    found = variables([args])
    if len(found) == 1:
        call = calls(build, target, args)  # a division may be one by a rounded reciprocal
        return entrywise(build, name_of(target), call, absolute_of(call), *found, terms=4)
    if found[0].index == found[1].index:
        return build.apply("square", SMOOTH["square"](), found[0])
    return product(build, found[0], found[1])


def _div(build: Builder, target: Any, args: Args) -> Var:
    numerator, denominator = args[:2]
    if not isinstance(denominator, Var):
        return _mul(build, target, args)
    inverse = build.apply("reciprocal", SMOOTH["reciprocal"](), denominator)
    if isinstance(numerator, Var):
        return product(build, numerator, inverse)
    return _mul(build, torch.ops.aten.mul.Tensor, (inverse, numerator))


def _neg(build: Builder, _: Any, args: Args) -> Var:
    return negated(build, args[0])


def _batch_norm(build: Builder, target: Any, args: Args) -> Any:
    x, weight, bias, mean, var, *rest = args
    plain = name_of(target) == "batch_norm"
    if plain and rest[0]:
        raise ModelError("batch norm in eval mode", "batch norm in training mode", "Call .eval() on the network.")
    eps = rest[2] if plain else rest[1]

    def at(t: Tensor) -> Tensor:
        return t.to(build.device, build.dtype).view(1, -1, *[1] * (len(x.shape) - 2))

    # Scale and shift as the network has them, where a few roundings are allowed for by ``terms``.
    factor = at((var.double() + eps).rsqrt()) * (1 if weight is None else at(weight))
    centre, shift = at(mean), 0 * at(mean) if bias is None else at(bias)
    step = entrywise(
        build,
        "batch_norm",
        lambda t: (t - centre) * factor + shift,
        lambda t: (t + centre.abs()) * factor.abs() + shift.abs(),
        x,
        terms=12,
    )
    return step if plain else (step, Absent("the statistics of a batch"), Absent("the statistics of a batch"))


# ------------------------------------------------------------------------------------------ piecewise linear ones


def _relu(build: Builder, _: Any, args: Args) -> Var:
    return relu(build, args[0])


def _leaky_relu(build: Builder, target: Any, args: Args) -> Var:
    """``s x + (1 - s) relu(x)``: slope s (a number, or one for each channel) below 0."""
    x, slope = args[:2]
    if name_of(target) == "rrelu":
        if args[3]:
            raise ModelError("RReLU in eval mode", "RReLU in training mode", "Call .eval() on the network.")
        slope = (args[1] + args[2]) / 2
    if len(variables([args])) > 1:
        raise refused(target, "It has a rule for slopes that are constants.")
    if isinstance(slope, Tensor):
        slope = slope.to(build.device, build.dtype)
        slope = slope.view(1, -1, *[1] * (len(x.shape) - 2)) if slope.numel() > 1 else slope.view(())
    return entrywise(
        build,
        "leaky_relu",
        lambda a, b: slope * a + (1 - slope) * b,
        lambda a, b: abs(slope) * a + abs(1 - slope) * b,
        x,
        relu(build, x),
    )


def _abs(build: Builder, _: Any, args: Args) -> Var:
    """``relu(x) + relu(-x)``."""
    up, down = relu(build, args[0]), relu(build, negated(build, args[0]))
    return entrywise(build, "abs", torch.add, torch.add, up, down)


def _clamp(build: Builder, target: Any, args: Args) -> Any:
    """Clamp(x, low, high) and its kin; limits that are tensors of several numbers, or results, by max and min."""
    name, x = name_of(target), args[0]
    low, high = _LIMITS[name](args) if name in _LIMITS else args[1:3]
    if any(isinstance(t, Var) or (isinstance(t, Tensor) and t.numel() > 1) for t in (low, high)):
        x = x if low is None else larger(build, x, low)
        return x if high is None else larger(build, x, high, -1)
    low, high = (None if t is None or math.isinf(t) else float(t) for t in (low, high))
    return between(build, x, low, high)


_LIMITS: dict[str, Callable[[Args], tuple[Any, Any]]] = {
    "relu6": lambda _: (0.0, 6.0),
    "clamp_min": lambda args: (args[1], None),
    "clamp_max": lambda args: (None, args[1]),
}


def _threshold(build: Builder, target: Any, args: Args) -> Var:
    """X where it is above a threshold, else a value: continuous only if these are the same."""
    if args[1] != args[2]:
        raise refused(target, "It has a rule where the value is the threshold.")
    return between(build, args[0], float(args[1]), None)


def _softshrink(build: Builder, _: Any, args: Args) -> Var:
    """``relu(x - s) - relu(-x - s)``."""
    x, size = args[:2]
    up = relu(build, plus(build, x, -size))
    return plus(build, up, relu(build, plus(build, negated(build, x), -size)), -1)


def _maximum(build: Builder, target: Any, args: Args) -> Var:
    return larger(build, args[0], args[1], 1 if name_of(target) in ("maximum", "fmax", "max") else -1)


def _max_pool(build: Builder, target: Any, args: Args) -> Any:
    _spatial(target, args[0])
    x, spatial = args[0], len(args[0].shape) - 2
    kernel = many(args[1], spatial, 1)
    stride = many(args[2], spatial, 1) if args[2] else kernel
    padding, dilation = many(args[3], spatial, 0), many(args[4], spatial, 1)
    pool = getattr(functional, f"max_pool{spatial}d")
    shape = tuple(pool(torch.zeros(x.shape), kernel, stride, padding, dilation, bool(args[5])).shape)
    places = [
        torch.arange(count)[:, None] * s - p + torch.arange(k) * d
        for count, k, s, p, d in zip(shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    step = _largest(build, x, places, shape)
    return (step, _PLACES) if "with_indices" in name_of(target) else step


def _adaptive_max_pool(build: Builder, target: Any, args: Args) -> Any:
    """Window k of n along an axis of i entries: from floor(k i / n) to ceil((k + 1) i / n), so of unequal lengths."""
    _spatial(target, args[0])
    x, sizes = args[0], many(args[1], len(args[0].shape) - 2, 1)
    places = []
    for i, n in zip(x.shape[2:], sizes, strict=True):
        first, end = torch.arange(n) * i // n, -(-torch.arange(1, n + 1) * i // n)
        each = first[:, None] + torch.arange(int((end - first).max()))
        places.append(torch.where(each < end[:, None], each, i))
    return _largest(build, x, places, (*x.shape[:2], *sizes)), _PLACES


_PLACES = Absent("the places of the largest")


def _largest(build: Builder, x: Var, places: Sequence[Tensor], shape: Shape) -> Var:
    return build.apply("max_pool", MaxPool(partial(_windows, places=[t.to(build.device) for t in places]), shape), x)


def _windows(x: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Return the windows (w, k) of one sample (1, c, *spatial).

    ``places`` (n, k) has the entries of each window along each axis; what lies outside is -inf.
    """
    for axis, place in enumerate(places, start=2):
        outside = (place < 0) | (place >= x.shape[axis])
        x = x.movedim(axis, -1)[..., torch.where(outside, 0, place)].masked_fill(outside, -math.inf)
        x = x.movedim(-2, axis)  # the window's axis stays last
    # Axes now: (1, c, *out, k_first, ..., k_last) with each window axis appended in turn.
    size = math.prod(place.shape[1] for place in places)
    return x.flatten(x.ndim - len(places)).reshape(-1, size)


# ------------------------------------------------------------------------------------------------------- others


def _smooth(build: Builder, target: Any, args: Args, **keywords: Any) -> Var:
    name, x = name_of(target), args[0]
    y = build.apply(name, SMOOTH[name](*args[1:], **keywords), x)
    return rounding(build, y, x, *ROUGH[name]) if name in ROUGH else y


def _pow(build: Builder, target: Any, args: Args) -> Var:
    if not isinstance(args[0], Var) or not isinstance(args[1], int | float):
        raise refused(target, "It has a rule where the exponent is a constant number.")
    return args[0] if args[1] == 1 else _smooth(build, target, args)


def _glu(build: Builder, _: Any, args: Args) -> Var:
    first, second = _parts(build, torch.ops.aten.chunk.default, (args[0], 2, args[1]))
    return product(build, first, build.apply("sigmoid", SMOOTH["sigmoid"](), second))


def _hardsigmoid(build: Builder, _: Any, args: Args) -> Var:
    return _mul(build, torch.ops.aten.div.Tensor, (between(build, plus(build, args[0], 3.0), 0.0, 6.0), 6.0))


_COPIES = (
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze permute transpose t numpy_T movedim swapaxes "
    "expand expand_as slice select index_select narrow cat concat stack pad constant_pad_nd reflection_pad1d "
    "reflection_pad2d replication_pad1d replication_pad2d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "repeat flip roll tile pixel_shuffle pixel_unshuffle channel_shuffle ravel diagonal im2col index gather where "
    "masked_fill select_scatter slice_scatter index_fill tril triu rot90 repeat_interleave view_as mT"
)
_SUMS = (
    "sum mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d cumsum col2im"
)
_LAYERS = (
    "linear conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d matmul mm "
    "bmm mv addmm baddbmm einsum"
)

LOWERINGS: dict[str, Lowering] = {
    **COMPOSITE,
    **dict.fromkeys(SMOOTH, _smooth),
    **dict.fromkeys(_COPIES.split(), _copy),
    **dict.fromkeys(IDENTITIES, _identity),
    **dict.fromkeys(_SUMS.split(), _positive),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_linear1d", "upsample_trilinear3d"), _interpolation),
    "upsample_bicubic2d": _bicubic,
    **dict.fromkeys(_LAYERS.split(), _weighted),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind", "tensor_split"), _parts),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill"), _alike),
    **dict.fromkeys(("add", "sub", "subtract", "rsub"), _add),
    **dict.fromkeys(("mul", "multiply"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide"), _div),
    **dict.fromkeys(("neg", "negative"), _neg),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("leaky_relu", "prelu", "_prelu_kernel", "rrelu"), _leaky_relu),
    **dict.fromkeys(("clamp", "clip", "hardtanh", "relu6", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), _maximum),
    **{f"max_pool{d}d{tail}": _max_pool for d in (1, 2, 3) for tail in ("", "_with_indices")},
    **{f"adaptive_max_pool{d}d": _adaptive_max_pool for d in (1, 2, 3)},
    **dict.fromkeys(
        ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"), _dropout
    ),
    "copy": _copied,
    "unfold": _unfold,
    "relu": _relu,
    "abs": _abs,
    "threshold": _threshold,
    "softshrink": _softshrink,
    "hardsigmoid": _hardsigmoid,
    "pow": _pow,
    "glu": _glu,
}
