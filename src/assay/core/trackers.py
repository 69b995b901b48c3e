"""Where experiments are tracked: MLflow, TensorBoard, Weights & Biases, behind one small protocol."""

import importlib.util
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, final

from assay.core.errors import RunError
from assay.core.optional import need
from assay.core.registry import one_of

_LONGEST: Final = 500
"""Characters of a setting or a tag: the least that any of the trackers takes."""


class Tracker(Protocol):
    """One run of a tracker. What a tracker has no place for, it leaves out."""

    def start(self, name: str, settings: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Begin a run with these settings, which may be nested, and tags; return where it is, as a sentence.

        Raises:
            MissingExtraError: the tracker's package is not installed.
        """

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send numbers by name; steps never fall."""

    def artifact(self, path: Path) -> None:
        """Send a file."""

    def end(self, *, ok: bool = True) -> None:
        """End the run, as one that failed where it is not ``ok``. A run that others had begun goes on."""


@final
class MLflow:
    """MLflow, at the address that it is set to; without one and without a database, the folder ``mlruns``."""

    def __init__(self, _: Path) -> None:
        self._mlflow: Any = None
        self._own = True

    def start(self, name: str, settings: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        mlflow = self._mlflow = need("mlflow", "mlflow")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder is refused otherwise, by MLflow 3.7 on
        if not mlflow.tracking.is_tracking_uri_set() and importlib.util.find_spec("sqlalchemy") is None:
            mlflow.set_tracking_uri((Path.cwd() / "mlruns").as_uri())
        run = mlflow.active_run()
        self._own = run is None
        run = run or mlflow.start_run(run_name=name)
        mlflow.log_params({_key(n): str(v)[:_LONGEST] for n, v in flat(settings).items()})
        mlflow.set_tags({_key(n): v[:_LONGEST] for n, v in tags.items()})
        return f"MLflow run {run.info.run_id} in {mlflow.get_tracking_uri()}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics({_key(n): v for n, v in figures.items()}, step=step)

    def artifact(self, path: Path) -> None:
        self._mlflow.log_artifact(str(path))

    def end(self, *, ok: bool = True) -> None:
        if self._own:
            self._mlflow.end_run("FINISHED" if ok else "FAILED")


def _key(name: str) -> str:
    """Return a name as MLflow takes it."""
    return re.sub(r"[^\w\-./ ]", "_", name)[:250]


@final
class TensorBoard:
    """Files for TensorBoard in ``tensorboard`` in the folder; settings and tags are a table among its texts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def start(self, name: str, settings: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        files = need("tensorboard.summary.writer.event_file_writer", "tensorboard")
        self._writer = files.EventFileWriter(str(self._folder))
        rows = [f"| {_cell(n)} | {_cell(v)} |" for n, v in {**flat(settings), **tags}.items()]
        text = "\n".join([f"| {_cell(name)} | |", "|---|---|", *rows])
        metadata = need("tensorboard.plugins.text.metadata", "tensorboard").create_summary_metadata(None, None)
        tensor = need("tensorboard.util.tensor_util", "tensorboard").make_tensor_proto([text])
        self._write([{"tag": "settings/text_summary", "metadata": metadata, "tensor": tensor}], 0)
        return f"TensorBoard files in {self._folder}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._write([{"tag": n, "simple_value": v} for n, v in figures.items()], step)

    def _write(self, values: Sequence[Mapping[str, Any]], step: int) -> None:
        summary, event = (need(f"tensorboard.compat.proto.{part}_pb2", "tensorboard") for part in ("summary", "event"))
        content = summary.Summary(value=[summary.Summary.Value(**v) for v in values])
        self._writer.add_event(event.Event(wall_time=time.time(), step=step, summary=content))
        self._writer.flush()

    def artifact(self, path: Path) -> None:
        pass

    def end(self, *, ok: bool = True) -> None:
        self._writer.close()


def _cell(value: Any) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join(str(value)[:_LONGEST].split()).replace("|", "\\|")


@final
class WeightsAndBiases:
    """Weights & Biases, offline unless WANDB_MODE says otherwise: nothing leaves the machine unasked."""

    def __init__(self, _: Path) -> None:
        self._run: Any = None
        self._own = True

    def start(self, name: str, settings: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        wandb = need("wandb", "wandb")
        mode = os.environ.get("WANDB_MODE", "offline")
        self._own = wandb.run is None
        quiet = wandb.Settings(silent=True, console="off")
        self._run = wandb.run or wandb.init(project="assay", name=name, mode=mode, settings=quiet)
        self._run.config.update({**flat(settings), **tags}, allow_val_change=True)
        if mode != "offline":
            return f"Weights & Biases run {name} ({mode})"
        folder = Path(self._run.dir).parent
        return f"Weights & Biases run {name}, offline in {folder}; wandb sync {folder} sends it"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log({**figures, "step": step}, step=step if self._own else None)

    def artifact(self, path: Path) -> None:
        copied = shutil.copy(path, self._run.dir)  # it would be a link otherwise, which breaks
        self._run.save(copied, base_path=self._run.dir, policy="now")

    def end(self, *, ok: bool = True) -> None:
        if self._own:
            self._run.finish(exit_code=0 if ok else 1)


TRACKERS: Final[Mapping[str, Callable[[Path], Tracker]]] = {
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """Return the trackers in these names, each of which may be a list with commas; to be asked before long work.

    Raises:
        UsageError: an unknown tracker.
        MissingExtraError: the package of one is not installed.
    """
    wanted = tuple(dict.fromkeys(n.strip() for given in names for n in given.split(",") if n.strip()))
    for one in wanted:
        one_of("a tracker", one, list(TRACKERS))
    for one in wanted:
        need(one, one)
    return wanted


@contextmanager
def tracking(
    names: Sequence[str], folder: Path, name: str, settings: Mapping[str, Any], tags: Mapping[str, str] | None = None
) -> Iterator["Tracking"]:
    """Begin a run with each of these trackers, and end it: as one that failed, where an error is raised inside.

    Args:
        names: of trackers; each may be a list with commas, as on the command line.
        folder: for files of trackers that have no place of their own.
        name: of the run.
        settings: what was set, which may be nested.
        tags: what is worth a search.

    Raises:
        UsageError: an unknown tracker.
        MissingExtraError: the package of one is not installed.
        RunError: one cannot be reached, or does not take the run.
    """
    wanted = chosen(names)
    made, where = [], []
    with ExitStack() as stack:
        for one in wanted:
            tracker = TRACKERS[one](folder)
            where.append(_started(one, partial(tracker.start, name, settings, tags or {})))
            stack.push(_ending(tracker))
            made.append(tracker)
        yield Tracking(tuple(made), tuple(where))


def _started(name: str, start: Callable[[], str]) -> str:
    try:
        return start()
    except Exception as e:  # of whatever is behind it: a server, a disk, a library
        remedy = "Mend it, or leave this tracker out."
        raise RunError(f"a run of {name} that can be written", f"{type(e).__name__}: {_first(e)}", remedy) from e


def _first(e: Exception) -> str:
    return (str(e).splitlines() or [""])[0]


def _ending(tracker: Tracker) -> Callable[..., None]:
    return lambda error, *_: _safely(partial(tracker.end, ok=error is None))


class TrackerWarning(UserWarning):
    """A tracker failed. What is measured is not lost to that: work goes on without the tracker having it."""


def _safely(send: Callable[[], None]) -> None:
    try:
        send()
    except Exception as e:
        warnings.warn(f"a tracker failed: {type(e).__name__}: {_first(e)}", TrackerWarning, stacklevel=3)


@final
@dataclass(frozen=True, slots=True)
class Tracking:
    """Trackers with a run each; ``where`` says of each, in a sentence, where its run is."""

    trackers: tuple[Tracker, ...]
    where: tuple[str, ...]

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send numbers to all; one that fails is a warning."""
        for tracker in self.trackers:
            _safely(partial(tracker.log, figures, step))

    def artifact(self, path: Path) -> None:
        """Send a file to all; one that fails is a warning."""
        for tracker in self.trackers:
            _safely(partial(tracker.artifact, path))


def flat(settings: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Return nested settings as one level, their names joined by dots; lists are text.

    Example:
        >>> flat({"seed": 0, "threat": {"norm": "linf", "box": [0, 1]}})
        {'seed': 0, 'threat.norm': 'linf', 'threat.box': '[0, 1]'}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{within}{name}.")
        else:
            found[f"{within}{name}"] = value if isinstance(value, str | int | float | None) else str(value)
    return found
