"""Every error that assay raises on purpose: what was expected, what was found, what to do."""

from collections.abc import Mapping
from typing import Any


class AssayError(Exception):
    """Base of all errors. ``exit_code`` is what the command line returns, ``code`` names the check that failed."""

    exit_code = 3

    # All can be given by position, for that is how an error comes back from another process.
    def __init__(self, expected: str, found: str, remedy: str, code: str | None = None) -> None:
        self.expected, self.found, self.remedy, self.code = expected, found, remedy, code
        super().__init__(expected, found, remedy, code)

    def __str__(self) -> str:
        head = f"[{self.code}] " if self.code else ""
        return f"{head}expected {self.expected}; found {self.found.rstrip('.')}. {self.remedy}"


class ThreatError(AssayError):
    """The threat model makes no sense, or does not fit the model's box."""


class DataError(AssayError):
    """The samples or their labels cannot be used."""


class ModelError(AssayError):
    """The model cannot be loaded, or does not fit the data."""


class ModelOutputError(ModelError):
    """The model ran, and what it returned are not logits."""

    exit_code = 4


class NonFiniteError(ModelOutputError):
    """The model returned NaN or infinity."""


class ContradictionError(AssayError):
    """A sample was certified and fooled at once: a bug in one of the two, never a result.

    ``evidence`` holds arrays by name: what was proven of which input, and the adversarial input that says otherwise.
    """

    exit_code = 4
    evidence: Mapping[str, Any] = {}


class RunError(AssayError):
    """A run folder cannot be read, written, or continued with these settings."""


class MissingExtraError(AssayError, ImportError):
    """An optional package is needed; the remedy names the extra that installs it."""
