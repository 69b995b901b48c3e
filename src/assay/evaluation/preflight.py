"""What is checked before any attack: the data, the model, and whether they fit each other and the threat."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from assay.attacks import LOSSES, Square
from assay.core.errors import DataError, ModelError
from assay.core.types import Logits
from assay.data import Data
from assay.evaluation.diagnosis import masking
from assay.evaluation.finding import Finding, Severity
from assay.evaluation.health import EVEN, LINEAR, Bench, Health, averaged, gradient_spread
from assay.evaluation.ladder import State, mend
from assay.evaluation.wrapping import check_wrapping
from assay.models import Door, Live, Model
from assay.models.model import are_probabilities
from assay.threats import Box, Threat
from assay.threats.problem import ROUNDING

PROBE = 64
"""Samples whose logits and gradients the model's checks look at."""

RANDOM_PROBE = 16
"""Samples on which the gradients of a random model are measured, many passes each; and of large samples, all."""

_SPREAD = 256
"""Samples from all over the data on which wrong wrappings are looked for; ``PROBE`` of large ones."""

_LARGE = 2**15
"""Values of a sample from which on the model's checks look at fewer samples."""

_CONVERTED = 1e-3
"""The most that logits may differ from those of what a network was converted from, as a share of the largest."""

_GREY = 100
"""The width from which on the units of a box are taken for grey levels."""

_COARSE = 0.01
"""The most of the lead of a sample's class that may be lost in rounding."""

_REPAIRED = 0.1
"""Share of what stands that is searched by scores where gradients were repaired, or only cross-entropy's are masked."""

_SAME = 1e-4
"""Logits that differ by more than this share of their median size (one may be huge to mask a class) are different."""


@final
@dataclass(frozen=True, slots=True)
class Preflight:
    """What the checks found: the model as it is to be attacked, and findings.

    ``blind`` is the share of probe samples that have no gradient after all repairs. ``masked`` says that gradients,
    not of cross-entropy alone, are masked still.
    """

    model: Model
    findings: tuple[Finding, ...]
    classes: int
    blind: float
    masked: bool

    @property
    def doubt(self) -> float:
        """Share of what stands that a search by scores begins with: all where gradients are masked still."""
        return 1.0 if self.masked else _REPAIRED * masking(self.findings)


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


def check_model(
    model: Model, data: Data, threat: Threat, device: torch.device | str | None, *, repair: bool = True
) -> Preflight:
    """Ask the model about the first samples, ten passes each; where its gradients are unsound, repair them.

    What repairs would be worth takes hundreds of passes: none is tried without ``repair``, for attacks that see no
    gradient, nor on a model of which every question has its price.

    Raises:
        ModelOutputError: what it returns are not logits (``bad-logits``).
        NonFiniteError: NaN or infinity (``bad-logits``).
        DataError: labels outside the classes (``bad-logits``).
    """
    findings = [*check_modes(model), *_told(model, data), *check_units(threat, model.domain)]
    rows = torch.arange(min(len(data), RANDOM_PROBE if _large(data) else PROBE))
    with model.frozen(device) as live:
        x, y = data.batch(rows).to(live.device), data.labels[rows].to(live.device)
        z = _ask(live, x)
        check_labels(data, z.shape[1])
        findings += [*check_conversion(model, x, z), *check_rounding(z)]
        findings += check_wrapping(model, partial(_ask, live), *(v.to(live.device) for v in _spread(data)))
        again = _ask(live, x)
        random = _differ(z, again)
        if not random:
            findings += _batch_dependence(live, x, z)
            with torch.no_grad():  # a network that notices when its layers are replaced is searched as it is
                model = replace(model, tuned=not _differ(z, Door(live, len(x)).searched(x, rows.to(x.device))))
        if are_probabilities(z):
            findings.append(_PROBABILITIES)
            model = replace(model, probabilities=True)
    hits = (z.argmax(1) == y).nonzero()[:, 0]
    bench = Bench(x, y, threat, device).take(hits if len(hits) else torch.arange(len(x), device=x.device))
    if random:
        model, finding = _steadied(model, bench, z, again)
        bench, findings = bench.head(RANDOM_PROBE), [*findings, finding]
    before = bench.health(model)
    dear = getattr(model.module, "dear", False)
    after, repairs = mend(model, before, bench) if repair and not dear else (State(model, before, 0.0), ())
    findings += [*check_gradients(before, after.health, threat, random=random), *repairs]
    if repairs and not random and _differ(*(looks := _two_looks(after.model, bench))):  # the mask hid that too
        model, finding = _steadied(after.model, bench, *looks)
        after, findings = replace(after, model=model), [*findings, finding]
    return Preflight(
        after.model, tuple(findings), z.shape[1], after.health.blind, masking(findings) and not after.trusted
    )


def _large(data: Data) -> bool:
    return math.prod(data.shape) > _LARGE


def _spread(data: Data) -> tuple[Tensor, Tensor]:
    """Return samples (b, *f) from all over the data, which may be in the order of its classes, and labels (b,)."""
    count = min(len(data), PROBE if _large(data) else _SPREAD)
    rows = torch.linspace(0, len(data) - 1, count, dtype=torch.float64).long()
    return data.batch(rows), data.labels[rows]


def _told(model: Model, data: Data) -> Iterator[Finding]:
    """Say what was done to make a model of what the user has, and whether its classes are called as the data's are."""
    for note in model.notes:
        yield Finding("adapted", "info", note, {}, "Nothing is to be done, if that is what you meant.")
    ours, theirs = data.class_names, model.class_names
    if ours and theirs and ours != theirs and set(ours) == set(theirs):
        k = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        yield Finding(
            "labels-permuted",
            "error",
            f"Model and data have the same classes in another order: class {k} is {theirs[k]!r} to the model, and "
            f"{ours[k]!r} in the data.",
            {"first": k, "model": theirs[k], "data": ours[k]},
            "Bring them into one order, for example by numbering the class folders.",
        )


def check_conversion(model: Model, x: Tensor, z: Tensor) -> Iterator[Finding]:
    """Compare a converted network with what it was converted from, on the user's own samples.

    Raises:
        ModelError: they are two different networks (``conversion-differs``).
    """
    if model.reference is None:
        return
    own = replace(model, net=model.reference, reference=None, notes=(), rows=None, fixed_rows=False)
    with torch.no_grad():
        wanted = own(x.cpu()).to(z)
    gap = float((z - wanted).abs().max() / wanted.abs().max().clamp_min(1))
    same = int((z.argmax(1) == wanted.argmax(1)).sum())
    if not gap <= _CONVERTED:
        raise ModelError(
            f"the converted network to answer as what it was converted from (to within {_CONVERTED:g})",
            f"logits that differ by {gap:.2g} of the largest on {len(z)} samples; {same} predictions agree",
            "Export it anew; an .onnx file can be attacked by its scores instead: ort:FILE.",
            code="conversion-differs",
        )
    yield Finding(
        "converted",
        "info",
        f"On {len(z)} of your samples the logits of the converted network differ from the original's by at most "
        f"{gap:.2g} of the largest; {same} predictions agree.",
        {"difference": gap, "same_predictions": same, "n": len(z)},
        "Nothing is to be done.",
    )


def check_units(threat: Threat, box: Box) -> Iterator[Finding]:
    """Report an eps that looks like one for inputs in [0, 1], where the box has grey levels."""
    if threat.norm.name != "l0" and threat.eps is not None and threat.eps < 1 and box.width >= _GREY:
        yield Finding(
            "eps-below-a-grey-level",
            "warning",
            f"eps is {threat.eps:g} in a box of width {box.width:g}: less than one grey level. Nearly any model takes "
            "that.",
            {"eps": threat.eps, "width": box.width},
            f"Give eps in units of the box: {threat.norm.name}:{threat.eps * box.width:g} if you mean {threat.eps:g} "
            "of inputs in [0, 1].",
        )


def check_rounding(z: Logits) -> Iterator[Finding]:
    """Report logits (b, c) so large, next to their differences, that float32 rounding has a say in who wins."""
    first, second = z.double().topk(2, 1).values.T
    unsure = ROUNDING * torch.maximum(first.abs(), second.abs())
    share = float((unsure / (first - second).clamp_min(torch.finfo(z.dtype).tiny)).median())
    if share > _COARSE:
        yield Finding(
            "coarse-logits",
            "warning",
            f"The two largest logits are so near each other, for their size, that rounding may change "
            f"{min(share, 1):.0%} of what is between them (median). An input that fools by less than that does not "
            "count as fooled, so the model looks more robust than it is.",
            {"share": share, "n": len(z)},
            "Return logits without a common offset, in float32 or float64, before anything that saturates.",
        )


def _two_looks(model: Model, bench: Bench) -> tuple[Tensor, Tensor]:
    """Ask twice what a search sees."""
    with model.frozen(bench.device) as live:
        door, p = Door(live, len(bench.x)), bench.pose()
        a, b = (door.score(bench.x, p, LOSSES["margin"]).logits for _ in range(2))
        return a, b


def _steadied(model: Model, bench: Bench, a: Tensor, b: Tensor) -> tuple[Model, Finding]:
    """Average a model whose two looks a and b at the same samples differ."""
    spread = gradient_spread(model, bench.head(RANDOM_PROBE))
    model = averaged(model, spread)
    return model, _randomized(a, b, model, spread)


def _ask(live: Live, x: Tensor) -> Tensor:
    return Door(live, len(x)).logits(x, torch.arange(len(x), device=x.device))


def _differ(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > _SAME * float(a.abs().median().clamp_min(1e-3))


def _randomized(a: Tensor, b: Tensor, model: Model, spread: float) -> Finding:
    gap, flips = float((a - b).abs().max()), int((a.argmax(1) != b.argmax(1)).sum())
    return Finding(
        "randomized",
        "warning",
        f"Two passes of the same {len(a)} inputs differ by up to {gap:.3g} in a logit, {flips} predictions changed. "
        f"The gradient of one pass strays from the mean by {spread:.2g} times its length, so attacks see the mean of "
        f"{model.samples} passes (expectation over the randomness). A sample counts as right, or as fooled, by the "
        f"mean logits of {model.deciding} fresh passes.",
        {
            "max_difference": gap,
            "changed_predictions": flips,
            "n": len(a),
            "gradient_spread": spread,
            "samples": model.samples,
            "judged": model.deciding,
        },
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


def check_gradients(before: Health, after: Health, threat: Threat, *, random: bool) -> Iterator[Finding]:
    """Report gradients that are absent, zero, of wild sizes, or that do not keep their promise."""
    severity, consequence = _consequence(after, threat)
    evidence = {"share_ce": before.blind_ce, "share_margin": before.blind, "samples": before.samples}
    if not before.differentiable:
        yield Finding(
            "no-gradient",
            severity,
            "The model's output cannot be differentiated with respect to its input: gradient attacks cannot work on it "
            f"as it is. {consequence}",
            evidence,
            "Remove no_grad, detach, numpy or integer steps, or give a differentiable replacement.",
        )
    elif before.blind or before.blind_ce:
        yield Finding(
            "zero-gradient",
            severity,
            f"The input gradient is exactly zero on {before.blind_ce:.0%} of {before.samples} samples for "
            f"cross-entropy and {before.blind:.0%} for the margin. {consequence}",
            evidence,
            "Look for saturated outputs (large logits, a softmax), rounding, thresholds or sign functions.",
        )
    if not (random or (before.linear and before.even) or math.isnan(before.linearity)):
        yield _shattered(before)
    if before.steepest > STEEP:
        yield _exploding(before)


STEEP = 50.0
"""The steepest gradient over the median one, from which sizes count as wild; sound networks stay below 5."""


def _shattered(health: Health) -> Finding:
    return Finding(
        "shattered-gradient",
        "warning",
        f"A step of eps / 8 along the gradient changes the margin by {health.linearity:.2f} times what the "
        f"gradient promises (median; the 10 % and 90 % quantiles are {health.spread:.2f} apart); on sound networks by "
        f"{LINEAR[0]:g} to {LINEAR[1]:g} (and by less than {EVEN:g}). Gradients tell little about what is near, and "
        "attacks that follow them may miss what is there.",
        {"linearity": health.linearity, "spread": health.spread, "samples": health.samples},
        "Look for steps, top-k or winner-take-all activations, and very steep functions.",
    )


def _exploding(health: Health) -> Finding:
    return Finding(
        "exploding-gradient",
        "warning",
        f"The largest input gradient is {health.steepest:.3g} times the median one: on many samples it all but "
        "vanishes, or it explodes on a few.",
        {"largest_over_median": health.steepest, "samples": health.samples},
        "Look for saturated functions, high powers, and very deep chains of sigmoids.",
    )


def _consequence(after: Health, threat: Threat) -> tuple[Severity, str]:
    """Say what becomes of samples without a gradient."""
    if not after.blind:
        return "warning", "Attacks search by a gradient that is not masked."
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
