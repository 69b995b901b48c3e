"""Is the model wrapped as it was trained? Each usual mistake is undone on some samples, and named if that helps.

A network that is fed what it was not trained on is often not at chance, only worse: its clean accuracy looks like that
of a bad network, and everything that is measured of it is about the mistake. So each mistake is tried out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias, final

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from assay.core.types import Inputs, Labels, Logits, Mask
from assay.evaluation.finding import Finding
from assay.models import Model
from assay.runs.compare import shares

Ask: TypeAlias = Callable[[Inputs], Logits]
Undo: TypeAlias = Callable[[Model, Inputs], Inputs | None]
"""From the inputs to those that a wrongly wrapped model should have got; None where the mistake cannot be made."""

GOOD: Final = 0.95
"""Clean accuracy from which a model is taken to be wrapped right."""

GAIN: Final = 0.1
"""The least gain in accuracy for which a mistake is named."""

EXPLAINED: Final = 0.5
"""The least accuracy without the mistake: an untrained network, too, goes with the classes in some order."""

SURE: Final = 1e-4
"""The largest p-value (McNemar's exact test) at which that gain is no chance; about fifteen mistakes are tried."""

_FIRST: Final = 4
"""A mistake is undone on one of so many samples first, and on all only where that helps; of few samples, on all."""

_FEW: Final = 64

_A_CLASS: Final = 5
"""Samples for each class from which any order of the classes is looked for, not only a shifted one."""


@final
@dataclass(frozen=True, slots=True)
class Mistake:
    """What may be wrong between a model and its data."""

    code: str
    said: str
    remedy: str


def _own_statistics(model: Model, x: Inputs) -> Inputs | None:
    if model.mean is not None or x.ndim < 3:
        return None
    axes = [0, *range(2, x.ndim)]
    return (x - x.mean(axes, keepdim=True)) / x.std(axes, keepdim=True).clamp_min(1e-6)


def _once(model: Model, x: Inputs) -> Inputs | None:
    """Feed what, normalised by the model, is x itself."""
    if model.mean is None or model.std is None:
        return None
    mean, std = (
        torch.as_tensor(v, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 2))
        for v in (model.mean, model.std)
    )
    return x * std + mean


def _between(lo: float, hi: float) -> Undo:
    def undo(model: Model, x: Inputs) -> Inputs | None:
        box = model.domain
        return None if (box.lo, box.hi) == (lo, hi) else (x - box.lo) / box.width * (hi - lo) + lo

    return undo


def _image(change: Callable[[Tensor], Tensor], *, fits: Callable[[tuple[int, ...]], bool]) -> Undo:
    def undo(_: Model, x: Inputs) -> Inputs | None:
        return change(x).reshape(x.shape) if x.ndim == 4 and fits(tuple(x.shape[1:])) else None

    return undo


def _reread(x: Tensor) -> Tensor:
    """Take memory that holds (h, w, c) for what it is."""
    b, c, h, w = x.shape
    return x.reshape(b, h, w, c).permute(0, 3, 1, 2).contiguous()


_RANGE = "The network was trained on inputs from {0} to {1}: the model must bring them there."
_SCALE = "Give it inputs in its own units and say so (--box {0} {1}), or divide inside the model (--mean, --std)."

_MISTAKES: Final[tuple[tuple[Mistake, Undo], ...]] = (
    (
        Mistake(
            "normalised-twice",
            "The inputs are normalised by mean and std, and then once more by the network's own layers.",
            "Leave out --mean and --std.",
        ),
        _once,
    ),
    (
        Mistake(
            "not-normalised",
            "The network was trained on normalised inputs, and gets them as they are.",
            "Give the --mean and --std that it was trained with.",
        ),
        _own_statistics,
    ),
    *(
        (Mistake("wrong-scale", _RANGE.format(lo, hi), _SCALE.format(lo, hi)), _between(lo, hi))
        for lo, hi in ((0, 1), (-1, 1), (0, 255))
    ),
    (
        Mistake(
            "channels-last",
            "The memory of the images holds (h, w, c), and is read as (c, h, w).",
            "Permute the axes of the data instead of reshaping them: x.transpose(0, 3, 1, 2).",
        ),
        _image(_reread, fits=lambda s: s[0] > 1),
    ),
    (
        Mistake(
            "channels-last",
            "The network takes images as (h, w, c), and gets (c, h, w) reshaped to that.",
            "Permute the axes in the wrapper instead of reshaping them: x.permute(0, 2, 3, 1).",
        ),
        _image(lambda x: x.permute(0, 2, 3, 1).contiguous(), fits=lambda s: s[0] > 1),
    ),
    (
        Mistake(
            "channels-reversed",
            "The network takes the colours in the other order (BGR for RGB).",
            "Reverse the channels: x[:, [2, 1, 0]], in the data or in the model.",
        ),
        _image(lambda x: x.flip(1), fits=lambda s: s[0] == 3),
    ),
    (
        Mistake(
            "axes-swapped",
            "Rows and columns of the images are swapped.",
            "Transpose the images: x.transpose(2, 3).",
        ),
        _image(lambda x: x.transpose(2, 3), fits=lambda s: s[1] == s[2]),
    ),
    (
        Mistake(
            "inverted",
            "The network was trained on the negatives of these images: black is white.",
            "Invert the data (lo + hi - x), or the inputs inside the model.",
        ),
        lambda model, x: model.domain.lo + model.domain.hi - x,
    ),
)


def check_wrapping(model: Model, ask: Ask, x: Inputs, y: Labels) -> Iterator[Finding]:
    """Report the mistake that explains a clean accuracy below ``GOOD`` best, if one does.

    Args:
        model: as the user gave it.
        ask: what it answers, logits (b, c) to x (b, *f), also outside the box.
        x: samples (b, *f) from all over the data.
        y: their labels (b,).

    *Cost*: one forward a sample; for models that are not good, two or three more, up to ten of few samples.
    """
    z = ask(x)
    said, classes = z.argmax(1), z.shape[1]
    right = said == y
    if float(right.float().mean()) >= GOOD:
        return
    found = [*_inputs(model, ask, x, y, right), *_labels(said, y, classes)]
    helped = [(shares(right.cpu().numpy(), now.cpu().numpy()), mistake) for mistake, now in found]
    gain, mistake = max(helped, key=lambda pair: pair[0].difference)
    if gain.difference < GAIN or gain.b < EXPLAINED * gain.n or gain.p_value > SURE:
        return
    yield Finding(
        mistake.code,
        "error",
        f"{mistake.said} On {gain.n} samples {gain.a / gain.n:.0%} are right as it is, and {gain.b / gain.n:.0%} "
        "with that undone. The figures are those of the mistake, not of the network.",
        {"right": gain.a, "right_without": gain.b, "n": gain.n, "p_value": gain.p_value},
        mistake.remedy,
    )


def _inputs(model: Model, ask: Ask, x: Inputs, y: Labels, right: Mask) -> Iterator[tuple[Mistake, Tensor]]:
    some = slice(None, None, _FIRST)
    for mistake, undo in _MISTAKES:
        if (other := undo(model, x)) is None:
            continue
        try:
            helps = len(x) < _FEW or bool((ask(other[some]).argmax(1) == y[some]).sum() > right[some].sum())
            z = ask(other) if helps else None
        except Exception:  # the user's network need not bear any input
            continue
        if z is not None:
            yield mistake, z.argmax(1) == y


def _labels(said: Labels, y: Labels, classes: int) -> Iterator[tuple[Mistake, Tensor]]:
    """Look for an order of the classes in which the labels are right: one that is shifted, or any."""
    for shift in {1, -1, int(((said - y) % classes).mode().values)} - {0}:
        way = f"{abs(shift)} {'above' if shift > 0 else 'below'}"
        text = f"The network's classes are numbered {way} the labels."
        remedy = f"Add {shift} to the labels, or drop the class that the network has and the data has not."
        yield Mistake("labels-shifted", text, remedy), said == (y + shift) % classes
    if len(y) >= _A_CLASS * classes:
        text = "The network numbers its classes in another order than the labels."
        remedy = "Bring them into one order: class folders are numbered by the alphabet, or by their numbers."
        yield Mistake("labels-permuted", text, remedy), _reordered(said, y, classes)


def _reordered(said: Labels, y: Labels, classes: int) -> Tensor:
    """Return which samples (b,) are right with the classes in the order that fits the other half of them best."""
    right = torch.zeros_like(y, dtype=torch.bool)
    for half, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        table = np.zeros((classes, classes))
        np.add.at(table, (y[other].cpu().numpy(), said[other].cpu().numpy()), 1)
        order = torch.as_tensor(linear_sum_assignment(-table)[1], device=y.device)
        right[half] = said[half] == order[y[half]]
    return right
