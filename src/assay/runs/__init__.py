"""A run on disk: its schema, its store and its totals. Free of torch, so that whoever only reads runs starts fast."""

from assay.runs.schema import ROBUST, SAMPLES, Status
from assay.runs.statistics import Curve, exact_interval
from assay.runs.store import Run
from assay.runs.totals import totals

__all__ = ["ROBUST", "SAMPLES", "Curve", "Run", "Status", "exact_interval", "totals"]
