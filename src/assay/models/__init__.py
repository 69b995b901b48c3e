"""The one door to a model: wrapping, freezing and restoring it, counting what it is asked, and loading its files."""

from assay.models.bpda import BPDA
from assay.models.bridges.function import from_function
from assay.models.door import Decision, Door, Gradient, Loss, Measure, Score, Slopes
from assay.models.model import Live, Model, as_model

__all__ = [
    "BPDA",
    "Decision",
    "Door",
    "Gradient",
    "Live",
    "Loss",
    "Measure",
    "Model",
    "Score",
    "Slopes",
    "as_model",
    "from_function",
]
