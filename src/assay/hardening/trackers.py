"""Rows of the history, sent to where experiments are tracked."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from assay.core.errors import MissingExtraError
from assay.core.registry import one_of

Tracker: TypeAlias = Callable[[Mapping[str, Any]], None]

TRACKERS: Final = ("tensorboard", "mlflow")


def trackers(names: Sequence[str], folder: Path | None, settings: Mapping[str, Any]) -> list[Tracker]:
    """Return what sends rows to these trackers; TensorBoard's files go into ``folder`` (``runs/tensorboard``).

    Raises:
        UsageError: an unknown tracker.
        MissingExtraError: its package is not installed.
    """
    for name in names:
        one_of("a tracker", name, TRACKERS)
    made = {"tensorboard": _tensorboard, "mlflow": _mlflow}
    return [made[name](folder or Path("runs"), settings) for name in names]


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by name, parts of the loss among them."""
    plain = {n: float(v) for n, v in row.items() if isinstance(v, int | float) and n != "steps"}
    return plain | {f"loss/{n}": float(v) for n, v in row["parts"].items()}


def _tensorboard(folder: Path, _: Mapping[str, Any]) -> Tracker:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise MissingExtraError("the package tensorboard", "none", "Install it: pip install tensorboard.") from e
    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(row: Mapping[str, Any]) -> None:
        for name, value in figures(row).items():
            writer.add_scalar(name, value, row["steps"])
        writer.flush()

    return send


def _mlflow(_: Path, settings: Mapping[str, Any]) -> Tracker:
    try:
        import mlflow
    except ImportError as e:
        raise MissingExtraError("the package mlflow", "none", "Install it: pip install mlflow-skinny.") from e
    if mlflow.active_run() is None:
        mlflow.start_run(run_name=str(settings.get("method", "harden")))
    mlflow.log_params({n: str(v)[:500] for n, v in settings.items()})

    def send(row: Mapping[str, Any]) -> None:
        mlflow.log_metrics(figures(row), step=row["steps"])

    return send
