"""Double precision while searching: slopes that are lost in float32, above all behind a saturated softmax."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from assay.models.repairs.calls import Function, is_in_place, mapped, name_of

_NARROW: Final = (torch.float32, torch.float16, torch.bfloat16)


@final
@dataclass(frozen=True, slots=True)
class Float64:
    """Every function of the network computes in float64, and the logarithm of a softmax is one function.

    It makes searching about twice as dear. Values differ from the network's own by their float32 rounding, which is
    what hid the slope.

    References:
        Carlini & Wagner 2016, arXiv:1607.04311, sec. 3, on gradients that vanish behind a saturated softmax.
    """

    def opened(self, x: Tensor) -> AbstractContextManager[Any]:
        return _Mode()


def log_of(probabilities: Tensor) -> Tensor | None:
    """Return the logarithm that a softmax or sigmoid left with its result."""
    log: Tensor | None = getattr(probabilities, "_log", None)
    return log


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        if is_in_place(name) and isinstance(args[0], Tensor) and args[0].dtype in _NARROW:
            return func(*args, **kwargs)  # a buffer of the network's keeps its type
        args, kwargs = mapped(_wide, args), mapped(_wide, kwargs)
        if name in _CASTS and args[0].is_floating_point() and _asks_narrow(name, args[1:], kwargs):
            return args[0]
        if name == "log" and (log := log_of(args[0])) is not None:
            return log
        out = func(*args, **kwargs)
        if name in _LOGS:
            out._log = _LOGS[name](*args, **{k: v for k, v in kwargs.items() if k == "dim"})
        return out


_CASTS: Final = frozenset({"float", "half", "bfloat16", "to", "type", "_to_copy"})

_LOGS: Final[dict[str, Callable[..., Tensor]]] = {
    "softmax": lambda x, dim=-1, *_: F.log_softmax(x, dim),
    "sigmoid": lambda x, *_: F.logsigmoid(x),
}


def _wide(t: Tensor) -> Tensor:
    return t.double() if t.dtype in _NARROW else t


def _asks_narrow(name: str, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a cast wants a narrower type, and nothing else that matters, such as another device."""
    if name in ("float", "half", "bfloat16"):
        return True
    wanted = [*rest, *kwargs.values()]
    return any(w in _NARROW for w in wanted if isinstance(w, torch.dtype)) or any(is_double(w) for w in wanted)


def is_double(v: Any) -> bool:
    """Tell whether ``x.to(v)`` is a cast to the type of a tensor that has been widened."""
    return isinstance(v, Tensor) and v.dtype == torch.float64
