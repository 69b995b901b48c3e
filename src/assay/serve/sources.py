"""Which models and data a run may be looked at with: those that the user named, and those that can do no harm."""

import re
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar, final

from assay.core.errors import AssayError, DataError, ModelError
from assay.data import Data, load_data
from assay.models import Model
from assay.models.fingerprint import fingerprint
from assay.models.loaders import load_model
from assay.models.loaders.demo import NETS
from assay.reports.summary import Manifest, dig, whole
from assay.runs.totals import number
from assay.serve.catalogue import Kept

_HARMLESS: Final = (".onnx", ".pt2")
"""Files that run no code when they are loaded (see their loaders)."""

_LARGEST: Final = 8 * 2**30
_MOST_DRAWS: Final = 1000

T = TypeVar("T", Model, Data)


@final
class Sources:
    """Models and data by their fingerprints, loaded when they are asked for.

    ``use`` must be held while a model is asked: it is frozen then, and can be so for one question at a time.

    Args:
        models: those that the user named.
        data: those that the user named.
    """

    def __init__(self, models: Sequence[Model] = (), data: Sequence[Data] = ()) -> None:
        self.use = threading.RLock()
        self._loading = threading.RLock()
        self._models = {fingerprint(m): m for m in models}
        self._data = tuple(data)
        self._found: dict[tuple[str, str], Model | Data | AssayError] = {}

    def model(self, run: Kept) -> Model:
        """Return the model of a run: one that was named, or a harmless one that has the fingerprint in the manifest.

        Raises:
            ModelError: there is none; the remedy says how to name it.
        """
        return self._once("model", str(dig(run.manifest, "model", "fingerprint") or ""), lambda: self._model(run))

    def data(self, run: Kept) -> Data:
        """Return the data of a run, as its model takes them.

        Raises:
            DataError: they are not there, others now, or may only be loaded if the user names them.
        """
        return self._once("data", str(dig(run.manifest, "data", "fingerprint") or ""), lambda: self._of_run(run))

    def _once(self, what: str, mark: str, load: Callable[[], T]) -> T:
        """Load once for each fingerprint; what failed fails again in the same way."""
        with self._loading:
            if (what, mark) not in self._found:
                try:
                    self._found[what, mark] = load()
                except AssayError as e:
                    self._found[what, mark] = e
            found = self._found[what, mark]
        if isinstance(found, AssayError):
            raise found
        return found  # type: ignore[return-value]

    def _model(self, run: Kept) -> Model:
        told, mark = dig(run.manifest, "model"), dig(run.manifest, "model", "fingerprint")
        if mark in self._models:
            return _as_told(self._models[mark], told)
        tried = []
        for source in _model_sources(run.manifest):
            try:
                model = load_model(source, **_settings(told))
            except Exception as e:  # a parser given a file that others wrote may raise anything
                tried.append(f"{source}: {e}")
                continue
            if fingerprint(model) == mark:
                return _as_told(model, told)
            tried.append(f"{source} has another fingerprint")
        raise ModelError(
            "the model of this run",
            "; ".join(tried) or "no file or name that is loaded unasked",
            "Name it: assay serve DIR --model SOURCE (with --arch, --mean, --std, --box as they were).",
        )

    def _of_run(self, run: Kept) -> Data:
        n, mark = whole(dig(run.manifest, "data", "n")), dig(run.manifest, "data", "fingerprint")
        if not mark or n is None or n < 1:
            raise DataError("data that the run names", "nothing about them", "The stored inputs are all there is.")
        for known in self._data:
            fitting = self._fitted(known.head(n), run)
            if fitting.fingerprint() == mark:
                return fitting
        source = str(dig(run.manifest, "data", "source") or "")
        if not _is_harmless_data(source):
            raise DataError(
                "the data of this run",
                f"{source!r}, which is not loaded unasked",
                "Name them: assay serve DIR --data SOURCE.",
            )
        found = self._fitted(load_data(source, limit=n), run)
        if found.fingerprint() != mark:
            raise DataError(
                "the data of this run",
                f"others at {source!r} now",
                "Name those that it had: assay serve DIR --data SOURCE.",
            )
        return found

    def _fitted(self, data: Data, run: Kept) -> Data:
        """Return data as the model of a run takes them, or where there is none, over the box of the run."""
        try:
            return self.model(run).takes(data)
        except ModelError:
            return data.scaled(*run.box)


def _as_told(model: Model, told: Any) -> Model:
    """Return a model with what the checks before the attacks decided: how often it is asked, and what it answers."""
    samples = whole(dig(told, "samples")) or 1
    return replace(
        model,
        samples=min(max(samples, 1), _MOST_DRAWS),
        probabilities=model.probabilities or dig(told, "probabilities") is True,
    )


def _model_sources(manifest: Manifest) -> Iterator[str]:
    """Yield what may be loaded unasked: networks that ship, by name, and harmless files, by the command of the run."""
    name = dig(manifest, "model", "name")
    if name in NETS:
        yield f"demo:{name}"
    try:
        words = shlex.split(str(manifest.get("command") or "")[:10_000])
    except ValueError:
        words = []
    yield from (w for w in words if w.startswith("demo:") and w[5:] in NETS)
    yield from (w for w in words if w.lower().endswith(_HARMLESS) and _is_file_here(w))


def _is_harmless_data(source: str) -> bool:
    """Tell whether data may be loaded unasked: those that ship, and files and folders, none of which run code."""
    if source.startswith("demo:"):
        return True
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source) or _is_elsewhere(source):
        return False
    try:
        return Path(source).is_dir() or (source.lower().endswith((".npz", ".parquet")) and _is_file_here(source))
    except (OSError, ValueError):
        return False


def _is_file_here(source: str) -> bool:
    try:
        path = Path(source)
        return not _is_elsewhere(source) and path.is_file() and path.stat().st_size <= _LARGEST
    except (OSError, ValueError):
        return False


def _is_elsewhere(source: str) -> bool:
    """Tell whether a path names another machine, which would learn who asked."""
    return not source or source.replace("\\", "/").startswith("//")


def _settings(told: Any) -> dict[str, Any]:
    """Return box, mean and std out of a manifest, as far as they are numbers."""
    box = _numbers(dig(told, "box"))
    how: dict[str, Any] = {"box": tuple(box)} if isinstance(box, list) and len(box) == 2 else {}
    for name in ("mean", "std"):
        if (value := _numbers(dig(told, name))) is not None:
            how[name] = value
    return how


def _numbers(value: Any) -> float | list[float] | None:
    if isinstance(value, list):
        found = [number(v) for v in value]
        return [v for v in found if v is not None] if value and None not in found else None
    return number(value)
