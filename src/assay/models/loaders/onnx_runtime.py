"""ONNX files that ONNX Runtime runs as they are: ``ort:model.onnx``, for what cannot be converted.

No gradients: what is left are attacks that see scores. Any operator of ONNX Runtime may be in the file; none of them
runs code from it, or reads or writes files other than the weights beside it.
"""

from assay.core.errors import ModelError
from assay.core.files import check_readable
from assay.models.bridges.onnxruntime import Runtime, digest, scored
from assay.models.loaded import Loaded
from assay.models.loaders.request import Request


def load(r: Request) -> Loaded:
    """Open a network of one input and one output; any number of rows is handed over as the file takes them.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        ModelError: no such file, a damaged one, or one of other inputs than one float32 tensor.
    """
    check_readable(r.path, ModelError, "a model file", "Save or copy it anew.")
    return scored(Runtime.open(r.path), digest(r.path), r.path.stem)
