"""Attacks: one file each, all on the one loop of ``loop.py``."""

from assay.attacks import presets
from assay.attacks.attack import Outcome, Result, Runnable
from assay.attacks.combine import Bisect, Cascade, Chain, OutputDiversified, Restarts, Targets
from assay.attacks.decision.boundary import Boundary
from assay.attacks.decision.cgba import CGBA
from assay.attacks.decision.geoda import GeoDA
from assay.attacks.decision.hop_skip_jump import HopSkipJump
from assay.attacks.decision.pointwise import Pointwise
from assay.attacks.decision.rays import RayS
from assay.attacks.decision.sign_opt import SignOPT
from assay.attacks.decision.start import Pool
from assay.attacks.decision.sur_free import SurFree
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
from assay.attacks.noise.images import Blur, Contrast
from assay.attacks.noise.random import Gaussian, SaltPepper, Uniform
from assay.attacks.noise.strength import Noise
from assay.attacks.registry import ATTACKS, describe_attack, get, names
from assay.attacks.score.bandits import Bandits
from assay.attacks.score.estimated import Estimated
from assay.attacks.score.one_pixel import OnePixel
from assay.attacks.score.simba import SimBA
from assay.attacks.score.sparse_rs import SparseRS
from assay.attacks.score.sparse_rs_patch import SparseRSPatch
from assay.attacks.score.square import Square
from assay.attacks.score.zoo import ZOO
from assay.attacks.shared.ascent import SharedAttack
from assay.attacks.shared.patch import Patch
from assay.attacks.shared.universal import Universal
from assay.attacks.spatial.spatial import Spatial
from assay.attacks.taxonomy import taxonomy
from assay.attacks.transfer.transfer import Transfer
from assay.attacks.transforms import Diversity, Momentum, Scales, Smoothing, Transform, Transformed, Variance

__all__ = [
    "ACG",
    "ALMA",
    "APGD",
    "ATTACKS",
    "BIM",
    "CGBA",
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
    "ZOO",
    "Bandits",
    "Bisect",
    "Blur",
    "Boundary",
    "BrendelBethge",
    "CarliniWagner",
    "CarliniWagnerL0",
    "CarliniWagnerLinf",
    "Cascade",
    "Chain",
    "Contrast",
    "DecisionAttack",
    "DeepFool",
    "Diversity",
    "Estimated",
    "Funnel",
    "Gaussian",
    "GeoDA",
    "GradientAttack",
    "HopSkipJump",
    "Inward",
    "Momentum",
    "Noise",
    "OnePixel",
    "Outcome",
    "OutputDiversified",
    "Patch",
    "Pointwise",
    "Pool",
    "RayS",
    "Restarts",
    "Result",
    "Runnable",
    "SaltPepper",
    "Scales",
    "ScoreAttack",
    "SharedAttack",
    "SigmaZero",
    "SignOPT",
    "SimBA",
    "Smoothing",
    "SparseFool",
    "SparseRS",
    "SparseRSPatch",
    "Spatial",
    "Square",
    "SuperDeepFool",
    "SurFree",
    "TargetedAscent",
    "Targets",
    "Transfer",
    "Transform",
    "Transformed",
    "TrustRegion",
    "Uniform",
    "Universal",
    "Variance",
    "describe_attack",
    "get",
    "names",
    "presets",
    "taxonomy",
]
