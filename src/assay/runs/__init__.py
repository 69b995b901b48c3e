"""A run on disk: its schema and its store. Free of torch, so that whoever only reads runs starts fast."""

from assay.runs.schema import ROBUST, SAMPLES, Status
from assay.runs.store import Run

__all__ = ["ROBUST", "SAMPLES", "Run", "Status"]
