"""What every integration shares: from a batch of a framework to the points to learn from, and to the loss there.

The framework keeps its loop, its optimiser, its precision and, where an objective only moves the samples, its loss. The
objectives, their attacks and weight perturbations are those of :mod:`assay.hardening`; there is no second copy of them.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from assay.core.errors import AssayError, DataError, ThreatError
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.core.types import Inputs, Labels, Logits
from assay.hardening import OBJECTIVES, BrokenDefence, Objective, Settings, Step, Terms
from assay.hardening.awp import perturbed
from assay.hardening.harden import split_settings
from assay.hardening.inner import around
from assay.nets import Normalise
from assay.threats import Threat
from assay.threats.threat import Box, outside_box

_OURS: Final = ("awp", "awp_from", "ramp", "stretch")
"""The settings of our own loop that another loop can have; the rest of them it sets itself."""

_SLACK: Final = 1e-3
"""Share of the box's width by which undoing a normalisation may leave the box."""


@final
@dataclass(frozen=True, slots=True)
class Look:
    """How a framework's network sees inputs inside the box: ``(x - mean) / std`` for each channel, or as they are."""

    box: Box = Box()
    mean: Sequence[float] | float | None = None
    std: Sequence[float] | float | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise UsageError("mean and std together", f"mean={self.mean}, std={self.std}", "Give both or neither.")

    def layer(self) -> nn.Module:
        """Return the normalisation as a module."""
        return nn.Identity() if self.mean is None or self.std is None else Normalise(self.mean, self.std)

    def seen(self, x: Inputs) -> Inputs:
        """Return inputs (b, *f) of the box as the network sees them."""
        out: Inputs = self.layer().to(x.device)(x)
        return out

    def pixels(self, x: Inputs) -> Inputs:
        """Return what the network sees (b, *f) as float32 inputs inside the box.

        Raises:
            DataError: they are not there, so that this is not the normalisation (``input-outside-box``).
        """
        x = x.detach().as_subclass(Tensor).float()
        if self.mean is not None and self.std is not None:
            mean, std = (
                torch.as_tensor(v).to(x).flatten().view(-1, *[1] * (x.ndim - 2)) for v in (self.mean, self.std)
            )
            x = x * std + mean
        slack = _SLACK * self.box.width
        outside = ((x < self.box.lo - slack) | (x > self.box.hi + slack)).flatten(1).any(1)
        if outside.any():
            rows = outside.nonzero()[:, 0].tolist()
            raise outside_box(self.box, (float(x.min()), float(x.max())), rows, len(x), " once mean and std are undone")
        return x.clamp(self.box.lo, self.box.hi)


@final
class Seen(nn.Module):
    """A framework's network as objectives ask it: from inputs inside the box to float32 logits (b, c).

    ``normalise`` is a layer on its device; ``dtype`` is what the network takes.
    """

    def __init__(self, net: nn.Module, normalise: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net, self.normalise, self.dtype = net, normalise, dtype

    def forward(self, x: Inputs) -> Logits:
        z = self.net(self.normalise(x).to(self.dtype))
        logits: Logits = getattr(z, "logits", z).float()
        return logits


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to learn from, whatever the framework; made by :func:`planned`."""

    threat: Threat  # its box settled
    objective: Objective
    settings: Settings
    mix: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the training method."""
        return OBJECTIVES.name_of(self.objective)

    @property
    def own_loss(self) -> bool:
        """Whether the objective has a loss of its own; else the framework's is taken at the points found."""
        return type(self.objective).loss is not Objective.loss

    def step(
        self,
        net: nn.Module,
        x: Inputs,
        y: Labels,
        look: Look,
        *,
        at: int,
        share: float,
        soft: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Step:
        """Pose a batch.

        Args:
            net: from what the framework's loader gives to logits.
            x: (b, *f), as the framework's loader gives them.
            y: (b,), their labels.
            look: how the two belong together.
            at: the number of the batch: random numbers are those of (seed, batch, row).
            share: of training that is done, from 0 to 1.
            soft: (b, c), where the framework mixed labels.
            label_smoothing: for a loss of the objective's own.

        Raises:
            DataError: inputs that are no numbers of the box, or labels that are not one class number for each sample.
        """
        if x.ndim < 2 or not x.is_floating_point():
            raise DataError("float inputs (b, *f) to move", f"{x.dtype} of shape {tuple(x.shape)}",
                            "Train on images, or on other numbers that an adversary can change.")  # fmt: skip
        if y.ndim != 1 or y.is_floating_point() or len(y) != len(x):
            found = f"{y.dtype} of shape {tuple(y.shape)} for inputs {tuple(x.shape)}"
            raise DataError("one class number for each sample, (b,)", found, "Train a classifier of one label.")
        kind = x.dtype
        x, y = look.pixels(x), y.detach().as_subclass(Tensor).long()
        draws = Draws.of(self.seed, torch.arange(len(x), device=x.device)).fold(at)
        share = min(1.0, max(0.0, share)) if math.isfinite(share) else 1.0
        grown = self.settings.grown(share)
        p = around(x, y, self.threat, grown * self.settings.stretch, draws)
        asked = Seen(net, look.layer().to(x.device), kind)
        return Step(asked, x, y, p, soft, label_smoothing, share, grown)

    def find(self, s: Step) -> Inputs:
        """Return the points (b, *f) inside the box to learn from; the last ``mix`` of the batch stays clean.

        They are looked for in float32, with the network in eval mode: statistics of batches never see an attack.
        """
        k = len(s.x) - round(self.mix * len(s.x))
        if k == 0:
            return s.x
        rows = torch.arange(k, device=s.x.device)
        some = replace(
            s, x=s.x[:k], y=s.y[:k], problem=s.problem.take(rows), soft=None if s.soft is None else s.soft[:k]
        )
        with precise(s.x), torch.enable_grad():
            found = self.objective.find(some if k < len(s.x) else s).detach()
        return torch.cat([found, s.x[k:]]) if k < len(s.x) else found

    def loss(self, s: Step, x: Inputs) -> Terms:
        """Return the objective's own loss at points x (b, *f), in the caller's precision."""
        return self.objective.loss(s, x)

    def worst_weights(self, s: Step, x: Inputs) -> AbstractContextManager[None]:
        """Return a context for the forward and backward pass at x: adversarial weights, where ``awp`` says so."""

        def loss() -> Tensor:
            with precise(x):
                return self.objective.loss(s, x).loss

        return perturbed(s.net, loss, self.settings.awp if s.share >= self.settings.awp_from else 0.0)


def planned(
    threat: Threat | str,
    method: str | Objective,
    given: Mapping[str, Any],
    *,
    box: Box = Box(),
    mix: float = 0.0,
    seed: int = 0,
) -> Plan:
    """Check what the user said, before any training.

    Args:
        threat: what to train against, in units of the box.
        method: the name of an objective, or an objective.
        given: hyper-parameters of the objective, and ``awp``, ``awp_from``, ``ramp``, ``stretch``.
        box: of the inputs before normalisation.
        mix: share of each batch that stays clean.
        seed: of random starts.

    Raises:
        UsageError: a name or a value that does not exist, or that this loop cannot do.
        ThreatError: a threat that the method is not defined for, or whose eps does not fit the box.
    """
    threat = Threat.parse(threat) if isinstance(threat, str) else threat
    objective, settings = split_settings(method, given)
    name = OBJECTIVES.name_of(objective)
    if others := [n for n in given if n in Settings.__dataclass_fields__ and n not in _OURS]:
        raise UsageError(f"a setting of {name}, or {', '.join(_OURS)}", ", ".join(others),
                         "The framework's own loop decides the rest.")  # fmt: skip
    _admit(objective, name)
    _check_threat(threat, objective, name)
    if not 0 <= mix <= 1:
        raise UsageError("mix from 0 to 1, the share that stays clean", f"{mix}", "Leave it out for none.")
    plan = Plan(threat=threat.within(box, 1 << 40), objective=objective, settings=settings, mix=mix, seed=seed)
    if mix and plan.own_loss:
        raise UsageError(f"mix=0 for {name}, which weighs clean samples itself", f"mix={mix}",
                         "Leave mix out, or take method='pgd'.")  # fmt: skip
    if warning := getattr(objective, "warning", ""):
        warnings.warn(warning, BrokenDefence, stacklevel=3)
    return plan


def _admit(objective: Objective, name: str) -> None:
    """Refuse objectives that need a loop of ours."""
    needs = [
        (len(objective.helpers) > 0, "needs networks that are trained first"),
        (objective.replays > 1, "learns from each batch several times"),
        (type(objective).learned is not Objective.learned, "keeps what a backward pass left from batch to batch"),
    ]
    if why := [text for applies, text in needs if applies]:
        raise UsageError("a method that learns from each batch once, by itself", f"{name}, which {why[0]}",
                         "Take method='fast' or 'pgd' here, or train with assay.harden.")  # fmt: skip


def _check_threat(threat: Threat, objective: Objective, name: str) -> None:
    if threat.eps is None:
        raise ThreatError("an eps to train against", str(threat), "Write for example linf:8/255.")
    if threat.targeted or threat.quantize is not None:
        raise ThreatError("an untargeted threat without quantize", str(threat.to_json()), "Leave them out.")
    if threat.norm.name not in objective.norms:
        known = ", ".join(objective.norms)
        raise ThreatError(f"one of {known} for {name}", str(threat), "Choose another method.")


def precise(x: Tensor) -> AbstractContextManager[None]:
    """Return a context without the caller's autocast: everything in the precision of the parameters."""
    off: AbstractContextManager[None] = torch.autocast(x.device.type, enabled=False)
    return off


@contextmanager
def standing_in(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put ``value`` in the place of an attribute of one object, and put back what was there, or was not."""
    undo = replaced(owner, name, value)
    try:
        yield
    finally:
        undo()


def answer_once(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Let the next call of ``owner.name`` return ``value``, whatever it is asked; then all is as it was before.

    Return what undoes it earlier; doing so twice does nothing.
    """

    def answer(*_: Any, **__: Any) -> Any:
        undo()
        return value

    undo = replaced(owner, name, answer)
    return undo


def replaced(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Put ``value`` in the place of an attribute of one object; return what puts back what was there, or was not."""
    own = vars(owner)
    before = {n: own[n] for n in (name,) if n in own}
    done: list[bool] = []

    def undo() -> None:
        if done:
            return
        done.append(True)
        own.pop(name, None)
        own.update(before)

    own[name] = value
    return undo


def refuse_parallel(net: nn.Module, name: str) -> None:
    """Refuse a network that several devices share, for an objective with a loss of its own.

    Raises:
        AssayError: it is one.
    """
    if isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise AssayError(f"one device for {name}, which asks the network several times a step", type(net).__name__,
                         "Take method='pgd' here, or train with assay.harden(devices=...).")  # fmt: skip
