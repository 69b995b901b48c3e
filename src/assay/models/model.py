"""A classifier with its box and its normalisation; in use it is frozen, afterwards it is as it was."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import final

import torch
from torch import Tensor, nn

from assay.core.errors import ModelError, ModelOutputError
from assay.core.registry import one_of
from assay.core.types import Inputs, Logits
from assay.data import Data
from assay.data.fit import Fit
from assay.models.bridges import bridged
from assay.models.loaded import Loaded, Net
from assay.models.patches import Patch, find_patches, patched
from assay.models.repairs import Float64, Repair, opened
from assay.models.repairs.float64 import log_of
from assay.threats.problem import ROUNDING, Goal
from assay.threats.threat import Box

PAD = 8
"""Batches are filled up to a multiple of this many rows. CPU kernels treat the rows of a full block alike and those of
a remainder differently; with full blocks a sample's logits and gradients do not depend on its batch, to the last bit,
where the numbers of features in all layers but the last are multiples of 4. (Others leave vectorised activations a
scalar remainder. That MKL sums all rows in one order is asked for in ``assay/__init__.py``.)"""

_CHANNELS_LAST_FROM = 16
"""Input channels from which convolutions on a CPU are faster in channels_last (see benchmarks/step_overhead.py)."""


@final
@dataclass(frozen=True, slots=True)
class Smoothing:
    """Gradients of the mean over Gaussian noise of size ``sigma`` (units of the box), from ``count`` draws.

    Each draw is a gradient beside the point where they are ``exact``, for networks with steep ripples; else a pair of
    values, for networks without gradients: then many draws are needed, and still the direction is a rough one.

    References:
        Values: Duchi, Jordan, Wainwright & Wibisono 2015, arXiv:1312.2139, eq. 7, with both sides of each direction.
        Gradients: Smilkov et al. 2017, arXiv:1706.03825, sec. 3.
    """

    sigma: float
    count: int = 32
    exact: bool = False

    def cost(self, functions: int) -> int:
        """Return the passes of a question for the gradients of some functions."""
        return 1 + self.count * (1 + functions if self.exact else 2)


@final
@dataclass(frozen=True, slots=True)
class Model:
    """A classifier: any callable from inputs (b, *f) inside the box to logits (b, c), c >= 2.

    Args:
        net: a ``torch.nn.Module`` or any callable on tensors. It is never changed for good: while it is in use its
            parameters are frozen and its submodules in eval mode, and afterwards everything is as it was. Or a live
            model of Keras, TensorFlow, JAX, scikit-learn, ONNX Runtime or fastai, which gets a bridge.
        box: the input domain before normalisation.
        mean, std: per channel (axis 1), applied inside: ``net((x - mean) / std)``.
        name: how reports call it.
        samples: how many random passes are averaged for one answer (for networks that are random by design).
        judged: how many are averaged where an answer decides whether a claim holds; 0 for ``samples``.
        probabilities: the net returns probabilities; their logarithm is used as logits.
        rejects: the last logit stands for "rejected", as of a detector. To be fooled, such a model must accept a wrong
            class; a clean input that it rejects counts as wrong.
        rows: the most rows a call of the net may have; None for no limit.
        fixed_rows: the net takes batches of exactly ``rows`` rows; shorter ones are filled up.
        memory_format: ``auto``, or a ``torch.memory_format`` for four-dimensional inputs while searching.
        precision: ``float32``, or ``bf16``: while searching, layers compute in bfloat16, which is faster on most GPUs.
            Whatever counts is asked in the precision of the parameters.
        tuned: while searching, layers may be replaced by faster ones that give the same values (``patches.py``).
        repairs: while searching, these stand in for steps that mask the gradient (``repairs``).
        smoothing: while searching, gradients are means over points around the one in question.
        fit: how images get the size that the net takes, where that is known.
        reference: what the net was converted from, asked for logits only; it must agree with it on the data.
        class_names: what the outputs stand for, where that is known.
        notes: what was changed or assumed to make a model of what the user has; a report shows them.

    Raises:
        ModelError: std not positive, only one of mean and std given, or fewer than one random pass.
        UsageError: an unknown precision.
    """

    net: Net
    box: Box | tuple[float, float] = Box()
    mean: Sequence[float] | float | None = None
    std: Sequence[float] | float | None = None
    name: str = ""
    samples: int = 1
    judged: int = 0
    probabilities: bool = False
    rejects: bool = False
    rows: int | None = None
    fixed_rows: bool = False
    memory_format: torch.memory_format | str = "auto"
    precision: str = "float32"
    tuned: bool = True
    repairs: tuple[Repair, ...] = ()
    smoothing: Smoothing | None = None
    fit: Fit | None = None
    reference: Net | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (loaded := bridged(self.net)) is not None:
            self._take(loaded)
        if not callable(self.net):
            raise ModelError("a torch.nn.Module or a callable", type(self.net).__name__, "Pass the network itself.")
        if not isinstance(self.box, Box):
            object.__setattr__(self, "box", Box(*self.box))
        one_of("precision", self.precision, tuple(_ROUNDING))
        if (self.mean is None) != (self.std is None):
            raise ModelError("mean and std together", f"mean={self.mean}, std={self.std}", "Give both or neither.")
        if self.std is not None and not (torch.as_tensor(self.std) > 0).all():
            raise ModelError("std > 0 for every channel", f"{self.std}", "Check the normalisation.")
        if self.mean is not None and not torch.as_tensor(self.mean, dtype=torch.float64).isfinite().all():
            raise ModelError("a finite mean", f"{self.mean}", "Check the normalisation.")
        if self.samples < 1 or self.judged < 0:
            found = f"samples={self.samples}, judged={self.judged}"
            raise ModelError("samples >= 1 and judged >= 0", found, "Leave them out for networks that are not random.")
        if not self.name:
            object.__setattr__(self, "name", getattr(self.net, "__name__", type(self.net).__name__))

    def _take(self, loaded: Loaded) -> None:
        """Become what a bridge made, but for what the user said."""
        kept = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        for f in fields(loaded):
            if f.name == "net" or f.name not in kept:
                object.__setattr__(self, f.name, getattr(loaded, f.name))

    def takes(self, data: Data) -> Data:
        """Return data as this model takes it: images of its size, 8-bit values spread over its box.

        Raises:
            DataError: samples of another size that are no images.
        """
        return data.fitted(self.fit).scaled(self.domain.lo, self.domain.hi)

    @property
    def domain(self) -> Box:
        assert isinstance(self.box, Box)
        return self.box

    @property
    def deciding(self) -> int:
        """The random passes averaged for an answer that decides."""
        return self.judged or self.samples

    def joint(self, z: Logits, goal: Goal) -> Logits:
        """Return logits by which a model that ``rejects`` meets a goal exactly where it accepts a wrong class.

        To reject is then as good as the label: the larger of the two stands for the label, and nothing for rejection.
        So every loss is the joint objective of classifier and detector (Carlini & Wagner 2017, arXiv:1705.07263,
        sec. 4.4). Where a class is wanted, it must beat the rejection as it must beat all others.
        """
        if not self.rejects or goal.label is None:
            return z
        own = torch.maximum(z.gather(1, goal.label[:, None]), z[:, -1:])
        nothing = z.detach().amin(1, keepdim=True) - 1
        return torch.cat([z.scatter(1, goal.label[:, None], own)[:, :-1], nothing], 1)

    @property
    def rounding(self) -> float:
        """The share of the larger of two logits by which a success must be clear while searching."""
        return _ROUNDING[self.precision]

    @property
    def wide(self) -> bool:
        """Whether searching computes in float64."""
        return any(isinstance(r, Float64) for r in self.repairs)

    @property
    def narrow(self) -> bool:
        """Whether searching computes in less precision than the network has."""
        return self.precision != "float32" and not self.wide

    @property
    def module(self) -> nn.Module | None:
        """The net, where it is a module: what has parameters, modes and buffers."""
        return self.net if isinstance(self.net, nn.Module) else None

    def __call__(self, x: Inputs) -> Logits:
        """Return the logits of x (b, *f), with the net as it is at the moment."""
        return self._logits(x, torch.contiguous_format, self.deciding)

    @contextmanager
    def frozen(self, device: torch.device | str | None = None) -> Iterator["Live"]:
        """Put the net in eval mode, frozen, on ``device``; put everything back at the end, whatever happens.

        The global random state is put back too.
        """
        module = self.module
        target = torch.device(device) if device is not None else _device_of(module)
        try:
            torch.empty(0, device=target)
        except (RuntimeError, AssertionError) as e:
            raise ModelError("a device of this machine", f"{target} ({str(e).splitlines()[0]})", "Use cpu.") from e
        layout = self._layout(module, target)
        kept = _Kept(module)
        devices = [*range(torch.cuda.device_count())] if target.type == "cuda" else []
        # A caller's inference_mode would make every gradient zero, and a model look robust.
        with torch.inference_mode(False), torch.random.fork_rng(devices), _float32(target):
            try:
                kept.freeze(target)
                yield Live(self, target, layout, find_patches(kept.module, layout) if self._patchable else [])
            finally:
                kept.restore()

    @property
    def _patchable(self) -> bool:
        return self.tuned and not self.repairs  # repairs look at the calls of the network's own layers

    def _layout(self, module: nn.Module | None, device: torch.device) -> torch.memory_format:
        if not self._patchable:
            return torch.contiguous_format
        if isinstance(self.memory_format, torch.memory_format):
            return self.memory_format
        convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)] if module is not None else []
        wide = sum(m.in_channels // m.groups >= _CHANNELS_LAST_FROM for m in convs)
        pays = device.type == "cpu" and wide * 2 > len(convs)
        return torch.channels_last if pays else torch.contiguous_format

    def _logits(self, x: Inputs, layout: torch.memory_format, samples: int, repairs: tuple[Repair, ...] = ()) -> Logits:
        if self.mean is not None and self.std is not None:
            mean, std = (_per_channel(v, x) for v in (self.mean, self.std))
            x = (x - mean) / std
        if layout == torch.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=layout)
        out = self._answer(x, repairs)
        for _ in range(samples - 1):
            out = out + self._answer(x, repairs)
        return out / samples if samples > 1 else out

    def _answer(self, x: Inputs, repairs: tuple[Repair, ...]) -> Logits:
        with opened(repairs, x):
            return self._asked(x)

    def _asked(self, x: Inputs) -> Logits:
        first = None if self.module is None else next(self.module.parameters(), None)
        if first is not None and first.is_floating_point() and first.dtype != x.dtype:
            x = x.to(first.dtype)
        out = self.net(x)
        out = getattr(out, "logits", out)
        if not isinstance(out, Tensor):
            raise ModelOutputError(
                "a tensor of logits (b, c)",
                f"{type(out).__name__}",
                "Wrap the net so that it returns logits only.",
                code="bad-logits",
            )
        if not self.probabilities:
            return out if out.dtype == torch.float64 else out.float()
        if (log := log_of(out)) is not None:
            return log
        return out.double().clamp_min(_LEAST_PROBABILITY).log()


def are_probabilities(z: Tensor) -> bool:
    """Tell whether answers (b, c) are distributions: rows that are not negative and sum to 1."""
    return bool((z >= 0).all()) and torch.allclose(z.sum(1), torch.ones_like(z[:, 0]), atol=1e-3)


_LEAST_PROBABILITY = 1e-300

_ROUNDING = {"float32": ROUNDING, "bf16": 2**-8}
"""The share of the larger of two logits by which a success must be clear, in each precision of a search.

In bfloat16 it is one unit in the last place. Rounding inside the network may be more: there each success is asked about
again, by the network as it is, before the search counts on it."""


def as_model(model: Model | Net) -> Model:
    """Return a model as it is, and a network as a model that takes inputs in [0, 1]."""
    return model if isinstance(model, Model) else Model(model)


@final
@dataclass(slots=True)
class Live:
    """A model in use: frozen, and on its device."""

    model: Model
    device: torch.device
    layout: torch.memory_format
    patches: list[Patch]

    def __call__(self, x: Inputs) -> Logits:
        """Ask the network exactly as it is."""
        return self.model._logits(x, torch.contiguous_format, self.model.deciding)

    def search(self, x: Inputs) -> Logits:
        """Ask in less time and with repairs, for the same up to rounding: to look for something, not to prove it."""
        try:
            with patched(self.patches), self._narrow():
                return self.model._logits(x, self.layout, self.model.samples, self.model.repairs)
        except RuntimeError as e:
            if "view size is not compatible" not in str(e) or self.layout != torch.channels_last:
                raise
        # A net that calls .view() on a channels_last tensor: use the ordinary memory format from here on.
        self.layout = torch.contiguous_format
        self.patches = find_patches(nn.Module() if self.model.module is None else self.model.module, self.layout)
        return self.search(x)

    def _narrow(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.model.narrow else nullcontext()


class _Kept:
    """Everything of a module that use may change: modes, requires_grad, parameter storage, buffers."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module = nn.Module() if module is None else module
        self.modes = [(m, m.training) for m in module.modules()]
        self.grads = [(p, p.requires_grad) for p in module.parameters()]
        self.data = [(p, p.data) for p in module.parameters()]
        self.buffers = [(m, n, b) for m in module.modules() for n, b in m._buffers.items()]

    def freeze(self, device: torch.device) -> None:
        for m, _ in self.modes:
            m.training = False  # not .eval(): it may be overridden, and exported modules refuse it
        for p, _ in self.grads:
            p.requires_grad_(False)
            if p.device != device:
                p.data = p.data.to(device)
        for m, n, b in self.buffers:
            m._buffers[n] = None if b is None else b.detach().to(device, copy=True)

    def restore(self) -> None:
        for p, data in self.data:
            p.data = data
        for p, wanted in self.grads:
            p.requires_grad_(wanted)
        for m, n, b in self.buffers:
            m._buffers[n] = b
        for m, mode in self.modes:
            m.training = mode


@contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Compute in the precision of the parameters: without a caller's autocast, and without TF32 on a GPU."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


def _device_of(module: nn.Module | None) -> torch.device:
    first = next(module.parameters(), None) if module is not None else None
    return first.device if first is not None else torch.device("cpu")


def _per_channel(v: Sequence[float] | float, x: Inputs) -> Tensor:
    values = torch.as_tensor(v, dtype=x.dtype, device=x.device)
    if values.numel() not in (1, x.shape[1]):
        found = f"{values.numel()} for inputs with {x.shape[1]} channels"
        raise ModelError("mean and std of every channel, or one for all", found, "Check --mean, --std and the images.")
    return values.view(-1, *[1] * (x.ndim - 2)) if values.ndim else values
