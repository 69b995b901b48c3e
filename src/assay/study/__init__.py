"""Why a network fails: what its layers answer, the landscape of its loss, and the way to its boundary."""

from assay.study.landscape import Landscape, landscape, weight_landscape
from assay.study.sparseness import LayerSparseness, Sparseness, sparseness
from assay.study.walk import Walk, distances, walk

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
