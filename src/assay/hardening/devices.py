"""Several devices that train one network: each takes its part of every batch, and all take the same step.

Lightning Fabric starts the processes, knows their devices and precision, and carries the sums. Its wrapper of networks
is not used: it allows one ordinary backward pass a step, and many objectives need more (second derivatives, intervals).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from assay.core.errors import MissingExtraError
from assay.core.registry import UsageError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def fabric_for(device: torch.device | str | None, devices: int, precision: str) -> "Fabric":
    """Return what starts the processes and knows the device of each.

    Args:
        device: of the first; None for a GPU if there is one.
        devices: how many; on a CPU processes with one thread each.
        precision: of forward passes.

    Raises:
        MissingExtraError: Lightning Fabric is not installed.
        UsageError: more devices than there are.
    """
    try:
        from lightning_fabric import Fabric
    except ImportError as e:
        raise MissingExtraError("the package lightning-fabric", "none", "pip install 'assay[harden]'.") from e
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    most = torch.cuda.device_count() if place.type == "cuda" else 64
    if not 1 <= devices <= most:
        raise UsageError(f"devices from 1 to {most}", f"{devices}", "Leave it out for one.")
    one: Any = 1 if place.type == "cpu" else [place.index or 0]
    return Fabric(
        accelerator=place.type,
        devices=devices if devices > 1 else one,
        strategy="ddp_fork" if devices > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
    )


@final
class Precise(nn.Module):
    """A network whose forward passes have the precision of Fabric; logits are float32, and so is all of an interval."""

    def __init__(self, net: nn.Module, fabric: "Fabric") -> None:
        super().__init__()
        self.net, self._fabric = net, fabric

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            return self.net(x)  # type: ignore[unreachable]
        with self._fabric.autocast():
            z = self.net(x)
        return z.float()  # type: ignore[no-any-return]


@final
class Together:
    """What the processes of a training tell each other; for a single one, nothing."""

    def __init__(self, fabric: "Fabric") -> None:
        self.fabric, self.count, self.rank = fabric, fabric.world_size, fabric.global_rank

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return self.rank == 0

    def part(self, x: Tensor) -> Tensor:
        """Return this process's rows of a batch."""
        return x[self.rank :: self.count]

    def average_gradients(self, net: nn.Module) -> None:
        """Give every process the mean of all gradients, which is the gradient of the whole batch."""
        if self.count > 1:
            self._average([p.grad for p in net.parameters() if p.grad is not None])

    def average_statistics(self, net: nn.Module) -> None:
        """Give every process the mean of all running statistics."""
        if self.count > 1:
            self._average([b for b in net.buffers() if b.is_floating_point()])

    def _average(self, tensors: list[Tensor]) -> None:
        if not tensors:
            return
        flat = self.fabric.all_reduce(torch.cat([t.detach().flatten() for t in tensors]), reduce_op="mean")
        assert isinstance(flat, Tensor)
        with torch.no_grad():
            for t, mean in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
                t.copy_(mean.view_as(t))

    def sums(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the sums of numbers over all processes."""
        if self.count == 1 or not values:
            return {n: float(v) for n, v in values.items()}
        stacked = self.fabric.all_reduce(torch.stack([*values.values()]).clone(), reduce_op="sum")
        assert isinstance(stacked, Tensor)
        return dict(zip(values, stacked.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Tell whether it is so in any process."""
        if self.count == 1:
            return flag
        return self.sums({"": torch.tensor(float(flag), device=self.fabric.device)})[""] > 0


def one_thread() -> None:
    """Compute on one thread: processes share the cores, and a forked one must not use its parent's threads."""
    torch.set_num_threads(1)
