"""A run that others are compared with, kept in a folder of its own: small enough for a repository."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Final

from assay.core.errors import RunError
from assay.core.urls import url_of
from assay.runs.store import Run

_OURS: Final = {"manifest.json", "samples", "adversarials", "natural", "report.html", ".lock"}


def keep(run: Run, folder: str | os.PathLike[str]) -> Path:
    """Make a run the baseline in ``folder``: its manifest and its table, without adversarial inputs and report.

    The copy is made beside the folder, and takes its place when it is whole. Links are not followed.

    Raises:
        RunError: the folder holds something that is no run, is a part of this run, is a URL, or cannot be written.
    """
    if url := url_of(folder):
        raise RunError("a folder on this machine for the baseline", url, "Make it here, and copy it there.")
    target, source = Path(folder).resolve(), run.path.resolve()
    if target == source:
        return target
    if target in source.parents or source in target.parents:
        raise RunError("a baseline beside the run", f"{target} and {source}", "Choose another --baseline.")
    _check_ours(target)
    fresh, old = (target.with_name(f".{what}-{os.getpid()}-{target.name}") for what in ("tmp", "old"))
    try:
        _copy(source, fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except OSError as e:
        with contextlib.suppress(OSError):
            if old.exists() and not target.exists():
                old.rename(target)
        raise RunError(f"a folder that can be written in {target.parent}", str(e), "Choose another --baseline.") from e
    finally:
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
    return target


def _check_ours(folder: Path) -> None:
    """Leave alone a folder that is neither empty nor a run and nothing else."""
    if not folder.exists():
        return
    held = {p.name for p in folder.iterdir()} if folder.is_dir() else {folder.name}
    if strays := sorted(held - _OURS if "manifest.json" in held else held):
        raise RunError(f"an empty folder, or that of a run, in {folder}", ", ".join(strays[:3]), "Choose another.")


def _copy(source: Path, target: Path) -> None:
    parts = sorted(p for p in (source / "samples").glob("*.parquet") if not p.name.startswith("."))
    (target / "samples").mkdir(parents=True)
    for file in (source / "manifest.json", *parts):
        if file.is_symlink():
            raise OSError(f"{file} is a link")
        shutil.copyfile(file, target / file.relative_to(source))
