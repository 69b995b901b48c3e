"""Live models of other frameworks as networks on tensors, by one table; a framework is imported only for its own."""

import importlib
from typing import Final

from assay.models.loaded import Loaded

BRIDGES: Final = {
    "fastai": "fastai",
    "jax": "jax",
    "jaxlib": "jax",
    "keras": "keras",
    "onnxruntime": "onnxruntime",
    "sklearn": "sklearn",
    "tensorflow": "tensorflow",
}
"""From the package that a model's class (or one of its bases) comes from to the module beside this one, whose
``bridge(model)`` returns a :class:`Loaded`."""


def bridged(model: object) -> Loaded | None:
    """Return a model of another framework as a network; None for what needs no bridge.

    Raises:
        ModelError: the framework is known, and this object is no classifier of it.
    """
    for base in type(model).__mro__:
        if module := BRIDGES.get(base.__module__.partition(".")[0]):
            loaded: Loaded = importlib.import_module(f"assay.models.bridges.{module}").bridge(model)
            return loaded
    return None
