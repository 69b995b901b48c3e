"""Lipschitz constants in l2: sound upper bounds of layers and of chains of layers, and the radius a margin proves.

Everything is computed in float64, and what rounding can have changed is added to each bound: a sum of n products has
an error of at most ``gamma(n)`` times the sum of their absolute values, in whatever order they are added (Higham 2002,
Accuracy and Stability of Numerical Algorithms, sec. 3.1). What is bounded is the network in exact arithmetic with the
weights that it has. Power iteration approaches the spectral norm from below and has no place here.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.core.errors import DataError, ModelError
from assay.core.types import Inputs, Labels, PerSample
from assay.models.line import default_batch
from assay.models.model import Model
from assay.nets import GroupSort

Shape: TypeAlias = tuple[int, ...]
Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
MaxPool: TypeAlias = nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d
AvgPool: TypeAlias = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d
AdaptiveAvgPool: TypeAlias = nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d

_WEIGHTED: Final = (nn.Linear, *get_args(Conv))

_UNIT: Final = 2.0**-53
"""The unit roundoff of float64."""

_UP: Final = 1 + 2.0**-50
"""A factor that outweighs up to seven roundings."""

_VALUES: Final = 2**22
"""Numbers in the matrices of one batch of frequencies."""


def gamma(n: int) -> float:
    """Return the relative error of a sum of n products, with two terms more for underflow and its own rounding."""
    return (n + 2) * _UNIT / (1 - (n + 2) * _UNIT)


# ---------------------------------------------------------------------------------------------------- one layer


@torch.no_grad()
def gram_bound(a: Tensor, iterations: int = 10) -> Tensor:
    """Bound the spectral norms (b,) of matrices (b, m, n) from above by Gram iteration.

    ``A_0 = A, A_{k+1} = A_k A_k^T``, so that ``|A_k|_2^2 = |A_{k+1}|_2``, and at the end ``|A_K|_2 <= |A_K|_F``: too
    large by a factor of at most ``rank(A)^(1 / 2^(K + 1))``. On the way back every level adds its rounding:
    ``|A_k|_2^2 <= |fl(A_k A_k^T)|_2 + gamma(n) |A_k|_F^2``. Matrices are scaled by powers of two, without rounding.

    References:
        Delattre, Barthelemy, Araujo & Allauzen 2023, arXiv:2305.16173, algorithm 1; the slack is ours.
    """
    a = a.double()
    a = a if a.shape[1] <= a.shape[2] else a.mT
    levels = []
    for _ in range(iterations):
        scale = _power_of_two(a.abs().amax((1, 2)))
        a = a / scale[:, None, None]
        levels.append((scale, gamma(a.shape[2]) * _frobenius(a) ** 2))
        a = a @ a.mT
    bound = _frobenius(a)
    for scale, slack in reversed(levels):
        bound = (_UP * (bound + slack)).sqrt() * scale * _UP
    return bound


def _power_of_two(v: Tensor) -> Tensor:
    """Return the least powers of two above v; 1 for 0."""
    return torch.where(v > 0, v / torch.frexp(v).mantissa, 1)


def _frobenius(a: Tensor) -> Tensor:
    """Bound the Frobenius norms (b,) of matrices (b, m, n) from above."""
    size: Tensor = torch.linalg.vector_norm(a, dim=(1, 2))
    return size * (1 + gamma(a[0].numel()))


def spectral_bound(layer: nn.Module, iterations: int = 10, fineness: int = 16) -> float:
    """Bound the spectral norm of a linear layer or a convolution from above, for inputs of any size.

    A convolution with zeros around its input is a part of the convolution of infinite images, whose norm is the largest
    of the norms of its symbol ``S(w) = sum_t K_t e^(-i w t)``. For a fixed vector u, ``|S(w) u|^2`` is a trigonometric
    polynomial, of degree ``d = k - 1`` along an axis with k taps. Such a polynomial with its maximum M at w0 is at
    least ``M cos(d (w - w0))`` within ``pi / d`` of w0, so its values at N > 2 d equidistant points give
    ``M <= max / cos(pi d / N)``, axis by axis. Stride s makes s channels of each, one a phase. Dilation d alone
    interleaves copies of the undilated convolution, and beside a stride it leaves the stride ``s / gcd(s, d)``.
    Circular padding takes the symbol at some of the frequencies; a stride then only drops outputs, and padding
    that yields more outputs than inputs repeats each output at most three times an axis. A transposed convolution is a
    part of the adjoint. Never more than ``sqrt(|A|_1 |A|_inf)`` is returned.

    Args:
        layer: ``Linear``, ``Conv1d`` to ``Conv3d`` (zero or circular padding), ``ConvTranspose1d`` to
            ``ConvTranspose3d``; in float64 or anything that converts to it without loss.
        iterations: of :func:`gram_bound`.
        fineness: frequencies per degree along an axis, at least 3; the bound of a two-dimensional convolution is at
            most ``1 / cos(pi / fineness)`` times the supremum (16: 2 %).

    Raises:
        ModelError: another layer or another padding, or weights that are not finite.

    References:
        Delattre et al. 2023, arXiv:2305.16173, sec. 4 (frequency by frequency); M. Riesz 1914, on trigonometric
        polynomials near their maximum; Ehlich & Zeller 1964 (grids).
    """
    if fineness < 3:
        raise ValueError(f"fineness of at least 3 expected, found {fineness}")
    w, copies = _taps(layer)
    norm = float(gram_bound(w, iterations)) if w.ndim == 3 else _symbol_bound(w, iterations, fineness)
    return min(norm, _schur_bound(w)) * copies * _UP


def _taps(layer: nn.Module) -> tuple[Tensor, float]:
    """Return the weights (g, o, i, *k) for stride 1, and a factor for outputs that circular padding repeats."""
    mode = getattr(layer, "padding_mode", "zeros")
    if not isinstance(layer, _WEIGHTED) or mode not in ("zeros", "circular"):
        raise _refused(f"{type(layer).__name__} with padding {mode!r}")
    w: Tensor = layer.weight.detach().double()
    if not w.isfinite().all():
        raise ModelError("finite weights", f"NaN or infinity in {type(layer).__name__}", "Load the network anew.")
    if isinstance(layer, nn.Linear):
        return w[None], 1.0
    wraps = mode == "circular" and layer.padding != "valid" and any(layer.padding)
    strides = [1 if wraps else s // math.gcd(s, d) for s, d in zip(layer.stride, layer.dilation, strict=True)]
    gaps = [-k % s for k, s in zip(w.shape[2:], strides, strict=True)]
    w = functional.pad(w, [v for gap in reversed(gaps) for v in (0, gap)])
    for axis, s in enumerate(strides, 2):
        w = w.reshape(*w.shape[:axis], -1, s, *w.shape[axis + 1 :]).movedim(axis + 1, 1).flatten(1, 2)
    return w.reshape(layer.groups, -1, *w.shape[1:]), _copies(layer) if wraps else 1.0


def _copies(layer: Conv) -> float:
    """Return the norm of the repetition of outputs by circular padding."""
    if layer.padding == "same":
        return 1.0
    paddings: Any = layer.padding
    axes = zip(paddings, layer.dilation, layer.kernel_size, strict=True)
    return math.sqrt(math.prod(3 if 2 * p > d * (k - 1) else 1 for p, d, k in axes))


def _symbol_bound(w: Tensor, iterations: int, fineness: int) -> float:
    """Bound the largest norm of the symbol of w (g, o, i, *k) over all frequencies."""
    degrees = [k - 1 for k in w.shape[3:]]
    points = [max(1, fineness * d) for d in degrees]
    half = [*points[:-1], points[-1] // 2 + 1]  # w is real: S(-w) is conjugate to S(w)
    grid = torch.cartesian_prod(*(torch.arange(n, device=w.device) for n in half)).view(-1, len(half))
    at = torch.cartesian_prod(*(torch.arange(k, device=w.device) for k in w.shape[3:])).view(-1, len(half))
    count = torch.tensor(points, device=w.device)
    w = w.reshape(*w.shape[:3], -1)
    # Entries are wrong by gamma(taps) for the sum and less than 128 units for the angle and its cosine or sine.
    slack = 2 * gamma(w.shape[3] + 128) * _frobenius(w.abs().sum(3)).max()
    largest = w.new_zeros(())
    for part in torch.split(grid, max(1, _VALUES // (4 * w[..., 0].numel()))):
        turns = ((part[:, None] * at) % count / count.double()).sum(2)
        matrices = _real(torch.polar(torch.ones_like(turns), -2 * math.pi * turns), w)
        largest = torch.maximum(largest, gram_bound(matrices, iterations).max() + slack)
    axes = sum(d > 0 for d in degrees)
    return float(largest) * math.pow(math.cos(math.pi / fineness), -axes / 2) * _UP


def _real(phases: Tensor, w: Tensor) -> Tensor:
    """Return the symbols of w (g, o, i, t) at phases (f, t) as real matrices (f g, 2 o, 2 i) of the same norms."""
    a, b = (torch.einsum("ft,goit->fgoi", v.contiguous(), w).flatten(0, 1) for v in (phases.real, phases.imag))
    return torch.cat([torch.cat([a, -b], 2), torch.cat([b, a], 2)], 1)


def _schur_bound(w: Tensor) -> float:
    """Bound the norm of w (g, o, i, *k), and that of its absolute values, by sqrt(|A|_1 |A|_inf)."""
    size = w.abs().flatten(3) if w.ndim > 3 else w.abs()[..., None]
    rows, columns = size.sum((2, 3)).max(), size.sum((1, 3)).max()
    return math.sqrt(float(rows * columns)) * (1 + gamma(size[0].numel()))


# ---------------------------------------------------------------------------------------------------- chains


@final
@dataclass(frozen=True, slots=True)
class Step:
    """A layer f of a chain, with what is known of it in l2.

    ``|f(x) - f(y)| <= lipschitz |x - y|``, and rounding changes f(x), with n entries, by no more than
    ``gamma(terms) (growth |x| + shift sqrt(n))``.
    """

    layer: nn.Module
    lipschitz: float
    growth: float = 1.0
    shift: float = 0.0
    terms: int = 0


Rule: TypeAlias = Callable[[Any, Shape], Step]


@final
class Normalise(nn.Module):
    """``(x - mean) / std``, per channel (axis 1)."""

    def __init__(self, mean: Any, std: Any) -> None:
        super().__init__()
        self.mean, self.std = (torch.as_tensor(v, dtype=torch.float64).flatten() for v in (mean, std))

    def forward(self, x: Inputs) -> Inputs:
        mean, std = (v.to(x.device).view(-1, *[1] * (x.ndim - 2)) for v in (self.mean, self.std))
        return (x - mean) / std


def _refused(what: str) -> ModelError:
    known = ", ".join(kind.__name__ for kind in (nn.Sequential, *_RULES) if kind is not Normalise)
    return ModelError(
        f"layers whose Lipschitz constant is known, one after another ({known})",
        what,
        "Prove by another method (crown, smoothing).",
    )


def _weighted(layer: nn.Linear | Conv, _: Shape) -> Step:
    w, bias = layer.weight, layer.bias
    taps, copies = _taps(layer)
    return Step(
        layer,
        spectral_bound(layer),
        growth=_schur_bound(taps) * copies,
        shift=0.0 if bias is None else float(bias.abs().max()),
        terms=max(w[0].numel(), w[:, 0].numel()),
    )


def _normalise(layer: Normalise, _: Shape) -> Step:
    steepest = 1 / float(layer.std.min())
    return Step(layer, steepest, steepest, steepest * float(layer.mean.abs().max()), terms=8)


def _batch_norm(layer: BatchNorm, _: Shape) -> Step:
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise _refused(f"{type(layer).__name__} with the statistics of the batch")
    scale = (var + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * layer.weight.abs()
    shift = (mean * scale).abs() + (0 if layer.bias is None else layer.bias.abs())
    steepest = float(scale.max())
    return Step(layer, steepest, steepest, float(shift.max()), terms=8)


def _max_pool(axes: int, layer: MaxPool, _: Shape) -> Step:
    """Each input is in so many windows along an axis, and a maximum moves no more than the largest of its inputs."""
    if layer.return_indices:
        raise _refused(f"{type(layer).__name__} that returns indices")
    settings = zip(*(_each(v, axes) for v in (layer.kernel_size, layer.stride, layer.dilation)), strict=True)
    return Step(layer, math.sqrt(math.prod(-(-k // (s // math.gcd(s, d))) for k, s, d in settings)))


def _avg_pool(axes: int, layer: AvgPool, _: Shape) -> Step:
    """As a matrix: rows that sum to at most 1, and columns with one entry for each window."""
    if getattr(layer, "divisor_override", None):
        raise _refused(f"{type(layer).__name__} with a divisor of its own")
    kernel, stride, padding = (_each(v, axes) for v in (layer.kernel_size, layer.stride, layer.padding))
    windows = math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True))
    cut = layer.ceil_mode or (any(padding) and not layer.count_include_pad)
    gain = math.sqrt(windows / (1 if cut else math.prod(kernel)))
    return Step(layer, gain, gain, terms=math.prod(kernel))


def _adaptive_avg_pool(axes: int, layer: AdaptiveAvgPool, shape: Shape) -> Step:
    sizes = [n if m is None else m for n, m in zip(shape[-axes:], _each(layer.output_size, axes), strict=True)]
    if any(n % m for n, m in zip(shape[-axes:], sizes, strict=True)):
        raise _refused(f"{type(layer).__name__} from {shape[-axes:]} to {tuple(sizes)}, with windows that overlap")
    count = math.prod(shape[-axes:]) // math.prod(sizes)
    gain = 1 / math.sqrt(count)
    return Step(layer, gain, gain, terms=count)


def _each(v: Any, axes: int) -> tuple[Any, ...]:
    """Return a setting for each axis."""
    return tuple(v) if isinstance(v, tuple | list) else (v,) * axes


def _same(layer: nn.Module, _: Shape) -> Step:
    return Step(layer, 1.0)


def _slope(steepest: float | Callable[[Any], float]) -> Rule:
    """Return the rule of a function of single numbers f, |f(v)| <= max(1, steepest) (1 + |v|)."""

    def rule(layer: nn.Module, _: Shape) -> Step:
        gain = steepest(layer) if callable(steepest) else steepest
        return Step(layer, gain, max(1.0, gain), max(1.0, gain), terms=16)

    return rule


# The seam for further layers: from a layer and the shape of one sample's input to what is known of it.
_RULES: Final[dict[type[nn.Module], Rule]] = {
    Normalise: _normalise,
    **dict.fromkeys(_WEIGHTED, _weighted),
    **dict.fromkeys(get_args(BatchNorm), _batch_norm),
    **{kind: partial(_max_pool, axes) for axes, kind in enumerate(get_args(MaxPool), 1)},
    **{kind: partial(_avg_pool, axes) for axes, kind in enumerate(get_args(AvgPool), 1)},
    **{kind: partial(_adaptive_avg_pool, axes) for axes, kind in enumerate(get_args(AdaptiveAvgPool), 1)},
    **dict.fromkeys((nn.Identity, nn.Flatten, nn.Unflatten, GroupSort), _same),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _same),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softsign), _slope(1.0)),
    nn.Sigmoid: _slope(0.25),
    nn.LeakyReLU: _slope(lambda f: max(1.0, abs(f.negative_slope))),
    nn.PReLU: _slope(lambda f: max(1.0, float(f.weight.abs().max()))),
    nn.ELU: _slope(lambda f: max(1.0, abs(f.alpha))),
    nn.SiLU: _slope(1.0999),  # 1.09984 at 2.3994
    nn.GELU: _slope(1.1291),  # 1.12891 at sqrt(2); 1.12900 with tanh
}


def _layers(net: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Give the layers of nested ``Sequential`` in turn, each with its name."""
    if type(net).forward is not nn.Sequential.forward or _hooked(net):
        yield name, net
        return
    for key, child in net.named_children():
        yield from _layers(child, f"{name}.{key}" if name else key)


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _step(name: str, layer: nn.Module, shape: Shape) -> Step:
    """Return what is known of a layer; a subclass with a forward of its own, or with hooks, is another layer."""
    for kind, rule in _RULES.items():
        if type(layer).forward is kind.forward and isinstance(layer, kind) and not _hooked(layer):
            return rule(layer, shape)
    raise _refused(f"{name or 'the network'}: {type(layer).__name__}{' with hooks' * _hooked(layer)}")


@torch.no_grad()
def _chain(model: Model, shape: Shape) -> list[Step]:
    """Return the layers of a model in float64, copied, for inputs of a shape."""
    if model.module is None or model.probabilities or model.rejects:
        what = "a callable" if model.module is None else "probabilities or a class for rejection"
        raise _refused(f"{model.name}, {what}")
    net = copy.deepcopy(model.module).double().eval()
    layers = [*_layers(net, "")]
    if model.mean is not None:
        layers.insert(0, ("normalisation", Normalise(model.mean, model.std)))
    first = next(net.parameters(), torch.empty(0))
    x = torch.zeros(1, *shape, dtype=torch.float64, device=first.device)
    steps = []
    for name, layer in layers:
        steps.append(_step(name, layer, tuple(x.shape[1:])))
        x = _applied(name, layer, x)
    return steps


def _applied(name: str, layer: nn.Module, x: Inputs) -> Inputs:
    """Return what a layer makes of a single input."""
    try:
        out: Tensor = layer(x)
    except RuntimeError as e:
        raise ModelError(f"inputs that fit {name}", f"{tuple(x.shape)} ({e})", "Check shape and channels.") from e
    if len(out) != 1:
        raise _refused(f"{name}: {type(layer).__name__}, which mixes samples")
    return out


def _product(steps: list[Step]) -> float:
    """Return the product of all Lipschitz constants; each factor makes up for the rounding of its own rule too."""
    return math.prod(s.lipschitz * _UP for s in steps)


def lipschitz_bound(model: Model, shape: Shape) -> float:
    """Bound the l2 Lipschitz constant of a model's logits from above, as the product over its layers.

    The layers stand in (nested) ``Sequential``; units of the logits by units of the box, normalisation included.

    Args:
        model: a chain of layers.
        shape: of one input, without the batch.

    Raises:
        ModelError: a layer that has no rule, by name, or weights that are not finite.

    References:
        Szegedy et al. 2013, arXiv:1312.6199, sec. 4.3.
    """
    return _product(_chain(model, shape))


@torch.no_grad()
def lipschitz_radius(model: Model, x: Inputs, y: Labels) -> PerSample:
    """Return l2 radii (n,), float64, within which no input is classified wrongly; 0 where x itself is.

    With features h before the last linear layer (rows w_j), whose Lipschitz constant is at most L, the margin of class
    y over j changes by at most ``|w_y - w_j| L`` a unit of distance: the radius is the least of
    ``(z_y - z_j) / (|w_y - w_j| L)``, after taking the rounding of the forward pass off the margins. The box is not
    used. For two classes and no hidden layer the radius is exact.

    *Cost* one forward pass, in float64, and the bounds of all layers, once.

    Args:
        model: a chain of layers as for :func:`lipschitz_bound`, the last a ``Linear``.
        x: inputs (n, *f) inside the box.
        y: the true labels (n,).

    Raises:
        ModelError: as of :func:`lipschitz_bound`, or the last layer is not linear.
        DataError: labels that the model has no class for.

    References:
        Tsuzuku, Sato & Sugiyama 2018, arXiv:1802.04034, sec. 4; by pairs: Leino, Wang & Fredrikson 2021,
        arXiv:2102.08452, sec. 2.
    """
    steps = _chain(model, tuple(x.shape[1:]))
    head = steps[-1].layer
    if not isinstance(head, nn.Linear):
        raise _refused(f"{type(head).__name__} at the end, where a Linear gives the logits")
    if not ((y >= 0) & (y < head.out_features)).all():
        found = f"labels from {int(y.min())} to {int(y.max())}"
        raise DataError(
            f"labels from 0 to {head.out_features - 1}", found, "Check that model and data belong together."
        )
    rows = default_batch(x.shape[1:], x.device)
    parts = zip(torch.split(x, rows), torch.split(y, rows), strict=True)
    return torch.cat([_radius(steps[:-1], head, a.to(head.weight), b.to(head.weight.device)) for a, b in parts])


def _radius(steps: list[Step], head: nn.Linear, x: Inputs, y: Labels) -> PerSample:
    h, error = _features(steps, x)
    w = head.weight
    bias = w.new_zeros(len(w)) if head.bias is None else head.bias
    slack = gamma(w.shape[1] + 4)
    apart = torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist")[y] * (1 + slack)
    z = h @ w.T + bias
    terms = w.norm(dim=1) * h.norm(dim=1, keepdim=True) + bias.abs()
    own = _at(terms, y) + terms  # the absolute values of what is added up to a margin
    margin = _at(z, y) - z - apart * error[:, None] * _UP - 2 * slack * own
    radius = torch.where(margin > 0, margin / (_product(steps) * apart), 0.0) / _UP
    return radius.scatter(1, y[:, None], torch.inf).amin(1)


def _at(v: Tensor, y: Labels) -> Tensor:
    return v.gather(1, y[:, None])


def _features(steps: list[Step], x: Inputs) -> tuple[Tensor, PerSample]:
    """Return what the layers make of x, and a bound (n,) of how far rounding has moved it in l2."""
    error = x.new_zeros(len(x))
    x = x.clone()  # layers may work in place
    for s in steps:
        size = x.flatten(1).norm(dim=1)
        x = s.layer(x)
        own = gamma(s.terms) * (s.growth * size + s.shift * math.sqrt(x[0].numel()))
        error = s.lipschitz * _UP * error + 2 * own  # twice, for the rounding of these lines
    return x, error
