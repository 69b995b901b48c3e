"""Numbers for the calls of a pass, by which a repair finds the same place again in the next pass."""

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from assay.models.repairs.calls import Function, is_float, name_of

Call: TypeAlias = tuple[int, int]
"""One call of a pass: how many layers came before, and how many other calls since; so loops elsewhere do not count."""

_LAYERS: Final = frozenset(
    [f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)]
    + ["convolution", "linear", "matmul", "__matmul__", "mm", "batch_norm", "layer_norm", "group_norm"]
)
_DETACHES: Final = frozenset({"detach", "detach_", "data"})
_LEAVES_TORCH: Final = frozenset({"numpy", "tolist", "item", "__array__", "__dlpack__", "__float__", "__int__"})


class Numbered(TorchFunctionMode):
    """Numbers the calls of a pass, and lets the input of each layer and the result of each call be changed.

    Where it is ``transparent``, the gradient stays on, nothing is detached, and hooks do not get to change a gradient.
    """

    def __init__(
        self, enter: Callable[[int, Tensor], Tensor], leave: Callable[[Call, Any], Any], *, transparent: bool
    ) -> None:
        super().__init__()
        self.enter, self.leave, self.transparent, self.layers, self.since = enter, leave, transparent, 0, 0

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = name_of(func)
        if self.transparent and name in _DETACHES:
            return args[0]
        if self.transparent and name == "register_hook":
            return func(args[0].detach().requires_grad_(), *args[1:], **(kwargs or {}))  # where no gradient passes
        if self.transparent and name in _LEAVES_TORCH:
            return func(args[0].detach(), *args[1:], **(kwargs or {}))
        with torch.set_grad_enabled(self.transparent or torch.is_grad_enabled()):
            if name in _LAYERS and args and is_float(args[0]):
                args = (self.enter(self.layers, args[0]), *args[1:])
                self.layers, self.since = self.layers + 1, 0
            out = self.leave((self.layers, self.since), func(*args, **(kwargs or {})))
        self.since += 1
        return out


def is_data(t: Tensor, x: Tensor) -> bool:
    """Tell whether a tensor has a row for each sample."""
    return is_float(t) and t.ndim > 0 and len(t) == len(x) and not isinstance(t, torch.nn.Parameter)
