"""What a run must hold, as it is given in a call or read from the table ``[gate]`` of a file."""

import math
import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, final

from assay.core.registry import UsageError, closest
from assay.core.urls import url_of
from assay.runs.totals import number

SEVERITIES: Final = ("error", "warning", "info")
"""The gravest first; a word of a policy means all findings that are at least as grave."""

CODES: Final = (
    *("adapted", "axes-swapped", "batch-dependent", "black-box-gain", "channels-last", "channels-reversed"),
    *("coarse-logits", "converted", "duplicate-samples", "eps-below-a-grey-level", "exploding-gradient"),
    *("flat-in-eps", "inverted", "labels-permuted", "labels-shifted", "loss-disagreement", "lost-at-8-bit"),
    *("low-clean-accuracy", "no-gradient", "noise-as-strong", "normalised-twice", "not-normalised"),
    *("probabilities-not-logits", "randomized", "repaired-bpda", "repaired-float64", "repaired-output"),
    *("repaired-smoothing", "repaired-straight-through", "restart-yield", "shattered-gradient"),
    *("single-step-overfit", "single-step-stronger", "stopped-early", "train-mode", "unbounded-attack-fails"),
    *("unverified-claims", "wrong-scale", "zero-gradient"),
)
"""The findings that a run may have: a policy against one that is misspelt would hold for ever."""


@final
@dataclass(frozen=True, slots=True)
class Policy:
    """What a run must hold. Shares are of all samples, between 0 and 1; None asks nothing.

    Example:
        >>> Policy(min_robust=0.9, no_finding=("error", "zero-gradient")).empty
        False

    Args:
        min_robust: the least robust accuracy.
        min_certified: the least certified accuracy.
        max_drop: by how much the robust accuracy may be below that of a baseline.
        no_finding: codes of findings that there must not be; ``error`` or ``warning`` means all at least as grave.
        max_seconds: the longest time that the run may have spent.
        baseline: the folder of the run that ``max_drop`` is about, where none is given with the call.

    Raises:
        UsageError: a value out of its range, or a code that no finding has; the message names the nearest.
    """

    min_robust: float | None = None
    min_certified: float | None = None
    max_drop: float | None = None
    no_finding: tuple[str, ...] = ()
    max_seconds: float | None = None
    baseline: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "no_finding", tuple(self.no_finding))
        for field in ("min_robust", "min_certified", "max_drop"):
            _check_number(field, getattr(self, field), 1.0)
        _check_number("max_seconds", self.max_seconds, math.inf)
        known = [*SEVERITIES, *CODES]
        for code in self.no_finding:
            if code not in known:
                raise UsageError(
                    "the code of a finding, or a severity, for no-finding", repr(code), closest(str(code), known)
                )

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for."""
        return not self.no_finding and all(
            getattr(self, field) is None for field in ("min_robust", "min_certified", "max_drop", "max_seconds")
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Policy":
        """Read the table ``[gate]`` of a TOML file; its keys are the flags of ``assay gate`` without their dashes.

        A baseline that is neither an absolute path nor a URL is one beside the file.

        Raises:
            UsageError: no such file, no such table, a key that is not known (the message names the nearest), or a value
                of the wrong type or out of its range.
        """
        file = Path(path)
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8-sig")).get("gate")
        except (OSError, ValueError) as e:
            raise UsageError("a policy in TOML that can be read", f"{file}: {e}", "Check the path and the file.") from e
        if not isinstance(table, dict):
            raise UsageError(f"a table [gate] in {file}", "none", "Write for example [gate] and min-robust = 0.45.")
        given = {_field(key, file): value for key, value in table.items()}
        if not _texts(given.get("no_finding", [])):
            raise UsageError(f"a list of codes for no-finding in {file}", repr(given["no_finding"]), 'Say ["error"].')
        if "baseline" in given:
            if not _texts([given["baseline"]]):
                raise UsageError(f"a folder for baseline in {file}", repr(given["baseline"]), "Put it in quotes.")
            given["baseline"] = url_of(given["baseline"]) or str(file.parent / given["baseline"])
        return cls(**given)


def _field(key: str, file: Path) -> str:
    known = [f.name.replace("_", "-") for f in fields(Policy)]
    if key not in known:
        raise UsageError(f"a key of [gate] in {file}", repr(key), closest(key, known))
    return key.replace("-", "_")


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)


def _check_number(field: str, value: Any, most: float) -> None:
    if value is None:
        return
    found = number(value)
    if found is None or not 0 <= found <= most:
        wanted = "at least 0" if math.isinf(most) else "between 0 and 1"
        raise UsageError(f"a number {wanted} for {field.replace('_', '-')}", repr(value), "0.45 is 45 %, 30 is 30 s.")
