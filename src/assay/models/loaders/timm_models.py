"""Networks of timm by their names, with the size, the normalisation and the classes of their configuration."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from assay.core.errors import DataError, ModelError
from assay.core.optional import need
from assay.data.fit import FILTERS, Fit
from assay.models.loaded import Loaded
from assay.models.loaders import library, weights
from assay.models.loaders.request import Request

_FILES = ("model.safetensors", "pytorch_model.bin")
"""Where timm's repositories keep weights, the first that is there."""


def load(r: Request) -> Loaded:
    """Load ``NAME`` (``resnet18``, ``resnet18.a1_in1k``), ``NAME+download``, ``NAME@FILE``, or a folder of timm's.

    A folder is one that ``timm.models.save_for_hf`` wrote: ``config.json`` with the weights beside it.

    Raises:
        MissingExtraError: timm is not installed.
        ModelError: no such name, weights that are not on this machine, or of another architecture.
    """
    wanted = library.Wanted.of(r.rest)
    if wanted.file is not None:
        found = library.state(wanted.file, r)
        net = weights.fit(untrained(wanted.name, found), found, r.source)
        return described(net, net.pretrained_cfg, wanted.name, own=True)  # type: ignore[arg-type]
    if Path(wanted.name).is_dir():
        net = _made(f"local-dir:{wanted.name}", pretrained=True)
    elif wanted.download:
        _checked(wanted.name)
        net = _made(wanted.name, pretrained=True)
    else:
        overlay = {"file": str(_local(wanted.name)), "custom_load": False}
        net = _made(wanted.name, pretrained=True, pretrained_cfg_overlay=overlay)
    return described(net.eval(), net.pretrained_cfg, Path(wanted.name).name)  # type: ignore[arg-type]


def untrained(name: str, state: Mapping[str, Any]) -> nn.Module:
    """Build an architecture for as many classes as the weights have.

    Raises:
        MissingExtraError: timm is not installed.
        ModelError: no such name.
    """
    _checked(name)
    return library.fitting(lambda n: _made(name, **({} if n is None else {"num_classes": n})), state)


def described(net: nn.Module, cfg: Mapping[str, Any], name: str, *, own: bool = False) -> Loaded:
    """Return a network with what its configuration says; ``own`` says that the weights are not those of timm."""
    data = need("timm", "timm").data
    try:
        config = data.resolve_data_config({}, pretrained_cfg=dict(cfg))
        fit = fit_of(config)
    except (TypeError, ValueError, KeyError, ZeroDivisionError, DataError) as e:
        said = f"{name}: {type(e).__name__}: {e}"
        raise ModelError("a configuration of timm that makes sense", said, "Mend its config.json.") from e
    notes = [
        f"Size, mean and standard deviation are those that timm's configuration gives for {name}"
        + ("; if the weights were trained with others, give --size, --mean and --std." if own else ".")
    ]
    if fit is None:
        notes.append(
            f"How timm crops images for {name} ({config['crop_mode']}) has no equal here: resize them yourself."
        )
    return Loaded(
        net,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        fit=fit,
        class_names=None if own else _class_names(net, cfg),
        notes=tuple(notes),
        name=name,
    )


def fit_of(config: Mapping[str, Any]) -> Fit | None:
    """Return how timm brings images to the size of a model, as its ``create_transform`` does for evaluation."""
    channels, height, width = config["input_size"]
    scaled = [math.floor(v / config["crop_pct"]) for v in (height, width)]
    name = config["interpolation"] if config["interpolation"] in FILTERS else "bilinear"  # "random": when training
    known: dict[str, Any] = {"filter": name, "channels": channels if channels in (1, 3) else 0}
    if config["crop_mode"] == "squash":
        return Fit(height, width, stretch=(scaled[0], scaled[1]), **known)
    if config["crop_mode"] == "center" and height == width:
        return Fit(height, width, scaled[0], **known)
    return None


def _made(name: str, **settings: Any) -> nn.Module:
    timm = need("timm", "timm")
    try:
        net: nn.Module = timm.create_model(name, **settings)
    except Exception as e:  # of timm, torch, or what reads the file
        raise ModelError(
            f"a model that timm can make of {name.removeprefix('local-dir:')}",
            f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}",
            "Check the name, the folder and its weights.",
        ) from e
    return net


def _checked(name: str) -> Any:
    """Return the configuration that timm has for a name."""
    timm = need("timm", "timm")
    if not timm.is_model(name):
        raise library.unknown("timm", name, timm.list_models())
    try:
        return timm.models.get_pretrained_cfg(name)
    except RuntimeError as e:  # another tag
        raise library.unknown("timm", name, timm.list_pretrained(f"{name.partition('.')[0]}*")) from e


def _local(name: str) -> Path:
    """Return the weights that timm has downloaded before."""
    cfg = _checked(name)
    if cfg is None or not cfg.has_weights:
        raise ModelError("a model that has trained weights", f"none for {name}", f"Give yours: timm:{name}@FILE.")
    hub = need("huggingface_hub", "timm")
    repository, _, revision = (cfg.hf_hub_id or "").partition("@")
    for file in (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _FILES:
        found = hub.try_to_load_from_cache(repository, file, revision=revision or None) if repository else None
        if isinstance(found, str):
            return Path(found)
    kept = Path(torch.hub.get_dir(), "checkpoints", str(cfg.url or "").rpartition("/")[2])
    if cfg.url and kept.is_file():
        return kept
    raise library.absent("timm", name, "in the caches of Hugging Face and torch.hub")


def _class_names(net: nn.Module, cfg: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names in the configuration, or those of ImageNet where the weights are of ImageNet."""
    names = cfg.get("label_names")
    data = need("timm", "timm").data
    if names is None and (subset := data.infer_imagenet_subset(net)) is not None:
        info = data.ImageNetInfo(subset)
        names = [info.index_to_description(i) for i in range(info.num_classes())]
    return tuple(map(str, names)) if names and len(names) == getattr(net, "num_classes", -1) else None
