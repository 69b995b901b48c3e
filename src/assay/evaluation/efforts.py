"""Cascades as data: which attacks run, in which order, at each effort.

Every stage attacks what the earlier ones left standing, cheapest first. The figures behind the choice are measured by
``benchmarks/cascade.py``.
"""

from dataclasses import dataclass
from typing import Any, Final, final

from assay.attacks import APGD, LOSSES, PGD, Bisect, Cascade, Restarts, Runnable, Square, Targets, describe_attack
from assay.core.errors import ThreatError
from assay.threats import Threat

_MARGIN, _DLR = LOSSES["margin"], LOSSES["dlr"]


@final
@dataclass(frozen=True, slots=True)
class Stage:
    """One named attack of a cascade."""

    name: str
    attack: Runnable

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "attack": describe_attack(self.attack)}


def _sprint(steps: int) -> Stage:
    """Return PGD that starts with steps of twice eps and ends with none: most of what falls, falls here."""
    pgd = PGD(steps=steps, rel_step=2.0, decay="cosine", momentum=0.75, loss=_MARGIN)
    return Stage("pgd-margin", pgd)


def _square(steps: int) -> Stage:
    return Stage("square", Square(steps=steps))


EFFORTS: Final[dict[str, tuple[Stage, ...]]] = {
    "quick": (
        _sprint(10),
        Stage("apgd-ce", APGD(steps=20)),
        Stage("apgd-targeted", Targets(APGD(steps=15, loss=_DLR), 2)),
        _square(50),
    ),
    "standard": (
        _sprint(20),
        Stage("apgd-ce", Restarts(APGD(steps=75), 3)),
        Stage("apgd-targeted", Targets(APGD(steps=30, loss=_DLR), 5)),
        _square(1500),
    ),
    "thorough": (
        _sprint(40),
        Stage("apgd-ce", Restarts(APGD(steps=100), 5)),
        Stage("apgd-targeted", Targets(APGD(steps=100, loss=_DLR), 9)),
        _square(5000),
    ),
}


def stages_for(effort: str, threat: Threat, blind: float) -> tuple[Stage, ...]:
    """Return the cascade of an effort for a threat; without an eps, a bisection over its first stages.

    ``blind`` is the share of samples on which the model shows no gradient. Where there are any, the search by scores
    gets a larger budget; where there are no others, it is alone.

    Raises:
        ThreatError: a norm that no cascade exists for.
    """
    norm = threat.norm.name
    if norm not in _NORMS:
        raise ThreatError(f"one of {', '.join(_NORMS)} to evaluate", norm, "Attacks for other norms come later.")
    stages = _with_scores(effort, norm, blind)
    if threat.eps is not None:
        return stages
    repeated = {"pgd-margin", "apgd-ce"} | ({"square"} if blind else set())
    return (Stage("bisect", Bisect(Cascade(tuple(s.attack for s in stages if s.name in repeated)))),)


def _with_scores(effort: str, norm: str, blind: float) -> tuple[Stage, ...]:
    gradient = tuple(s for s in EFFORTS[effort] if s.name != "square")
    if norm not in Square.norms:
        return gradient
    if not blind:
        return EFFORTS[effort]
    square = _square(_BLIND_QUERIES[effort])
    return (square,) if blind == 1 else (*gradient, square)


_NORMS: Final = ("linf", "l2", "l1")

_BLIND_QUERIES: Final = {"quick": 500, "standard": 2500, "thorough": 10_000}
