"""Which inputs an answer goes back to, before and after an attack: saliency and integrated gradients, compared."""

from assay.study.attribution.attacked import attribution, shuffled
from assay.study.attribution.compare import Compared, common, compared, rank_correlation, top_pixels
from assay.study.attribution.maps import INTEGRATED, METHODS, SALIENCY, attribute
from assay.study.attribution.result import Attribution, Sample

__all__ = [
    "INTEGRATED",
    "METHODS",
    "SALIENCY",
    "Attribution",
    "Compared",
    "Sample",
    "attribute",
    "attribution",
    "common",
    "compared",
    "rank_correlation",
    "shuffled",
    "top_pixels",
]
