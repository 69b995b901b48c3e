"""Bounds of margins by auto_LiRPA 0.3 (Xu et al. 2020, arXiv:2002.12920), beside ours in ``certify.py``.

The release is made for torch before 1.13 and numpy before 2. What it needs of them and is gone since is put back here,
before it is imported; bounds are computed by its own code alone.
"""

import importlib
import sys
import types
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NAMES = {"ibp": "IBP", "crown-ibp": "CROWN-IBP", "crown": "CROWN", "alpha": "CROWN-Optimized"}
"""What it calls our methods."""

STEPS = 20
"""Iterations of CROWN-Optimized; its default."""


def load() -> types.ModuleType:
    """Return the library.

    Raises:
        ModuleNotFoundError: auto_LiRPA is not installed.
    """
    if "auto_LiRPA" in sys.modules:
        return sys.modules["auto_LiRPA"]
    sets: Any = types.ModuleType("numpy.lib.arraysetops")
    sets.isin = np.isin
    sys.modules.setdefault(sets.__name__, sets)
    exporter = importlib.import_module("torch.onnx._internal.torchscript_exporter._globals").GLOBALS
    helper: Any = importlib.import_module("torch.onnx.symbolic_helper")
    helper._set_opset_version = lambda version: setattr(exporter, "export_onnx_opset_version", version)
    torch._C.Node.__getitem__ = lambda self, k: getattr(self, self.kindOf(k))(k)  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = importlib.import_module("auto_LiRPA")
    kept = library.BoundedModule._named_members

    def named(self: Any, get: Any, prefix: str = "", recurse: bool = True, **_: bool) -> Any:  # remove_duplicate is new
        return kept(self, get, prefix, recurse)

    library.BoundedModule._named_members = named
    return library


class Bounded:
    """A network inside auto_LiRPA, for one sample x (1, *f) at a time."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        self.library = load()
        settings = {"optimize_bound_args": {"iteration": STEPS}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.net = self.library.BoundedModule(net, torch.zeros_like(x), bound_opts=settings, device="cpu")

    def margins(self, x: Tensor, eps: float, c: Tensor, method: str) -> Tensor:
        """Return lower bounds (1, s) of c (1, s, classes) @ logits on the l-infinity ball cut with [0, 1]."""
        low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
        ball = self.library.PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high)
        given = self.library.BoundedTensor(x, ball)
        lower, _ = self.net.compute_bounds(x=(given,), C=c, method=NAMES[method], bound_upper=False)
        found: Tensor = lower.detach()
        return found
