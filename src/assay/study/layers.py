"""What the layers of a network answer: found by name, listened to by forward hooks that leave no trace."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from assay.core.errors import ModelError
from assay.core.registry import UsageError
from assay.core.types import Inputs, Logits
from assay.models import Door, Live, Model

ACTIVATIONS: Final[tuple[type[nn.Module], ...]] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish,
    nn.Threshold, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink,
)  # fmt: skip
"""Modules whose outputs are responses after a non-linearity."""


_WHOLE: Final = (*ACTIVATIONS, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules that are one layer even where they have children: those that compute a weight anew each time."""


@final
@dataclass(frozen=True, slots=True)
class Layer:
    """Responses to be measured: what a module returns at its ``call``-th use in a pass (0: the first).

    ``name`` says behind which weighted layer that is, counted in the order of use: ``conv1``, ``fc2``; where several
    activations follow one, ``conv1#2``; the module's own name where none comes before, or where it is no activation.
    """

    name: str
    module: str
    call: int
    shape: tuple[int, ...]

    @property
    def units(self) -> int:
        return prod(self.shape)


@final
@dataclass(slots=True)
class Tap:
    """The responses of complete passes, each a list with one tensor a layer; passes that fail leave nothing."""

    passes: list[list[Tensor]] = field(default_factory=list)

    def taken(self) -> list[list[Tensor]]:
        """Return what has been collected since, and forget it."""
        passes, self.passes = self.passes, []
        return passes


@contextmanager
def tapped(module: nn.Module, layers: Sequence[Layer], keep: Callable[[Tensor], Tensor]) -> Iterator[Tap]:
    """Listen to layers of a module; afterwards its hooks are as they were, whatever happened.

    Args:
        module: the network.
        layers: to listen to.
        keep: what to make of responses (b, *shape) at once, for later layers may write into the same memory.
    """
    at = {(layer.module, layer.call): i for i, layer in enumerate(layers)}
    tap, now, calls = Tap(), list[Tensor](), Counter[str]()

    def begin(*_: Any) -> None:
        now[:] = [torch.empty(0)] * len(layers)
        calls.clear()

    def hear(name: str, _: nn.Module, __: Any, out: Any) -> None:
        place = at.get((name, calls[name]))
        calls[name] += 1
        if place is not None:
            now[place] = keep(_tensor(out, name))

    def end(*_: Any) -> None:
        tap.passes.append([*now])

    modules = dict(module.named_modules())
    handles = [module.register_forward_pre_hook(begin)]
    try:
        handles += [modules[n].register_forward_hook(partial(hear, n)) for n in {layer.module for layer in layers}]
        handles.append(module.register_forward_hook(end))
        yield tap
    finally:
        for handle in handles:
            handle.remove()


def _tensor(out: Any, name: str) -> Tensor:
    if not isinstance(out, Tensor) or out.ndim < 2:
        found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ModelError(f"responses (b, ...) of {name}", found, "Leave this module out with --layers.")
    return out


def responses(live: Live, layers: Sequence[Layer], x: Inputs) -> tuple[Logits, list[Tensor], Door]:
    """Return logits (b, c) of inputs x (b, *f), the responses (b, units) of each layer, and the door that counted."""
    door = Door(live, len(x))
    with tapped(module_of(live.model), layers, lambda r: r.detach().flatten(1).clone()) as tap:
        z = door.logits(x, torch.arange(len(x), device=x.device))
        parts = tap.taken()
    return z, [torch.cat(found)[: len(x)] for found in zip(*parts, strict=True)], door  # rows that filled up are last


def module_of(model: Model) -> nn.Module:
    """Return the network of a model.

    Raises:
        ModelError: it is a function, without layers to listen to.
    """
    if model.module is None:
        raise ModelError("a torch.nn.Module", type(model.net).__name__, "Wrap the function in a module with layers.")
    return model.module


def find_layers(live: Live, x: Inputs, patterns: Sequence[str] | None = None) -> tuple[Layer, ...]:
    """Return the layers to be measured, in the order of use, from one pass over the first of inputs x (b, *f).

    Args:
        live: a model in use.
        x: some of its inputs.
        patterns: shell patterns (``conv*``, ``features.1``) of names of layers or of modules. Activations they
            choose from; where they name no activation, modules without children are measured, as they are. None for
            all activations.

    Raises:
        UsageError: the patterns name nothing.
        ModelError: there is no activation module, and no pattern says what to measure.
    """
    module = module_of(live.model)
    seen = _trace(live, module, x[:1])
    found = _activations(seen, module)
    if patterns is None and not found:
        names = ", ".join(dict.fromkeys(name for name, _ in seen))
        raise ModelError(
            "activations that are modules (nn.ReLU, ...), which alone can be listened to",
            f"none in {type(module).__name__}; functions called in forward() cannot be",
            f"Choose modules by name with --layers, for their outputs as they are. There are: {names}.",
        )
    if patterns is None:
        return found
    chosen = _chosen(found, patterns) or _chosen([_plain(seen, i) for i in range(len(seen))], patterns)
    if not chosen:
        known = [layer.name for layer in found] + [name for name, _ in seen]
        raise UsageError("patterns of layers", ", ".join(patterns), f"Known: {', '.join(dict.fromkeys(known))}.")
    return chosen


Seen = list[tuple[str, tuple[int, ...]]]
"""Modules without children in the order of use, and the shapes of their responses to a sample."""


def _trace(live: Live, module: nn.Module, x: Inputs) -> Seen:
    """Ask once, and return what was used."""
    seen: Seen = []
    leaves = {n: m for n, m in module.named_modules() if n and (isinstance(m, _WHOLE) or not [*m.children()])}

    def hear(name: str, _: nn.Module, __: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.ndim > 1:
            seen.append((name, tuple(out.shape[1:])))

    handles = []
    try:
        handles += [m.register_forward_hook(partial(hear, name)) for name, m in leaves.items()]
        Door(live, 1).logits(x, torch.zeros(1, dtype=torch.int64, device=x.device))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _activations(seen: Seen, module: nn.Module) -> tuple[Layer, ...]:
    modules, kinds, names = dict(module.named_modules()), Counter[str](), Counter[str]()
    found, last = list[Layer](), ""
    for i, (name, _) in enumerate(seen):
        weight = getattr(modules[name], "weight", None)
        if isinstance(modules[name], ACTIVATIONS):
            names[last] += bool(last)
            nth = f"#{names[last]}" if names[last] > 1 else ""
            plain = _plain(seen, i)
            found.append(Layer(f"{last}{nth}" if last else plain.name, *_place(plain)))
        elif isinstance(weight, Tensor) and weight.ndim > 1:
            kind = "fc" if weight.ndim == 2 else "conv"
            kinds[kind] += 1
            last = f"{kind}{kinds[kind]}"
    return tuple(found)


def _plain(seen: Seen, i: int) -> Layer:
    """Return the i-th thing seen as a layer that has the name of its module."""
    name, shape = seen[i]
    call = sum(other == name for other, _ in seen[:i])
    return Layer(f"{name}#{call + 1}" if call else name, name, call, shape)


def _place(layer: Layer) -> tuple[str, int, tuple[int, ...]]:
    return layer.module, layer.call, layer.shape


def _chosen(layers: Sequence[Layer], patterns: Sequence[str]) -> tuple[Layer, ...]:
    names = ((layer, (layer.name, layer.module)) for layer in layers)
    return tuple(layer for layer, both in names if any(fnmatchcase(n, p) for n in both for p in patterns))
