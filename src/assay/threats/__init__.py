"""What the adversary may do: norms, the box, threat models, and the problem that they pose for one batch."""

from assay.threats.norms import L0, L1, L2, NORMS, Linf, Norm
from assay.threats.problem import Goal, Problem
from assay.threats.threat import Box, Threat

__all__ = ["L0", "L1", "L2", "NORMS", "Box", "Goal", "Linf", "Norm", "Problem", "Threat"]
