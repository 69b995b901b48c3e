"""What every worker does, wherever it runs: it gets the work once, then answers task after task."""

import io
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

from assay.core.errors import AssayError, ModelError


def sent(work: Callable[..., Any], dumps: Callable[[Any], bytes] = pickle.dumps) -> bytes:
    """Return the work as bytes for other processes.

    Raises:
        ModelError: it, most often its model, cannot be sent.
    """
    try:
        return dumps(work)
    except AssayError:
        raise
    except Exception as e:
        raise ModelError(
            "a model and data that can be sent to other processes",
            f"{type(e).__name__}: {e}",
            "Work in this process (no --workers, no executor), or load a form that torch computes, such as "
            ".safetensors with --arch, .pt2 or .onnx.",
        ) from e


def received(content: Any, threads: int) -> Callable[[Any], Any]:
    """Return the work that :func:`sent` wrote, in a worker that shall use ``threads`` CPU threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of libraries that are loaded later
    import torch

    torch.set_num_threads(threads)
    work: Callable[[Any], Any] = pickle.load(io.BytesIO(content))
    return work


def attempt(work: Callable[[Any], Any], task: Any) -> bytes:
    """Do a task; return whether it worked, and the answer or the exception, packed."""
    try:
        return pickle.dumps((True, work(task)), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as e:
        return pickle.dumps((False, _portable(e)))


def outcome(content: Any) -> tuple[bool, Any]:
    """Read what :func:`attempt` returned."""
    worked, value = pickle.loads(content)
    return worked, value


def _portable(error: Exception) -> Exception:
    """Return an exception that survives the journey, with the lines of the worker as a note."""
    there = "".join(traceback.format_exception(error))
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(f"In a worker:\n{there}")
    return copy
