"""A policy held against a run: which figures it must reach, by how much it may fall, what it must not show."""

from assay.runs.policy.judgement import Check, Judgement, Sample
from assay.runs.policy.judging import ALIKE, SHOWN, drop, finished, hold
from assay.runs.policy.wanted import CODES, SEVERITIES, Policy

__all__ = [
    "ALIKE",
    "CODES",
    "SEVERITIES",
    "SHOWN",
    "Check",
    "Judgement",
    "Policy",
    "Sample",
    "drop",
    "finished",
    "hold",
]
