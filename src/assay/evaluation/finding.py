"""A finding: something the user should know, with evidence and a remedy."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, final

Severity: TypeAlias = Literal["info", "warning", "error"]


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. ``code`` is stable and meant for programs, ``evidence`` holds the figures behind ``message``."""

    code: str
    severity: Severity
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
