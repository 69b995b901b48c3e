"""What became of a policy: its checks, one by one, and the verdict."""

from dataclasses import asdict, dataclass
from typing import Any, final

from assay.runs.totals import number


@final
@dataclass(frozen=True, slots=True)
class Sample:
    """A sample that a check is about: what it is taken for, and by which change. Size 0: wrong as it is."""

    index: int
    label: int
    prediction: int
    size: float
    broken_by: str | None


@final
@dataclass(frozen=True, slots=True)
class Check:
    """One line of a policy, and what became of it.

    ``wanted`` and ``found`` are figures, ``why`` plain sentences. ``samples`` are the first of the ``concerned``, those
    for which the check did not hold.
    """

    name: str
    held: bool
    wanted: str
    found: str
    why: str
    concerned: int = 0
    samples: tuple[Sample, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Judgement:
    """A policy held against a run; ``baseline`` is None where none was needed."""

    run: str
    baseline: str | None
    confidence: float
    checks: tuple[Check, ...]

    @property
    def held(self) -> bool:
        """Whether every check held."""
        return all(check.held for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """Return the checks that did not hold."""
        return tuple(check for check in self.checks if not check.held)

    @property
    def verdict(self) -> str:
        """Say in one sentence whether the gate holds, and which checks did not."""
        n, failed = len(self.checks), [check.name for check in self.failed]
        if not n:
            return "The gate holds: nothing was asked."
        checks = f"{n} check{'' if n == 1 else 's'}"
        if not failed:
            return f"The gate holds: {checks}, none failed."
        return f"The gate does not hold: {len(failed)} of {checks} failed ({', '.join(failed)})."

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON; a size that was not found becomes None."""
        plain = asdict(self) | {"held": self.held, "verdict": self.verdict}
        for check in plain["checks"]:
            check["samples"] = [s | {"size": number(s["size"])} for s in check["samples"]]
        return plain
