"""Why a network fails: what its layers answer, its loss around a sample, the way to its boundary, its attributions."""

from assay.study.attribution import Attribution, attribute, attribution
from assay.study.landscape import landscape
from assay.study.plane import Landscape
from assay.study.sparseness import LayerSparseness, Sparseness, sparseness
from assay.study.walk import Walk, distances, walk
from assay.study.weights import weight_landscape

__all__ = [
    "Attribution",
    "Landscape",
    "LayerSparseness",
    "Sparseness",
    "Walk",
    "attribute",
    "attribution",
    "distances",
    "landscape",
    "sparseness",
    "walk",
    "weight_landscape",
]
