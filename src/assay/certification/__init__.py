"""Proofs: what is certified, how far, and between which sizes the truth lies."""

from assay.certification.certify import Certificate, Proof, certify
from assay.certification.prover import METHODS, NORMS
from assay.certification.radius import Bracket, bracket, certified_radius
from assay.certification.smoothing import Smoothed, SmoothedCertificate

__all__ = [
    "METHODS",
    "NORMS",
    "Bracket",
    "Certificate",
    "Proof",
    "Smoothed",
    "SmoothedCertificate",
    "bracket",
    "certified_radius",
    "certify",
]
