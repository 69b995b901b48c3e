"""The pytest plugin: a fixture ``assay`` that evaluates models in tests, and says in the summary what it found.

It imports nothing but pytest before a test uses it. ``pytest -p no:assay`` leaves it out.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import pytest

if TYPE_CHECKING:
    from assay.evaluation import Evaluation

SETTINGS: Final = ("effort", "seed", "limit", "prove", "batch_size", "device")
"""What the marker may give."""

_PROPERTY: Final = "assay"
"""Under this name a test's report carries what its checks found: from workers, to the summary and to JUnit XML."""

_MARKER: Final = (
    f"assay({', '.join(f'{name}=...' for name in SETTINGS)}): defaults for the fixture `assay` in this test"
)


@final
@dataclass(frozen=True, slots=True, repr=False)
class Assay:
    """The package :mod:`assay`, with the defaults of a test: what is not defined here is that of the package.

    Args:
        defaults: settings of each evaluation, unless the call has others.
        forced: settings that even those of the call give way to.
        folder: where the run of the first evaluation is kept; others get a number.
        tell: what to do with the line that an evaluation has for the summary.
    """

    defaults: Mapping[str, Any]
    forced: Mapping[str, Any]
    folder: Path
    tell: Callable[[str], None]
    _runs: list[Path] = field(default_factory=list)

    def check(self, model: Any, data: Any, threat: Any, **settings: Any) -> "Evaluation":
        """Evaluate a model, and fail the test where it does not hold what is asked; all is as in ``assay.check``."""
        __tracebackhide__ = methodcaller("errisinstance", AssertionError)
        from assay.evaluation.check import CheckError, check, outcome

        try:
            found = check(model, data, threat, **self._filled(settings))
        except CheckError as e:
            if e.evaluation is not None:
                self.tell(f"failed  {outcome(e.evaluation)}")
            raise
        self.tell(f"held    {outcome(found)}")
        return found

    def evaluate(self, model: Any, data: Any, threat: Any, **settings: Any) -> "Evaluation":
        """Evaluate a model, as ``assay.evaluate`` does, without a display."""
        from assay.evaluation import evaluate
        from assay.evaluation.check import outcome

        found = evaluate(model, data, threat, **self._filled({"progress": False} | settings))
        self.tell(f"found   {outcome(found)}")
        return found

    def _filled(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.defaults, **settings, **self.forced, "out": settings.get("out") or self._next()}

    def _next(self) -> Path:
        """Return a folder for one more run, after removing what the same check of an earlier session left there."""
        n = len(self._runs) + 1
        self._runs.append(self.folder if n == 1 else self.folder.with_name(f"{self.folder.name}-{n}"))
        if (self._runs[-1] / "manifest.json").is_file():
            shutil.rmtree(self._runs[-1])
        return self._runs[-1]

    def __repr__(self) -> str:
        return "the package assay with the defaults of this test"

    def __getattr__(self, name: str) -> Any:
        import assay

        return getattr(assay, name)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say which options there are."""
    group = parser.getgroup("assay", "robustness of models")
    group.addoption("--assay-effort", metavar="EFFORT", help="quick, standard, thorough or reference, in every test")
    group.addoption("--assay-limit", metavar="N", type=int, help="use only the first N samples, in every test")
    parser.addini("assay_effort", "effort of the fixture `assay` (quick)")
    parser.addini("assay_runs", "folder where its last runs are kept (the test's tmp_path)")


def pytest_configure(config: pytest.Config) -> None:
    """Say what the marker is."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture(name="assay")
def _assay(request: pytest.FixtureRequest, tmp_path: Path) -> Assay:
    """The package assay, whose settings come from the command line, the call, the marker, and the ini file."""
    config, told = request.config, request.node.user_properties
    given = {"effort": config.getoption("--assay-effort"), "limit": config.getoption("--assay-limit")}
    forced = {k: v for k, v in given.items() if v is not None}
    kept = config.getini("assay_runs")
    folder = config.rootpath / kept / _name(request.node.nodeid) if kept else tmp_path / "assay"
    return Assay(_defaults(request), forced, folder, lambda line: told.append((_PROPERTY, line)))


def _defaults(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the settings of the marker, and those of the ini file where it has none.

    Raises:
        UsageError: the marker has a setting that there is not.
    """
    from assay.core.registry import one_of

    marker = request.node.get_closest_marker("assay")
    marked = dict(marker.kwargs) if marker else {}
    for key in marked:
        one_of("a setting of the marker assay", key, SETTINGS)
    return {"effort": request.config.getini("assay_effort") or "quick"} | marked


def _name(nodeid: str) -> str:
    """Name a folder after a test: readable, and no two tests alike."""
    words = "".join(c if c.isalnum() or c in "-." else "_" for c in nodeid.rpartition("/")[2])
    return f"{words[:80]}-{hashlib.sha256(nodeid.encode()).hexdigest()[:6]}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say, test by test, what checks found."""
    lines = [*_lines(terminalreporter.stats)]
    if not lines:
        return
    terminalreporter.section("assay")
    for line in lines:
        terminalreporter.write_line(line, red=line.startswith("failed"))


def _lines(stats: Mapping[str, list[Any]]) -> Iterator[str]:
    """Yield what the tests' reports carry, in the order of the tests' names."""
    reports = {r.nodeid: r for same in stats.values() for r in same if getattr(r, "when", None) == "call"}
    for nodeid in sorted(reports):
        for name, line in reports[nodeid].user_properties:
            if name == _PROPERTY:
                yield f"{line}  ({nodeid})"
