"""Arrays and tensors as samples and labels; ``.npz`` files of them."""

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.core.errors import DataError
from assay.core.types import Labels
from assay.data.data import Arrays, Data

_CHANNELS = (1, 3, 4)


def as_samples(x: Any, where: str) -> Tensor:
    """View x (n, ...) as samples (n, *shape), uint8 or floats.

    Float tensors are taken exactly as they are: they are what the model takes. 8-bit (n, h, w) are grey
    images, which become (n, 1, h, w). 8-bit images and float arrays of four axes are channel-last if the last
    axis is 1, 3 or 4 long and axis 1 is not; they become (n, c, h, w).

    Raises:
        DataError: another type of number, or fewer axes than samples have.
    """
    exact = isinstance(x, Tensor) and x.is_floating_point()
    t = as_tensor(x, where)
    image = t.dtype == torch.uint8
    if not image and not t.is_floating_point():
        raise DataError(
            "samples of type uint8 (0..255) or float (in the model's box)",
            f"{t.dtype} in {where}",
            "Convert: x.astype('uint8') for 8-bit images, x.astype('float32') for anything else.",
        )
    if t.ndim < (3 if image else 2):
        raise DataError(
            "8-bit images (n, h, w), (n, h, w, c) or (n, c, h, w), or float samples (n, ...)",
            f"{t.dtype} of shape {tuple(t.shape)} in {where}",
            "Reshape to images, or convert vectors to floats in the model's box.",
        )
    if image and t.ndim == 3:
        return t.unsqueeze(1)
    last = t.ndim == 4 and t.shape[3] in _CHANNELS and t.shape[1] not in _CHANNELS
    return t.permute(0, 3, 1, 2) if last and not exact else t


def as_labels(y: Any, where: str) -> Labels:
    """Return class numbers (n,) as int64.

    Raises:
        DataError: labels that are not whole numbers, or not one number for each sample.
    """
    t = as_tensor(y, where)
    if t.ndim != 1:
        raise DataError(
            "labels of shape (n,): one class number for each sample",
            f"shape {tuple(t.shape)} in {where}",
            "One-hot labels: y.argmax(1). A column (n, 1): y[:, 0].",
        )
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise DataError(
            "labels that are class numbers of an integer type",
            f"{t.dtype} in {where}",
            "Convert with y.astype('int64'), if the values are class numbers.",
        )
    return t.to("cpu", torch.int64)


def as_tensor(value: Any, where: str) -> Tensor:
    """Return a tensor that shares memory with ``value`` where it can.

    Raises:
        DataError: ``value`` is no array of numbers.
    """
    if isinstance(value, Tensor):
        return value.detach()
    try:
        a = np.asarray(value)
        if a.dtype.kind in "US":
            remedy = "For labels that are names: class_names, y = numpy.unique(y, return_inverse=True)."
            raise DataError("an array or tensor of numbers", f"text in {where}", remedy)
        if not a.dtype.isnative or any(s < 0 for s in a.strides):
            a = np.ascontiguousarray(a, a.dtype.newbyteorder("="))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to it
            return torch.from_numpy(a)
    except (TypeError, ValueError) as e:
        raise DataError("an array or tensor of numbers", f"{_kind(value)} in {where}", f"It failed with: {e}") from e


def from_arrays(x: Any, y: Any, *, name: str, source: str, class_names: Sequence[str] | None = None) -> Data:
    """Return data of x (n, ...) and y (n,), both arrays or tensors.

    Raises:
        DataError: see :func:`as_samples` and :func:`as_labels`; not as many labels as samples, or none.
    """
    samples = as_samples(x, f"x of {source}")
    labels = as_labels(y, f"y of {source}")
    if class_names is not None and len(labels) and int(labels.max()) >= len(class_names):
        found = f"{len(class_names)} names, and label {int(labels.max())}, in {source}"
        raise DataError("a name for every class", found, "Name all of them, or leave class_names out.")
    return Data(Arrays(samples), labels, name=name, source=source, class_names=class_names)


def npz(path: Path, *, trust_pickle: bool) -> Data:
    """Load ``x`` and ``y``, and ``class_names`` if they are there, from a ``.npz`` file.

    Raises:
        DataError: not such a file, damaged, without ``x`` or ``y``, or with a pickle that is not trusted.
    """
    if not zipfile.is_zipfile(path):
        raise DataError("a .npz file (a zip archive of arrays)", f"{path} is none, or is cut off", "Make it anew.")
    try:
        with np.load(path, allow_pickle=trust_pickle) as file:
            names = list(file.files)
            found = {n: file[n] for n in ("x", "y", "class_names") if n in names}
    except Exception as e:  # a parser given hostile bytes may raise anything
        raise _unreadable(path, e) from e
    if not {"x", "y"} <= found.keys():
        raise DataError(
            "arrays named x and y",
            f"{', '.join(names) or 'no arrays'} in {path}",
            "Save it with numpy.savez(file, x=inputs, y=labels, class_names=names); the names may be left out.",
        )
    x, y = (_plain(found[n], f"{n} of {path}") for n in ("x", "y"))
    called = [str(n) for n in np.ravel(found["class_names"])] if "class_names" in found else None
    return from_arrays(x, y, name=path.stem, source=str(path), class_names=called)


def _plain(a: Any, where: str) -> Any:
    """Turn an array of objects, unpickled because the user trusts it, into one of numbers."""
    if a.dtype != object:
        return a
    try:
        return np.stack([np.asarray(v) for v in a])
    except (TypeError, ValueError) as e:
        raise DataError("samples of one shape", f"{where} holds objects: {e}", "Save plain arrays.") from e


def _unreadable(path: Path, e: Exception) -> DataError:
    if "allow_pickle" in str(e):
        return DataError(
            "plain arrays",
            f"a pickle (an array of objects) in {path}, which runs code when it is loaded",
            "Save x and y as arrays of numbers of one shape, or, if you trust the file, give --trust-pickle.",
        )
    return DataError("a readable .npz file", f"{path}: {type(e).__name__}: {e}", "The file is damaged; make it anew.")


def _kind(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ + ("" if dtype is None else f" of {dtype}")
