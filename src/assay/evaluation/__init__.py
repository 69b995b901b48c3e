"""The evaluation: checks, race, verification, and the table of what was found."""

from assay.evaluation.efforts import EFFORTS, plan_for
from assay.evaluation.engine import evaluate
from assay.evaluation.finding import Finding
from assay.evaluation.race import Plan, Round
from assay.evaluation.result import Evaluation
from assay.runs import Curve, exact_interval

__all__ = [
    "EFFORTS",
    "Curve",
    "Evaluation",
    "Finding",
    "Plan",
    "Round",
    "evaluate",
    "exact_interval",
    "plan_for",
]
