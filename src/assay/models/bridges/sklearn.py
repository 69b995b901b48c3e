"""scikit-learn classifiers as networks without gradients."""

import hashlib
import io
import pickle
import warnings
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from assay.core.errors import ModelError
from assay.models.bridges.function import Outside, scores
from assay.models.bridges.layout import Layout
from assay.models.loaded import Loaded


def bridge(model: Any) -> Loaded:
    """Make a network of a fitted classifier or pipeline.

    Probabilities (``predict_proba``) are asked for, or the values of ``decision_function`` where there are none.
    Samples are flattened to the ``n_features_in_`` columns that it was fitted to, in float64. Column i of the answer
    stands for ``classes_[i]``.

    Raises:
        ModelError: it is not fitted, is no classifier, or has several outputs.
    """
    ask = next((name for name in ("predict_proba", "decision_function") if _has(model, name)), None)
    classes = getattr(model, "classes_", None)
    if ask is None or classes is None or isinstance(classes, list):
        raise ModelError(
            "a fitted classifier of one output, with predict_proba or decision_function",
            f"{type(model).__name__}{'' if ask else ' without either'}",
            "Fit it first. A regressor, a clusterer or a classifier of several outputs cannot be evaluated.",
        )
    features = getattr(model, "n_features_in_", None)
    layout = Layout(None if features is None else (int(features),))
    names = tuple(str(c) for c in classes)
    net = Outside(_asking(model, ask, len(names)), None, layout, lambda: _digest(model), torch.float64)
    return Loaded(
        net,
        probabilities=ask == "predict_proba",
        class_names=names,
        notes=_notes(ask, names),
        name=type(model).__name__,
    )


def _asking(model: Any, ask: str, classes: int) -> Any:
    def forward(x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "X does not have valid feature names")
            out = np.asarray(getattr(model, ask)(x.numpy()))
        if out.ndim == 1:  # of two classes, the score of the second one
            out = np.stack([np.zeros_like(out), out], 1)
        return scores(out, len(x), classes)

    return forward


def _notes(ask: str, names: tuple[str, ...]) -> tuple[str, ...]:
    said = [f"scikit-learn computes this model by {ask}, without gradients: attacks see its scores only."]
    if ask == "decision_function":
        said.append("It gives no probabilities; the values of its decision function are taken as logits.")
    if names != tuple(map(str, range(len(names)))):
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        said.append(f"Its classes are not 0..{len(names) - 1}: label i of the data must stand for the i-th of {shown}.")
    return tuple(said)


def _has(model: Any, name: str) -> bool:
    """Tell whether a method is there: some are offered, and refused for the settings at hand."""
    try:
        return callable(getattr(model, name, None))
    except Exception:  # a property that checks may raise anything
        return False


def _digest(model: Any) -> str:
    """Return the SHA-256 of a pickle in which nothing refers back: which objects are one object does not matter."""
    written = io.BytesIO()
    pickler = _Plain(written, protocol=5)
    pickler.fast = True
    try:
        pickler.dump(model)
    except (ValueError, RecursionError):  # what holds itself can only be written with references
        return hashlib.sha256(pickle.dumps(model, protocol=5)).hexdigest()
    return hashlib.sha256(written.getvalue()).hexdigest()


@final
class _Plain(pickle.Pickler):
    """Writes arrays by type, shape and values alone; never read back."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not np.ndarray or value.dtype.hasobject:
            return NotImplemented
        return np.ndarray, (value.dtype.descr, value.shape, value.tobytes())
