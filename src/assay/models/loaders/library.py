"""Networks of libraries by their names: ``NAME``, ``NAME+download``, ``NAME@FILE``, each after the library and a colon.

Without more, weights are taken from where the library keeps what it downloaded before, and nothing is downloaded.
``+download`` asks for it. ``@FILE`` takes weights of one's own.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias, final

from torch import nn

from assay.core.errors import ModelError
from assay.core.files import check_readable
from assay.core.registry import closest
from assay.models.loaders import pickled, tensors, weights
from assay.models.loaders.request import Request

_MANY: Final = 400
"""Letters of the names that a message lists."""

Builder: TypeAlias = Callable[[int | None], nn.Module]
"""From a number of classes, or None for the usual one, to a network without weights."""


@final
@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for: ``file`` has the weights, and without one ``download`` says whether to fetch them."""

    name: str
    file: Path | None = None
    download: bool = False

    @classmethod
    def of(cls, text: str) -> "Wanted":
        if Path(text).is_dir():
            return cls(text)
        name, at, file = text.partition("@")
        if at:
            return cls(name, Path(file))
        return cls(text.removesuffix("+download"), download=text.endswith("+download"))


def state(file: Path, r: Request) -> Mapping[str, Any]:
    """Return the weights in a file of one's own: ``.safetensors``, or what ``torch.save`` wrote.

    Raises:
        ModelError: no such file, a damaged one, or one that would run code and is not trusted.
    """
    check_readable(file, ModelError, "a file of weights", "Save or copy it anew.")
    at = replace(r, rest=str(file))
    found = tensors.read(at) if file.suffix.lower() == ".safetensors" else pickled.read(at)
    if not isinstance(found, Mapping):
        raise ModelError("a state dict", f"{type(found).__name__} in {file}", "Save net.state_dict().")
    return found


def fitting(build: Builder, found: Mapping[str, Any]) -> nn.Module:
    """Build a network for as many classes as the weights have."""
    net = build(None)
    usual, theirs = weights.classes(net, net.state_dict()), weights.classes(net, found)
    return net if theirs in (None, usual) else build(theirs)


def unknown(kind: str, name: str, known: Iterable[str]) -> ModelError:
    """Return the error for a name that a library does not have."""
    hint, _, names = closest(name, [*known]).partition("Known: ")
    few = names if len(names) < _MANY else f"{names[:_MANY].rpartition(',')[0]}, ..."
    return ModelError(f"the name of a model of {kind}", repr(name), f"{hint}Known: {few}")


def absent(form: str, name: str, where: str) -> ModelError:
    """Return the error for weights that are not on this machine."""
    return ModelError(
        f"the weights of {name} on this machine ({where})",
        "none there",
        f"Nothing is downloaded unless it is asked for: {form}:{name}+download. "
        f"Weights of your own: {form}:{name}@weights.safetensors.",
    )
