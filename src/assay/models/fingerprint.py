"""Which model this is: a digest of all that its answers depend on, as far as that can be read."""

import functools
import hashlib
import re
import types
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from assay.models.model import Model
from assay.models.pieces import Inner, pieces

_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


def fingerprint(model: Model) -> str:
    """Return the SHA-256, in hex, of a model.

    It covers box, mean, std, samples, probabilities and precision, and of the net: for a module its structure, the code
    of ``forward`` in classes that are not torch's, and names, types, shapes and values of parameters and
    buffers; for another callable its qualified name, its code, and the modules, tensors, arrays and functions
    that it holds. What a callable may change while it is used, such as a counter, and globals are left out.
    """
    digest = hashlib.sha256()
    normalisation = [None if v is None else _numbers(v) for v in (model.mean, model.std)]
    settings = (model.domain.lo, model.domain.hi, normalisation, model.samples, model.probabilities, model.rejects)
    digest.update(repr(settings).encode())
    if model.precision != "float32":
        digest.update(model.precision.encode())
    for piece in pieces(model.net, _parts, _PLAIN, set()):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()


def _numbers(v: Any) -> Any:
    return torch.as_tensor(v, dtype=torch.float64).tolist()


_PLAIN: Final = (int, float, str, types.NoneType)


def _parts(value: Any) -> Iterator[bytes | Inner]:
    """Yield bytes that tell a value from others, and what it holds."""
    if isinstance(value, _PLAIN):
        yield _written(value)
    elif isinstance(value, nn.Module):
        yield from _module(value)
    elif isinstance(value, Tensor | np.ndarray):
        yield from _array(value)
    elif isinstance(value, functools.partial):
        yield _written(sorted(value.keywords))
        yield from map(Inner, (value.func, *_each(value.args), *_each(value.keywords.values())))
    elif isinstance(value, types.MethodType):
        yield from map(Inner, (value.__func__, value.__self__))
    elif isinstance(value, types.FunctionType):
        yield value.__qualname__.encode()
        yield from _code(value.__code__)
        yield from map(Inner, (*(value.__defaults__ or ()), *(c.cell_contents for c in value.__closure__ or ())))
    else:
        yield from _other(value)


def _each(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what is in (nested) lists; of lists elsewhere nobody knows whether they only record what happens."""
    for v in values:
        if isinstance(v, list | tuple):
            yield from _each(v)
        else:
            yield v


def _array(value: Tensor | np.ndarray[Any, Any]) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield from _tensor("", value)
    else:
        yield f"{value.dtype} {value.shape}".encode() + value.tobytes()


def _other(value: Any) -> Iterator[bytes | Inner]:
    """Yield the class of an object, the code of its call, and what it holds that may compute."""
    yield f"{_name(type(value))} {getattr(value, '__qualname__', '')}".encode()
    held = {"": vars(type(value)).get("__call__"), **getattr(value, "__dict__", {})}
    for name, v in held.items():
        if isinstance(v, nn.Module | Tensor | np.ndarray | types.FunctionType | types.MethodType):
            yield name.encode()
            yield Inner(v)
        elif isinstance(v, list | tuple):
            yield name.encode()
            yield from map(Inner, v)
        elif isinstance(v, bool | float | str):  # not int: it may count calls
            yield name.encode() + _written(v)


def _module(module: nn.Module) -> Iterator[bytes | Inner]:
    yield _written(module)
    for name, m in module.named_modules():
        yield f"{name} {_name(type(m))}".encode()
        if isinstance(m, torch.fx.GraphModule):
            yield m.code.encode()
        yield from _own(m)
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        yield from _tensor(name, t)


def _own(module: nn.Module) -> Iterator[bytes | Inner]:
    """Yield what the user's class adds to a module: the code of its methods, plain attributes, functions it holds."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch."):
            break
        for name, method in vars(cls).items():
            if isinstance(method, types.FunctionType):
                yield name.encode()
                yield from _code(method.__code__)
    for name, v in vars(module).items():
        if not name.startswith("_") and name != "training" and isinstance(v, bool | int | float | str | tuple | list):
            yield name.encode() + _written(v)
        elif isinstance(v, Tensor | np.ndarray):
            yield name.encode()
            yield from _array(v)
        elif isinstance(v, _FUNCTIONS):
            yield name.encode()
            yield Inner(v)


def _tensor(name: str, t: Tensor) -> Iterator[bytes]:
    yield f"{name} {t.dtype} {tuple(t.shape)}".encode()
    yield t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _code(code: types.CodeType) -> Iterator[bytes]:
    """Yield what code does; not where it stands."""
    yield code.co_code
    yield repr((code.co_names, code.co_varnames, code.co_freevars)).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        else:
            yield _written(constant)


def _written(value: Any) -> bytes:
    """Write a value without what differs between two runs: addresses, and the order of sets."""
    text = repr(sorted(map(repr, value))) if isinstance(value, set | frozenset) else repr(value)
    return re.sub(r"0x[0-9a-f]+", "", text).encode()


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
