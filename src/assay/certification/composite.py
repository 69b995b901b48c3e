"""Operators that are written with others: softmax, normalisation over features, products of two results, maxima.

Each is exact in real numbers. As deployed they are one kernel that may add up in another order or use other
intermediate results; ``terms`` of the pieces are chosen so that their allowances cover every usual way, as the
comments say.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from assay.certification.graph import Absent, Builder, Var
from assay.certification.rules import MaxPool
from assay.certification.smooth import SMOOTH, exponential, known
from assay.certification.steps import (
    Args,
    Call,
    Lowering,
    entrywise,
    larger,
    name_of,
    negated,
    plus,
    product,
    refused,
    rounding,
    variables,
)  # fmt: skip

_FAINT = 1e-10
"""A softmax whose exponentials are cut off at e^60 is wrong by less than a rounding of this."""


def copied(build: Builder, name: str, call: Call, x: Var) -> Var:
    """Append a step that moves the entries of x."""
    return build.affine(name, call, x)


def summed(build: Builder, x: Var, axis: int, factor: float = 1.0, keepdim: bool = False) -> Var:
    """Append ``factor * sum of x`` over an axis."""
    count = x.shape[axis]
    return build.affine("sum", lambda t: factor * t.sum(axis, keepdim=keepdim), x, signs="positive", terms=count + 4)


def smooth(build: Builder, name: str, x: Var) -> Var:
    """Append a function of one variable."""
    return build.apply(name, SMOOTH[name](), x)


# ------------------------------------------------------------------------------------------------------- softmax


def _softmax(build: Builder, target: Any, args: Args) -> Var:
    """``p_i = 1 / sum_j exp(x_j - x_i)``, and its logarithm."""
    x, axis = args[0], args[1] % len(args[0].shape)
    last = x if axis == len(x.shape) - 1 else copied(build, "movedim", lambda t: t.movedim(axis, -1), x)
    total = _odds(build, last)
    if "log" in name_of(target):
        p = negated(build, build.apply("log", known("log", 1.0), total))
        p = rounding(build, p, last, 4, 1.0)  # of x - max, of the logarithm of the sum, and of their difference
    else:
        p = build.apply("reciprocal", known("reciprocal", 1.0), total)
        p = rounding(build, p, _zero(build, last), 2, _FAINT)
    return p if last is x else copied(build, "movedim", lambda t: t.movedim(-1, axis), p)


def _zero(build: Builder, x: Var) -> Var:
    return build.affine("zero", lambda t: 0 * t, x)


def _odds(build: Builder, x: Var) -> Var:
    """Append ``1 + sum over j != i of exp(x_j - x_i)`` for every entry i of the last axis."""
    count = x.shape[-1]
    eye = torch.eye(count, dtype=torch.bool, device=build.device)
    others = torch.arange(count, device=build.device).expand(count, count)[~eye].view(count, count - 1)
    mine = copied(build, "expand", lambda t: t[..., None].expand(*t.shape, count - 1), x)
    theirs = copied(build, "index", lambda t: t[..., others], x)

    def size(a: Tensor, b: Tensor) -> Tensor:
        # Deployed, x_i - max and x_j - max are rounded, which may be far larger than x_j - x_i.
        largest = torch.maximum(a, b.amax(-1, keepdim=True)) if count > 1 else a
        return a + b + 2 * largest

    gaps = entrywise(build, "sub", lambda a, b: b - a, size, mine, theirs)
    each = build.apply("exp", exponential(), gaps)
    # The sum has ``count`` terms when deployed, each as wrong as a quotient of two exponentials.
    return build.affine("sum", lambda t: 1 + t.sum(-1), each, signs="positive", terms=count + 20)


def _attention(build: Builder, target: Any, args: Args, scale: float | None = None) -> Var:
    """``softmax(q k' scale) v``."""
    q, k, v, mask, dropout, causal, *_ = args
    if mask is not None or dropout or causal:
        raise refused(target, "It has a rule without mask and dropout.")
    if len(variables([q, k, v])) != 3:
        raise refused(target, "It has a rule where query, key and value depend on the input.")
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    keys = copied(build, "transpose", lambda t: t.transpose(-2, -1), k)
    scores = _product_of(build, q, keys)
    scaled = entrywise(build, "mul", lambda t: factor * t, lambda t: abs(factor) * t, scores, terms=8)
    weights = _softmax(build, torch.ops.aten.softmax.int, (scaled, len(scaled.shape) - 1, None))
    return _product_of(build, weights, v)


# --------------------------------------------------------------------------------------------- products of results


def _matmul(build: Builder, target: Any, args: Args) -> Var:
    x, y = args[:2]
    if min(len(x.shape), len(y.shape)) < 2:
        raise refused(target, "It has a rule for matrices, or batches of them.")
    return _product_of(build, x, y)


def _product_of(build: Builder, x: Var, y: Var) -> Var:
    """Append the matrix product of two results: all products of entries, and their sums."""
    left = copied(build, "unsqueeze", lambda t: t.unsqueeze(-1), x)
    right = copied(build, "unsqueeze", lambda t: t.unsqueeze(-3), y)
    return summed(build, product(build, left, right), -2)


# -------------------------------------------------------------------------------------------------- normalisation


def centred(build: Builder, x: Var, count: int) -> Var:
    """Append x minus the mean over its last axis, of ``count`` entries.

    Deployed kernels may never form it, but ``(x s - mean s) w + b``: the terms allow for roundings of that size.
    """

    def size(t: Tensor) -> Tensor:
        return t + t.mean(-1, keepdim=True)

    return build.affine(
        "centre", lambda t: t - t.mean(-1, keepdim=True), x, signs="weighted", absolute=size, terms=count + 8
    )


def variance(build: Builder, x: Var, count: int, less: float, keepdim: bool) -> Var:
    """Append the variance over the last axis, divided by ``count - less``."""
    squares = smooth(build, "square", centred(build, x, count))
    return summed(build, squares, -1, 1 / (count - less), keepdim)


def normalised(build: Builder, x: Var, eps: float) -> Var:
    """Append x with mean 0 and variance 1 over its last axis. No entry is larger than ``sqrt(count - 1)``."""
    count = x.shape[-1]
    around = centred(build, x, count)
    spread = summed(build, smooth(build, "square", around), -1, 1 / count, keepdim=True)
    inverse = build.apply("rsqrt", known("rsqrt", eps * (1 - 1e-6)), plus(build, spread, eps))
    return product(build, around, inverse, math.sqrt(max(count - 1, 0)))


def scaled(build: Builder, x: Var, weight: Tensor | None, bias: Tensor | None) -> Var:
    """Append ``x * weight + bias``, both constants that broadcast."""
    if weight is None and bias is None:
        return x
    w = (
        torch.ones((), dtype=build.dtype, device=build.device)
        if weight is None
        else weight.to(build.device, build.dtype)
    )
    b = torch.zeros_like(w) if bias is None else bias.to(build.device, build.dtype)
    return entrywise(build, "scale", lambda t: t * w + b, lambda t: t * w.abs() + b.abs(), x, terms=4)


def _layer_norm(build: Builder, target: Any, args: Args) -> Any:
    x, dims, weight, bias, eps = args[:5]
    whole = len(x.shape) - len(dims)
    flat = copied(build, "flatten", lambda t: t.flatten(whole), x)
    found = copied(build, "unflatten", lambda t: t.unflatten(-1, tuple(dims)), normalised(build, flat, eps))
    found = scaled(build, found, weight, bias)
    unknown = Absent("the statistics of layer norm")
    return (found, unknown, unknown) if name_of(target) == "native_layer_norm" else found


def _group_norm(build: Builder, target: Any, args: Args) -> Any:
    """Group_norm(x, groups, weight, bias, eps) and native_group_norm(x, weight, bias, n, c, hw, groups, eps)."""
    native = name_of(target) == "native_group_norm"
    x, *rest = args
    weight, bias, groups, eps = (rest[0], rest[1], rest[5], rest[6]) if native else (rest[1], rest[2], rest[0], rest[3])
    found = _by_groups(build, x, groups, weight, bias, eps)
    unknown = Absent("the statistics of group norm")
    return (found, unknown, unknown) if native else found


def _instance_norm(build: Builder, target: Any, args: Args) -> Var:
    """Instance_norm(x, weight, bias, mean, var, use_input_stats, momentum, eps, cudnn)."""
    x, weight, bias, _, _, own, _, eps, *_ = args
    if not own:
        raise refused(target, "It has a rule with the statistics of the input itself.")
    return _by_groups(build, x, x.shape[1], weight, bias, eps)


def _by_groups(build: Builder, x: Var, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Var:
    shape = x.shape
    flat = copied(build, "view", lambda t: t.reshape(shape[0], groups, -1), x)
    found = copied(build, "view", lambda t: t.reshape(shape), normalised(build, flat, eps))
    form = (1, -1, *[1] * (len(shape) - 2))
    w, b = (None if t is None else t.view(form) for t in (weight, bias))
    return scaled(build, found, w, b)


def _variance(build: Builder, target: Any, args: Args, correction: float | None = None, keepdim: bool = False) -> Var:
    """``var.dim(x, dims, unbiased, keepdim)`` and ``var.correction(x, dims, *, correction, keepdim)``, and std."""
    if "dim" in str(target):
        x, dims, unbiased, keepdim = args
        correction = float(unbiased)
    elif "correction" in str(target):
        x, dims = args[:2]
    else:
        raise refused(target, "It has a rule over given axes.")
    axes = sorted(d % len(x.shape) for d in (dims or range(len(x.shape))))
    less = 1.0 if correction is None else float(correction)
    flat, shape = _last(build, x, axes), tuple(1 if i in axes else s for i, s in enumerate(x.shape))
    found = variance(build, flat, flat.shape[-1], less, keepdim=False)
    found = copied(build, "view", lambda t: t.reshape(shape), found) if keepdim else found
    return build.apply("sqrt", known("sqrt", 0.0), found) if name_of(target) == "std" else found


def _last(build: Builder, x: Var, axes: list[int]) -> Var:
    """Append x with some axes moved to the end and joined."""
    ends = [*range(-len(axes), 0)]
    return copied(build, "movedim", lambda t: t.movedim(axes, ends).flatten(len(x.shape) - len(axes)), x)


# -------------------------------------------------------------------------------------------------------- maxima


def _amax(build: Builder, target: Any, args: Args) -> Any:
    """Amax(x, dims, keepdim), amin, ``max.dim(x, dim, keepdim)``, ``max(x)``, and the larger of two."""
    name, overload = name_of(target), str(target).rsplit(".", 1)[-1]
    if overload == "other":
        return larger(build, args[0], args[1], 1 if name == "max" else -1)
    x, dims, keepdim = args if len(args) == 3 else (args[0], None, False)
    given = [dims] if isinstance(dims, int) else [*(dims or range(len(x.shape)))]
    axes = sorted(d % len(x.shape) for d in given)
    kept = tuple(1 if i in axes else s for i, s in enumerate(x.shape))
    shape = kept if keepdim else tuple(s for i, s in enumerate(x.shape) if i not in axes)
    least = name in ("amin", "min")
    found = build.apply("max", MaxPool(partial(_rows, axes=axes), shape), negated(build, x) if least else x)
    found = negated(build, found) if least else found
    return (found, Absent("the place of the largest")) if overload == "dim" else found


def _rows(x: Tensor, axes: list[int]) -> Tensor:
    """Return the entries (w, k) over which each maximum goes."""
    ends = [*range(-len(axes), 0)]
    moved = x.movedim(axes, ends)
    return moved.reshape(-1, math.prod(moved.shape[-len(axes) :]))


COMPOSITE: dict[str, Lowering] = {
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), _softmax),
    "scaled_dot_product_attention": _attention,
    "matmul": _matmul,
    **dict.fromkeys(("layer_norm", "native_layer_norm"), _layer_norm),
    **dict.fromkeys(("group_norm", "native_group_norm"), _group_norm),
    "instance_norm": _instance_norm,
    **dict.fromkeys(("var", "std"), _variance),
    **dict.fromkeys(("amax", "amin", "max", "min"), _amax),
}
"""Operators by name; ``matmul`` is the one of two results."""
