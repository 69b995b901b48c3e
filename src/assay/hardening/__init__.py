"""Hardening: objectives, one training loop, and recipes."""

from assay.hardening.distil import distil
from assay.hardening.harden import BrokenDefence, Hardened, harden
from assay.hardening.objective import OBJECTIVES, Objective, Step, Terms
from assay.hardening.settings import Settings

__all__ = ["OBJECTIVES", "BrokenDefence", "Hardened", "Objective", "Settings", "Step", "Terms", "distil", "harden"]
