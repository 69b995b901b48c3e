"""What repairs share: opening them around a pass, naming the function that is called, values with another gradient."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from assay.models.bpda import _Straight

Function: TypeAlias = Callable[..., Any]


class Repair(Protocol):
    """Something that stands in for a while, for a pass over x that wants a gradient or looks for a better point."""

    def opened(self, x: Tensor) -> AbstractContextManager[Any]: ...


@contextmanager
def opened(repairs: Sequence[Repair], x: Tensor) -> Iterator[None]:
    """Open all repairs around one pass over x; the last one sees the network's calls first."""
    with ExitStack() as stack:
        for repair in repairs:
            stack.enter_context(repair.opened(x))
        yield


def name_of(function: Function) -> str:
    """Return the name of a function of torch, whether it was called as function, method, property or ATen operator."""
    name: str = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", "")
    return name.partition(".")[0]


def is_in_place(name: str) -> bool:
    """Tell whether a function of this name writes into its first argument."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def is_float(v: Any) -> bool:
    """Tell whether an argument is a floating-point tensor."""
    return isinstance(v, Tensor) and v.is_floating_point()


def has_slope(v: Any) -> bool:
    """Tell whether an argument is a tensor with a gradient."""
    return is_float(v) and bool(v.requires_grad)


def straight(value: Tensor, shadow: Tensor) -> Tensor:
    """Return the value, to the last bit, with the gradient of ``shadow``, which has its shape."""
    passed: Tensor = _Straight.apply(value.detach(), shadow)  # type: ignore[no-untyped-call]
    return passed


def mapped(change: Callable[[Tensor], Tensor], v: Any) -> Any:
    """Apply a change to every tensor in an argument: tensors may stand in lists, tuples and dictionaries."""
    if isinstance(v, Tensor):
        return change(v)
    if type(v) in (list, tuple):
        return type(v)(mapped(change, part) for part in v)
    if type(v) is dict:
        return {key: mapped(change, part) for key, part in v.items()}
    return v


def tensors(v: Any) -> Iterator[Tensor]:
    """Yield every tensor in an argument."""
    if isinstance(v, Tensor):
        yield v
    elif type(v) in (list, tuple):
        for part in v:
            yield from tensors(part)
    elif type(v) is dict:
        yield from tensors(tuple(v.values()))


def grad_wanted(x: Tensor) -> bool:
    """Tell whether a pass over x is one to differentiate."""
    return torch.is_grad_enabled() and x.requires_grad
