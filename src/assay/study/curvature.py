"""Numbers for the shape of the loss around a sample: its largest curvatures, and how far from linear it is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias, final

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn

from assay.attacks.attack import needs_eps
from assay.attacks.gradient.pgd import climb
from assay.attacks.losses import cross_entropy
from assay.core.errors import DataError, ModelError, ThreatError
from assay.core.random import Draws
from assay.core.types import Inputs, PerSample
from assay.models import Door, Model, as_model
from assay.models.door import Gradient, Loss
from assay.models.loaded import Net
from assay.models.model import Live
from assay.models.repairs import Float64
from assay.threats import Problem, Threat
from assay.threats.threat import outside_box

Classifier: TypeAlias = Model | nn.Module | Net
"""What these studies are made of: an :class:`assay.Model`, or a network that takes inputs in [0, 1]."""

_DENSE: Final = 24
"""Inputs of at most this many values get their whole Hessian: ARPACK needs more of them than it keeps vectors."""

_STEP: Final = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far apart gradients are compared, in widths of the box. Measured on a plain MNIST network: from 1e-5 down the
eigenvalues are those of its exact Hessian; at 1e-4 kinks of ReLUs get in between."""

_TOLERANCE: Final = 1e-4
_SUPPORT: Final = 0.05


@final
@dataclass(frozen=True, slots=True)
class Curvature:
    """The largest eigenvalues of the Hessian of a loss with respect to the input, in falling order.

    There are none where the model has no gradient. ``converged`` says whether Lanczos' method got all of them to its
    tolerance; those that it did not get are left out.
    """

    eigenvalues: tuple[float, ...]
    converged: bool
    forwards: int
    backwards: int


@final
@dataclass(frozen=True, slots=True)
class Linearity:
    """The largest |l(x + d) - l(x) - <d, g>| that ascent found in the ball: a lower bound on the true maximum."""

    error: float
    forwards: int
    backwards: int


def pose_one(
    live: Live, x: Tensor, y: int, threat: Threat, seed: int, index: int, dtype: torch.dtype = torch.float32
) -> Problem:
    """Pose the problem of a threat for one sample x (*f), at row 0 of a door; its random numbers go by ``index``.

    Raises:
        DataError: x is no floating-point tensor inside the box.
        ThreatError: an eps that does not fit the box.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.ndim:
        found = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise DataError("one sample (*f), a tensor of floats", found, "Convert: torch.as_tensor(x).float().")
    box = live.model.domain
    if not ((x >= box.lo) & (x <= box.hi)).all():
        raise outside_box(box, (float(x.min()), float(x.max())), [index], 1)
    threat = replace(threat.within(box, x.numel()), targeted=False, quantize=None)
    at = torch.tensor([index], device=live.device)
    label = torch.tensor([int(y)], device=live.device)
    x0 = x.detach()[None].to(live.device, dtype).contiguous()
    return Problem.pose(x0, label, threat, Draws.of(seed, at))


def copies(p: Problem, n: int) -> Problem:
    """Return the problem of one sample n times, all of them counted as that sample."""
    return p.take(torch.zeros(n, dtype=torch.int64, device=p.x0.device))


def curvature(
    model: Classifier, x: Tensor, y: int, count: int = 3, step: float | None = None, seed: int = 0, *,
    index: int = 0, loss: Loss = cross_entropy, device: torch.device | str | None = None,
) -> Curvature:  # fmt: skip
    """Return the largest (not: largest in size) eigenvalues of the Hessian of the loss at x.

    Lanczos' method (scipy's ARPACK) on products H v = (g(x + h v) - g(x - h v)) / 2h, |v|_2 = 1: two gradients a
    product, some twenty products. They are taken in float64, for a kink of a ReLU that is nearer than h spoils them:
    between kinks they are exact to many digits, and then say nothing about the kinks beyond. A network that cannot
    compute in float64 gets a wider h, and its eigenvalues are rough.

    Args:
        model: whose loss.
        x: one sample (*f) inside the box.
        y: its label.
        count: how many eigenvalues.
        step: h, in widths of the box; None for 1e-6 in float64, 1e-3 in float32.
        seed: of the vector to start from.
        index: of the sample in its data, for its random numbers.
        loss: what is differentiated twice.
        device: where to run; None for where the model's parameters are.

    Raises:
        DataError: x is not inside the box, or y no class of the model.

    References:
        Lanczos 1950; for products by differences of gradients, Moosavi-Dezfooli et al. 2019, arXiv:1811.09716, eq. 4.
    """
    model = as_model(model)
    how = (x, y, count, step, seed, index, loss, device)
    try:
        return _curvature(replace(model, repairs=(*model.repairs, Float64())), torch.float64, *how)
    except ModelError as e:
        if e.code != "model-failed":
            raise
    return _curvature(model, torch.float32, *how)


def _curvature(
    model: Model, dtype: torch.dtype, x: Tensor, y: int, count: int, step: float | None, seed: int, index: int,
    loss: Loss, device: torch.device | str | None,
) -> Curvature:  # fmt: skip
    with model.frozen(device) as live:
        door = Door(live, 1)
        p = copies(pose_one(live, x, y, Threat("l2"), seed, index, dtype), 2)
        n, h = p.x0[0].numel(), (_STEP[dtype] if step is None else step) * p.box.width

        def product(v: np.ndarray) -> np.ndarray:
            size = float(np.linalg.norm(v))
            if size == 0:
                return np.zeros(n)
            d = torch.from_numpy(v.reshape(p.x0.shape[1:]) * (h / size)).to(p.x0)
            up, down = door.gradient(torch.stack([p.x0[0] + d, p.x0[0] - d]), p, loss).grad.flatten(1).double()
            bent: np.ndarray = ((up - down) * (size / (2 * h))).cpu().numpy()
            return bent

        start = p.draws.fold(0).normal((n,), torch.float64)[0].cpu().numpy()
        values, converged = _largest(product, start, count)
        known = values if door.differentiable else ()
        return Curvature(known, converged, int(door.forwards[0]), int(door.backwards[0]))


def _largest(
    product: Callable[[np.ndarray], np.ndarray], start: np.ndarray, count: int
) -> tuple[tuple[float, ...], bool]:
    """Return the largest eigenvalues of a symmetric operator on vectors (n,), and whether these are all."""
    n = len(start)
    if n <= max(_DENSE, 2 * count):
        hessian = np.stack([product(column) for column in np.eye(n)])
        found, converged = np.linalg.eigvalsh((hessian + hessian.T) / 2), True
    elif not product(start).any():  # ARPACK refuses the zero operator
        found, converged = np.zeros(count), True
    else:
        operator = LinearOperator((n, n), matvec=lambda v: product(v.reshape(-1)), dtype=np.float64)
        try:
            found, converged = eigsh(operator, count, which="LA", v0=start, tol=_TOLERANCE)[0], True
        except ArpackNoConvergence as e:
            found, converged = e.eigenvalues, False
    return tuple(sorted(map(float, found), reverse=True)[:count]), converged


def linearity(
    model: Classifier, x: Tensor, y: int, threat: Threat | str, steps: int = 20, restarts: int = 4, seed: int = 0, *,
    index: int = 0, loss: Loss = cross_entropy, device: torch.device | str | None = None,
) -> Linearity:  # fmt: skip
    """Return how far the loss is from its tangent plane in the ball, by projected ascent from random starts.

    What is ascended is |l(x + d) - l(x) - <d, g>|, g the gradient at x; steps fall from half the radius to 0.

    Raises:
        ThreatError: no eps, or the norm l0, whose ball has no size.

    References:
        Qin et al. 2019, arXiv:1907.02610, eq. 5 (the local linearity measure).
    """
    threat = Threat.parse(threat) if isinstance(threat, str) else threat
    _sized(threat)
    with as_model(model).frozen(device) as live:
        door = Door(live, 1)
        one = pose_one(live, x, y, threat, seed, index)
        needs_eps(one, "local linearity")
        here = door.gradient(one.x0, one, loss)
        keys = torch.cat([one.draws.fold(r).keys for r in range(restarts)])
        p = replace(copies(one, restarts), draws=Draws(keys))
        at, worst = p.start("uniform"), 0.0
        for k in range(steps):
            e = door.gradient(at, p, loss)
            off = off_tangent(here, p, at, e)
            worst = max(worst, float(off.abs().max()))
            way = (e.grad - here.grad) * off.sign().to(at.dtype).view(-1, *[1] * (at.ndim - 1))
            at = climb(p, at, way, 0.5 * (1 - k / steps), _SUPPORT)
        return Linearity(worst, int(door.forwards[0]), int(door.backwards[0]))


def off_tangent(here: Gradient, p: Problem, x: Inputs, e: Gradient) -> PerSample:
    """Return l(x) - l(x0) - <x - x0, g>: ``here`` is the answer at x0, for one sample, ``e`` those at x (b, *f)."""
    promised = ((x - p.x0) * here.grad).flatten(1).double().sum(1)
    return e.loss.double() - here.loss.double() - promised


def _sized(threat: Threat) -> None:
    if threat.norm.name == "l0":
        raise ThreatError("a norm that has lengths: linf, l2 or l1", "l0", "Choose another --threat.")
