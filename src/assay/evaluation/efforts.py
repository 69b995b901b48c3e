"""Efforts as data: which rounds a race has, in which order. The figures behind them: ``benchmarks/verdict.py``."""

from collections.abc import Iterator
from typing import Any, Final

from assay.attacks import (
    APGD,
    FAB,
    FMN,
    LOSSES,
    PGD,
    Bisect,
    CarliniWagnerL0,
    Cascade,
    Chain,
    Funnel,
    Inward,
    Runnable,
    SigmaZero,
    Square,
    Targets,
)
from assay.core.errors import ThreatError
from assay.evaluation.race import Plan, Round, passes_of
from assay.models.door import Loss
from assay.runs.schema import UNATTACKED
from assay.threats import Threat

EFFORTS: Final = ("quick", "standard", "thorough", "reference")

NORMS: Final = ("linf", "l2", "l1", "l0")

_CE, _MARGIN, _DLR = LOSSES["tempered-ce"], LOSSES["margin"], LOSSES["dlr"]


def plan_for(effort: str, threat: Threat, blind: float = 0.0, *, doubt: float = 0.0) -> Plan:
    """Return the rounds of an effort for a threat; without an eps, one that searches for the smallest perturbation.

    ``blind`` is the share of samples on which the model shows no gradient. Where there are any, the search by scores
    is run on all that stand; where there are no others, it is alone. Where gradients are in ``doubt``, it begins with
    this share of what stands, with no limit to what the race may cost. The effort ``none`` has no rounds.

    Raises:
        ThreatError: a norm that no rounds exist for.
    """
    if effort == UNATTACKED:
        return Plan(())
    norm = threat.norm.name
    if norm not in NORMS:
        raise ThreatError(f"one of {', '.join(NORMS)} to evaluate", norm, "Attacks for other norms come later.")
    hidden = (blind or doubt) and norm in Square.norms
    share = 1.0 if blind else doubt
    scores = (Round("square", "scores", _square_climb(_HIDDEN_QUERIES[effort]), share),) if hidden else ()
    tighten = (*_tighten(norm),)
    if threat.eps is None:
        search = Inward(steps=_STEPS[effort]), _SECOND[norm](steps=_STEPS[effort] // 4)
        parts = search + tuple(Bisect(Square(steps=_HIDDEN_QUERIES[effort] // 2)) for _ in scores)
        return Plan((Round("smallest", "outside", Cascade(parts)),), tighten=tighten)
    if blind == 1 and scores:
        alone = (_square(_HIDDEN_QUERIES[effort]),)
        return Plan(alone, tighten=alone)
    if effort == "reference":
        return Plan((*_ensemble(norm, full=True),), tighten=tighten)
    rounds = (*(_sparse(effort) if norm == "l0" else _ROUNDS[effort](norm)), *scores)
    ladder, most = (*_ensemble(norm), _BEYOND), None if hidden else _MOST[effort]
    audit = _AUDIT if effort == "thorough" else 0.0
    return Plan(rounds, most, ladder if audit else (), audit, tighten)


def _climb(steps: int, loss: Loss = _MARGIN, rel_step: float = 2.0) -> Runnable:
    """Return the gradient ascent of the race: steps of twice eps that fall to none, with momentum."""
    return PGD(steps=steps, rel_step=rel_step, decay="cosine", momentum=0.75, loss=loss)


_PRICE: Final = 10_000
"""Passes that a block of a dear round may cost, and so, about, the last samples that it breaks."""


def _dear(name: str, kind: str, attack: Runnable, share: float, price: int = _PRICE, repeat: int = 2) -> Round:
    """Return a round that costs much a sample: it is given few at a time, and goes on as long as that pays."""
    return Round(name, kind, attack, share, repeat, block=price // passes_of(attack))


def _funnel(norm: str, steps: int) -> Runnable:
    return Funnel(steps=steps, rel_step=2.0 if norm == "linf" else 1.0)


def _openers(norm: str, steps: int) -> Iterator[Round]:
    """Return three openers. That on the margin leads: places are margins, and mislead where another loss was ascended.

    On networks that were trained adversarially, what the other two break of what it leaves is among the nearest 22 %;
    after either of the others it may be anywhere.
    """
    yield Round(f"ce-{steps}", "ce", _climb(steps, _CE), 0.3, opener=True)
    yield Round(f"margin-{steps}", "margin", _climb(steps), 0.3, opener=True, leads=True)
    yield Round(f"funnel-{steps}", "outside", _funnel(norm, steps), 0.3, opener=True)


def _sparse(effort: str) -> Iterator[Round]:
    """Return the rounds for l0, where walks from outside are what finds most, and cost most."""
    yield Round("margin-20", "margin", _climb(20), 0.3, opener=True)
    yield Round("inward-40", "outside", Inward(steps=40), 0.3, opener=True)
    if effort == "quick":
        return
    yield Round("inward-150", "outside", Inward(steps=150), 0.15, repeat=4)
    yield Round("inward-500", "outside", Inward(steps=500), 0.05, repeat=4)
    if effort == "thorough":
        yield Round("sigma-zero-300", "restart", SigmaZero(steps=300), 0.1, repeat=3)
        yield Round("inward-1500", "outside", Inward(steps=1500), 0.05, repeat=4)


def _quick(norm: str) -> Iterator[Round]:
    yield from _openers(norm, 15)
    yield Round("ce-30", "restart", _climb(30, _CE), 0.1, repeat=2)
    yield Round("funnel-30", "outside", _funnel(norm, 30), 0.1)


def _standard(norm: str) -> Iterator[Round]:
    yield from _openers(norm, 20)
    yield Round("ce-40", "restart", _climb(40, _CE), 0.08, repeat=3)
    yield Round("funnel-40", "outside", _funnel(norm, 40), 0.15, repeat=4)
    yield Round("funnel-warm-40", "outside", _funnel(norm, 40), 0.1, repeat=6, warm=True)
    yield Round("targets-5", "targets", Targets(_climb(5), 2), 0.3)
    yield Round("targets-20", "targets", Targets(_climb(20), 4, among=20), 0.05)
    if norm in Square.norms:
        yield _dear("square-climb-500", "outside", _square_climb(500), 0.05)
    yield _dear("inward-500", "outside", Inward(steps=500), 0.03, _PRICE // 2)
    if norm in Square.norms:
        yield _dear("square-climb-1500", "outside", _square_climb(1500), 0.02)


def _thorough(norm: str) -> Iterator[Round]:
    yield from _standard(norm)
    yield Round("ce-100", "restart", _climb(100, _CE), 0.1, repeat=4)
    yield Round("targets-100", "targets", Targets(_climb(100), 4, among=40), 0.03)
    if norm in Square.norms:
        yield _dear("square-climb-3000", "scores", _square_climb(3000), 0.03, 3 * _PRICE, repeat=3)
    yield _dear("inward-1000", "outside", Inward(steps=1000), 0.03, 3 * _PRICE, repeat=3)


def _tighten(norm: str) -> Iterator[Round]:
    """Return what is tried at each eps of a list on the samples that fell at a larger one."""
    yield Round("eps-warm", "restart", _climb(20), warm=True)
    if norm == "l0":
        yield Round("eps-inward", "outside", Inward(steps=60), 0.3, repeat=2)
        return
    yield Round("eps-ce", "restart", _climb(20, _CE), 0.3)
    yield Round("eps-funnel", "outside", _funnel(norm, 30), 0.2, repeat=2)


def _square_climb(queries: int) -> Runnable:
    """Return a random search, and gradient ascent from where it got: each ends where the other one is stuck."""
    return Chain((Square(steps=queries), _climb(60, rel_step=0.5)))


def _square(steps: int) -> Round:
    return Round("square", "scores", Square(steps=steps))


def _ensemble(norm: str, *, full: bool = False) -> Iterator[Round]:
    """Return the published ensemble, on all samples (Croce & Hein 2020, arXiv:2003.01690, sec. 6; l1: 2103.01208).

    With ``full``, its gradient attacks take all their steps, as the published code does, and cost what that costs.
    """
    if norm == "l0":  # which the ensemble is not defined for
        yield Round("sigma-zero-1000", "restart", SigmaZero(steps=1000), repeat=3)
        return
    repeat, targets = (5, 5) if norm == "l1" else (1, 9)
    yield Round("apgd-ce", "ce", APGD(), repeat=repeat, full=full)
    yield Round("apgd-targeted", "targets", Targets(APGD(loss=_DLR), targets), full=full)
    yield Round("fab-targeted", "targets", Targets(FAB(steps=100), 9), full=full)
    if norm in Square.norms:
        yield _square(5000)


_BEYOND: Final = Round("audit-inward", "outside", Inward(steps=500))
"""What the audit tries besides the ensemble."""

_ROUNDS: Final = {"quick": _quick, "standard": _standard, "thorough": _thorough}

_MOST: Final = {"quick": 80, "standard": 400, "thorough": 650}
"""Passes that a race may cost for each sample that stands: less than a twentieth of the ensemble's, for standard."""

_AUDIT: Final = 0.03
"""Share of the survivors that the thorough effort audits."""

_STEPS: Final = {"quick": 60, "standard": 400, "thorough": 1500, "reference": 1500}
"""Steps of the search for the smallest perturbation; the second opinion takes a quarter as many."""

_SECOND: Final[dict[str, Any]] = {"linf": FMN, "l2": FAB, "l1": FMN, "l0": CarliniWagnerL0}
"""What finds most of what walks from outside miss, above all on networks without hardening."""

_HIDDEN_QUERIES: Final = {"quick": 500, "standard": 5000, "thorough": 20_000, "reference": 5000}
"""Queries of the search by scores where gradients do not tell."""


def budget(effort: str, threat: Threat) -> tuple[int, int]:
    """Return what a sample that stays robust costs, on average over such samples: (as a rule, at most) passes.

    As a rule one opener runs on all samples, and every other round has one turn and goes no further than its share; at
    most every turn reaches every sample.
    """
    plan = plan_for(effort, threat)
    shares = [1.0 if i == 0 else r.share for i, r in enumerate(plan.rounds)]
    usual = sum(s * passes_of(r.attack) for s, r in zip(shares, plan.rounds, strict=True)) + 2
    most = sum(r.repeat * passes_of(r.attack) for r in plan.rounds) + 2
    audit = plan.audit * sum(passes_of(r.attack) for r in plan.ladder)
    most = min(most, plan.most) if plan.most else most
    return round(usual + audit), round(most + audit)
