"""A fastai ``Learner`` as a network: its model, with the normalisation that its data loaders apply."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from assay.core.errors import ModelError
from assay.core.optional import need
from assay.data.fit import Fit
from assay.models.loaded import Loaded

_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of resampling filters."""


def bridge(model: Any) -> Loaded:
    """Return the classifier of a Learner; a plain module of fastai is taken as it is.

    Raises:
        ModelError: neither of the two, several inputs or targets, several labels a sample, or no classes.
    """
    learner = need("fastai.learner", "fastai").Learner
    if isinstance(model, nn.Module) and not isinstance(model, learner):
        return Loaded(model)
    if not isinstance(model, learner):
        raise ModelError("a fastai Learner", type(model).__name__, "Pass the Learner itself, or learn.model.")
    check_classifier(model)
    mean, std = normalisation(model.dls)
    fit = size(model.dls)
    return Loaded(
        model.model,
        mean=mean,
        std=std,
        fit=fit,
        class_names=class_names(model.dls),
        notes=tuple(_notes(mean, std, fit)),
        name=type(model.model).__name__,
    )


def check_classifier(learn: Any) -> None:
    """Refuse what is no classifier of one input and one label.

    Raises:
        ModelError: it is not.
    """
    inputs = getattr(learn.dls, "n_inp", 1)
    if inputs != 1:
        raise ModelError("a Learner with one input", f"{inputs} inputs", "Wrap its model in a network of one input.")
    loss = getattr(learn.loss_func, "func", learn.loss_func)
    if "BCE" in type(loss).__name__ or isinstance(loss, nn.MSELoss | nn.L1Loss):
        raise ModelError("a Learner with one label a sample", f"the loss {type(loss).__name__}",
                         "Robustness of a class is what is measured: train with cross-entropy.")  # fmt: skip


def normalisation(dls: Any) -> tuple[list[float] | None, list[float] | None]:
    """Return mean and std per channel of the ``Normalize`` of data loaders, or twice None where there is none."""
    kind = need("fastai.data.transforms", "fastai").Normalize
    found = [t for t in _transforms(dls, "after_batch") if isinstance(t, kind)]
    if not found:
        return None, None
    mean, std = (v.detach().cpu().flatten().tolist() for v in (found[0].mean, found[0].std))
    return mean, std


def class_names(dls: Any) -> tuple[str, ...] | None:
    """Return the names of the classes of data loaders, in the order of the outputs."""
    vocab = getattr(dls, "vocab", None)
    if vocab is None or not len(vocab):
        return None
    vocab = vocab[-1] if isinstance(vocab[-1], Sequence) and not isinstance(vocab[-1], str) else vocab
    return tuple(map(str, vocab))


def size(dls: Any) -> Fit | None:
    """Return how images get the size that the network sees in validation, where scaling and a crop say it.

    Items are resized by ``Resize``; batches may be once more, by augmentation with a ``size`` ("presizing").
    """
    resize = need("fastai.vision.augment", "fastai").Resize
    found = [t for t in _transforms(dls, "after_item") if type(t) is resize]
    last = presized(dls)
    if len(found) != 1:
        return None if last is None else Fit(*last)
    (width, height), method = found[0].size, found[0].method
    seen = last or (int(height), int(width))
    name = _FILTERS.get(int(found[0].mode), "bilinear")
    if method == "squish":
        return Fit(*seen, filter=name)
    square = width == height and seen[0] == seen[1]
    return Fit(*seen, shorter=seen[0], filter=name) if method == "crop" and square else None


def presized(dls: Any) -> tuple[int, int] | None:
    """Return the height and width to which batches are resized; None where they are not."""
    sizes = [v for t in _transforms(dls, "after_batch") if (v := getattr(t, "size", None)) is not None]
    if not sizes:
        return None
    return (int(sizes[-1]),) * 2 if isinstance(sizes[-1], int) else (int(sizes[-1][0]), int(sizes[-1][1]))


def _transforms(dls: Any, stage: str) -> list[Any]:
    loader = dls.valid if len(dls.loaders) > 1 else dls.train
    return list(getattr(getattr(loader, stage, None), "fs", ()))


def _notes(mean: Sequence[float] | None, std: Sequence[float] | None, fit: Fit | None) -> list[str]:
    if mean is None or std is None:
        said = "The Learner has no Normalize: its network is taken to see values from 0 to 1."
    else:
        shown = [", ".join(f"{x:.4g}" for x in v) for v in (mean, std)]
        said = f"The normalisation is that of the Learner's Normalize: mean {shown[0]}, std {shown[1]}."
    resized = "" if fit is None else f" Its images have {fit.width} x {fit.height} pixels."
    return [said + resized]
