"""Augmentation: what a training sample looks like this time. Random numbers belong to the sample, not to the batch."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import torch
from torch import Tensor
from torch.nn import functional as F

from assay.core.errors import DataError
from assay.core.levels import at_level
from assay.core.optional import need
from assay.core.random import Draws
from assay.core.registry import Registry, UsageError, build, one_of
from assay.core.types import Inputs, Labels, Mask, PerSample, choose, per_sample
from assay.threats.threat import Box


class Change(ABC):
    """An augmentation that changes samples, each by itself. A subclass is a final frozen dataclass."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, x: Inputs, draws: Draws, box: Box) -> Inputs:
        """Return images (b, c, h, w) inside the box; places without an image become its low end."""


class Mixing(ABC):
    """An augmentation that mixes samples and their labels. A subclass is a final frozen dataclass.

    The partner of a sample is the one at its place in the reversed batch (the middle one of an odd number is its own),
    so the result depends on which samples are in a batch and on their order; shares and places depend on the sample.
    """

    __slots__ = ()

    @abstractmethod
    def __call__(self, x: Inputs, soft: Tensor, draws: Draws, box: Box) -> tuple[Inputs, Tensor]:
        """Return images (b, c, h, w) inside the box, and distributions over the classes (b, k)."""


Augmentation: TypeAlias = Change | Mixing

AUGMENTATIONS: "Registry[type[Change] | type[Mixing]]" = Registry("augmentation")


@final
@AUGMENTATIONS.register("flip")
@dataclass(frozen=True, slots=True)
class Flip(Change):
    """Mirror left and right with probability ``chance``."""

    chance: float = 0.5

    def __post_init__(self) -> None:
        _check(0 <= self.chance <= 1, "a chance of flip from 0 to 1", self.chance)

    def __call__(self, x: Inputs, draws: Draws, box: Box) -> Inputs:
        return choose(draws.uniform() < self.chance, x.flip(-1), x)


@final
@AUGMENTATIONS.register("shift")
@AUGMENTATIONS.register("crop")
@dataclass(frozen=True, slots=True)
class Crop(Change):
    """Pad each side by ``padding`` pixels and cut the old size out at a random place.

    That is a shift by up to so many pixels along both axes, each of them equally likely.
    """

    padding: int = 4

    def __post_init__(self) -> None:
        _check(self.padding >= 1, "a padding of crop of at least 1", self.padding)

    def __call__(self, x: Inputs, draws: Draws, box: Box) -> Inputs:
        height, width = x.shape[2:]
        wide = F.pad(x, [self.padding] * 4, value=box.lo).permute(0, 2, 3, 1)
        top, left = draws.integers(2 * self.padding + 1, (2,)).unbind(1)
        rows = top[:, None] + torch.arange(height, device=x.device)
        columns = left[:, None] + torch.arange(width, device=x.device)
        samples = torch.arange(len(x), device=x.device)
        cut = wide[samples[:, None, None], rows[:, :, None], columns[:, None, :]]  # (b, h, w, c)
        return cut.permute(0, 3, 1, 2).contiguous()


Shift = Crop
"""The same by its other name."""


@final
@AUGMENTATIONS.register("cutout")
@dataclass(frozen=True, slots=True)
class Cutout(Change):
    """Blank a square of ``size`` pixels whose middle is anywhere in the image; edges may cut it.

    References:
        DeVries & Taylor 2017, arXiv:1708.04552, sec. 3.2. Filled with the low end of the box instead of the mean.
    """

    size: int = 8

    def __post_init__(self) -> None:
        _check(self.size >= 1, "a size of cutout of at least 1", self.size)

    def __call__(self, x: Inputs, draws: Draws, box: Box) -> Inputs:
        side = torch.full((len(x),), self.size, device=x.device)
        return x.masked_fill(_window(x, side, side, draws), box.lo)


@final
@AUGMENTATIONS.register("mixup")
@dataclass(frozen=True, slots=True)
class Mixup(Mixing):
    """Take a share of each sample and its label, and the rest from its partner; the share is from Beta(alpha, alpha).

    References:
        Zhang et al. 2018, arXiv:1710.09412, sec. 2. A share of its own for each sample.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        _check(0 < self.alpha < math.inf, "an alpha of mixup above 0", self.alpha)

    def __call__(self, x: Inputs, soft: Tensor, draws: Draws, box: Box) -> tuple[Inputs, Tensor]:
        share = _beta(self.alpha, draws)
        return _between(x, share).clamp(box.lo, box.hi), _between(soft, share)


@final
@AUGMENTATIONS.register("cutmix")
@dataclass(frozen=True, slots=True)
class CutMix(Mixing):
    """Put a window of the partner into each sample; labels are mixed by area.

    With s from Beta(alpha, alpha) the window has the shape of the image and 1 - s of its area, and its middle is
    anywhere; edges may cut it.

    References:
        Yun et al. 2019, arXiv:1905.04899, sec. 3.1. A window of its own for each sample.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check(0 < self.alpha < math.inf, "an alpha of cutmix above 0", self.alpha)

    def __call__(self, x: Inputs, soft: Tensor, draws: Draws, box: Box) -> tuple[Inputs, Tensor]:
        side = (1 - _beta(self.alpha, draws)).sqrt()
        height, width = ((side * n).long() for n in x.shape[2:])
        window = _window(x, height, width, draws.fold(0))
        kept = 1 - window.flatten(1).double().mean(1)
        return torch.where(window, x.flip(0), x), _between(soft, kept)


POLICIES: Final = {
    "trivial": ("TrivialAugmentWide", None),
    "rand": ("RandAugment", None),
    "auto": ("AutoAugment", "IMAGENET"),
    "auto-cifar10": ("AutoAugment", "CIFAR10"),
    "auto-svhn": ("AutoAugment", "SVHN"),
}
"""Policies of torchvision by our names: class, and the data set it was searched for."""


@final
@AUGMENTATIONS.register("policy")
@dataclass(frozen=True, slots=True)
class Policy(Change):
    """A policy of torchvision, at its defaults, on each sample by itself; values are rounded to 8 bits.

    It runs on the CPU, one sample after another, with torch's generator seeded by the sample's random numbers and
    restored afterwards.

    Args:
        name: ``trivial`` (TrivialAugment), ``rand`` (RandAugment), ``auto``, ``auto-cifar10`` or ``auto-svhn``
            (AutoAugment).

    References:
        Müller & Hutter 2021, arXiv:2103.10158; Cubuk et al. 2020, arXiv:1909.13719; Cubuk et al. 2019,
        arXiv:1805.09501.
    """

    name: str = "trivial"

    def __post_init__(self) -> None:
        one_of("policy", self.name, [*POLICIES])

    def __call__(self, x: Inputs, draws: Draws, box: Box) -> Inputs:
        """Return images (b, c, h, w) with c = 1 or 3 inside the box.

        Raises:
            MissingExtraError: torchvision is not installed, or cannot be imported.
            DataError: another number of channels.
        """
        if x.shape[1] not in (1, 3):
            raise DataError("images of 1 or 3 channels for a policy", f"{tuple(x.shape)}", "Leave the policy out.")
        policy = _policy(self.name)
        levels = ((x - box.lo) / box.width * 255).round().to(torch.uint8).cpu()
        with torch.random.fork_rng([]):
            changed = [_seeded(policy, image, key) for image, key in zip(levels, draws.keys.tolist(), strict=True)]
        return at_level(torch.stack(changed).to(x), box.lo, box.hi)


def parse(text: str) -> tuple[Augmentation, ...]:
    """Read augmentations, in their order: names with a value each after a colon, if it is not the default.

    Raises:
        UsageError: an unknown name, or a value that it does not take.

    Example:
        >>> parse("crop:4,flip,cutout:8")
        (Crop(padding=4), Flip(chance=0.5), Cutout(size=8))
    """
    return tuple(_parsed(part.strip()) for part in text.split(",")) if text.strip() else ()


def _parsed(text: str) -> Augmentation:
    name, colon, value = text.partition(":")
    make: Callable[..., Augmentation] = AUGMENTATIONS[name]
    first = next(iter(inspect.signature(make).parameters))
    return build(make, {first: value} if colon else {}, name)


def augmented(
    x: Inputs, y: Labels, classes: int, steps: Sequence[Augmentation], draws: Draws, box: Box
) -> tuple[Inputs, Tensor | None]:
    """Return a batch after all steps, inside the box, and its distributions over the classes (b, classes) if any mixes.

    Each step has random numbers of its own; none of them changes x in place.

    Args:
        x: images (b, c, h, w) inside the box.
        y: their labels (b,).
        classes: their number.
        steps: in their order.
        draws: of the samples, for this epoch.
        box: of the inputs.

    Raises:
        DataError: other inputs than images, though there are steps.
        MissingExtraError: a :class:`Policy` without torchvision.
    """
    if steps and x.ndim != 4:
        raise DataError("images (b, c, h, w) to augment", f"inputs {tuple(x.shape)}", "Train without augmentation.")
    soft = F.one_hot(y, classes).to(x.dtype) if any(isinstance(s, Mixing) for s in steps) else None
    for number, step in enumerate(steps):
        own = draws.fold(number)
        if isinstance(step, Change):
            x = step(x, own, box)
        else:
            assert soft is not None
            x, soft = step(x, soft, own, box)
    return x, soft


def _check(good: bool, expected: str, found: float) -> None:
    if not good:
        raise UsageError(expected, f"{found}", "Leave the augmentation out instead?")


def _window(x: Inputs, height: Labels, width: Labels, draws: Draws) -> Mask:
    """Return where (b, 1, h, w) windows of heights and widths (b,) lie whose middles are drawn from all places."""
    u = draws.uniform((2,), torch.float64)

    def inside(axis: int, size: Labels) -> Mask:
        n = x.shape[2 + axis]
        first = (u[:, axis] * n).long() - size // 2
        at = torch.arange(n, device=x.device) - first[:, None]
        return (at >= 0) & (at < size[:, None])

    return (inside(0, height)[:, :, None] & inside(1, width)[:, None, :])[:, None]


def _between(v: Tensor, share: PerSample) -> Tensor:
    """Return ``share`` (b,) of each row and the rest of its partner's."""
    s = per_sample(share.to(v), v)
    return s * v + (1 - s) * v.flip(0)


def _beta(alpha: float, draws: Draws) -> PerSample:
    """Draw from Beta(alpha, alpha), (b,) float64: the quantiles of uniform numbers, computed on the CPU."""
    from scipy.special import betaincinv

    u = draws.uniform(dtype=torch.float64)
    return torch.from_numpy(betaincinv(alpha, alpha, u.cpu().numpy())).to(u)


def _policy(name: str) -> Any:
    """Build a policy of torchvision.

    Raises:
        MissingExtraError: torchvision is not installed, or does not fit torch.
    """
    v2 = need("torchvision.transforms.v2", "augment")
    kind, searched = POLICIES[name]
    return getattr(v2, kind)(*[v2.AutoAugmentPolicy[searched]] if searched else [])


def _seeded(policy: Any, image: Tensor, key: int) -> Tensor:
    torch.default_generator.manual_seed(key)  # of the CPU alone: torch.manual_seed would reach the devices, too
    out: Tensor = policy(image)
    return out
