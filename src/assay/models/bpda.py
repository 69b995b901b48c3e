"""Gradients for steps that have none: the backward pass of something differentiable stands in (BPDA)."""

from collections.abc import Callable
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from assay.core.errors import ModelOutputError

Step: TypeAlias = Callable[[Tensor], Tensor]


@final
class BPDA(nn.Module):
    """A step without a useful gradient, before or inside a network, that attacks can differentiate all the same.

    The value is that of ``forward``, to the last bit; the gradient is that of ``backward`` at the same point. Use it
    for rounding, compression, thermometer codes: whatever is flat, random, or leaves torch.

    Args:
        forward: the step, from a tensor to a floating-point tensor; it runs without autograd.
        backward: a differentiable step that resembles it and returns the same shape; None for the identity, for steps
            that return nearly what they get.

    Raises:
        ModelOutputError: what comes back is no floating-point tensor, or the stand-in's shape is another.

    Example:
        >>> import torch
        >>> from assay import BPDA
        >>> levels = BPDA(lambda x: (x * 4).round() / 4)
        >>> x = torch.tensor([0.3], requires_grad=True)
        >>> levels(x).item(), torch.autograd.grad(3 * levels(x).sum(), x)[0].item()
        (0.25, 3.0)

    References:
        Athalye, Carlini & Wagner 2018, arXiv:1802.00420, sec. 4.1.
    """

    def __init__(self, forward: Step, backward: Step | None = None) -> None:
        super().__init__()
        self.step, self.stand_in = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            value = self.step(x.detach())
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ModelOutputError("a floating-point tensor from a BPDA step", found, "Convert its result: .float().")
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        shadow = x if self.stand_in is None else self.stand_in(x)
        if shadow.shape != value.shape:
            raise ModelOutputError(
                f"a stand-in that returns {tuple(value.shape)}, as the step does",
                "the identity's " * (self.stand_in is None) + f"{tuple(shadow.shape)}",
                "Pass backward=, a differentiable function that returns this shape.",
            )
        passed: Tensor = _Straight.apply(value, shadow)  # type: ignore[no-untyped-call]
        return passed


class _Straight(torch.autograd.Function):
    """The first argument's value with the second one's gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shadow: Tensor) -> Tensor:
        ctx.dtype = shadow.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0].to(ctx.dtype)
