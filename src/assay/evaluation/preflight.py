"""What is checked before any attack: the data, the model, and whether they fit each other and the threat."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from assay.attacks import LOSSES, Square
from assay.core.errors import DataError, ModelError
from assay.core.random import Draws
from assay.data import Data
from assay.evaluation.finding import Finding, Severity
from assay.models import Door, Live, Model
from assay.threats import Box, Problem, Threat
from assay.threats.threat import outside_box

PROBE = 64
"""Samples whose logits and gradients the model's checks look at."""

EOT_SAMPLES = 16
"""Random passes averaged for one answer of a model that is random."""

_SAME = 1e-4
"""Logits that differ by more than this share of their median size (one may be huge to mask a class) are different."""


@final
@dataclass(frozen=True, slots=True)
class Preflight:
    """What the checks found: the model as it is to be attacked, findings, and the share of samples without gradient."""

    model: Model
    findings: tuple[Finding, ...]
    classes: int
    blind: float


def check_data(data: Data, box: Box) -> list[Finding]:
    """Read every sample once.

    Raises:
        DataError: no samples (``empty-data``), values outside the box (``input-outside-box``) or not finite
            (``non-finite-input``), negative labels, or a sample that cannot be read.
    """
    if not len(data):
        raise DataError(
            "at least one sample", f"none in {data.source}", "Check the path and --limit.", code="empty-data"
        )
    seen: set[int] = set()
    twice = start = 0
    low, high, outside = float("inf"), -float("inf"), []
    for x, _ in data:
        bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero()[:, 0]
        if len(bad):
            raise DataError(
                "finite inputs",
                f"NaN or infinity in {len(bad)} samples (first: sample {start + int(bad[0])})",
                "Repair or remove these samples.",
                code="non-finite-input",
            )
        outside += [start + int(i) for i in ((x < box.lo) | (x > box.hi)).flatten(1).any(1).nonzero()[:, 0]]
        low, high = min(low, float(x.min())), max(high, float(x.max()))
        for row in x:
            key = hash(row.numpy().tobytes())
            twice += key in seen
            seen.add(key)
        start += len(x)
    if outside:
        raise outside_box(box, (low, high), outside, len(data), f" in {data.source}")
    return list(_duplicates(twice, len(data)))


def _duplicates(twice: int, n: int) -> Iterator[Finding]:
    if twice:
        yield Finding(
            "duplicate-samples",
            "warning",
            f"{twice} of {n} samples are exact copies of another one.",
            {"duplicates": twice, "n": n},
            "Remove them: intervals count each sample as independent.",
        )


def check_labels(data: Data, classes: int) -> None:
    """Refuse labels outside 0 .. classes - 1.

    Raises:
        DataError: ``bad-logits``.
    """
    wrong = ((data.labels < 0) | (data.labels >= classes)).nonzero()[:, 0]
    if len(wrong):
        raise DataError(
            f"labels 0..{classes - 1}, as the model has {classes} outputs",
            f"{int(data.labels[wrong[0]])} at sample {int(wrong[0])} ({len(wrong)} such labels)",
            "Check that model and data belong together, and the order of the classes.",
            code="bad-logits",
        )


def check_modes(model: Model) -> Iterator[Finding]:
    """Report dropout and batch normalisation that the user left in training mode."""
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    module = model.module
    active = [type(m).__name__ for m in module.modules() if isinstance(m, kinds) and m.training] if module else []
    if active:
        yield Finding(
            "train-mode",
            "info",
            f"{len(active)} modules were in training mode ({', '.join(sorted(set(active)))}); the model is evaluated "
            "in eval mode, and handed back as it was.",
            {"modules": len(active)},
            "Call model.eval() before.",
        )


def check_model(model: Model, data: Data, threat: Threat, device: torch.device | str | None) -> Preflight:
    """Ask the model about the first samples, a few passes each.

    Raises:
        ModelOutputError: what it returns are not logits (``bad-logits``).
        NonFiniteError: NaN or infinity (``bad-logits``).
        DataError: labels outside the classes (``bad-logits``).
    """
    findings = list(check_modes(model))
    rows = torch.arange(min(len(data), PROBE))
    with model.frozen(device) as live:
        x, y = data.batch(rows).to(live.device), data.labels[rows].to(live.device)
        z = _ask(live, x)
        check_labels(data, z.shape[1])
        again = _ask(live, x)
        if _differ(z, again):
            findings.append(_randomized(z, again))
            model = replace(model, samples=EOT_SAMPLES)
        else:
            findings += _batch_dependence(live, x, z)
            with torch.no_grad():  # a network that notices when its layers are replaced is searched as it is
                model = replace(model, tuned=not _differ(z, live.search(x)))
        if bool((z >= 0).all()) and torch.allclose(z.sum(1), torch.ones_like(z[:, 0]), atol=1e-3):
            findings.append(_PROBABILITIES)
            model = replace(model, probabilities=True)
    with model.frozen(device) as live:
        found, blind = _gradients(live, x, y, threat)
    return Preflight(model, (*findings, *found), z.shape[1], blind)


def _ask(live: Live, x: Tensor) -> Tensor:
    return Door(live, len(x)).logits(x, torch.arange(len(x), device=x.device))


def _differ(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > _SAME * float(a.abs().median().clamp_min(1e-3))


def _randomized(a: Tensor, b: Tensor) -> Finding:
    gap, flips = float((a - b).abs().max()), int((a.argmax(1) != b.argmax(1)).sum())
    return Finding(
        "randomized",
        "warning",
        f"Two passes of the same {len(a)} inputs differ by up to {gap:.3g} in a logit, {flips} predictions changed. "
        f"Every answer is now the mean of {EOT_SAMPLES} passes (expectation over the randomness).",
        {"max_difference": gap, "changed_predictions": flips, "n": len(a), "samples": EOT_SAMPLES},
        "Expect an averaged model's robustness, and figures that vary from machine to machine.",
    )


def _batch_dependence(live: Live, x: Tensor, z: Tensor) -> Iterator[Finding]:
    """Ask again in another order and with other neighbours."""
    order = torch.arange(len(x) - 1, -1, -1, device=x.device)
    others = [_ask(live, x[order])[order], torch.cat([_ask(live, part) for part in x.tensor_split(3) if len(part)])]
    worst = max(others, key=lambda other: float((other - z).abs().max()))
    if _differ(z, worst):
        gap = float((worst - z).abs().max())
        yield Finding(
            "batch-dependent",
            "warning",
            f"A sample's logits change by up to {gap:.3g} with the samples beside it. Robustness of a single sample is "
            "not defined for such a model, and results depend on the batch size.",
            {"max_difference": gap},
            "Look for statistics over the batch: normalisation, top-k, or a stateful detector.",
        )


_PROBABILITIES = Finding(
    "probabilities-not-logits",
    "warning",
    "The model returns probabilities. Their logarithm is attacked instead, in float64: gradients through a saturated "
    "softmax vanish, and attacks on it fail for that reason alone.",
    {},
    "Return logits: remove the last softmax (or sigmoid).",
)


def _gradients(live: Live, x: Tensor, y: Tensor, threat: Threat) -> tuple[list[Finding], float]:
    """Look at the input gradient of samples that are right (of all, if none is)."""
    door, draws = Door(live, len(x)), Draws.of(0, torch.arange(len(x), device=x.device))
    p = Problem.pose(x, y, replace(threat, targeted=False), draws)
    right = (~p.goal.reached(door.logits(x, p.rows))).nonzero()[:, 0]
    p = p.take(right) if len(right) else p
    shares = {}
    for loss in ("ce", "margin"):
        try:
            grad = door.gradient(p.x0, p, LOSSES[loss]).grad
        except ModelError as e:  # its backward pass raises
            if e.code != "model-failed":
                raise
            door.differentiable, grad = False, torch.zeros_like(p.x0)
        shares[loss] = float((grad.flatten(1).abs().amax(1) == 0).double().mean())
    severity, consequence = _without_gradient(threat)
    if not door.differentiable:
        message = (
            "The model's output cannot be differentiated with respect to its input: gradient attacks cannot work. "
        )
        remedy = "Remove no_grad, detach, numpy or integer steps, or give a differentiable replacement."
        return [Finding("no-gradient", severity, message + consequence, {"samples": len(p)}, remedy)], 1.0
    if max(shares.values()) == 0:
        return [], 0.0
    if shares["margin"] == 0:
        severity, consequence = "warning", "Attacks that ascend the margin are not affected."
    return [
        Finding(
            "zero-gradient",
            severity,
            f"The input gradient is exactly zero on {shares['ce']:.0%} of {len(p)} samples for cross-entropy and "
            f"{shares['margin']:.0%} for the margin. {consequence}",
            {"share_ce": shares["ce"], "share_margin": shares["margin"], "samples": len(p)},
            "Look for saturated outputs (large logits, a softmax), rounding, thresholds or sign functions.",
        )
    ], shares["margin"]


def _without_gradient(threat: Threat) -> tuple[Severity, str]:
    """Say what becomes of a model that gradient attacks cannot see."""
    if threat.norm.name in Square.norms:
        return "warning", "A score-based attack takes over, with a larger budget."
    return "error", f"No attack here searches {threat.norm.name} by scores: the figure says nothing about this model."


def check_accuracy(right: int, n: int, classes: int) -> Iterator[Finding]:
    """Report a clean accuracy at or below chance."""
    if n and right / n <= 1 / classes:
        yield Finding(
            "low-clean-accuracy",
            "warning",
            f"Only {right} of {n} samples are right without any attack; guessing gets {1 / classes:.0%}.",
            {"right": right, "n": n, "classes": classes},
            "Labels or preprocessing are probably wrong: check the class order, --mean and --std, and the box.",
        )
