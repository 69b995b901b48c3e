"""Executors that spread work over processes, GPUs and machines; results are those of one process."""

from assay.distributed.on_ray import RayExecutor
from assay.distributed.processes import Processes

__all__ = ["Processes", "RayExecutor"]
