"""Why a network fails: what its layers answer, the landscape of its loss, and the way to its boundary."""

from assay.study.landscape import landscape
from assay.study.plane import Landscape
from assay.study.sparseness import LayerSparseness, Sparseness, sparseness
from assay.study.walk import Walk, distances, walk
from assay.study.weights import weight_landscape

__all__ = [
    "Landscape",
    "LayerSparseness",
    "Sparseness",
    "Walk",
    "distances",
    "landscape",
    "sparseness",
    "walk",
    "weight_landscape",
]
