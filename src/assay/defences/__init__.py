"""Defences that wrap a model, each with what breaks it: to be judged by attacks that go through them."""

from assay.defences.compression import JPEG, BitDepth
from assay.defences.defence import Defence
from assay.defences.detector import Detector, FeatureSqueezing, Suspicion, calibrated
from assay.defences.encoding import Thermometer
from assay.defences.ensemble import Ensemble
from assay.defences.randomisation import GaussianNoise, RandomResizePad
from assay.defences.smoothing import GaussianBlur, Median, TotalVariation
from assay.defences.wrap import defended

__all__ = [
    "JPEG",
    "BitDepth",
    "Defence",
    "Detector",
    "Ensemble",
    "FeatureSqueezing",
    "GaussianBlur",
    "GaussianNoise",
    "Median",
    "RandomResizePad",
    "Suspicion",
    "Thermometer",
    "TotalVariation",
    "calibrated",
    "defended",
]
