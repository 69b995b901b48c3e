"""Cascades as data: which attacks run, in which order, at each effort.

Every stage attacks what the earlier ones left standing, cheapest first. The figures behind the choice are measured by
``benchmarks/cascade.py``.
"""

from dataclasses import dataclass
from typing import Any, Final, final

from assay.attacks import (
    APGD,
    FAB,
    FMN,
    LOSSES,
    PGD,
    Bisect,
    Cascade,
    Inward,
    Runnable,
    SigmaZero,
    Square,
    Targets,
    describe_attack,
)
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


def _inward(steps: int) -> Stage:
    """Return walks from outside: they find what is hidden from every search that starts at the clean input."""
    return Stage("inward", Inward(steps=steps))


def _square(steps: int) -> Stage:
    return Stage("square", Square(steps=steps))


EFFORTS: Final[dict[str, tuple[Stage, ...]]] = {
    "quick": (
        _sprint(10),
        _inward(40),
        Stage("apgd-targeted", Targets(APGD(steps=15, loss=_DLR), 2)),
        _square(50),
    ),
    "standard": (
        _sprint(20),
        Stage("apgd-ce", APGD(steps=75)),
        _inward(300),
        Stage("apgd-targeted", Targets(APGD(steps=30, loss=_DLR), 5)),
        _square(1500),
    ),
    "thorough": (
        _sprint(40),
        Stage("apgd-ce", APGD(steps=100)),
        _inward(1000),
        Stage("apgd-targeted", Targets(APGD(steps=100, loss=_DLR), 9)),
        _square(5000),
    ),
}


def stages_for(effort: str, threat: Threat, blind: float) -> tuple[Stage, ...]:
    """Return the cascade of an effort for a threat; without an eps, searches for the smallest perturbation.

    ``blind`` is the share of samples on which the model shows no gradient. Where there are any, the search by scores
    gets a larger budget; where there are no others, it is alone.

    Raises:
        ThreatError: a norm that no cascade exists for.
    """
    norm = threat.norm.name
    if norm not in _GRADIENT:
        raise ThreatError(f"one of {', '.join(_GRADIENT)} to evaluate", norm, "Attacks for other norms come later.")
    scores = _scores(effort, norm, blind)
    if threat.eps is None:
        search = Inward(steps=_STEPS[effort]), _SECOND[norm](steps=_STEPS[effort] // 4)
        parts = search + tuple(Bisect(s.attack) for s in scores if blind)
        return (Stage("smallest", Cascade(parts)),)
    gradient = tuple(s for s in EFFORTS[effort] if s.name in _GRADIENT[norm])
    return scores if blind == 1 and scores else (*gradient, *scores)


def _scores(effort: str, norm: str, blind: float) -> tuple[Stage, ...]:
    if norm not in Square.norms:
        return ()
    return (_square(_BLIND_QUERIES[effort]) if blind else EFFORTS[effort][-1],)


_GRADIENT: Final = {
    "linf": ("pgd-margin", "apgd-ce", "inward", "apgd-targeted"),
    "l2": ("pgd-margin", "apgd-ce", "inward", "apgd-targeted"),
    "l1": ("pgd-margin", "apgd-ce", "inward", "apgd-targeted"),
    "l0": ("pgd-margin", "inward"),
}

_STEPS: Final = {"quick": 60, "standard": 400, "thorough": 1500}
"""Steps of the search for the smallest perturbation; the second opinion takes a quarter as many."""

_SECOND: Final = {"linf": FMN, "l2": FAB, "l1": FMN, "l0": SigmaZero}
"""The attack that is best where walks from outside are of no use: on networks without hardening."""

_BLIND_QUERIES: Final = {"quick": 500, "standard": 2500, "thorough": 10_000}
