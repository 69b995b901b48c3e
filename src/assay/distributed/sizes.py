"""What executors have in common: how many workers, and what each of them gets."""

from assay.core.registry import UsageError


def check_sizes(workers: int, gpus_per_worker: float, threads: int) -> None:
    """Refuse an executor without workers."""
    if workers < 1 or threads < 1 or gpus_per_worker < 0:
        found = f"{workers} workers, {gpus_per_worker:g} GPUs and {threads} threads each"
        raise UsageError("at least 1 worker, 1 thread and 0 GPUs", found, "Leave them out for the defaults.")
    if gpus_per_worker > 1 and gpus_per_worker % 1:
        raise UsageError("whole GPUs, or a part of one", f"{gpus_per_worker:g}", "Give 0.5, 1, 2, ...")


def device_with(gpus_per_worker: float) -> str:
    """Return where workers compute that have so many GPUs each."""
    return "cuda" if gpus_per_worker else "cpu"
