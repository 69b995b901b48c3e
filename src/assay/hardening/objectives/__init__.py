"""Objectives, one file a family; importing this registers them all."""

from assay.hardening.objectives.adversarial import Adversarial
from assay.hardening.objectives.plain import Plain

__all__ = ["Adversarial", "Plain"]
