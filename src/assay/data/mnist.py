"""The data that ships with the package: the 10,000 test images of MNIST."""

import gzip
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from assay.core.errors import DataError
from assay.core.registry import closest
from assay.data.arrays import from_arrays
from assay.data.data import Data


def demo(name: str) -> Data:
    """Load demo data by its name.

    Raises:
        DataError: no such name, or an incomplete installation.
    """
    if name != "mnist":
        raise DataError("the name of demo data", repr(name), closest(name, ["mnist"]))
    images, labels = (_idx(f"t10k-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
    return from_arrays(images, labels, name="mnist", source="demo:mnist", class_names="0123456789")


def _idx(name: str) -> NDArray[np.uint8]:
    """Read IDX: two zero bytes, the type (8: uint8), the rank, the shape as big-endian int32, the values."""
    try:
        raw = gzip.decompress((resources.files("assay.data") / "demo" / name).read_bytes())
    except OSError as e:
        raise DataError(f"{name} in the installed package", str(e), "Reinstall the package.") from e
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
