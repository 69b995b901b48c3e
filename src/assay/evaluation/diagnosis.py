"""Signs that attacks fail for another reason than robustness: looked for actively on a few samples, and in a race.

What the gradients themselves are worth is checked before (``check_gradients``). Here attacks are compared: with each
other, with noise, and with budgets that must suffice. The thresholds and the controls that they were set by are in
``docs/diagnostics.md``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, final

import torch

from assay.attacks import LOSSES, PGD
from assay.attacks.attack import Outcome, verify
from assay.attacks.gradient.pgd import climb
from assay.core.random import Draws
from assay.core.types import Inputs, Mask
from assay.data import Data
from assay.evaluation.finding import Finding
from assay.models import Door, Model
from assay.threats import Problem, Threat

PROBED: Final = 32
"""Samples that the active checks attack."""

STEPS: Final = 15
"""Steps of the attacks that are compared; larger budgets are searched for half as long."""

DISAGREEMENT: Final = 0.2
"""Share of the probe that the margin may break behind cross-entropy; in a race, with more samples, ``RACE_GAP``."""

RACE_GAP: Final = 0.02
RESTART_YIELD: Final = 0.05
UNREACHED: Final = 0.1
"""Share of the probe that may stand when the whole box is allowed."""

WIDER: Final = 4
"""The multiple of eps at which what the gradient promises must have fallen."""

EXCEPTIONS: Final = 2
"""Samples that a single step or noise may break and an attack of many steps leave, by chance."""

BLACK_BOX: Final = 0.01
"""Share of all samples that a search by scores may break behind gradients before it is a warning."""

OVERFIT: Final = 0.8
"""Share of the probe by which many steps may be ahead of one."""

MASKING: Final = frozenset(
    {
        "exploding-gradient",
        "flat-in-eps",
        "loss-disagreement",
        "no-gradient",
        "noise-as-strong",
        "shattered-gradient",
        "single-step-overfit",
        "single-step-stronger",
        "unbounded-attack-fails",
        "zero-gradient",
    }
)
"""Findings after which a search by scores joins the race, on all samples that stand unless a repair helps."""

_NOISE = 5
_SUPPORT = 0.05


def masking(findings: Iterable[Finding]) -> bool:
    """Tell whether one of the findings says that gradients are masked."""
    return any(f.code in MASKING for f in findings)


@final
@dataclass(frozen=True, slots=True)
class Counts:
    """How many of n samples the compared attacks break; 0 or None where a check does not apply.

    ``ce`` fall to cross-entropy and ``margin`` more to the margin; ``one_step`` to one step of eps (linf only).
    Of what is ``left``, ``step_more`` fall to one step and ``noise_more`` to noise; ``promised`` should fall at four
    times eps, as far as gradients tell, and ``kept`` of these do. ``unreached`` stand with the whole box allowed.
    """

    n: int
    ce: int = 0
    margin: int = 0
    one_step: int | None = None
    left: int = 0
    step_more: int = 0
    noise_more: int = 0
    promised: int = 0
    kept: int = 0
    unreached: int = 0


@final
@dataclass(frozen=True, slots=True)
class Probe:
    """Findings of the active checks, and the counts behind them."""

    findings: tuple[Finding, ...] = ()
    counts: Counts = Counts(0)


def probe(model: Model, data: Data, threat: Threat, seed: int = 0, device: torch.device | str | None = None) -> Probe:
    """Attack at most 32 samples that the model has right in ways that must agree, and report where they do not.

    Args:
        model: as it is to be attacked, with its repairs.
        data: the samples; the first right ones of the first 64 are used.
        threat: what the adversary may do; without an eps only the whole box is tried.
        seed: of all random numbers.
        device: where to run; None for where the model is.

    Returns:
        Findings ``loss-disagreement``, ``single-step-overfit``, ``single-step-stronger``, ``noise-as-strong``,
        ``flat-in-eps`` and ``unbounded-attack-fails``; no more than about 100 passes a sample on sound networks.
    """
    rows = torch.arange(min(len(data), 2 * PROBED))
    with model.frozen(device) as live:
        x, y = data.batch(rows).to(live.device), data.labels[rows].to(live.device)
        door = Door(live, len(rows), indices=rows)
        p = Problem.pose(x, y, replace(threat, targeted=False), Draws.of(seed, rows.to(live.device)))
        right = (~p.goal.reached(door.logits(x, p.rows))).nonzero()[:PROBED, 0]
        counts = _compare(door, p.take(right)) if len(right) else Counts(0)
        return Probe(tuple(_findings(counts)), counts)


def _compare(door: Door, p: Problem) -> Counts:
    """Run every attack once, each on what is standing."""
    if p.minimal:
        return Counts(len(p), unreached=_unreached(door, p, Outcome.nothing(p)))
    ce = _attack(door, p, "ce", STEPS)
    both = _attack_rest(door, p, ce, "margin", STEPS)
    left = (~both.success).nonzero()[:, 0]
    wide = p.with_radius((WIDER * p.radius).clamp_max(p.norm.diameter(p.box.width, p.x0[0].numel())))
    wider = _attack_rest(door, wide, both, "margin", STEPS // 2)
    due = _due(door, wide.take(left)) if len(left) else both.success[left]
    return Counts(
        len(p),
        int(ce.success.sum()),
        int((both.success & ~ce.success).sum()),
        _by_steps(door, p, ("margin",)) if p.norm.is_box else None,
        len(left),
        _by_steps(door, p.take(left), ("ce", "margin")) if len(left) else 0,
        _by_noise(door, p.take(left)) if len(left) else 0,
        int(due.sum()),
        int((due & wider.success[left]).sum()),
        _unreached(door, p, wider),
    )


def _attack(door: Door, p: Problem, loss: str, steps: int) -> Outcome:
    """Run PGD; only what a fresh pass of the network as it is confirms counts."""
    found = PGD(steps=steps, rel_step=2.0, decay="cosine", momentum=0.75, loss=LOSSES[loss]).run(door, p)
    holds, x, _ = verify(door, p, found)
    return Outcome(x, holds, found.by)


def _attack_rest(door: Door, p: Problem, out: Outcome, loss: str, steps: int) -> Outcome:
    """Attack what stands, from where it was left."""
    rest = (~out.success).nonzero()[:, 0]
    if not len(rest):
        return out
    q = p.take(rest)
    return out.updated(rest, _attack(door, q.starting(out.x[rest]), loss, steps), by=0)


def _by_steps(door: Door, p: Problem, losses: Sequence[str]) -> int:
    """Count what falls to one step of eps."""
    grads = (door.gradient(p.x0, p, LOSSES[loss]).grad for loss in losses)
    return _broken(door, p, (climb(p, p.x0, grad, 1.0, _SUPPORT) for grad in grads))


def _by_noise(door: Door, p: Problem) -> int:
    return _broken(door, p, (_noise(p.stage(i)) for i in range(_NOISE)))


def _noise(p: Problem) -> Inputs:
    """Draw noise as large as it may be: at the corners of a ball that is a box, on the sphere of another."""
    if not p.norm.is_box:
        return p.start("sphere")
    return torch.where(p.draws.signs(p.x0.shape[1:], p.x0.dtype) > 0, p.upper, p.lower)


def _broken(door: Door, p: Problem, points: Iterator[Inputs]) -> int:
    """Count the samples that at least one of the points fools, on the network as it is."""
    fooled = torch.zeros_like(p.rows, dtype=torch.bool)
    for x in points:
        fooled |= p.goal.clearly_reached(door.logits(x, p.rows, p.goal)) & p.allows(x)
    return int(fooled.sum())


def _due(door: Door, p: Problem) -> Mask:
    """Tell which samples fall inside the ball if the slope at the clean input holds throughout."""
    e = door.gradient(p.x0, p, LOSSES["margin"])
    return e.loss + (e.grad * (climb(p, p.x0, e.grad, 1.0, _SUPPORT) - p.x0)).flatten(1).sum(1) > 0


def _unreached(door: Door, p: Problem, out: Outcome) -> int:
    """Count what stands even with the whole box allowed, in whatever norm: an image of another class is in there."""
    assert p.goal.label is not None
    whole = Problem.pose(p.x0, p.goal.label, Threat("linf", p.box.width, p.box), p.draws, p.rows)
    return int((~_attack_rest(door, whole, out, "margin", STEPS // 2).success).sum())


def _findings(c: Counts) -> Iterator[Finding]:
    """Say which counts do not fit together."""
    if c.margin > DISAGREEMENT * c.n:
        yield _disagree(c.ce, c.margin, c.n)
    if c.one_step is not None and c.ce + c.margin - c.one_step > OVERFIT * c.n:
        yield _warning(
            "single-step-overfit",
            c,
            f"One step of eps breaks {c.one_step} of {c.n} samples, smaller ones break {c.ce + c.margin}: the gradient "
            "at the input holds for the input only.",
            "The network was probably trained against single steps; do not judge it, or train it, by them.",
        )
    if c.step_more > EXCEPTIONS:
        yield _warning(
            "single-step-stronger",
            c,
            f"One step of eps breaks {c.step_more} of {c.left} samples that {2 * STEPS} smaller ones leave: near the "
            "input the gradient points elsewhere than farther out, and attacks that start there are led astray.",
            "Expect more from restarts far from the input and from attacks by scores.",
        )
    if c.noise_more > EXCEPTIONS:
        yield _warning(
            "noise-as-strong",
            c,
            f"{_NOISE} draws of noise of size eps break {c.noise_more} of {c.left} samples that gradients leave.",
            "Gradients point nowhere useful: trust attacks by scores only, and look for what masks the gradient.",
        )
    if c.promised > UNREACHED * c.n and c.kept <= UNREACHED * c.promised:
        yield _warning(
            "flat-in-eps",
            c,
            f"Accuracy does not fall with eps: of {c.left} samples that stand, gradients promise that {c.promised} "
            f"fall at {WIDER} times eps, but {c.kept} do.",
            "More room must make attacks stronger; where it does not, they fail. Look at how gradients are masked.",
        )
    if c.unreached > UNREACHED * c.n:
        yield _warning(
            "unbounded-attack-fails",
            c,
            f"{c.unreached} of {c.n} samples stand even when the whole box is allowed, in which all other images lie.",
            "The attack fails, not the adversary: gradients are masked. Trust attacks by scores, and repair the model.",
        )


def _warning(code: str, counts: Counts, message: str, remedy: str) -> Finding:
    return Finding(code, "warning", message, asdict(counts), remedy)


def _disagree(by_ce: int, by_margin: int, n: int) -> Finding:
    return Finding(
        "loss-disagreement",
        "warning",
        f"Cross-entropy broke {by_ce} of {n} samples; as many steps on the margin broke {by_margin} of those it left. "
        "The gradient of cross-entropy is masked, most likely by large logits.",
        {"ce": by_ce, "margin": by_margin, "n": n},
        "Compare with attacks on the margin or on rescaled logits only; a defence that hides from one loss is none.",
    )


def judge(stages: Sequence[Mapping[str, Any]], n: int) -> tuple[Finding, ...]:
    """Report what the rounds of a finished race say about each other.

    Args:
        stages: in order, each with ``name, kind, entered, broken, forwards, backwards``; ``kind`` is one of ``ce``,
            ``margin``, ``restart``, ``outside``, ``targets`` and ``scores``.
        n: the number of samples of the run.

    Returns:
        Findings ``loss-disagreement``, ``restart-yield`` and ``black-box-gain``.
    """
    checks: tuple[Callable[[Sequence[Mapping[str, Any]], int], Iterator[Finding]], ...]
    checks = (_race_disagreement, _restart_yield, _black_box_gain)
    return tuple(finding for check in checks for finding in check(stages, n))


def _race_disagreement(stages: Sequence[Mapping[str, Any]], n: int) -> Iterator[Finding]:
    """Look at a cross-entropy round and a margin round that was given no more than what it left.

    Of both the last turn counts: in an earlier one they were tried on samples that the other had not seen.
    """
    kinds = [s["kind"] for s in stages]
    if "ce" not in kinds or "margin" not in kinds[kinds.index("ce") :]:
        return
    at = kinds.index("ce"), kinds.index("margin", kinds.index("ce"))
    ce, margin = (stages[i].get("last", stages[i]) for i in at)
    if margin["entered"] <= ce["entered"] and margin["broken"] > RACE_GAP * n:
        yield _disagree(ce["broken"], margin["broken"], n)


def _restart_yield(stages: Sequence[Mapping[str, Any]], _: int) -> Iterator[Finding]:
    turns = ((s["name"], s.get("last", s)) for s in reversed(stages) if s["kind"] == "restart" and s["entered"])
    name, last = next(turns, ("", None))
    if last is not None and last["broken"] > max(1, RESTART_YIELD * last["entered"]):
        yield Finding(
            "restart-yield",
            "warning",
            f"The last restart ({name}) still broke {last['broken']} of {last['entered']} samples: the search "
            "has not converged.",
            {"broken": last["broken"], "entered": last["entered"]},
            "Use a larger effort; more samples are likely to fall.",
        )


def _black_box_gain(stages: Sequence[Mapping[str, Any]], n: int) -> Iterator[Finding]:
    """Look at a search by scores that ends the race: behind sound gradients it finds next to nothing."""
    if not stages or stages[-1]["kind"] != "scores" or not stages[-1]["broken"]:
        return
    last = stages[-1]
    masked = last["broken"] > BLACK_BOX * n
    yield Finding(
        "black-box-gain",
        "warning" if masked else "info",
        f"A search by scores ({last['name']}) broke {last['broken']} of {last['entered']} samples that gradients left."
        + " Gradients are masked." * masked,
        {"broken": last["broken"], "entered": last["entered"], "n": n},
        "Give the search by scores more queries (a larger effort); more samples are likely to fall.",
    )
