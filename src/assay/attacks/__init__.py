"""Attacks: one file each, all on the one loop of ``loop.py``."""

from assay.attacks import presets
from assay.attacks.attack import Outcome, Result, Runnable
from assay.attacks.combine import Bisect, Cascade, Chain, OutputDiversified, Restarts, Targets
from assay.attacks.gradient.acg import ACG
from assay.attacks.gradient.apgd import APGD
from assay.attacks.gradient.bim import BIM
from assay.attacks.gradient.fgsm import FGSM
from assay.attacks.gradient.funnel import Funnel
from assay.attacks.gradient.pgd import PGD
from assay.attacks.gradient.rfgsm import RFGSM
from assay.attacks.gradient.targeted_ascent import TargetedAscent
from assay.attacks.loop import DecisionAttack, GradientAttack, ScoreAttack
from assay.attacks.losses import LOSSES
from assay.attacks.minimum.alma import ALMA
from assay.attacks.minimum.brendel_bethge import BrendelBethge
from assay.attacks.minimum.carlini_wagner import CarliniWagner
from assay.attacks.minimum.carlini_wagner_l0 import CarliniWagnerL0
from assay.attacks.minimum.carlini_wagner_linf import CarliniWagnerLinf
from assay.attacks.minimum.ddn import DDN
from assay.attacks.minimum.deepfool import DeepFool
from assay.attacks.minimum.ead import EAD
from assay.attacks.minimum.fab import FAB
from assay.attacks.minimum.fmn import FMN
from assay.attacks.minimum.inward import Inward
from assay.attacks.minimum.jsma import JSMA
from assay.attacks.minimum.pdgd import PDGD
from assay.attacks.minimum.pdpgd import PDPGD
from assay.attacks.minimum.sigma_zero import SigmaZero
from assay.attacks.minimum.sparsefool import SparseFool
from assay.attacks.minimum.superdeepfool import SuperDeepFool
from assay.attacks.minimum.trust_region import TrustRegion
from assay.attacks.minimum.vfga import VFGA
from assay.attacks.registry import ATTACKS, describe_attack, get, names
from assay.attacks.score.square import Square
from assay.attacks.shared.ascent import SharedAttack
from assay.attacks.shared.patch import Patch
from assay.attacks.shared.universal import Universal
from assay.attacks.spatial.spatial import Spatial
from assay.attacks.transforms import Diversity, Momentum, Scales, Smoothing, Transform, Transformed, Variance

__all__ = [
    "ACG",
    "ALMA",
    "APGD",
    "ATTACKS",
    "BIM",
    "DDN",
    "EAD",
    "FAB",
    "FGSM",
    "FMN",
    "JSMA",
    "LOSSES",
    "PDGD",
    "PDPGD",
    "PGD",
    "RFGSM",
    "VFGA",
    "Bisect",
    "BrendelBethge",
    "CarliniWagner",
    "CarliniWagnerL0",
    "CarliniWagnerLinf",
    "Cascade",
    "Chain",
    "DecisionAttack",
    "DeepFool",
    "Diversity",
    "Funnel",
    "GradientAttack",
    "Inward",
    "Momentum",
    "Outcome",
    "OutputDiversified",
    "Patch",
    "Restarts",
    "Result",
    "Runnable",
    "Scales",
    "ScoreAttack",
    "SharedAttack",
    "SigmaZero",
    "Smoothing",
    "SparseFool",
    "Spatial",
    "Square",
    "SuperDeepFool",
    "TargetedAscent",
    "Targets",
    "Transform",
    "Transformed",
    "TrustRegion",
    "Universal",
    "Variance",
    "describe_attack",
    "get",
    "names",
    "presets",
]
