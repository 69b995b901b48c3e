"""The circle whose diameter is the line from the clean input to a point of the boundary."""

from typing import NamedTuple

import torch

from assay.attacks.decision.probes import L2_NORM
from assay.core.types import Inputs, PerSample, per_sample
from assay.threats.planes import inner
from assay.threats.problem import Problem


class Arc(NamedTuple):
    """A circle in the plane of two orthogonal directions of length 1; ``u`` points from x0 to the boundary."""

    u: Inputs
    v: Inputs
    reach: PerSample  # l2 distance of the boundary along u

    @classmethod
    def through(cls, p: Problem, x: Inputs, v: Inputs) -> "Arc":
        """Return the circle through x that lies in the plane of x0, x and direction v."""
        d = x - p.x0
        u = L2_NORM.steepest(d)
        return cls(u, L2_NORM.steepest(v - per_sample(inner(u, v), u) * u), L2_NORM.size(d))

    def at(self, p: Problem, angle: PerSample) -> Inputs:
        """Return the point seen from x0 under an angle from u: it is reach * cos(angle) from x0."""
        # In float64, for in float32 the last bit of a cosine depends on the place in the batch.
        cos, sin = (per_sample(f(angle.double()).to(self.u), self.u) for f in (torch.cos, torch.sin))
        return (p.x0 + per_sample(self.reach, self.u) * cos * (cos * self.u + sin * self.v)).clamp(p.lower, p.upper)
