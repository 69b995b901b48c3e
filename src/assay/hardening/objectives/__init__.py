"""Objectives, one file a family; importing this registers them all."""

from assay.hardening.objectives.adversarial import Adversarial, Fast, Mixed, Pairing
from assay.hardening.objectives.certified import IBP, MTLIBP, SABR, CrownIBP
from assay.hardening.objectives.distillation import Distillation, Tempered
from assay.hardening.objectives.ensemble import Ensemble
from assay.hardening.objectives.free import Free
from assay.hardening.objectives.gradalign import GradAlign
from assay.hardening.objectives.mart import Mart
from assay.hardening.objectives.plain import Plain
from assay.hardening.objectives.regularise import InputGradient, Jacobian
from assay.hardening.objectives.smoothing import Consistency, GaussianNoise, Macer, SmoothAdv
from assay.hardening.objectives.trades import Trades

__all__ = [
    "IBP",
    "MTLIBP",
    "SABR",
    "Adversarial",
    "Consistency",
    "CrownIBP",
    "Distillation",
    "Ensemble",
    "Fast",
    "Free",
    "GaussianNoise",
    "GradAlign",
    "InputGradient",
    "Jacobian",
    "Macer",
    "Mart",
    "Mixed",
    "Pairing",
    "Plain",
    "SmoothAdv",
    "Tempered",
    "Trades",
]
