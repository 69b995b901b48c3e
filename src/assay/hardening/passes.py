"""Counts what training costs: forward and backward passes, summed over samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn


@final
class PassCounter:
    """Counts the passes of a network by hooks, until it is closed; intervals count as the passes they take."""

    def __init__(self, net: nn.Module) -> None:
        self.forwards = self.backwards = 0
        self._counts = True
        self._hook = net.register_forward_hook(self._after)

    def close(self) -> None:
        """Take the hooks off the network."""
        self._hook.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing: what is asked now does not belong to training."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def _after(self, net: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not self._counts:
            return
        if not isinstance(output, Tensor):
            n = len(inputs[0]) * int(getattr(output, "passes", 1))
            self.forwards += n
            self.backwards += n if torch.is_grad_enabled() else 0  # no single tensor tells of it
            return
        n = len(output)
        self.forwards += n
        if output.requires_grad:
            output.register_hook(lambda _: self._count(n))  # type: ignore[no-untyped-call]

    def _count(self, n: int) -> None:
        if self._counts:
            self.backwards += n
