"""Options that say where the work is done: in this process, in several, or on a cluster."""

from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import typer

from assay.core.registry import UsageError, one_of

if TYPE_CHECKING:
    from assay.core.executor import Executor

_WHERE, KINDS = "Where it runs", ("processes", "ray")

EXECUTORS: Final = "|".join(KINDS)

ExecutorOpt: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--executor", metavar=EXECUTORS, help="Who does the work (default: this process).", rich_help_panel=_WHERE
    ),
]
WorkersOpt: TypeAlias = Annotated[
    int | None,
    typer.Option("--workers", min=1, metavar="N", help="Share the work; changes no result.", rich_help_panel=_WHERE),
]
GpusOpt: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker", min=0, metavar="G", help="Default: 1 where this machine has GPUs.", rich_help_panel=_WHERE
    ),
]
AddressOpt: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="ray://HOST:PORT", help="A cluster of Ray (default: this machine).", rich_help_panel=_WHERE),
]


def executor_of(
    kind: str | None, workers: int | None, gpus: float | None, address: str | None, device: str
) -> "Executor | None":
    """Return what shares the work; None where nothing was said: then this process does it all.

    Raises:
        UsageError: an executor that is not known, an address for one that has none, or GPUs with a CPU as the device.
    """
    if (kind, workers, gpus, address) == (None, None, None, None):
        return None
    kind = kind or ("ray" if address else "processes")
    one_of("an executor", kind, KINDS)
    if address and kind != "ray":
        raise UsageError("--address with --executor ray", f"--executor {kind}", "Leave one of them out.")
    here = device.partition(":")[0] == "cuda"
    if gpus is None:
        gpus = 1.0 if here and not address else 0.0
    if gpus and not here and not address:
        raise UsageError("GPUs to give to workers", f"--gpus-per-worker {gpus:g} with device {device}", "Give 0.")
    from assay.distributed import Processes, RayExecutor

    count = workers or _default(gpus, address)
    return RayExecutor(count, gpus, address) if kind == "ray" else Processes(count, gpus)


def _default(gpus: float, address: str | None) -> int:
    """Return how many workers this machine has GPUs, or else cores, for.

    Raises:
        UsageError: it is for a cluster.
    """
    if address:
        raise UsageError("--workers with --address", "none", "Say how many the cluster shall have.")
    import os

    import torch

    return max(1, int(torch.cuda.device_count() / gpus)) if gpus else len(os.sched_getaffinity(0))
