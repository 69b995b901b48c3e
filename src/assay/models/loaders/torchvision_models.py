"""Classifiers of torchvision by their names, with the transforms that belong to their weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from assay.core.errors import ModelError
from assay.core.optional import need
from assay.data.fit import Fit
from assay.models.loaded import Loaded
from assay.models.loaders import library, weights
from assay.models.loaders.request import Request


def load(r: Request) -> Loaded:
    """Load ``NAME`` (``resnet50``, ``resnet50.IMAGENET1K_V1``), ``NAME+download`` or ``NAME@FILE``.

    Without the weights' name they are the ones that torchvision calls the default.

    Raises:
        MissingExtraError: torchvision is not installed.
        ModelError: no such name, weights that are not on this machine, or of another architecture.
    """
    wanted = library.Wanted.of(r.rest)
    entry = _entry(wanted.name)
    if wanted.file is not None:
        found = library.state(wanted.file, r)
        return _described(weights.fit(untrained(wanted.name, found), found, r.source), entry, wanted.name, own=True)
    kept = Path(torch.hub.get_dir(), "checkpoints", entry.url.rpartition("/")[2])
    if kept.is_file():
        library.state(kept, r)  # torchvision would unpickle it
    elif not wanted.download:
        raise library.absent("torchvision", wanted.name, str(kept))
    return _described(_made(wanted.name, weights=entry).eval(), entry, wanted.name)


def untrained(name: str, state: Mapping[str, Any]) -> nn.Module:
    """Build an architecture for as many classes as the weights have.

    Raises:
        MissingExtraError: torchvision is not installed.
        ModelError: no such name.
    """
    _entry(name)
    return library.fitting(lambda n: _made(name, **({} if n is None else {"num_classes": n})), state)


def _entry(name: str) -> Any:
    """Return the entry of weights in torchvision's table."""
    models = need("torchvision", "torchvision").models
    net, _, tag = name.partition(".")
    known = models.list_models(module=models)
    if net not in known:
        raise library.unknown("torchvision", net, known)
    entries = models.get_model_weights(net)
    if tag and tag not in entries.__members__:
        raise library.unknown(f"torchvision: weights of {net}", tag, entries.__members__)
    return entries[tag] if tag else entries.DEFAULT


def _made(name: str, **settings: Any) -> nn.Module:
    models = need("torchvision", "torchvision").models
    try:
        net: nn.Module = models.get_model(name.partition(".")[0], **settings)
    except Exception as e:  # of torchvision, torch, or the network
        said = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        raise ModelError(f"a model that torchvision can make of {name}", said, "Check the name and the weights.") from e
    return net


def _described(net: nn.Module, entry: Any, name: str, *, own: bool = False) -> Loaded:
    """Return a network with what the transforms of the weights say; ``own`` says that the weights are others."""
    transforms = entry.transforms()
    size, scaled = transforms.crop_size[0], transforms.resize_size[0]
    note = f"Size, mean and standard deviation are those that torchvision has for {entry}"
    note += "; if the weights were trained with others, give --size, --mean and --std." if own else "."
    names = None if own else entry.meta.get("categories")
    return Loaded(
        net,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        fit=Fit(size, size, scaled, transforms.interpolation.value, channels=3),
        class_names=None if names is None else tuple(names),
        notes=(note,),
        name=name,
    )
