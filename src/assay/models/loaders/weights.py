"""Architectures, and the weights that belong to them."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from assay.core.errors import ModelError
from assay.core.named import call, call_named
from assay.models.loaders.request import Arch

CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "network")
"""Under these names training scripts keep the weights among other things."""

_PREFIXES = ("module.", "model.", "net.", "_orig_mod.")
"""What DataParallel, Lightning and torch.compile put before the names."""

_SHOWN = 3


LIBRARIES = {
    "hf": "hugging_face",
    "timm": "timm_models",
    "torchvision": "torchvision_models",
}
"""From ``NAME:`` before an architecture to the module beside this one whose ``untrained(name, state)`` builds it."""


def build(arch: Arch | None, source: str, state: Mapping[str, Any]) -> nn.Module:
    """Build the network that the weights ``state`` in ``source`` belong to.

    Raises:
        ModelError: no architecture given, or one that cannot be imported, raises, or is no network.
    """
    if arch is None:
        raise ModelError(
            f"an architecture for the weights in {source}",
            "none",
            "Add --arch module:callable (in Python: arch=), where the callable builds the network.",
        )
    if isinstance(arch, str) and arch.startswith("demo:"):
        from assay.models.loaders.demo import untrained

        return untrained(arch.removeprefix("demo:"))
    library, _, rest = arch.partition(":") if isinstance(arch, str) else ("", "", "")
    if library in LIBRARIES:
        module = importlib.import_module(f"assay.models.loaders.{LIBRARIES[library]}")
        net: nn.Module = module.untrained(rest, state)
        return net
    what = f"the architecture of {source}"
    name = arch if isinstance(arch, str) else getattr(arch, "__name__", type(arch).__name__)
    net = call_named(arch, ModelError, what) if isinstance(arch, str) else call(arch, name, ModelError, what)
    if not isinstance(net, nn.Module):
        raise ModelError(f"a torch.nn.Module from {name}", type(net).__name__, "Return the network itself.")
    return net


def fit(net: nn.Module, found: Mapping[str, Any], source: str) -> nn.Module:
    """Fill ``net`` with weights, strictly, and return it in eval mode, as it was just built for use.

    ``found`` may keep the weights under a usual name, and their names may have a usual prefix; either is
    taken off only where the names then are exactly those of ``net``.

    Raises:
        ModelError: other names or shapes than ``net`` has.
    """
    # Counters of BatchNorm are younger than many files, and torch fills them in by itself.
    wanted = {k: v for k, v in net.state_dict().items() if not k.endswith(".num_batches_tracked")}
    state = _best(found, wanted)
    if differences := _differences(wanted, state):
        raise ModelError(
            f"the weights of {type(net).__name__} ({len(wanted)} tensors)",
            f"{source} with {len(state)} entries: {'; '.join(differences)}",
            "Give the --arch that these weights were trained with.",
        )
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError) as e:
        raise ModelError(f"the weights of {type(net).__name__}", f"{source}: {e}", "Give the right --arch.") from e
    return net.eval()


def classes(net: nn.Module, found: Mapping[str, Any]) -> int | None:
    """Return how many classes weights have, by the last tensor of ``net``, which is that of its head; None if unclear.

    Networks of libraries are built for a number of classes, which is what people change before they train them.
    """
    wanted = net.state_dict()
    last = [*wanted][-1]
    mine, theirs = wanted[last], _best(found, wanted).get(last)
    if not isinstance(theirs, Tensor) or theirs.ndim < 1 or theirs.shape[1:] != mine.shape[1:]:
        return None
    return len(theirs)


def _best(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a file is most likely the state dict."""
    return max(_states(found), key=lambda s: (_names(s) == wanted.keys(), len(s.keys() & wanted.keys())))


def _states(found: Any, depth: int = 2) -> Iterator[dict[str, Any]]:
    """Yield what may be the state dict: ``found``, what it keeps under usual names, all without prefixes."""
    if not isinstance(found, Mapping):
        return
    yield from _stripped({str(k): v for k, v in found.items()})
    for name in CONTAINERS if depth else ():
        yield from _states(found.get(name), depth - 1)


def _stripped(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield state
    for prefix in _PREFIXES:
        if state and all(k.startswith(prefix) for k in state):
            yield from _stripped({k.removeprefix(prefix): v for k, v in state.items()})


def _differences(wanted: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    shapes = [
        f"{k} is {_shape(state[k])}, not {_shape(v)}"
        for k, v in wanted.items()
        if k in state and not is_lazy(v) and _shape(state[k]) != _shape(v)
    ]
    kinds = (
        ("missing", [k for k in wanted if k not in state]),
        ("unexpected", [k for k in state if k in _names(state) - wanted.keys()]),
        ("of another shape", shapes),
    )
    return [f"{len(names)} {kind} ({_few(names)})" for kind, names in kinds if names]


def _names(state: Mapping[str, Any]) -> set[str]:
    return {k for k in state if not k.endswith(".num_batches_tracked")}


def _shape(v: Any) -> tuple[int, ...] | str:
    return tuple(v.shape) if isinstance(v, Tensor) else f"a {type(v).__name__}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
