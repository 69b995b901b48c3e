"""The evaluation: checks, cascade, verification, and the table of what was found."""

from assay.evaluation.efforts import EFFORTS, Stage
from assay.evaluation.engine import evaluate
from assay.evaluation.finding import Finding
from assay.evaluation.result import Evaluation
from assay.runs import Curve, exact_interval

__all__ = ["EFFORTS", "Curve", "Evaluation", "Finding", "Stage", "evaluate", "exact_interval"]
