"""Python objects as data: pairs of arrays, datasets, data loaders."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from assay.core.errors import DataError
from assay.core.types import Labels
from assay.data.arrays import as_labels, as_samples, from_arrays
from assay.data.data import Data
from assay.data.images import is_colour, pixels

_ACCEPTED = "(x, y) of arrays or tensors, a map-style torch Dataset, a DataLoader, or assay data"

_Batch: TypeAlias = tuple[Any, Any, str]
"""Inputs (b, ...), labels (b,), and what messages call the two."""


def from_object(value: Any, source: str, *, limit: int | None = None) -> Data:
    """Return data of a Python object. Datasets and loaders are read into memory, up to ``limit`` samples.

    Raises:
        DataError: another kind of object, or one whose samples or labels cannot be used.
    """
    if isinstance(value, Data):
        return value
    if isinstance(value, DataLoader):
        return _joined(_batches(value, source), source, limit)
    if isinstance(value, Dataset):
        return _joined(_items(value, source), source, limit)
    if isinstance(value, tuple | list) and len(value) == 2:
        return from_arrays(*value, name=source.rpartition(":")[2], source=source)
    raise DataError(_ACCEPTED, _show(value), "Wrap it, or pass two arrays.")


def _batches(loader: "DataLoader[Any]", source: str) -> Iterator[_Batch]:
    for k, batch in enumerate(loader):
        where = f"batch {k} of {source}"
        yield *_pair(batch, where), where


def _items(dataset: "Dataset[Any]", source: str) -> Iterator[_Batch]:
    """Yield every item as a batch of one."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(_ACCEPTED, f"{_show(dataset)}, which has no length", "Put it into a DataLoader.")
    for i in range(len(dataset)):
        where = f"item {i} of {source}"
        try:
            item = dataset[i]
        except Exception as e:  # the user's code
            raise DataError("(x, y) for every item", f"{where} raised {type(e).__name__}: {e}", "Mend it.") from e
        x, y = _pair(item, where)
        if isinstance(x, Image.Image):
            x = pixels(x, 3 if is_colour(x, where) else 1)
        yield _one(x), _one(y), where


def _joined(batches: Iterator[_Batch], source: str, limit: int | None) -> Data:
    """Read batches into memory, until there are ``limit`` samples."""
    xs: list[Tensor] = []
    ys: list[Labels] = []
    for x, y, where in batches:
        xs.append(as_samples(x, f"x of {where}").cpu())
        ys.append(as_labels(y, f"y of {where}"))
        if xs[-1].shape[1:] != xs[0].shape[1:]:
            raise DataError(
                f"samples of one shape, {tuple(xs[0].shape[1:])}",
                f"{tuple(xs[-1].shape[1:])} in {where}",
                "Resize or crop all samples to one size.",
            )
        if limit is not None and sum(map(len, ys)) >= limit:
            break
    if not xs:
        raise DataError("at least one sample", f"none in {source}", "Give data with samples.", code="empty-data")
    return from_arrays(torch.cat(xs), torch.cat(ys), name=source.rpartition(":")[2], source=source)


def _pair(value: Any, where: str) -> tuple[Any, Any]:
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0], value[1]
    raise DataError("(x, y)", f"{_show(value)} as {where}", "Yield inputs and labels only.")


def _one(value: Any) -> Any:
    """Return a sample or a label as a batch of one."""
    return value[None] if isinstance(value, Tensor) else np.asarray(value)[None]


def _show(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"one {type(value).__name__} of shape {tuple(value.shape)}"
    return f"{type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
