"""How far a proof reaches, by bisection; and the bracket: proven from below, broken from above."""

import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

import torch

from assay.attacks import get
from assay.certification.certify import Case, Proof, contradiction
from assay.core.progress import Progress, silent
from assay.core.registry import UsageError
from assay.core.types import Labels, Mask, PerSample
from assay.models import Model
from assay.models.loaded import Net
from assay.threats import NORMS, Threat
from assay.threats.problem import exact_size

BEYOND: Final = 1.25
"""Bisection may look this far beyond what is broken: a proof that is wrong has to be able to show that it is."""

Holds: TypeAlias = Callable[[Labels, PerSample, int], Mask]
"""Tells which of some samples (k,) are proven in balls of a radius (k,) each; also gets the number of the step."""


class Bracket(NamedTuple):
    """For each sample ``lower <= true <= upper``, (n,) float64 both, in units of the box; 0 and 0 where it is wrong.

    ``lower`` is proven. ``upper`` is the size of a verified adversarial perturbation, inf where none was found.
    """

    lower: PerSample
    upper: PerSample


def certified_radius(
    model: Model | Net,
    x: Any,
    y: Any,
    norm: str = "linf",
    method: str = "crown",
    upper: Any = None,
    steps: int = 7,
    seconds: float = 30.0,
    arithmetic: str = "float32",
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    progress: Progress = silent,
) -> PerSample:
    """Return a radius (n,) float64 within which each sample is proven right: the largest found; 0 for what is wrong.

    Each step halves, for all samples together, the interval in which the largest provable radius is searched.

    ``upper``, (n,) or a number, is the largest radius that is tried; None stands for all that the box holds. The size
    of an adversarial perturbation saves steps. Each of the ``steps`` costs one proof a sample; the result is within
    upper / 2^steps of the largest radius that the method proves. For ``complete`` the bisection goes on from what
    ``crown`` proves, each sample for itself; ``seconds`` are for all that a sample takes, so that the last steps of a
    hard one are not made.

    The other arguments and all errors are those of :func:`assay.certify`.

    Example:
        >>> net = lambda x: torch.stack([x.sum(1), 1 - x.sum(1)], 1)  # from 0.9 to 0.5 in two coordinates
        >>> r = certified_radius(net, [[0.5, 0.4], [0.3, 0.1]], [0, 0], upper=0.4, steps=12)
        >>> round(r[0].item(), 3), r[1].item()
        (0.2, 0.0)
    """
    case = Case.pose(model, x, y, Threat(norm), Proof(method, seconds, arithmetic), device, batch_size, progress)
    return _radius(case, upper, steps)


def bracket(
    model: Model | Net,
    x: Any,
    y: Any,
    norm: str = "linf",
    method: str = "crown",
    attack: str = "inward",
    steps: int = 7,
    seed: int = 0,
    seconds: float = 30.0,
    arithmetic: str = "float32",
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    progress: Progress = silent,
) -> Bracket:
    """Return between which sizes the smallest perturbation that fools lies, sample by sample.

    ``attack`` is the name of a minimal-norm attack, out of ``assay.attacks.names(norm="linf", kind="minimal")``, and
    ``seed`` that of its random numbers.

    The other arguments are those of :func:`certified_radius`.

    Example:
        >>> net = lambda x: torch.stack([x.sum(1), 1 - x.sum(1)], 1)
        >>> lower, upper = bracket(net, [[0.5, 0.4]], [0])
        >>> bool(0.195 < lower[0] <= 0.2 <= upper[0] < 0.201)
        True

    Raises:
        ContradictionError: a proof reaches beyond a verified adversarial input: a bug, never a result.
        UsageError: no such attack for the norm.
    """
    case = Case.pose(model, x, y, Threat(norm), Proof(method, seconds, arithmetic), device, batch_size, progress)
    upper = torch.zeros(len(case.x), dtype=torch.float64)
    rows = case.right.nonzero()[:, 0]
    adversarial = case.x.clone()
    if len(rows):
        how: dict[str, Any] = {"indices": rows, "device": device}
        r = get(attack)(case.prover.model, case.x[rows], case.y[rows], case.threat, seed, **how)
        sizes = exact_size(NORMS[norm], r.x, case.x[rows])
        upper[rows], adversarial[rows] = torch.where(r.success, sizes, torch.inf), r.x
    lower = _radius(case, (upper * BEYOND).clamp_max(_most(case)), steps)
    for i in ((lower >= upper) & case.right).nonzero()[:1, 0].tolist():
        found = {"x": case.x[i].numpy(), "adversarial": adversarial[i].numpy(), "label": case.y[i].numpy()}
        raise contradiction(i, float(lower[i]), float(upper[i]), norm, found)
    return Bracket(lower, upper)


def bisect(
    holds: Holds, upper: PerSample, steps: int, lower: PerSample | None = None, *, whole: bool = False
) -> PerSample:
    """Return the largest radius (n,) for which a step of the bisection of [lower, upper] found that it ``holds``.

    ``lower``, 0 if not given, is known to hold. With ``whole``, radii are whole numbers (l0), and ``upper`` itself is
    tried where nothing else is left.
    """
    lower = torch.zeros_like(upper) if lower is None else lower.clone()
    upper = upper.floor() + 1 if whole else upper.clone()
    for step in range(steps):
        middle = (lower + upper) / 2
        middle = middle.floor() if whole else middle
        rows = (middle > lower).nonzero()[:, 0]
        if not len(rows):
            break
        proven = holds(rows, middle[rows], step)
        lower[rows] = torch.where(proven, middle[rows], lower[rows])
        upper[rows] = torch.where(proven, upper[rows], middle[rows])
    return lower


def _most(case: Case) -> float:
    box = case.prover.model.domain
    return case.threat.norm.diameter(box.width, case.x[0].numel())


def _radius(case: Case, upper: Any, steps: int) -> PerSample:
    if steps < 1:
        raise UsageError("steps of at least 1", str(steps), "Seven leave an uncertainty of a hundredth.")
    most = torch.as_tensor(_most(case) if upper is None else upper, dtype=torch.float64)
    most = most.expand(len(case.x)).clamp(0, _most(case))
    lower = torch.zeros(len(case.x), dtype=torch.float64)
    for rows in case.parts():
        reach = _searched if case.prover.method == "complete" else _reach
        lower[rows] = reach(case, rows, most[rows], steps)
        case.note(rows, int((lower[rows] > 0).sum()))
    return lower


def _reach(case: Case, rows: Labels, most: PerSample, steps: int) -> PerSample:
    """Return how far the samples ``rows`` (k,) are proven, all of them together."""

    def holds(at: Labels, radius: PerSample, step: int) -> Mask:
        return case.margins(rows[at], radius, f" {step + 1}/{steps}").amin(1) > 0

    return bisect(holds, most, steps, whole=case.threat.norm.name == "l0")


def _searched(case: Case, rows: Labels, most: PerSample, steps: int) -> PerSample:
    """Return how far the samples ``rows`` are proven by a search that begins where ``crown`` ends.

    The time of a sample is that of the prover; each step may take an equal share of what is left.
    """
    prover, begin = case.prover, time.monotonic()
    method, seconds = prover.method, prover.seconds
    try:
        prover.method = "crown"
        lower = _reach(case, rows, most, steps)
        prover.method = method
        left = seconds - (time.monotonic() - begin) / len(rows)
        for i, row in enumerate(rows.split(1)):  # type: ignore[no-untyped-call]
            end = time.monotonic() + left

            def holds(_: Labels, radius: PerSample, step: int, row: Labels = row, end: float = end) -> Mask:
                prover.seconds = (end - time.monotonic()) / (steps - step)
                if prover.seconds <= 0:
                    return torch.zeros(1, dtype=torch.bool)
                return case.margins(row, radius, f" {step + 1}/{steps}").amin(1) > 0

            whole = case.threat.norm.name == "l0"
            lower[i : i + 1] = bisect(holds, most[i : i + 1], steps, lower[i : i + 1], whole=whole)
    finally:
        prover.method, prover.seconds = method, seconds
    return lower
