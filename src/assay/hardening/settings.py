"""How to train, as plain data: everything but the objective, the threat and the data."""

import math
from dataclasses import dataclass, fields
from typing import Any, Final, final

from assay.core.registry import UsageError, one_of

OPTIMISERS: Final = ("sgd", "adam", "adamw")
SCHEDULES: Final = ("constant", "cosine", "cyclic", "multistep")
AVERAGES: Final = ("none", "ema", "swa")
MONITORS: Final = ("stop", "rollback", "off")
PRECISIONS: Final = ("32-true", "bf16-mixed")
INITS: Final = ("keep", "ibp")
SELECTIONS: Final = ("robust", "last")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of the training loop. Shares are of the whole training, from 0 to 1.

    Args:
        batch_size: samples that are learned from together.
        optimiser: ``sgd`` (Nesterov momentum), ``adam`` or ``adamw``.
        lr: the largest learning rate.
        sgd_momentum: of sgd.
        weight_decay: of weights with more than one axis; biases and normalisation have none.
        schedule: ``constant``; ``cosine``, which falls to 0; ``cyclic``, up to lr in the first 40 % and down to 0, both
            in straight lines; ``multistep``, a tenth after each milestone.
        milestones: shares after which multistep falls.
        warmup: share over which the rate grows from 0.
        ramp: shares between which eps grows from 0 to its final value; each method has one of its own.
        stretch: that value, as a multiple of the eps of the threat, which is what is validated against.
        clip: largest norm of the gradient; 0 for no limit.
        l1: weight of the sum of all weights' absolute values.
        label_smoothing: share of a label's probability that is spread over all classes.
        augment: text for :func:`assay.hardening.augment.parse`, as ``crop:4,flip``.
        average: weights that are judged and kept: those of the moment (``none``), their moving average (``ema``), or
            their mean since ``swa_from`` (``swa``).
        ema_decay: of the moving average, a step.
        swa_from: share from which swa averages, at the end of each epoch.
        awp: size of adversarial weight perturbations (``awp.py``), 0 for none.
        awp_from: share from which weights are perturbed.
        extra_share: share of each batch that comes from the second source of data, where there is one.
        precision: ``32-true`` or ``bf16-mixed``.
        channels_last: keep images and weights in that memory format, for speed on a GPU.
        init: ``keep`` the weights as given, or draw them anew for certified training (``ibp``).
        checks: validations an epoch.
        valid_limit: samples of the validation data that are attacked at each; 0 for all.
        valid_steps: steps of the PGD that validates.
        select: keep the weights with the best ``robust`` accuracy at a validation, or the ``last``.
        patience: stop after so many epochs without a better validation; 0 never stops.
        monitor: what to do when overfitting is catastrophic: ``stop``, ``rollback`` to the best weights and half the
            learning rate, or nothing (``off``).

    Raises:
        UsageError: a value that is none of the known ones, or out of range.
    """

    batch_size: int = 128
    optimiser: str = "adam"
    lr: float = 2e-3
    sgd_momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    milestones: str = "0.5,0.75"
    warmup: float = 0.0
    ramp: str = "0,0"
    stretch: float = 1.0
    clip: float = 0.0
    l1: float = 0.0
    label_smoothing: float = 0.0
    augment: str = ""
    average: str = "none"
    ema_decay: float = 0.998
    swa_from: float = 0.75
    awp: float = 0.0
    awp_from: float = 0.1
    extra_share: float = 0.5
    precision: str = "32-true"
    channels_last: bool = False
    init: str = "keep"
    checks: int = 1
    valid_limit: int = 1000
    valid_steps: int = 10
    select: str = "robust"
    patience: int = 0
    monitor: str = "stop"

    def __post_init__(self) -> None:
        known = {
            "optimiser": OPTIMISERS,
            "schedule": SCHEDULES,
            "average": AVERAGES,
            "monitor": MONITORS,
            "precision": PRECISIONS,
            "init": INITS,
            "select": SELECTIONS,
        }
        for name, values in known.items():
            one_of(name, getattr(self, name), values)
        self._check_ranges()
        for name, count in (("milestones", None), ("ramp", 2)):
            _shares(name, getattr(self, name), count)

    def _check_ranges(self) -> None:
        shares = {"label_smoothing", "warmup", "extra_share", "swa_from", "awp_from", "ema_decay", "sgd_momentum"}
        least = {"batch_size": 1, "checks": 1, "valid_steps": 1}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool | str):
                continue
            low, high = least.get(f.name, 0), 1.0 if f.name in shares else math.inf
            if not (math.isfinite(value) and low <= value <= high) or (f.name == "lr" and value == 0):
                wanted = f"{f.name} from {low:g} to {high:g}" if f.name in shares else f"{f.name} of at least {low:g}"
                raise UsageError(wanted, f"{value}", f"Its default is {f.default}.")

    def grown(self, done: float) -> float:
        """Return which share of the final eps is trained against when the share ``done`` of training is done."""
        start, end = _shares("ramp", self.ramp, 2)
        return 1.0 if done >= end else max(0.0, (done - start) / (end - start))

    def rate(self, done: float) -> float:
        """Return the learning rate when the share ``done`` of training is done."""
        warm = min(1.0, done / self.warmup) if self.warmup else 1.0
        if self.schedule == "cosine":  # level while eps grows, then down
            start = max(self.warmup, _shares("ramp", self.ramp, 2)[1])
            tail = max(0.0, done - start) / max(1 - start, 1e-9)
            return self.lr * warm * (1 + math.cos(math.pi * min(1.0, tail))) / 2
        if self.schedule == "cyclic":
            return self.lr * warm * min(done / 0.4, (1 - done) / 0.6)
        if self.schedule == "multistep":
            fallen = sum(done >= m for m in _shares("milestones", self.milestones))
            return self.lr * warm * 0.1**fallen
        return self.lr * warm

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def _shares(name: str, text: str, count: int | None = None) -> tuple[float, ...]:
    """Read ``0.5,0.75``: shares in ascending order."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    fits = found and list(found) == sorted(found) and found[0] >= 0 and found[-1] <= 1
    if not fits or (count is not None and len(found) != count):
        wanted = f"{name} as {'' if count is None else f'{count} '}shares from 0 to 1, ascending"
        raise UsageError(wanted, repr(text), "Write for example 0.5,0.75.")
    return found
