"""Packages that assay can do without until they are asked for."""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any, Final

from assay.core.errors import MissingExtraError

_BUILT_ON_TORCHVISION: Final = frozenset(
    {"fastai", "kornia", "lightning", "onnx2pytorch", "onnx2torch", "timm", "torchvision", "transformers"}
)
_kept: list[Any] = []  # operators stay registered for as long as their library object lives


def need(name: str, extra: str) -> ModuleType:
    """Import a package, or one of its modules, that belongs to an extra.

    Raises:
        MissingExtraError: it is not installed, or does not fit what else is installed; the remedy names the extra.
    """
    try:
        if name.partition(".")[0] in _BUILT_ON_TORCHVISION:
            admit_torchvision()
        return importlib.import_module(name)
    except Exception as e:  # ImportError where it is missing; what does not fit may raise anything
        said = (str(e).splitlines() or [""])[0]
        remedy = f"pip install 'assay[{extra}]'"
        raise MissingExtraError(f"the package {name}", f"{type(e).__name__}: {said}", remedy) from e


def admit_torchvision() -> None:
    """Make torchvision importable beside a torch without CUDA, where the wheel is one that was built with CUDA.

    Its compiled library cannot be loaded there, and the Python part fails on two operators that are then missing.
    With their signatures defined, everything else works: models, transforms, data sets. Where torchvision is missing,
    nothing happens: packages that can do without it may be used.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError as e:
        if "torchvision::" not in str(e) or torch.version.cuda is not None:
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _kept.append(operators)
        importlib.import_module("torchvision")
