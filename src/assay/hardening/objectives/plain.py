"""Training as everybody does it: on clean samples only."""

from dataclasses import dataclass
from typing import final

from assay.hardening.objective import OBJECTIVES, Objective


@final
@OBJECTIVES.register("plain")
@dataclass(frozen=True, slots=True, kw_only=True)
class Plain(Objective):
    """Cross-entropy on the clean samples: what the others are compared with. *Cost* 1 forward and 1 backward."""
