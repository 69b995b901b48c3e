"""Transforms of the gradient, and of where it is taken, that compose with any gradient attack.

They were made for perturbations that fool other networks too: a gradient that is averaged over time, over copies of the
input or over its surroundings depends less on the network that gave it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, final

import torch
from torch import Tensor

from assay.attacks.loop import Around, GradientAttack, HasX, without_gradient
from assay.core.errors import DataError
from assay.core.registry import UsageError, one_of
from assay.core.types import Inputs, Logits, Mask, PerSample, Rows, choose, per_sample
from assay.models.door import Door, Gradient
from assay.threats.norms import TINY
from assay.threats.problem import Problem

M = TypeVar("M")


class Transform(ABC, Generic[M]):
    """One rule for the gradient of a step; M is what it remembers, a NamedTuple of tensors, one row a sample.

    A transform may look at ``copies`` versions of a point; it gets the gradient of each, with respect to the point.
    """

    __slots__ = ()

    @property
    def copies(self) -> int:
        """The number of versions of a point that one gradient takes."""
        return 1

    @property
    def moves_first(self) -> bool:
        """Say whether copy 0 is not the point itself."""
        return False

    def start(self, p: Problem) -> M:
        """Return the memory before the first step; refuse inputs that the transform is not defined for."""
        return Nothing()  # type: ignore[return-value]

    def copy(self, p: Problem, x: Inputs, number: int) -> Inputs:
        """Return version ``number`` of points x, differentiable with respect to them, inside the box."""
        return x

    @abstractmethod
    def absorb(self, p: Problem, memory: M, grad: Inputs, number: int) -> tuple[M, Inputs]:
        """Take the gradient through copy ``number``; return the memory and, after the last copy, the new gradient."""

    def ahead(self, p: Problem, memory: M, x: Inputs) -> Inputs:
        """Return where to ask instead of x."""
        return x


class Nothing(NamedTuple):
    """No memory."""


class Sum(NamedTuple):
    """The sum of the gradients of a step so far."""

    total: Inputs


class Velocity(NamedTuple):
    """The gradients of all steps so far."""

    g: Inputs


class Surroundings(NamedTuple):
    """What gradients around the last points were more than at them; and the sums of this step."""

    variance: Inputs
    centre: Inputs
    around: Inputs


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Momentum(Transform[Velocity]):
    """MI and NI: g <- decay * g + grad / mean|grad|, and g stands for the gradient.

    With ``look_ahead`` the next gradient is taken at P(x + look_ahead * eps * decay * g) (Nesterov), for linf; for
    other norms the same move is scaled to the size that it has there.

    *Differs from the paper in*: the mean of |grad| instead of its sum, as in the published code: with the sum, the look
    ahead of images would be of no size. The point ahead is drawn into ball and box, so that it may succeed as well.

    References:
        MI: Dong et al. 2018, arXiv:1710.06081, algorithm 1. NI: Lin et al. 2020, arXiv:1908.06281, sec. 3.2.
    """

    decay: float = 1.0
    look_ahead: float = 0.0

    def start(self, p: Problem) -> Velocity:
        return Velocity(torch.zeros_like(p.x0))

    def absorb(self, p: Problem, memory: Velocity, grad: Inputs, number: int) -> tuple[Velocity, Inputs]:
        mean = grad.flatten(1).abs().mean(1).clamp_min(TINY)
        g = self.decay * memory.g + grad / per_sample(mean, grad)
        return Velocity(g), g

    def ahead(self, p: Problem, memory: Velocity, x: Inputs) -> Inputs:
        if not self.look_ahead:
            return x
        length = self.look_ahead * reach(p) * self.decay / p.norm.size(torch.ones_like(x))
        return p.project(x + per_sample(length, x) * memory.g)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Diversity(Transform[Nothing]):
    """DI: the gradient of the loss of the input shrunk and put at a random place, each sample in its own way.

    With probability ``chance`` a sample is shrunk by a random factor between ``smallest`` and 1 and put at a random
    place of a frame of the size of the input, black outside (the low end of the box). All axes after the channels are
    shrunk, so that it works for images and for sequences.

    *Differs from the paper in*: the frame has the size that the network takes, instead of a larger one; factors and
    places are real numbers (linear interpolation) instead of whole pixels.

    References:
        Xie et al. 2019, arXiv:1803.06978, sec. 3.2.
    """

    chance: float = 0.5
    smallest: float = 0.9

    @property
    def moves_first(self) -> bool:
        return True

    def start(self, p: Problem) -> Nothing:
        _spatial_axes(p.x0, "Diversity")
        return Nothing()

    def copy(self, p: Problem, x: Inputs, number: int) -> Inputs:
        u = p.draws.uniform((1 + x.ndim,), x.dtype)
        left, size = u[:, 0] >= self.chance, self.smallest + (1 - self.smallest) * u[:, 1]
        y = x - p.box.lo
        for axis in range(2, x.ndim):
            y = _shrunk(y, axis, size, u[:, axis])
        y = p.box.lo + y
        return choose(left, x, y + (y.clamp(p.box.lo, p.box.hi) - y).detach())  # rounding must not leave the box

    def absorb(self, p: Problem, memory: Nothing, grad: Inputs, number: int) -> tuple[Nothing, Inputs]:
        return memory, grad


KERNELS = ("gaussian", "uniform", "linear")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothing(Transform[Nothing]):
    """TI: the gradient convolved with a kernel over all axes after the channels.

    Approximates the mean gradient over shifted copies of the input. The kernel is a product of one-dimensional ones.

    Args:
        size: of the kernel, odd; 1 leaves the gradient as it is.
        kernel: ``gaussian`` (three standard deviations at the edge), ``uniform`` or ``linear``.

    References:
        Dong et al. 2019, arXiv:1904.02884, sec. 3.2 and 3.3.
    """

    size: int = 15
    kernel: str = "gaussian"

    def __post_init__(self) -> None:
        one_of("kernel", self.kernel, KERNELS)
        if self.size < 1 or self.size % 2 == 0:
            raise UsageError("an odd kernel size", f"{self.size}", "For example 15.")

    def start(self, p: Problem) -> Nothing:
        _spatial_axes(p.x0, "Smoothing")
        return Nothing()

    def absorb(self, p: Problem, memory: Nothing, grad: Inputs, number: int) -> tuple[Nothing, Inputs]:
        for axis in range(2, grad.ndim):
            grad = _smoothed(grad, axis, self.weights())
        return memory, grad

    def weights(self) -> list[float]:
        """Return the one-dimensional kernel; its sum is 1."""
        half = self.size // 2
        away = [abs(i - half) for i in range(self.size)]
        shape = {
            "gaussian": [math.exp(-((3 * d / max(half, 1)) ** 2) / 2) for d in away],
            "uniform": [1.0 for _ in away],
            "linear": [1 - d / (half + 1) for d in away],
        }[self.kernel]
        return [v / sum(shape) for v in shape]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Scales(Transform[Sum]):
    """SI: the mean gradient over copies of the input whose values are 1, 1/2, 1/4, ... of it (from the box's low end).

    References:
        Lin et al. 2020, arXiv:1908.06281, sec. 3.3.
    """

    count: int = 5

    def __post_init__(self) -> None:
        _at_least("Scales.count", self.count, 1)

    @property
    def copies(self) -> int:
        return self.count

    def start(self, p: Problem) -> Sum:
        return Sum(torch.zeros_like(p.x0))

    def copy(self, p: Problem, x: Inputs, number: int) -> Inputs:
        return p.box.lo + (x - p.box.lo) / 2**number if number else x

    def absorb(self, p: Problem, memory: Sum, grad: Inputs, number: int) -> tuple[Sum, Inputs]:
        total = memory.total + grad if number else grad
        return Sum(total), total / self.count


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Variance(Transform[Surroundings]):
    """VMI: grad + v stands for the gradient; then v <- mean of the gradients around the point - grad.

    The points around are uniform in the ball of radius ``radius`` * eps, and inside the box.

    Args:
        count: number of points around; each costs a forward and a backward pass at every step.
        radius: of the ball around, as a fraction of eps.

    *Differs from the paper in*: points around are drawn into the box.

    References:
        Wang & He 2021, arXiv:2103.15571, algorithm 1.
    """

    count: int = 20
    radius: float = 1.5

    def __post_init__(self) -> None:
        _at_least("Variance.count", self.count, 1)

    @property
    def copies(self) -> int:
        return 1 + self.count

    def start(self, p: Problem) -> Surroundings:
        zero = torch.zeros_like(p.x0)
        return Surroundings(zero, zero, zero)

    def copy(self, p: Problem, x: Inputs, number: int) -> Inputs:
        if not number:
            return x
        near = x.detach() + p.norm.sample(x, self.radius * reach(p), p.draws)
        return x + (near.clamp(p.box.lo, p.box.hi) - x).detach()

    def absorb(self, p: Problem, memory: Surroundings, grad: Inputs, number: int) -> tuple[Surroundings, Inputs]:
        if not number:
            return memory._replace(centre=grad, around=torch.zeros_like(grad)), grad
        around = memory.around + grad
        if number < self.count:
            return memory._replace(around=around), grad
        tuned = memory.centre + memory.variance
        return Surroundings(around / self.count - memory.centre, memory.centre, around), tuned


class Memories(tuple[Any, ...]):
    """The memories of several transforms, as a part of a state."""

    def __new__(cls, *parts: Any) -> "Memories":
        return super().__new__(cls, parts)


class Seen(NamedTuple):
    """What the model said about the point itself, until all copies have been asked about."""

    success: Mask
    loss: PerSample
    logits: Logits


class TransformedState(NamedTuple):
    """The next point; the attack's own state; what each transform remembers."""

    x: Inputs
    inner: Any
    memories: Memories
    seen: Seen


_STREAM = 0x7E57
"""Names the random numbers of transforms, so that they are none of the attack's own."""


@final
@dataclass(frozen=True, slots=True)
class Transformed(Around, GradientAttack[TransformedState]):  # type: ignore[override]
    """An attack whose gradients go through transforms, the first of them nearest to the model.

    Every step asks about all copies of the point that the transforms want (their numbers multiply), and the attack then
    takes its own step with the gradient that they return. What the attack learns of success and loss is that of the
    point itself, and only this point counts.

    *Sees* the gradient. *Cost* a step: one forward and one backward for each copy; with :class:`Diversity`, one more
    forward, for the point itself.

    Args:
        attack: any gradient attack that asks for a gradient at every query, for example :class:`assay.attacks.BIM`.
        transforms: in the order in which the gradient meets them.

    Example:
        >>> from assay.attacks import BIM
        >>> attack = Transformed(BIM(steps=20), (Scales(count=3), Momentum()))
        >>> attack.questions
        60
    """

    attack: GradientAttack[Any]
    transforms: tuple[Transform[Any], ...]

    def __post_init__(self) -> None:
        if not all(self.attack.differentiates(k) for k in range(self.attack.questions)):
            what = type(self.attack).__name__
            raise UsageError("an attack that asks for a gradient at every query", what, "For example bim or pgd.")

    @property
    def questions(self) -> int:
        return self.attack.questions * self._round

    @property
    def _copies(self) -> int:
        return math.prod(t.copies for t in self.transforms)

    @property
    def _plain(self) -> int:
        """The number of queries of a step, 0 or 1, that only ask about success at the point itself."""
        return int(any(t.moves_first for t in self.transforms))

    @property
    def _round(self) -> int:
        """The number of queries of a step."""
        return self._copies + self._plain

    def differentiates(self, k: int) -> bool:
        return k < self.questions and k % self._round >= self._plain

    def query(self, door: Door, x: Inputs, p: Problem, k: int) -> Gradient:
        copy = k % self._round - self._plain
        if not self.differentiates(k):
            return without_gradient(door, x, p, self.loss)
        if not copy and not self._plain:
            return door.gradient(x, p, self.loss)

        def through(v: Inputs, rows: Rows) -> Inputs:
            return self._version(p.take(rows), v, k, copy)

        g = door.gradient(x, p, self.loss, through)  # of another point: its success says nothing about this one
        return Gradient(torch.zeros_like(g.success), torch.full_like(g.loss, -torch.inf), g.logits, g.grad)

    def init(self, p: Problem) -> TransformedState:
        inner: HasX = self.attack.init(p)
        memories = Memories(*(t.start(p) for t in self.transforms))
        nothing = Seen(p.full(0.0) > 0, p.full(-torch.inf), p.x0.new_zeros(len(p), 0))
        return TransformedState(inner.x, inner, memories, nothing)

    def update(self, p: Problem, s: TransformedState, e: Gradient, k: int) -> TransformedState:
        step, at = divmod(k, self._round)
        s = s._replace(seen=Seen(e.success, e.loss, e.logits)) if at == 0 else s
        if at < self._plain:
            return s
        memories, grad = self._absorbed(p, s.memories, e.grad, at - self._plain)
        s = s._replace(memories=memories)
        if at + 1 < self._round:
            return s
        inner = self.attack.update(p, s.inner, Gradient(*s.seen, grad), step)
        x: Inputs = inner.x
        if k + 1 < self.questions:  # the last point is asked about as it is
            for t, memory in zip(self.transforms, memories, strict=True):
                x = t.ahead(p, memory, x)
        return s._replace(x=x, inner=inner)

    def _digits(self, copy: int) -> Iterable[int]:
        """Return the number of the copy for each transform; the first varies fastest."""
        for t in self.transforms:
            copy, digit = divmod(copy, t.copies)
            yield digit

    def _version(self, p: Problem, x: Inputs, k: int, copy: int) -> Inputs:
        """Return a copy of x, the last transform first: the gradient meets them in the other order."""
        for i, (t, digit) in reversed([*enumerate(zip(self.transforms, self._digits(copy), strict=True))]):
            x = t.copy(p.stage(_STREAM).stage(k).stage(i), x, digit)
        return x

    def _absorbed(self, p: Problem, memories: Memories, grad: Inputs, copy: int) -> tuple[Memories, Inputs]:
        """Pass a gradient on, as far as the transforms that have got all their copies let it."""
        new = [*memories]
        for i, (t, digit) in enumerate(zip(self.transforms, self._digits(copy), strict=True)):
            new[i], grad = t.absorb(p, memories[i], grad, digit)
            if digit + 1 < t.copies:
                break
        return Memories(*new), grad


def reach(p: Problem) -> PerSample:
    """Return eps, or where there is none the width of the box."""
    return torch.where(p.radius.isinf(), p.box.width, p.radius)


def _at_least(what: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{what} >= {least}", f"{value}", "Leave the transform out instead.")


def _spatial_axes(x: Inputs, what: str) -> None:
    if x.ndim < 3:
        raise DataError(
            f"images (b, c, h, w) or sequences (b, c, t) for {what}",
            f"inputs {tuple(x.shape)}",
            "Reshape the inputs, or leave this transform out.",
        )


def _shrunk(x: Inputs, axis: int, size: PerSample, place: PerSample) -> Inputs:
    """Shrink x along an axis by a factor a sample, and put it at a place from 0 (start) to 1 (end); zero elsewhere.

    Position i of the result lies at (i + 1/2 - gap) / size - 1/2 of x: a matrix a sample, of two weights a row, which
    unlike sampling on a grid has a gradient that is summed in the same order every time.
    """
    n = x.shape[axis]
    at = torch.arange(n, device=x.device, dtype=x.dtype)
    gap = (1 - size) * n * place
    source = (at + 0.5 - gap[:, None]) / size[:, None] - 0.5
    weights = (1 - (source[:, :, None] - at).abs()).clamp_min(0)  # (b, n, n): row i of the result, column of x
    flat = x.movedim(axis, 1).flatten(2)
    return torch.bmm(weights, flat).view(x.movedim(axis, 1).shape).movedim(1, axis)


def _smoothed(x: Inputs, axis: int, weights: list[float]) -> Inputs:
    """Convolve along one axis, zero outside; term by term, so that the order of the sum never changes."""
    n, half = x.shape[axis], len(weights) // 2
    pad = x.new_zeros([half if i == axis else v for i, v in enumerate(x.shape)])
    wide = torch.cat([pad, x, pad], axis)
    terms: list[Tensor] = [w * wide.narrow(axis, i, n) for i, w in enumerate(weights)]
    return torch.stack(terms).sum(0) if len(terms) < 4 else sum(terms[1:], terms[0])
