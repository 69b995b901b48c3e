"""Ways to append a step: the words that lowerings are written with."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from assay.certification.graph import Absent, Builder, Var
from assay.certification.rules import Clamp, Product, ReLU
from assay.core.errors import ModelError

Args: TypeAlias = tuple[Any, ...]
Call: TypeAlias = Callable[..., Tensor]
Lowering: TypeAlias = Callable[..., Any]
"""Takes the builder, the operator, its positional arguments and its keywords; returns a Var, or a tuple of them."""


def refused(target: Any, why: str) -> ModelError:
    """Return the error that refuses an operator by name."""
    return ModelError(
        "a network of operators that have a bound",
        f"{target}",
        f"{why} Write the step with other operators, or certify by smoothing.",
        code="no-bound-for-operator",
    )


def name_of(target: Any) -> str:
    """Return the name of an operator without its overload; of a function, its own."""
    parts = str(target).split(".")
    return parts[1] if len(parts) == 3 and parts[0] == "aten" else getattr(target, "__name__", str(target))


def variables(tree: Any) -> list[Var]:
    """Return the variables among arguments, in order, each as often as it stands there."""
    if isinstance(tree, Absent):
        raise ModelError("a network of operators that have a bound", tree.what, "Use the values only.")
    if isinstance(tree, Var):
        return [tree]
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    return [v for part in parts for v in variables(part)]


def _filled(tree: Any, given: list[Tensor], constant: Callable[[Tensor], Tensor]) -> Any:
    """Return arguments with tensors for variables, and constants seen through ``constant``."""
    if isinstance(tree, Var):
        return given.pop(0)
    if isinstance(tree, Tensor):
        return constant(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(_filled(v, given, constant) for v in tree)
    return tree


def calls(
    build: Builder, target: Any, args: Any, constant: Callable[[Tensor], Tensor] = lambda t: t, **keywords: Any
) -> Call:
    """Return the operator as a function of the variables among its arguments, with constants in the builder's dtype."""

    def cast(t: Tensor) -> Tensor:
        return constant(t.to(build.device, build.dtype)) if t.is_floating_point() else t.to(build.device)

    def call(*x: Tensor) -> Tensor:
        found: Tensor = target(*_filled([*args], [*x], cast), **keywords)
        return found

    return call


def absolute_of(call: Call) -> Call:
    """Return a function's absolute value: of what copies or multiplies, its value on absolute values."""
    return lambda *x: call(*x).abs()


def zeros(build: Builder, x: Var) -> Tensor:
    """Return zeros of the shape of x."""
    return torch.zeros(x.shape, dtype=build.dtype, device=build.device)


def entrywise(build: Builder, name: str, call: Call, absolute: Call, *of: Var, terms: int = 2) -> Var:
    """Append an affine step each of whose entries is made of one entry of each input."""
    return build.affine(name, call, *of, signs="vertex", absolute=absolute, terms=terms)


def rounding(build: Builder, y: Var, x: Var, units: int, floor: float = 0.0) -> Var:
    """Append a step that leaves y as it is, but lets it be wrong by ``units`` roundings of the size of x + ``floor``.

    For functions whose error, as deployed, is not small beside their result: GELU at -6 is a small difference.
    """
    return entrywise(build, "rounding", lambda a, b: a + 0 * b, lambda a, b: 0 * a + b + floor, y, x, terms=units)


def plus(build: Builder, first: Any, second: Any, scale: float = 1) -> Var:
    """Append ``first + scale * second``; either may be a constant."""
    cast = partial(_filled, constant=lambda t: t.to(build.device, build.dtype))

    def call(*x: Tensor) -> Tensor:
        a, b = cast((first, second), [*x])
        total: Tensor = a + scale * b
        return total

    def absolute(*x: Tensor) -> Tensor:
        a, b = cast((first, second), [*x])
        total: Tensor = abs(a) + abs(scale) * abs(b) + 0 * x[0]
        return total

    return entrywise(build, "add", call, absolute, *variables([first, second]), terms=2 if abs(scale) == 1 else 4)


def product(build: Builder, x: Var, y: Var, most: float = math.inf) -> Var:
    """Append x * y, each expanded to the shape of the result, whose absolute value is known to be at most ``most``."""
    shape = torch.broadcast_shapes(x.shape, y.shape)  # type: ignore[no-untyped-call]
    whole = [
        v if v.shape == shape else build.affine("expand", partial(torch.Tensor.expand, size=shape), v) for v in (x, y)
    ]
    return build.apply("mul", Product(most), *whole)


def negated(build: Builder, x: Var) -> Var:
    """Append -x."""
    return entrywise(build, "neg", torch.neg, lambda t: t, x, terms=0)


def relu(build: Builder, x: Var) -> Var:
    """Append max(x, 0)."""
    return build.apply("relu", ReLU(), x)


def between(build: Builder, x: Var, low: float | None, high: float | None) -> Var:
    """Append min(max(x, low), high); a limit that is None does not limit."""
    if low is not None and high is not None:
        low = min(low, high)  # as torch has it: the upper limit is applied last
        return build.apply("clamp", Clamp(low, high, 0.0 if _short(low) and _short(high) else 0.5), x)
    if low is None and high is None:
        return x
    limit, sign = (low, 1) if low is not None else (high, -1)  # max(x, low) = low + relu(x - low), and its mirror image
    assert limit is not None
    apart = entrywise(build, "clamp", lambda x: sign * (x - limit), lambda x: x + abs(limit), x)
    return entrywise(build, "clamp", lambda x: limit + sign * x, lambda x: abs(limit) + x, relu(build, apart))


def _short(number: float) -> bool:
    """Return whether a number is the same in every precision."""
    return float(torch.tensor(number, dtype=torch.bfloat16)) == number


def larger(build: Builder, first: Any, second: Any, sign: int = 1) -> Var:
    """``max(a, b) = a + relu(b - a)``, and ``min(a, b) = a - relu(a - b)``; either may be a constant."""
    if not isinstance(first, Var):
        first, second = second, first
    gap = plus(build, second, first, -1) if sign > 0 else plus(build, first, second, -1)
    return plus(build, first, relu(build, gap), sign)


def many(value: Any, count: int, default: int) -> tuple[int, ...]:
    """Return one number for each axis, out of one number or one for each."""
    if value is None:
        return (default,) * count
    given = [value] if isinstance(value, int) else [*value]
    return tuple(given * count) if len(given) == 1 else tuple(given)
