"""Samples and their labels: loaded from every form that people keep them in, handed out in batches."""

from assay.data.data import Data
from assay.data.fit import Fit
from assay.data.load import load_data

__all__ = ["Data", "Fit", "load_data"]
