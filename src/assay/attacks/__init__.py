"""Attacks: one file each, all on the one loop of ``loop.py``."""

from assay.attacks.attack import Outcome, Result, Runnable
from assay.attacks.combine import Bisect, Cascade, Restarts, Targets
from assay.attacks.gradient.apgd import APGD
from assay.attacks.gradient.bim import BIM
from assay.attacks.gradient.fgsm import FGSM
from assay.attacks.gradient.pgd import PGD
from assay.attacks.gradient.targeted_ascent import TargetedAscent
from assay.attacks.loop import DecisionAttack, GradientAttack, ScoreAttack
from assay.attacks.losses import LOSSES
from assay.attacks.registry import ATTACKS, describe_attack, get, names
from assay.attacks.score.square import Square

__all__ = [
    "APGD",
    "ATTACKS",
    "BIM",
    "FGSM",
    "LOSSES",
    "PGD",
    "Bisect",
    "Cascade",
    "DecisionAttack",
    "GradientAttack",
    "Outcome",
    "Restarts",
    "Result",
    "Runnable",
    "ScoreAttack",
    "Square",
    "TargetedAscent",
    "Targets",
    "describe_attack",
    "get",
    "names",
]
