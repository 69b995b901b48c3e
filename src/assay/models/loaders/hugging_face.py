"""Image classifiers of Hugging Face, with the preprocessing, the size and the classes of their own configuration."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from assay.core.errors import DataError, ModelError
from assay.core.optional import need
from assay.data.fit import Fit
from assay.models.loaded import Loaded
from assay.models.loaders import library, timm_models, weights
from assay.models.loaders.request import Request

_EXTRA: Final = "huggingface"


def load(r: Request) -> Loaded:
    """Load ``DIR``, or ``NAME`` from the local cache, ``NAME+download``, or ``DIR_OR_NAME@FILE`` for other weights.

    Weights are read from safetensors files only, unless the request is trusted; no code of a repository is run.

    Raises:
        MissingExtraError: transformers is not installed.
        ModelError: not on this machine, no image classifier, or a preprocessing that has no equal here.
    """
    wanted = library.Wanted.of(r.rest)
    if _is_timm(Path(wanted.name) / "config.json"):
        return timm_models.load(r)
    if wanted.file is not None:
        found = library.state(wanted.file, r)
        net: Any = weights.fit(untrained(wanted.name, found), found, r.source)
    else:
        settings = {} if r.trust_pickle else {"use_safetensors": True}
        net, loading = _ask("AutoModelForImageClassification", wanted, output_loading_info=True, **settings)
        _check_whole(loading, wanted.name)
    seen = _preprocessing(wanted)
    return Loaded(
        Classifier(net.float().eval(), flip=seen.flip),
        mean=seen.mean,
        std=seen.std,
        fit=seen.fit,
        class_names=_class_names(net.config.id2label),
        notes=seen.notes,
        name=Path(wanted.name).name,
    )


def _check_whole(loading: Mapping[str, Any], name: str) -> None:
    """Refuse a checkpoint without a head, or with another one: what is missing would be drawn at random."""
    lacking = [str(k) for kind in ("missing_keys", "mismatched_keys") for k in loading.get(kind) or ()]
    if lacking:
        raise ModelError(
            "the weights of an image classifier, all of them",
            f"{name} without {', '.join(sorted(lacking)[:3])}{', ...' if len(lacking) > 3 else ''}",
            "Take a checkpoint that was trained to classify; this one is of the network below the head.",
        )


def _is_timm(config: Path) -> bool:
    """Return whether a folder is one that timm wrote, for which transformers would ask timm in turn."""
    try:
        return "pretrained_cfg" in json.loads(config.read_text())
    except (OSError, ValueError, TypeError):
        return False


def untrained(name: str, state: Mapping[str, Any]) -> nn.Module:
    """Build the architecture that a configuration describes, for as many classes as the weights have.

    Raises:
        MissingExtraError: transformers is not installed.
        ModelError: the configuration is not on this machine, or is of no image classifier.
    """
    wanted = library.Wanted.of(name)
    auto = need("transformers", _EXTRA).AutoModelForImageClassification

    def build(classes: int | None) -> nn.Module:
        config = _ask("AutoConfig", wanted, **({} if classes is None else {"num_labels": classes}))
        try:
            net: nn.Module = auto.from_config(config)
        except ValueError as e:
            raise _refused(wanted, e) from e
        return net

    return library.fitting(build, state)


def _class_names(names: Mapping[int, str]) -> tuple[str, ...] | None:
    """Return the names of the classes, but for those that transformers makes up."""
    found = tuple(str(names.get(i, f"LABEL_{i}")) for i in range(len(names)))
    return None if found == tuple(f"LABEL_{i}" for i in range(len(names))) else found


@final
class Classifier(nn.Module):
    """An image classifier of transformers, from images (b, c, h, w) to logits; ``flip`` gives it BGR for RGB."""

    def __init__(self, net: nn.Module, *, flip: bool = False) -> None:
        super().__init__()
        self.net, self.flip = net, flip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(pixel_values=x.flip(1) if self.flip else x).logits
        return out


@final
@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What happens to an image, as values in [0, 1], before the network sees it."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    fit: Fit | None = None
    flip: bool = False
    notes: tuple[str, ...] = ()


def _preprocessing(wanted: library.Wanted) -> Preprocessing:
    if not _has_processor(wanted):
        return Preprocessing(
            notes=(
                f"{wanted.name} comes without preprocessor_config.json: images are handed over as they are, "
                "unless --size, --mean and --std are given.",
            )
        )
    settings = _ask("AutoImageProcessor", wanted).to_dict()
    try:
        return understood(settings, wanted.name)
    except (TypeError, ValueError, KeyError, ZeroDivisionError, DataError) as e:
        said = f"{wanted.name}: {type(e).__name__}: {e}"
        raise ModelError("an image processor with settings that make sense", said, "Mend its configuration.") from e


def _has_processor(wanted: library.Wanted) -> bool:
    if not Path(wanted.name).is_dir():
        return True
    return any((Path(wanted.name) / n).is_file() for n in ("preprocessor_config.json", "processor_config.json"))


def understood(p: Mapping[str, Any], name: str) -> Preprocessing:
    """Translate the settings of an image processor of transformers.

    Raises:
        ModelError: a kind of processor, or a setting, that has no equal here; it is named.
    """
    kind = str(p.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
    if kind == "TimmWrapperImageProcessor":
        config = p["data_config"]
        return Preprocessing(tuple(config["mean"]), tuple(config["std"]), timm_models.fit_of(config))
    if kind not in _SIZES:
        raise ModelError(
            f"an image processor out of {', '.join(_SIZES)}",
            f"{kind or 'none'} of {name}",
            "Write a function that returns the network and give it as py:module:callable, with images of its size.",
        )
    fit = _SIZES[kind](p)
    channels = max(
        (len(v) for v in (p.get("image_mean"), p.get("image_std")) if isinstance(v, list | tuple)), default=3
    )
    mean, std = _normalisation(p, channels)
    return Preprocessing(mean, std, fit, bool(p.get("do_flip_channel_order")))


def _normalisation(p: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std for values in [0, 1], of which the processor makes (255 x factor - offset - mean) / std."""
    factor = float(p.get("rescale_factor") or 1 / 255) if p.get("do_rescale", True) else 1.0
    offset = float(bool(p.get("rescale_offset")))
    normalised = bool(p.get("do_normalize"))
    mean = _each(p.get("image_mean") if normalised else 0.0, channels)
    std = _each(p.get("image_std") if normalised else 1.0, channels)
    twice = _each(p.get("image_std") if p.get("include_top") else 1.0, channels)  # EfficientNet divides by it again
    scale = 255 * factor
    return (
        tuple((m + offset) / scale for m in mean),
        tuple(s * t / scale for s, t in zip(std, twice, strict=True)),
    )


def _each(value: Any, channels: int) -> list[float]:
    return [float(v) for v in value] if isinstance(value, list | tuple) else [float(value)] * channels


def _usual(p: Mapping[str, Any], grown: Callable[[int], int] = int) -> Fit | None:
    """Resize and crop as most processors do; ``grown`` is what becomes of the shortest edge before."""
    size, crop = (_sides(p.get(n)) for n in ("size", "crop_size"))
    crop = crop if p.get("do_center_crop") else {}
    if not p.get("do_resize"):
        if crop:
            raise _no_size(p)
        return None
    if "shortest_edge" in size and "longest_edge" not in size and crop:
        return Fit(crop["height"], crop["width"], grown(size["shortest_edge"]), **_kept(p))
    if {"height", "width"} <= size.keys():
        wanted = crop or size
        stretch = (size["height"], size["width"]) if crop else None
        return Fit(wanted["height"], wanted["width"], stretch=stretch, **_kept(p))
    raise _no_size(p)


def _convnext(p: Mapping[str, Any]) -> Fit | None:
    """Crop to the shortest edge after scaling to a little more; from 384 on, scale both sides."""
    side = _sides(p.get("size")).get("shortest_edge")
    if not p.get("do_resize") or side is None or p.get("do_center_crop"):
        raise _no_size(p)
    scaled = int(side / float(p.get("crop_pct") or 224 / 256)) if side < 384 else 0
    return Fit(side, side, scaled, **_kept(p))


def _levit(p: Mapping[str, Any]) -> Fit | None:
    return _usual(p, lambda side: int(256 / 224 * side))


_SIZES: Final[dict[str, Callable[[Mapping[str, Any]], Fit | None]]] = {
    **dict.fromkeys(
        (
            "BeitImageProcessor",
            "BitImageProcessor",
            "CLIPImageProcessor",
            "DeiTImageProcessor",
            "EfficientNetImageProcessor",
            "MobileNetV1ImageProcessor",
            "MobileNetV2ImageProcessor",
            "MobileViTImageProcessor",
            "PvtImageProcessor",
            "SiglipImageProcessor",
            "ViTImageProcessor",
        ),
        _usual,
    ),
    "ConvNextImageProcessor": _convnext,
    "LevitImageProcessor": _levit,
}
"""The processors that are understood, and how each brings images to one size."""

_FILTERS: Final = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's numbers of its filters."""


def _kept(p: Mapping[str, Any]) -> dict[str, Any]:
    resample = p.get("resample")
    if not isinstance(resample, int) or not 0 <= resample < len(_FILTERS):
        raise ModelError("a filter of Pillow", f"resample={resample!r}", "Correct preprocessor_config.json.")
    return {"filter": _FILTERS[resample], "channels": 3, "floor": True}


def _sides(value: Any) -> dict[str, int]:
    """Return a size in one of the forms that it has had: a number, a pair, or a mapping."""
    if isinstance(value, int):
        return {"shortest_edge": value}
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"height": int(value[0]), "width": int(value[1])}
    return {k: int(v) for k, v in value.items() if v is not None} if isinstance(value, Mapping) else {}


def _no_size(p: Mapping[str, Any]) -> ModelError:
    named = {k: p.get(k) for k in ("do_resize", "size", "do_center_crop", "crop_size")}
    return ModelError(
        "an image processor that gives all images one size",
        f"{p.get('image_processor_type')} with {named}",
        "Resize the images yourself, and give the network as py:module:callable.",
    )


def _ask(loader: str, wanted: library.Wanted, **settings: Any) -> Any:
    """Load something of a folder or a name by one of the Auto classes."""
    transformers = need("transformers", _EXTRA)
    local = not wanted.download
    try:
        auto = getattr(transformers, loader)
        with torch.random.fork_rng():  # what a checkpoint lacks is drawn
            return auto.from_pretrained(wanted.name, local_files_only=local, trust_remote_code=False, **settings)
    except Exception as e:  # of transformers, safetensors, or what reads the configuration
        raise _refused(wanted, e) from e


def _refused(wanted: library.Wanted, e: Exception) -> ModelError:
    said = (str(e).splitlines() or [""])[0]
    if not Path(wanted.name).is_dir() and not wanted.download:
        return library.absent("hf", wanted.name, f"a folder, or in the cache of Hugging Face; {said}"[:300])
    return ModelError(
        "an image classifier of transformers (config.json, model.safetensors, preprocessor_config.json)",
        f"{wanted.name}: {type(e).__name__}: {said}",
        "Save it with save_pretrained(), also its image processor. Pickled weights: only with --trust-pickle.",
    )
