"""One map: what a class's logit has to do with each value of one input, by captum through the counted door."""

from dataclasses import dataclass, replace
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from assay.attacks.losses import pick
from assay.core.errors import DataError, ModelError
from assay.core.optional import need
from assay.core.registry import UsageError, one_of
from assay.core.types import Inputs, Labels, Logits
from assay.models import Door, as_model
from assay.models.line import default_batch
from assay.study.curvature import Classifier, copies, pose_one
from assay.threats import Problem, Threat
from assay.threats.problem import Goal

INTEGRATED, SALIENCY = "integrated-gradients", "saliency"
METHODS: Final = (INTEGRATED, SALIENCY)

STEPS: Final = 50
"""Points of the integral."""

ANY: Final = Threat("linf")
"""Poses a sample whose perturbation is of no matter."""


def attribute(
    model: Classifier, x: Tensor, target: int, method: str = INTEGRATED, *, baseline: float | Tensor | None = None,
    steps: int = STEPS, index: int = 0, device: torch.device | str | None = None,
) -> np.ndarray:  # fmt: skip
    """Return how much each value of x has to do with the logit of a class (before any softmax), by captum.

    ``integrated-gradients`` are (x - baseline) times the mean gradient on the straight way from the baseline to x, from
    ``steps`` Gauss-Legendre points; they sum to the rise of the logit but for that approximation. ``saliency`` is the
    absolute value of the gradient at x.

    Args:
        model: whose answer.
        x: one sample (*f) inside the box.
        target: the class.
        method: ``integrated-gradients`` or ``saliency``.
        baseline: where integrated gradients start: a value, or a sample (*f); None for the least value of the box.
        steps: gradients of integrated gradients.
        index: of the sample in its data, by which errors call it.
        device: where to run; None for where the model's parameters are.

    Returns:
        The attributions (*f), float32, in logits for integrated gradients, in logits per unit of the box for saliency.

    Raises:
        MissingExtraError: captum is not installed.
        DataError: x or the baseline is not inside the box, or the target is no class of the model.
        ModelError: the model has no gradient by its input.

    References:
        Sundararajan, Taly & Yan 2017, arXiv:1703.01365, eqs. 1 and 3; Simonyan, Vedaldi & Zisserman 2014,
        arXiv:1312.6034, sec. 3. The library: captum, arXiv:2009.07896.
    """
    model = as_model(model)
    how = How((method,), baseline, steps)
    with model.frozen(device) as live:
        door, p = Door(live, 1, indices=torch.tensor([index])), pose_one(live, x, target, ANY, 0, index)
        classes = torch.full_like(p.rows, int(target))
        found: np.ndarray = maps_of(door, p, p.x0, classes, method, how)[0].cpu().numpy()
        return found


@final
@dataclass(frozen=True, slots=True)
class How:
    """How maps are made."""

    methods: tuple[str, ...]
    baseline: float | Tensor | None
    steps: int

    def __post_init__(self) -> None:
        for method in self.methods or ("none",):
            one_of("method", method, METHODS)
        if self.steps < 1:
            raise UsageError("steps >= 1", f"{self.steps}", f"Leave it out for {STEPS}.")

    def start(self, p: Problem) -> Inputs:
        """Return the baseline of one sample (1, *f).

        Raises:
            DataError: it is not of the sample's shape, or not inside the box.
        """
        given = torch.as_tensor(p.box.lo if self.baseline is None else self.baseline)
        if given.shape not in (torch.Size(), p.x0.shape[1:]):
            found = f"{tuple(given.shape)}"
            raise DataError(f"a baseline of one value, or {tuple(p.x0.shape[1:])}", found, "Give one of these.")
        if not ((given >= p.box.lo) & (given <= p.box.hi)).all():
            found = f"values from {float(given.min()):g} to {float(given.max()):g}"
            raise DataError(
                f"a baseline inside the box [{p.box.lo:g}, {p.box.hi:g}]", found, "Models know nothing else."
            )
        return given.to(p.x0).expand_as(p.x0).contiguous()

    def told(self, low: float) -> str:
        """Say what the baseline is."""
        if self.baseline is None:
            return f"{low:g} everywhere, the least value of the box"
        given = torch.as_tensor(self.baseline)
        return "a sample of its own" if given.ndim else f"{float(given):g} everywhere"


class _Answer(torch.autograd.Function):
    """The logit of a class, with the gradient that came with it: captum differentiates, the door is asked once."""

    @staticmethod
    def forward(ctx: Any, x: Inputs, ask: Any) -> Tensor:
        value, grad = ask(x)
        ctx.save_for_backward(grad)
        answered: Tensor = value
        return answered

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return outer[0].view(-1, *[1] * (grad.ndim - 1)) * grad, None


def _logit(logits: Logits, goal: Goal) -> Tensor:
    """Return the logit of the class in question."""
    assert goal.target is not None
    return pick(logits, goal.target)


def maps_of(door: Door, p: Problem, x: Inputs, classes: Labels, method: str, how: How) -> Inputs:
    """Return the attributions (m, *f) of points x (m, *f) for classes (m,), all of the one sample of ``p``."""
    captum = need("captum.attr", "attribution")

    def forward(points: Inputs, which: Labels) -> Tensor:
        q = replace(copies(p, len(points)), goal=Goal(None, which))

        def ask(at: Inputs) -> tuple[Tensor, Inputs]:
            e = door.gradient(at, q, _logit)
            return e.loss, e.grad

        found: Tensor = _Answer.apply(points, ask)  # type: ignore[no-untyped-call]
        return found

    x = x.detach()
    if method == SALIENCY:
        point = x.clone().requires_grad_()
        found = captum.Saliency(forward).attribute(point, additional_forward_args=classes)
    else:
        rows = max(len(x), default_batch(x.shape[1:], x.device))
        parts: dict[str, Any] = {"n_steps": how.steps, "internal_batch_size": rows}
        start = how.start(p).expand_as(x)
        found = captum.IntegratedGradients(forward).attribute(x, start, None, classes, **parts)
    if not door.differentiable:
        raise ModelError(
            "a model with a gradient by its input",
            "one without",
            "Attributions are made of gradients; this model has none to tell.",
            code="no-gradient",
        )
    maps: Inputs = found.detach()
    return maps
