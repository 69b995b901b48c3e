"""The ladder of repairs: where gradients are masked, ways around the mask are tried, and what helps is kept."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Final, final

import torch

from assay.core.errors import AssayError
from assay.evaluation.finding import Finding
from assay.evaluation.health import BLIND, Bench, Health, gradient
from assay.models import Door, Model
from assay.models.model import Smoothing
from assay.models.repairs import Bridges, Float64, Plumber, Repair, Scout, StraightThrough
from assay.threats import Problem

_BETTER = 0.05
"""A repair is kept when a step of eps along it gains this much more, as a share of the margin."""

_GOOD = 0.5
"""A step of eps along repaired gradients that goes this share of the way is good enough not to try further ones."""

_SCOUTED = 8
_SMOOTHED = 16
_TAPS = 8
_SIGMAS = (1 / 3, 1.0)
_GRADIENTS = 8
_PAIRS = 32


@final
@dataclass(frozen=True, slots=True)
class State:
    """A model with repairs, and what they are worth: the health of its gradients, and the gain of a step of eps."""

    model: Model
    health: Health
    gain: float

    @property
    def sound(self) -> bool:
        """Nothing is left to repair: gradients exist and keep their promise, or are as good as repairs make them.

        Those of a random model are too noisy to compare with a step.
        """
        mended = bool(self.model.repairs) and self.gain >= _GOOD
        return self.health.blind <= BLIND and (self.health.linear or mended or self.model.samples > 1)

    @property
    def trusted(self) -> bool:
        """The margin's gradients are sound, and not only estimated; of a random model that cannot be told."""
        return self.sound and not self.model.smoothing and self.model.samples == 1

    def improves(self, other: "State") -> bool:
        more, fewer = self.gain - other.gain, other.health.blind - self.health.blind
        return more > _BETTER or (fewer > BLIND and more > -_BETTER)


def mend(model: Model, health: Health, bench: Bench) -> tuple[State, tuple[Finding, ...]]:
    """Climb the ladder for as long as gradients are unsound; return what is best, and a finding for each repair kept.

    Repairs are tried in the order of what they cost a search, on top of those that helped before.
    """
    at, findings = State(model, health, 0.0), []
    if not at.sound:
        at = replace(at, gain=bench.gain(model))
    for code, attempts in _LADDER.items():
        if at.sound:
            break
        tried = [state for model in attempts(at.model, bench) if (state := _tried(model, bench)) is not None]
        best = max(tried, key=lambda state: state.gain, default=at)
        if best.improves(at):
            findings.append(_repaired(code, at, best))
            at = best
    return at, tuple(findings)


def _tried(model: Model, bench: Bench) -> State | None:
    """Measure a repaired model; None where the repair makes a pass fail."""
    if model.smoothing:
        bench = bench.head(_SMOOTHED)
    try:
        return State(model, bench.health(model), bench.gain(model))
    except AssayError:
        return None


def _straight(model: Model, _: Bench) -> Iterator[Model]:
    yield _with(model, StraightThrough())


def _bridged(model: Model, bench: Bench) -> Iterator[Model]:
    """Bridge what is cut; and again with straight-through steps, for those that ``no_grad`` has hidden so far.

    Likewise without the backward passes that the network brings along.
    """
    few, bases = bench.head(_SCOUTED), dict.fromkeys([model.repairs, _with(model, StraightThrough()).repairs])
    found = dict[tuple[Repair, ...], None]()
    for base, trusting in product(bases, (True, False)):
        scout, repaired = Scout(trusting=trusting), replace(model, repairs=base)
        if _watched(repaired, scout, few, few.pose()):
            found[_with(repaired, Bridges(tuple(dict.fromkeys(scout.links)))).repairs] = None
    yield from (replace(model, repairs=repairs) for repairs in found)


def _tapped(model: Model, bench: Bench) -> Iterator[Model]:
    """Attack scores inside the network that pick the same classes beside the samples."""
    plumber, p = Plumber(), bench.pose()
    if _watched(model, plumber, bench, replace(p, x0=p.start())):
        yield from (_with(model, tap) for tap in [*dict.fromkeys(plumber.taps())][:_TAPS])


def _watched(model: Model, watcher: Repair, bench: Bench, p: Problem) -> bool:
    """Ask for one gradient while something watches; tell whether that went well."""
    try:
        with _with(replace(model, samples=1), watcher).frozen(bench.device) as live:
            gradient(Door(live, len(p)), p, "margin")
    except AssayError:
        return False
    return True


def _widened(model: Model, _: Bench) -> Iterator[Model]:
    yield _with(model, Float64())


def _smoothed(model: Model, bench: Bench) -> Iterator[Model]:
    """Average gradients beside each point; and estimate them from values alone."""
    p = bench.head(1).pose()
    reach = float(p.radius[0] / p.norm.size(torch.ones_like(p.x0))[0])  # of one coordinate, if all move alike
    for share in _SIGMAS:
        yield replace(model, smoothing=Smoothing(share * reach, _GRADIENTS, exact=True))
    for share in _SIGMAS:
        yield replace(model, smoothing=Smoothing(share * reach, _PAIRS))


def _with(model: Model, repair: Repair) -> Model:
    """Add a repair; those that number the network's own calls come last."""
    kept = [r for r in model.repairs if type(r) is not type(repair)]
    rank = {Float64: 0, StraightThrough: 1, Bridges: 2, Scout: 2}
    return replace(model, repairs=tuple(sorted([*kept, repair], key=lambda r: rank.get(type(r), 3))))


_LADDER: Final = {
    "repaired-straight-through": _straight,
    "repaired-bpda": _bridged,
    "repaired-output": _tapped,
    "repaired-float64": _widened,
    "repaired-smoothing": _smoothed,
}

FREE: Final = {code: attempts for code, attempts in _LADDER.items() if attempts not in (_widened, _smoothed)}
"""Repairs with which a pass costs what it costs without."""

_DONE: Final = {
    "repaired-straight-through": "Rounding, thresholds and casts keep their values and pass the gradient on",
    "repaired-bpda": "Steps that cut the gradient (detach, no_grad, numpy, an empty backward pass) are passed straight "
    "through in the backward pass",
    "repaired-output": "An inner tensor that picks the same classes stands for the output",
    "repaired-float64": "The network computes in float64, and the logarithm of a softmax is taken in one step,",
    "repaired-smoothing": "Gradients are means over points beside, or estimated from values there,",
}


def _repaired(code: str, before: State, after: State) -> Finding:
    evidence: dict[str, Any] = {
        "without_gradient_before": before.health.blind,
        "without_gradient": after.health.blind,
        "gain_before": before.gain,
        "gain": after.gain,
    }
    if after.model.smoothing:
        evidence |= asdict(after.model.smoothing)
    return Finding(
        code,
        "warning",
        f"The model masks its gradients. {_DONE[code]} while attacks search: samples without a gradient fall from "
        f"{before.health.blind:.0%} to {after.health.blind:.0%}, and one step of eps now takes the margin "
        f"{after.gain:.0%} of its way to zero, not {before.gain:.0%}. Successes are verified on the network as it is.",
        evidence,
        "A step that hides the gradient is no defence; remove it, or wrap it in assay.BPDA with a closer stand-in.",
    )
