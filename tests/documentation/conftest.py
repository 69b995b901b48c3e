"""Pages run in a folder of their own, and leave nothing behind in this process."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "frameworks"))  # for needs.py
sys.path.append(str(Path(__file__).parent))

from workshop import Workshop, forgotten, served

from assay.attacks.registry import ATTACKS
from assay.hardening.objective import OBJECTIVES

QUIET = {
    "BROWSER": "true",
    "GITHUB_STEP_SUMMARY": "summary.md",
    "MPLBACKEND": "Agg",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_MODE": "offline",
}
"""What keeps programs from asking, showing or sending something."""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    """A new workshop, in whose folder the test runs."""
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for registry in (ATTACKS, OBJECTIVES):
        for table in ("_items", "_traits"):
            monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    with served() as address:
        yield Workshop(tmp_path, address)
    forgotten(tmp_path)
