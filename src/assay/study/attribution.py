"""Which inputs an answer goes back to, before and after an attack: saliency and integrated gradients, compared."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.attacks import Runnable, describe_attack, get
from assay.attacks.losses import pick
from assay.core.errors import DataError, ModelError, RunError, ThreatError
from assay.core.files import replacing
from assay.core.optional import need
from assay.core.random import Draws
from assay.core.registry import UsageError, one_of
from assay.core.types import Inputs, Labels, Logits, Mask, Rows
from assay.data import Data, load_data
from assay.models import Door, Model, as_model
from assay.models.door import default_batch
from assay.reports.attribution import per_pixel, write_attribution
from assay.study.curvature import Classifier, copies, pose_one
from assay.study.measures import Values
from assay.threats import Problem, Threat
from assay.threats.problem import Goal, exact_size
from assay.threats.threat import outside_box

INTEGRATED, SALIENCY = "integrated-gradients", "saliency"
METHODS: Final = (INTEGRATED, SALIENCY)

STEPS: Final = 50
"""Points of the integral."""

_SHUFFLED: Final = 0xA77
"""A stream of random numbers."""

_LEVELS: Final = (0.1, 0.5, 0.9)
"""The quantiles over samples that sum a number up."""


@final
@dataclass(frozen=True, slots=True)
class Compared:
    """What one method says of a sample: of its label (row 0) and of the rival class (row 1).

    ``rank`` (2, 2) is Spearman's correlation, pixel by pixel, of the clean map with that of the attacked input (column
    0) and with that after a random change of the same sizes (column 1); NaN where a map is the same everywhere.
    ``overlap`` (2, 2) is the share of their top pixels that they have in common. In the others the columns are the
    clean (0) and the attacked (1) input: ``share`` (2, 2) is how much of the perturbation's l1 size lies in the top
    pixels of each map, ``total`` (2, 2) the sum of a map, ``rise`` (2, 2) how much higher the class's logit is than at
    the baseline; these two are equal where integrated gradients are exact. ``maps`` (2, 2, *f) are kept for the first
    samples only.
    """

    rank: Values
    overlap: Values
    share: Values
    total: Values
    rise: Values
    maps: NDArray[np.float32] | None

    @property
    def gap(self) -> Values:
        """How far the maps are from complete, in logits (2, 2)."""
        gap: Values = np.abs(self.total - self.rise)
        return gap

    def to_json(self) -> dict[str, Any]:
        names = ("rank", "overlap", "share", "total", "rise", "gap")
        return {name: _plain(getattr(self, name)) for name in names}


@final
@dataclass(frozen=True, slots=True)
class Sample:
    """A sample that the model has right, and what the attack made of it.

    ``rival`` is the class other than the label with the largest logit at the attacked input: what it is taken for,
    where it ``fooled`` the model. ``size`` is that of the perturbation in the norm of the threat; ``steady`` says that
    the model is still right after a random change of the same sizes. ``sure`` (2, 2) are the probabilities of label
    and rival (rows) at the clean and the attacked input (columns). ``x`` and ``attacked`` (*f) are kept for the first
    samples only.
    """

    index: int
    label: int
    rival: int
    fooled: bool
    size: float
    steady: bool
    sure: Values
    by: dict[str, Compared]
    x: NDArray[np.float32] | None = None
    attacked: NDArray[np.float32] | None = None

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("index", "label", "rival", "fooled", "size", "steady")}
        return plain | {
            "sure": _plain(self.sure),
            "methods": {name: found.to_json() for name, found in self.by.items()},
        }


@final
@dataclass(frozen=True, slots=True)
class Attribution:
    """What :func:`attribution` found: the samples that the model has right, in the order of the data.

    ``seen`` counts all samples that were looked at; ``pixels`` is the number of pixels (of values, where samples are no
    images), of which the ``k`` with the largest attributions are the top ones.
    """

    model: str
    data: str
    threat: str
    attack: dict[str, Any]
    methods: tuple[str, ...]
    baseline: str
    steps: int
    samples: tuple[Sample, ...]
    seen: int
    pixels: int
    k: int
    box: tuple[float, float]
    class_names: tuple[str, ...]
    seed: int
    forwards: int
    backwards: int

    def quantiles(self, method: str, what: str, at: tuple[int, int], *, fooled: bool) -> list[float] | None:
        """Return the 10 %, 50 % and 90 % quantiles of a number over the samples that were fooled, or were not.

        Args:
            method: ``integrated-gradients`` or ``saliency``.
            what: a number of :class:`Compared`.
            at: its row and column.
            fooled: which samples.

        Returns:
            None where no sample has that number.
        """
        values = np.array([getattr(s.by[method], what)[at] for s in self.samples if s.fooled is fooled])
        known = values[np.isfinite(values)]
        return list(np.quantile(known, _LEVELS).tolist()) if len(known) else None

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, without pictures; what is not a number is None."""
        names = ("model", "data", "threat", "attack", "baseline", "steps", "seen", "pixels", "k", "seed")
        return {
            **{name: getattr(self, name) for name in names},
            "fooled": sum(s.fooled for s in self.samples),
            "quantiles": list(_LEVELS),
            "summary": {name: {m: self._summary(m, fooled=way) for m in self.methods} for name, way in _GROUPS.items()},
            "passes": {"forwards": self.forwards, "backwards": self.backwards},
            "samples": [s.to_json() for s in self.samples],
        }

    def _summary(self, method: str, *, fooled: bool) -> dict[str, Any]:
        return {
            what: {
                f"{row}, {column}": self.quantiles(method, what, (i, j), fooled=fooled)
                for i, row in enumerate(("label", "rival"))
                for j, column in enumerate(columns)
            }
            for what, columns in _COLUMNS.items()
        }

    def report(self, path: Path | str, command: str = "") -> Path:
        """Write the page, one file that needs nothing else, and return where it is.

        Raises:
            RunError: it cannot be written.
        """
        return write_attribution(Path(path), self, command)

    def save(self, folder: Path | str, command: str = "") -> Path:
        """Write ``attribution.html``, ``attribution.json`` and, with the maps that were kept, ``attribution.npz``.

        Raises:
            RunError: the folder cannot be written.
        """
        folder = Path(folder)
        kept: dict[str, Any] = {f"{s.index}/{name}": v for s in self.samples for name, v in _arrays(s).items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / "attribution.json") as f:
                f.write((json.dumps(self.to_json(), indent=1) + "\n").encode())
            with replacing(folder / "attribution.npz") as f:
                np.savez_compressed(f, **kept)
        except OSError as e:
            raise RunError(f"a folder to write to at {folder}", str(e), "Choose another --out.") from e
        self.report(folder / "attribution.html", command)
        return folder


_GROUPS: Final = {"fooled": True, "held": False}
_CHANGES, _INPUTS = ("attacked", "random"), ("clean", "attacked")
_COLUMNS: Final = {"rank": _CHANGES, "overlap": _CHANGES, "share": _INPUTS, "gap": _INPUTS}


def _plain(values: Values) -> Any:
    """Return an array as nested lists, None for what is not a number."""
    found = values.astype(object)
    found[~np.isfinite(values)] = None
    return found.tolist()


def _arrays(s: Sample) -> dict[str, NDArray[np.float32]]:
    """Return the arrays of a sample that were kept, by name."""
    found = {"x": s.x, "attacked": s.attacked} | {name: c.maps for name, c in s.by.items()}
    return {name: v for name, v in found.items() if v is not None}


# ------------------------------------------------------------------------------------------------------------ one map


def attribute(
    model: Classifier, x: Tensor, target: int, method: str = INTEGRATED, *, baseline: float | Tensor | None = None,
    steps: int = STEPS, index: int = 0, device: torch.device | str | None = None,
) -> np.ndarray:  # fmt: skip
    """Return how much each value of x has to do with the logit of a class (before any softmax), by captum.

    ``integrated-gradients`` are (x - baseline) times the mean gradient on the straight way from the baseline to x, from
    ``steps`` Gauss-Legendre points; they sum to the rise of the logit but for that approximation. ``saliency`` is the
    absolute value of the gradient at x.

    Args:
        model: whose answer.
        x: one sample (*f) inside the box.
        target: the class.
        method: ``integrated-gradients`` or ``saliency``.
        baseline: where integrated gradients start: a value, or a sample (*f); None for the least value of the box.
        steps: gradients of integrated gradients.
        index: of the sample in its data, by which errors call it.
        device: where to run; None for where the model's parameters are.

    Returns:
        The attributions (*f), float32, in logits for integrated gradients, in logits per unit of the box for saliency.

    Raises:
        MissingExtraError: captum is not installed.
        DataError: x or the baseline is not inside the box, or the target is no class of the model.
        ModelError: the model has no gradient by its input.

    References:
        Sundararajan, Taly & Yan 2017, arXiv:1703.01365, eqs. 1 and 3; Simonyan, Vedaldi & Zisserman 2014,
        arXiv:1312.6034, sec. 3. The library: captum, arXiv:2009.07896.
    """
    model = as_model(model)
    how = _How((method,), baseline, steps)
    with model.frozen(device) as live:
        door, p = Door(live, 1, indices=torch.tensor([index])), pose_one(live, x, target, _ANY, 0, index)
        classes = torch.full_like(p.rows, int(target))
        found: np.ndarray = _maps(door, p, p.x0, classes, method, how)[0].cpu().numpy()
        return found


_ANY: Final = Threat("linf")
"""Poses a sample whose perturbation is of no matter."""


@final
@dataclass(frozen=True, slots=True)
class _How:
    """How maps are made."""

    methods: tuple[str, ...]
    baseline: float | Tensor | None
    steps: int

    def __post_init__(self) -> None:
        for method in self.methods or ("none",):
            one_of("method", method, METHODS)
        if self.steps < 1:
            raise UsageError("steps >= 1", f"{self.steps}", f"Leave it out for {STEPS}.")

    def start(self, p: Problem) -> Inputs:
        """Return the baseline of one sample (1, *f).

        Raises:
            DataError: it is not of the sample's shape, or not inside the box.
        """
        given = torch.as_tensor(p.box.lo if self.baseline is None else self.baseline)
        if given.shape not in (torch.Size(), p.x0.shape[1:]):
            found = f"{tuple(given.shape)}"
            raise DataError(f"a baseline of one value, or {tuple(p.x0.shape[1:])}", found, "Give one of these.")
        if not ((given >= p.box.lo) & (given <= p.box.hi)).all():
            found = f"values from {float(given.min()):g} to {float(given.max()):g}"
            raise DataError(
                f"a baseline inside the box [{p.box.lo:g}, {p.box.hi:g}]", found, "Models know nothing else."
            )
        return given.to(p.x0).expand_as(p.x0).contiguous()

    def told(self, low: float) -> str:
        """Say what the baseline is."""
        if self.baseline is None:
            return f"{low:g} everywhere, the least value of the box"
        given = torch.as_tensor(self.baseline)
        return "a sample of its own" if given.ndim else f"{float(given):g} everywhere"


class _Answer(torch.autograd.Function):
    """The logit of a class, with the gradient that came with it: captum differentiates, the door is asked once."""

    @staticmethod
    def forward(ctx: Any, x: Inputs, ask: Any) -> Tensor:
        value, grad = ask(x)
        ctx.save_for_backward(grad)
        answered: Tensor = value
        return answered

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return outer[0].view(-1, *[1] * (grad.ndim - 1)) * grad, None


def _logit(logits: Logits, goal: Goal) -> Tensor:
    """Return the logit of the class in question."""
    assert goal.target is not None
    return pick(logits, goal.target)


def _maps(door: Door, p: Problem, x: Inputs, classes: Labels, method: str, how: _How) -> Inputs:
    """Return the attributions (m, *f) of points x (m, *f) for classes (m,), all of the one sample of ``p``."""
    captum = need("captum.attr", "attribution")

    def forward(points: Inputs, which: Labels) -> Tensor:
        q = replace(copies(p, len(points)), goal=Goal(None, which))

        def ask(at: Inputs) -> tuple[Tensor, Inputs]:
            e = door.gradient(at, q, _logit)
            return e.loss, e.grad

        found: Tensor = _Answer.apply(points, ask)  # type: ignore[no-untyped-call]
        return found

    x = x.detach()
    if method == SALIENCY:
        point = x.clone().requires_grad_()
        found = captum.Saliency(forward).attribute(point, additional_forward_args=classes)
    else:
        rows = max(len(x), default_batch(x.shape[1:], x.device))
        parts: dict[str, Any] = {"n_steps": how.steps, "internal_batch_size": rows}
        start = how.start(p).expand_as(x)
        found = captum.IntegratedGradients(forward).attribute(x, start, None, classes, **parts)
    if not door.differentiable:
        raise ModelError(
            "a model with a gradient by its input",
            "one without",
            "Attributions are made of gradients; this model has none to tell.",
            code="no-gradient",
        )
    maps: Inputs = found.detach()
    return maps


# -------------------------------------------------------------------------------------------------- clean and attacked


def attribution(
    model: Classifier, data: Any, threat: Threat | str, attack: str | Runnable = "pgd",
    methods: Sequence[str] = METHODS, limit: int | None = None, seed: int = 0, *,
    baseline: float | Tensor | None = None, steps: int = STEPS, top: float = 0.1, shown: int = 8,
    batch_size: int | None = None, device: torch.device | str | None = None,
) -> Attribution:  # fmt: skip
    """Attack samples, and compare what the answers go back to before and after, for the label and for the rival class.

    The samples that the model has right are attacked, with all steps of the attack; then each is looked at clean and
    attacked. A pixel's attribution is the sum over its channels; the top pixels are those of the largest absolute
    values. Attributions are fragile by themselves: a small change that keeps the answer may turn the map (Ghorbani,
    Abid & Zou 2019, arXiv:1710.10547). So the clean maps are compared with those after a random change too, which has
    the sizes of the perturbation at other places, with other signs.

    Args:
        model: whom to ask.
        data: whatever :func:`assay.load_data` takes.
        threat: what the attack may do.
        attack: the name of an attack, or one with its parameters.
        methods: ``integrated-gradients``, ``saliency`` or both.
        limit: use only the first samples.
        seed: of the attack's random numbers.
        baseline: see :func:`attribute`.
        steps: of integrated gradients; a sample costs six times as many gradients.
        top: the share of the pixels that are the top ones.
        shown: of so many samples, the first ones, the pictures are kept.
        batch_size: samples attacked together; changes no result but for rounding.
        device: where to run; None for where the model's parameters are.

    Raises:
        MissingExtraError: captum is not installed.
        ThreatError: a targeted threat, or one that the attack cannot work with.
        UsageError: no such attack or method.
        DataError: samples outside the box, or labels that the model has no class for.
        ModelError: the model has no gradient by its input.
    """
    model, how = as_model(model), _How(tuple(methods), baseline, steps)
    threat = Threat.parse(threat) if isinstance(threat, str) else threat
    if threat.targeted or not 0 < top <= 1:
        _refuse(threat, top)
    need("captum.attr", "attribution")  # before anything is attacked
    samples = model.takes(load_data(data, limit=limit))
    chosen = get(attack) if isinstance(attack, str) else attack
    pixels = len(per_pixel(samples.batch([0])[0].numpy()))
    work = _Work(model, samples, threat, chosen, how, seed, device, max(1, round(top * pixels)), shown)
    for rows in torch.split(torch.arange(len(samples)), batch_size or default_batch(samples.shape, device)):
        work.take(rows)
    return Attribution(
        model=model.name,
        data=samples.name,
        threat=str(threat),
        attack=describe_attack(chosen),
        methods=how.methods,
        baseline=how.told(model.domain.lo),
        steps=steps,
        samples=tuple(work.found),
        seen=len(samples),
        pixels=pixels,
        k=work.k,
        box=(model.domain.lo, model.domain.hi),
        class_names=tuple(samples.class_names or model.class_names or ()),
        seed=seed,
        forwards=int(work.passes[0]),
        backwards=int(work.passes[1]),
    )


def _refuse(threat: Threat, top: float) -> None:
    if threat.targeted:
        raise ThreatError("a threat without targets", str(threat), "Leave the target out.")
    raise UsageError("0 < top <= 1", f"{top}", "It is a share of the pixels.")


class _Work:
    """The samples that were looked at so far, and the passes that they cost."""

    def __init__(
        self, model: Model, data: Data, threat: Threat, attack: Runnable, how: _How, seed: int,
        device: torch.device | str | None, k: int, shown: int,
    ) -> None:  # fmt: skip
        self.model, self.data, self.threat, self.attack, self.how = model, data, threat, attack, how
        self.seed, self.device, self.k, self.shown = seed, device, k, shown
        self.found: list[Sample] = []
        self.passes = np.zeros(2, dtype=np.int64)

    def take(self, rows: Rows) -> None:
        """Attack the samples ``rows`` that the model has right, and look at each."""
        x, y = self.data.batch(rows), self.data.labels[rows]
        right = self._right(rows, x, y).nonzero()[:, 0]
        if not len(right):
            return
        at: dict[str, Any] = {"indices": rows[right], "device": self.device}
        r = self.attack(self.model, x[right], y[right], self.threat, self.seed, full=True, **at)
        self.passes += (int(r.forwards.sum()), int(r.backwards.sum()))
        sizes = exact_size(self.threat.norm, r.x, x[right])
        for i, row in enumerate(right.tolist()):
            found = self._look(int(rows[row]), x[row], r.x[i], int(y[row]))
            self.found.append(replace(found, fooled=bool(r.success[i]), size=float(sizes[i])))

    def _right(self, rows: Rows, x: Inputs, y: Labels) -> Mask:
        box = self.model.domain
        outside = ~((x >= box.lo) & (x <= box.hi)).flatten(1).all(1)
        if outside.any():
            raise outside_box(box, (float(x.min()), float(x.max())), rows[outside].tolist(), len(self.data))
        with self.model.frozen(self.device) as live:
            door = Door(live, len(x), indices=rows)
            x0, label = x.to(live.device), y.to(live.device)
            p = Problem.pose(x0, label, replace(_ANY, box=box), Draws.of(self.seed, rows.to(live.device)))
            said = door.decide(x0, p).label
            self._spend(door)
            return (said == label).cpu()

    def _look(self, index: int, x: Tensor, attacked: Tensor, label: int) -> Sample:
        """Compare the maps of a sample x (*f) with those of its attacked version (*f)."""
        keep = len(self.found) < self.shown
        with self.model.frozen(self.device) as live:
            door, p = Door(live, 1, indices=torch.tensor([index])), pose_one(live, x, label, _ANY, self.seed, index)
            inputs = torch.stack([p.x0[0], attacked.to(p.x0), shuffled(p, attacked.to(p.x0))])
            z = door.logits(torch.cat([inputs, self.how.start(p)]), copies(p, 4).rows).double()
            classes = torch.tensor([label, rival_of(z[1], label)], device=live.device)
            pair = z[:, classes].cpu()
            rise = (pair[:2] - pair[3]).T.numpy()
            by = {}
            for method in self.how.methods:
                every, known = inputs.repeat(2, *[1] * x.ndim), rise if method == INTEGRATED else rise * np.nan
                maps = _maps(door, p, every, classes.repeat_interleave(3), method, self.how).view(2, 3, *x.shape)
                delta = (inputs[1] - inputs[0]).cpu().numpy()
                by[method] = compared(maps.cpu().numpy(), delta, known, self.k, keep=keep)
            self._spend(door)
        sure, steady = z[:2].softmax(1)[:, classes].T.cpu().numpy(), int(z[2].argmax()) == label
        kept = {"x": x.numpy().copy(), "attacked": attacked.cpu().numpy().copy()} if keep else {}
        return Sample(index, label, int(classes[1]), False, 0.0, steady, sure, by, **kept)

    def _spend(self, door: Door) -> None:
        self.passes += (int(door.forwards.sum()), int(door.backwards.sum()))


def shuffled(p: Problem, attacked: Tensor) -> Tensor:
    """Return a sample x (*f) with a random change: the sizes of the change to ``attacked``, each at another place.

    The sign of each is random where both stay inside the box, and else the one that does.
    """
    x, draws = p.x0[0].flatten(), p.draws.fold(_SHUFFLED)
    step = (attacked - p.x0[0]).abs().flatten()[draws.uniform((len(x),))[0].argsort()]
    up, down = x + step <= p.box.hi, x - step >= p.box.lo
    sign = torch.where(up & down, draws.fold(1).signs((len(x),))[0], up.to(x) - down.to(x))
    return (x + sign * step).clamp(p.box.lo, p.box.hi).view_as(attacked)


def rival_of(logits: Tensor, label: int) -> int:
    """Return the class other than the label with the largest of the logits (c,) of one input."""
    return int(logits.index_fill(0, torch.tensor([label], device=logits.device), -torch.inf).argmax())


# ------------------------------------------------------------------------------------------------------------- numbers


def compared(maps: np.ndarray, delta: np.ndarray, rise: Values, k: int, *, keep: bool = True) -> Compared:
    """Compare the maps (2, 3, *f) of two classes at the clean, the attacked and the randomly changed input.

    Args:
        maps: rows are classes, columns inputs.
        delta: the perturbation (*f), attacked minus clean.
        rise: see :class:`Compared`; NaN where sums of maps mean nothing.
        k: how many pixels are the top ones.
        keep: whether the result holds the maps.
    """
    flat = np.stack([[per_pixel(m.astype(np.float64)) for m in row] for row in maps])
    tops = np.stack([[top_pixels(m, k) for m in row] for row in flat])
    moved = per_pixel(np.abs(delta.astype(np.float64)))
    return Compared(
        rank=np.array([[rank_correlation(row[0], other) for other in row[1:]] for row in flat]),
        overlap=np.array([[common(row[0], other) for other in row[1:]] for row in tops]),
        share=tops[:, :2] @ moved / moved.sum() if moved.any() else np.full((2, 2), np.nan),
        total=np.where(np.isnan(rise), np.nan, flat[:, :2].sum(2)),
        rise=rise,
        maps=maps[:, :2].astype(np.float32) if keep else None,
    )


def rank_correlation(a: Values, b: Values) -> float:
    """Return Spearman's rank correlation of values (n,); NaN where one of them is the same everywhere."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else float("nan")


def top_pixels(values: Values, k: int) -> NDArray[np.bool_]:
    """Return the mask (n,) of the k largest absolute values, the first of equals; a value of 0 is never among them."""
    size = np.abs(values)
    mask = np.zeros(len(values), dtype=np.bool_)
    mask[np.argsort(-size, kind="stable")[:k]] = True
    found: NDArray[np.bool_] = mask & (size > 0)
    return found


def common(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Return the share of the larger of two sets, given as masks, that is in both; NaN where both are empty."""
    most = max(a.sum(), b.sum())
    return float((a & b).sum() / most) if most else float("nan")
