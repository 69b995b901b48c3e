"""Assay says how much a classifier can take: it attacks from above, proves from below, and shows where the truth lies.

Nothing heavy is imported before it is used: ``import assay`` alone loads neither torch nor any framework.
"""

import importlib
import os
from typing import Any

# On some processors MKL sums a row in an order that depends on where it lies in memory, and so on its batch.
# MKL reads this before its first product; whoever sets it otherwise is not overruled.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__version__ = "0.1.0"

_HOME = {
    "AssayError": "assay.core.errors",
    "BPDA": "assay.models",
    "Box": "assay.threats",
    "Certificate": "assay.certification",
    "CheckError": "assay.evaluation.check",
    "ContradictionError": "assay.core.errors",
    "DataError": "assay.core.errors",
    "Evaluation": "assay.evaluation",
    "Finding": "assay.evaluation",
    "Hardened": "assay.hardening",
    "MissingExtraError": "assay.core.errors",
    "Model": "assay.models",
    "ModelError": "assay.core.errors",
    "NonFiniteError": "assay.core.errors",
    "RunError": "assay.core.errors",
    "Smoothed": "assay.certification",
    "Threat": "assay.threats",
    "ThreatError": "assay.core.errors",
    "bracket": "assay.certification",
    "certified_radius": "assay.certification",
    "certify": "assay.certification",
    "check": "assay.evaluation.check",
    "compare": "assay.runs.compare",
    "evaluate": "assay.evaluation",
    "harden": "assay.hardening",
    "load_data": "assay.data",
    "load_model": "assay.models.loaders",
}
_MODULES = ("attacks", "defences", "nets", "study")

__all__ = ["__version__", *_MODULES, *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"assay.{name}")
    raise AttributeError(f"module 'assay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
