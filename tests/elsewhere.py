"""A second device without a GPU: tensors that claim to be elsewhere, compute here, and refuse to meet those from here.

``torch`` lets a subclass claim any device that it has a guard for; ``meta`` has one on every machine. So what would
fail on a GPU, since it mixes devices or hands a tensor to numpy, fails on any machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = "meta"

_CROSSING = ("aten::copy_", "aten::_to_copy")
_INDEXED = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index")


class Away(Tensor):
    """A tensor that is elsewhere; ``held`` is what it stands for."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> "Away":
        made = Tensor._make_wrapper_subclass(
            cls, real.shape, real.stride(), real.storage_offset(), dtype=real.dtype, device=torch.device(ELSEWHERE)
        )
        made.held = real
        return made

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a tensor that is elsewhere is no array: call .cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, op: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _computed(op, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _computed(op, args, kwargs or {})


def _computed(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    away = any(isinstance(t, Away) for t in tensors)
    if away:
        _check(op._schema.name, args, tensors)
    inside, named = tree_map(_real, args), tree_map(_real, kwargs)
    asked = kwargs.get("device")
    if asked is not None:
        away = torch.device(asked).type == ELSEWHERE
        named["device"] = torch.device("cpu") if away else asked
    out = op(*inside, **named)
    if op._schema.is_mutable and isinstance(out, Tensor):
        return next(t for t in tensors if _real(t) is out)
    return tree_map(lambda t: Away(t) if isinstance(t, Tensor) else t, out) if away else out


def _real(v: Any) -> Any:
    return v.held if isinstance(v, Away) else v


def _check(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Refuse what a GPU refuses: tensors of both places; an index, and a number without axes, may come from here."""
    if name in _INDEXED:
        tensors = [args[0], *args[2:3]]
    here = [t for t in tensors if isinstance(t, Tensor) and not isinstance(t, Away) and t.ndim]
    if here and name not in _CROSSING:
        raise RuntimeError(f"tensors on two devices meet in {name}")


def moved(net: nn.Module) -> nn.Module:
    """Move a network there, for good."""
    for module in net.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(Away(p.detach()), p.requires_grad)
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else Away(b)
    return net


@contextmanager
def second_device() -> Iterator[None]:
    """Let ``device="meta"`` stand for a place where tensors compute."""
    tensor, as_tensor, new_tensor = torch.tensor, torch.as_tensor, Tensor.new_tensor

    def there(device: Any) -> bool:
        return device is not None and torch.device(device).type == ELSEWHERE

    def make(value: Any, dtype: Any = None, device: Any = None) -> Tensor:
        return Away(tensor(value, dtype=dtype)) if there(device) else tensor(value, dtype=dtype, device=device)

    def take(value: Any, dtype: Any = None, device: Any = None) -> Tensor:
        if isinstance(value, Away):
            return value.to(device=device, dtype=dtype)
        return Away(as_tensor(value, dtype=dtype)) if there(device) else as_tensor(value, dtype=dtype, device=device)

    def alike(self: Tensor, value: Any, **how: Any) -> Tensor:
        return Away(new_tensor(self.held, value, **how)) if isinstance(self, Away) else new_tensor(self, value, **how)

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == ELSEWHERE else device_type, *args, **kwargs)

    with (
        mock.patch.object(torch, "tensor", make),
        mock.patch.object(torch, "as_tensor", take),
        mock.patch.object(Tensor, "new_tensor", alike),
        mock.patch.object(torch, "autocast", Autocast),
        _Mode(),
    ):
        yield
