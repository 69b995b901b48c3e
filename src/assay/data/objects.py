"""Python objects as data: pairs of arrays, datasets, data loaders."""

import io
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from assay.core.errors import DataError
from assay.core.types import Labels
from assay.data import columns
from assay.data.arrays import as_labels, as_samples, from_arrays
from assay.data.data import Data
from assay.data.images import Images, is_colour

_ACCEPTED = "(x, y) of arrays or tensors, a map-style Dataset of torch or Hugging Face, a DataLoader, or assay data"

_INPUTS: Final = (*columns.INPUTS, "pixel_values", "x")
_LABELS: Final = (*columns.LABELS, "y")
"""Under these names, the first that is there, samples that are mappings keep input and label."""

_MOST = 8 * 2**30
"""Bytes that are read into memory of a dataset or a loader; more may be meant to stay where it is."""

_Pair: TypeAlias = tuple[Any, Any, str]
"""An input and its label, or inputs (b, ...) and labels (b,), and what messages call the two."""


def from_object(value: Any, source: str, *, limit: int | None = None) -> Data:
    """Return data of a Python object. Datasets and loaders are read into memory once, up to ``limit`` samples.

    So random transforms are drawn once. Where items are PIL images, they may have different sizes
    (:meth:`Data.fitted`). The names of the classes are those in ``classes`` of a torch dataset, or in the features of
    one of Hugging Face.

    Raises:
        DataError: another kind of object, one whose samples or labels cannot be used, or more than fits into memory.
    """
    if isinstance(value, Data):
        return value
    if isinstance(value, DataLoader):
        return _joined(_batches(value, source), source, limit, _class_names(value))
    if isinstance(value, Dataset) or type(value).__module__.startswith("datasets."):
        return _read(_items(value, source), source, limit, _class_names(value))
    if isinstance(value, tuple | list) and len(value) == 2:
        return from_arrays(*value, name=_name(source), source=source)
    raise DataError(_ACCEPTED, _show(value), "Wrap it, or pass two arrays.")


def _batches(loader: "DataLoader[Any]", source: str) -> Iterator[_Pair]:
    for k, batch in enumerate(loader):
        where = f"batch {k} of {source}"
        yield *_pair(batch, where), where


def _items(dataset: Any, source: str) -> Iterator[_Pair]:
    if isinstance(dataset, IterableDataset | Mapping) or not hasattr(dataset, "__len__"):
        remedy = f"Choose one of {', '.join(dataset)}." if isinstance(dataset, Mapping) else "Put it into a DataLoader."
        raise DataError(_ACCEPTED, f"{_show(dataset)}, which has no length of its own", remedy)
    for i in range(len(dataset)):
        where = f"item {i} of {source}"
        try:
            item = dataset[i]
        except Exception as e:  # the user's code
            raise DataError("(x, y) for every item", f"{where} raised {type(e).__name__}: {e}", "Mend it.") from e
        yield *_pair(item, where), where


def _read(items: Iterator[_Pair], source: str, limit: int | None, names: list[str] | None) -> Data:
    """Read single samples into memory: images as they are, anything else as arrays of one shape."""
    first = next(items, None)
    items = items if first is None else chain([first], items)
    if first is not None and isinstance(first[0], Image.Image):
        return _pictures(islice(items, limit), source, names)
    return _joined(((_one(x), _one(y), where) for x, y, where in items), source, limit, names)


def _pictures(items: Iterator[_Pair], source: str, names: list[str] | None) -> Data:
    """Keep images as PNG, without loss, so that they may have different sizes."""
    kept: list[bytes] = []
    ys: list[Labels] = []
    size = 0
    for x, y, where in items:
        if not isinstance(x, Image.Image):
            raise DataError("images, as the first item has", f"{_show(x)} as {where}", "Give every item one form.")
        buffer = io.BytesIO()
        x.convert("RGB" if is_colour(x, where) else "L").save(buffer, "PNG", compress_level=1)
        kept.append(buffer.getvalue())
        ys.append(as_labels(_one(y), f"y of {where}"))
        _check_size(size := size + len(kept[-1]), source)
    samples = Images(kept.__getitem__, lambda row: f"item {row} of {source}", len(kept))
    return Data(samples, torch.cat(ys), name=_name(source), source=source, class_names=names)


def _joined(batches: Iterator[_Pair], source: str, limit: int | None, names: list[str] | None) -> Data:
    """Read batches into memory, until there are ``limit`` samples."""
    xs: list[Tensor] = []
    ys: list[Labels] = []
    size = 0
    for x, y, where in batches:
        xs.append(as_samples(x, f"x of {where}").cpu())
        ys.append(as_labels(y, f"y of {where}"))
        if xs[-1].shape[1:] != xs[0].shape[1:]:
            raise DataError(
                f"samples of one shape, {tuple(xs[0].shape[1:])}",
                f"{tuple(xs[-1].shape[1:])} in {where}",
                "Resize or crop all samples to one size.",
            )
        _check_size(size := size + xs[-1].numel() * xs[-1].element_size(), source)
        if limit is not None and sum(map(len, ys)) >= limit:
            break
    if not xs:
        raise DataError("at least one sample", f"none in {source}", "Give data with samples.", code="empty-data")
    return from_arrays(torch.cat(xs), torch.cat(ys), name=_name(source), source=source, class_names=names)


def _check_size(size: int, source: str) -> None:
    if size > _MOST:
        raise DataError(
            f"no more than {_MOST / 2**30:g} GiB of samples, which are read into memory",
            f"more in {source}",
            "Give a limit, or save it as a folder of class folders or as .parquet, which are read as they are needed.",
        )


def _class_names(value: Any) -> list[str] | None:
    """Return the names of classes that a dataset, or the one that it wraps, knows."""
    while isinstance(value, DataLoader | torch.utils.data.Subset):
        value = value.dataset
    features = getattr(value, "features", None)
    if isinstance(features, Mapping):
        value = next((features[n] for n in _LABELS if n in features), None)
    names = getattr(value, "names" if isinstance(features, Mapping) else "classes", None)
    return [str(n) for n in names] if isinstance(names, list | tuple) else None


def _pair(value: Any, where: str) -> tuple[Any, Any]:
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0], value[1]
    if isinstance(value, Mapping):
        found = [next((value[n] for n in names if n in value), None) for names in (_INPUTS, _LABELS)]
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
        shown = f"{', '.join(map(str, value))} as {where}"
        raise DataError(f"one of {', '.join(_INPUTS)} and one of {', '.join(_LABELS)}", shown, "Rename the columns.")
    raise DataError("(x, y)", f"{_show(value)} as {where}", "Yield inputs and labels only.")


def _one(value: Any) -> Any:
    """Return a sample or a label as a batch of one."""
    return value[None] if isinstance(value, Tensor) else np.asarray(value)[None]


def _name(source: str) -> str:
    return source.rpartition(":")[2]


def _show(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"one {type(value).__name__} of shape {tuple(value.shape)}"
    return f"{type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
