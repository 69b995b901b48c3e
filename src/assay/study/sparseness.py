"""How sparsely the layers of a network answer, as samples are and under attack."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from assay.attacks import Runnable, describe_attack, get
from assay.core.errors import ThreatError
from assay.core.registry import UsageError
from assay.core.types import Inputs, Labels, Rows
from assay.data import Data, load_data
from assay.models import Model, as_model
from assay.models.line import default_batch
from assay.models.loaders import load_model
from assay.reports.sparseness import write_sparseness
from assay.study.hidden import hide
from assay.study.kept import keep
from assay.study.layers import Layer, find_layers, responses
from assay.study.measures import Hits, Relation, Shift, Values, histogram, mode, separation
from assay.study.moments import Moments, by_class
from assay.threats import Threat

CLEAN, ATTACKED, HIDDEN = "clean", "attacked", "adaptive"

_PROBE: Final = 256
"""Samples whose PSI says in what units the adaptive attack counts a change: always the first, whatever the batches."""


@final
@dataclass(frozen=True, slots=True)
class Side:
    """What a layer answered under one condition; K classes, n samples, u units.

    ``psi`` (n,) is the population sparseness index of each sample, NaN where no unit answered (``silent`` counts them);
    ``active`` (n,) the share of units whose response is not 0. Of each class there are two figures: ``of_means`` (K,),
    the PSI of the responses averaged over the class's samples, and ``mean_of`` (K,), the mean of its samples' PSI.
    ``lifetime`` (u,) is the sparseness of each unit over samples, NaN for the ``dead`` ones, which never answer.
    ``counts`` is the histogram of ``psi`` over 0 .. 1, ``mode`` the middle of its fullest bin. ``signed`` says that
    there were responses below 0, for which the index was not made.
    """

    psi: Values
    active: Values
    of_means: Values
    mean_of: Values
    lifetime: Values
    counts: tuple[int, ...]
    mode: float
    silent: int
    dead: int
    signed: bool

    @classmethod
    def of(cls, m: Moments, y: Labels, bins: int) -> "Side":
        """Finish the sums of a layer; y (n,) are the labels in the order of the samples."""
        psi, lifetime = m.psi, m.lifetime
        counts = histogram(psi.numpy(), bins)
        return cls(
            psi=psi.numpy(),
            active=m.active.numpy(),
            of_means=m.class_psi.numpy(),
            mean_of=by_class(psi, y, m.classes).numpy(),
            lifetime=lifetime.numpy(),
            counts=tuple(counts.tolist()),
            mode=mode(counts),
            silent=int(psi.isnan().sum()),
            dead=int((~m.ever).sum()),
            signed=m.signed,
        )

    def to_json(self) -> dict[str, Any]:
        """Return all but the arrays by sample and unit, of which there are means."""
        means = {name: _mean(getattr(self, name)) for name in ("psi", "active", "lifetime")}
        classes = {name: [_number(v) for v in getattr(self, name).tolist()] for name in ("of_means", "mean_of")}
        rest = {"counts": list(self.counts), "mode": _number(self.mode), "silent": self.silent, "dead": self.dead}
        return means | classes | rest | {"signed": self.signed}


@final
@dataclass(frozen=True, slots=True)
class LayerSparseness:
    """All about one layer.

    ``sides`` are by condition: ``clean``, ``attacked`` and, where it was run, ``adaptive``. ``relations`` say how a
    condition's class PSI (of the mean responses) goes with the accuracy of the classes under it. ``shift`` is that of
    the PSI from clean to attacked, sample by sample. The three areas under the ROC say how well this layer's PSI alone
    tells attacked samples from the same samples clean (0.5: not at all): ``auc`` of all samples, ``auc_fooled`` of
    those that the attack fooled, ``auc_adaptive`` of those that the attack that knows of the PSI fooled.
    """

    layer: Layer
    sides: dict[str, Side]
    relations: dict[str, Relation | None]
    shift: Shift | None
    auc: float | None
    auc_fooled: float | None
    auc_adaptive: float | None

    def to_json(self) -> dict[str, Any]:
        layer = self.layer
        plain = {"name": layer.name, "module": layer.module, "call": layer.call, "shape": list(layer.shape)}
        areas = {name: getattr(self, name) for name in ("auc", "auc_fooled", "auc_adaptive")}
        return {
            **plain,
            **areas,
            "sides": {name: side.to_json() for name, side in self.sides.items()},
            "relations": {name: _plain(r) for name, r in self.relations.items()},
            "shift": _plain(self.shift),
        }


@final
@dataclass(frozen=True, slots=True)
class Sparseness:
    """What :func:`sparseness` found: layers in the order of use, accuracies by condition, and what it cost.

    ``right`` are masks (n,) by condition; a sample that is wrong clean may be right under an attack, and is wrong all
    the same. ``about`` says what was run.
    """

    layers: tuple[LayerSparseness, ...]
    labels: NDArray[np.int64]
    right: dict[str, Hits]
    class_names: tuple[str, ...]
    about: dict[str, Any]
    forwards: int
    backwards: int
    seconds: float

    @property
    def n(self) -> int:
        return len(self.labels)

    def accuracy(self, condition: str) -> float:
        """Return the share of samples that are right under a condition."""
        return float(self.right[condition].mean())

    def fooled(self, condition: str) -> int:
        """Return how many samples are right clean, and wrong under a condition."""
        return int((self.right[CLEAN] & ~self.right[condition]).sum())

    def class_accuracy(self, condition: str) -> Values:
        """Return the share of each class's samples that are right (K,), NaN for classes without a sample."""
        hits, y = (torch.from_numpy(v) for v in (self.right[condition], self.labels))
        return by_class(hits.double(), y, len(self.class_names)).numpy()

    def __getitem__(self, layer: str) -> LayerSparseness:
        """Return what was found about the layer of that name."""
        for found in self.layers:
            if found.layer.name == layer:
                return found
        raise UsageError(
            "the name of a layer", repr(layer), f"There are: {', '.join(s.layer.name for s in self.layers)}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return all but the arrays by sample and unit, as plain JSON; what is not a number is None."""
        classes = {name: [_number(v) for v in self.class_accuracy(name).tolist()] for name in self.right}
        return {
            **self.about,
            "n": self.n,
            "class_names": list(self.class_names),
            "class_counts": np.bincount(self.labels, minlength=len(self.class_names)).tolist(),
            "accuracy": {name: self.accuracy(name) for name in self.right},
            "fooled": {name: self.fooled(name) for name in self.right if name != CLEAN},
            "class_accuracy": classes,
            "passes": {"forwards": self.forwards, "backwards": self.backwards},
            "seconds": self.seconds,
            "layers": [layer.to_json() for layer in self.layers],
        }

    def report(self, path: str | Path) -> Path:
        """Write the page, one file that needs nothing else, and return where it is."""
        return write_sparseness(Path(path), self.to_json())

    def save(self, folder: str | Path) -> Path:
        """Write ``sparseness.json``, ``.html`` and, by sample and unit, ``.npz``; return the folder.

        Raises:
            RunError: the folder cannot be written.
        """
        folder = Path(folder)
        kinds = ("psi", "active", "lifetime")
        sides = [(f"{s.layer.name}/{name}", side) for s in self.layers for name, side in s.sides.items()]
        arrays = {f"{at}/{kind}": getattr(side, kind) for at, side in sides for kind in kinds}
        arrays |= {"labels": self.labels} | {f"right/{name}": hits for name, hits in self.right.items()}
        keep(folder, "sparseness", self.to_json(), arrays)
        self.report(folder / "sparseness.html")
        return folder


def _number(v: float) -> float | None:
    return v if math.isfinite(v) else None


def _mean(values: Values) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _plain(found: Shift | Relation | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def sparseness(
    model: Any,
    data: Any,
    threat: Threat | str = "linf:0.03",
    attack: str | Runnable = "fgsm",
    layers: str | Sequence[str] | None = None,
    bins: int = 100,
    limit: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    adaptive: bool = True,
    weight: float = 10.0,
) -> Sparseness:
    """Measure how sparsely each layer answers, clean and attacked side by side.

    With r_i the response of unit i of n, after the non-linearity, the population sparseness index of a sample is
    PSI = (1 - a) / (1 - 1/n), a = (sum r_i / n)**2 / (sum r_i**2 / n): 0 when all units respond alike, 1 when one does.
    All samples are attacked, also those that the model gets wrong, and each attack takes all its steps. The data are
    gone through once, in memory that grows by some numbers a sample and layer.

    Args:
        model: an :class:`assay.Model`, a network that takes inputs in [0, 1], or a MODEL form of the command line.
        data: whatever :func:`assay.load_data` takes.
        threat: what the attacks may do, with an eps.
        attack: the name of an attack, or one with its parameters.
        layers: shell patterns of names of layers or modules, with commas or as a sequence; None for all activations.
        bins: of the histograms over 0 .. 1.
        limit: use only the first samples.
        seed: of all random numbers.
        device: where to run; None for where the model is.
        batch_size: samples in work together; changes no result but for rounding.
        progress: show a bar on the terminal.
        adaptive: also run an attack that knows of the PSI, and keeps that of every layer where it was.
        weight: of hiding in that attack.

    Raises:
        ThreatError: no eps, or a targeted threat.
        UsageError: unknown attack or layers.
        ModelError: a model without layers that can be listened to.
        DataError: what :func:`assay.load_data` raises, and labels that the model has no class for.

    References:
        Rolls & Tovee 1995, Journal of Neurophysiology 73(2), 713-726; Vinje & Gallant 2000, Science 287, 1273-1276.
    """
    began = time.monotonic()
    threat = Threat.parse(threat) if isinstance(threat, str) else threat
    if threat.eps is None or threat.targeted:
        raise ThreatError("an eps, and a threat without targets", str(threat), "Write for example linf:0.03.")
    if bins < 1:
        raise UsageError("bins >= 1", f"{bins}", "Leave it out for 100.")
    whole = load_model(model) if isinstance(model, str) else as_model(model)
    samples = whole.takes(load_data(data, limit=limit))
    runnable = get(attack) if isinstance(attack, str) else attack
    patterns = [p.strip() for p in layers.split(",")] if isinstance(layers, str) else layers
    work = _Work.begin(whole, samples, threat, runnable, patterns, seed, device, weight if adaptive else None)
    with _bar(progress, len(samples)) as step:
        for rows in torch.arange(len(samples)).split(batch_size or default_batch(samples.shape, device)):  # type: ignore[no-untyped-call]
            work.measure(rows)
            step(len(rows))
    about = {
        "model": whole.name,
        "data": samples.name,
        "threat": threat.to_json(),
        "attack": describe_attack(runnable),
        "adaptive": {"steps": 40, "weight": weight} if adaptive else None,
        "bins": bins,
        "seed": seed,
    }
    return work.result(bins, about, time.monotonic() - began)


@final
@dataclass(slots=True)
class _Work:
    """The samples measured so far: sums by condition and layer, hits by condition, passes."""

    model: Model
    heard: Model
    data: Data
    threat: Threat
    attack: Runnable
    seed: int
    device: torch.device | str | None
    weight: float | None
    layers: tuple[Layer, ...]
    scale: Tensor
    moments: dict[str, list[Moments]]
    right: dict[str, list[Tensor]]
    forwards: int
    backwards: int = 0

    @classmethod
    def begin(
        cls, model: Model, data: Data, threat: Threat, attack: Runnable, patterns: Sequence[str] | None,
        seed: int, device: torch.device | str | None, weight: float | None,
    ) -> "_Work":  # fmt: skip
        """Find the layers, and how much their PSI differs between the first samples."""
        heard = replace(model, tuned=False, samples=1, judged=0, smoothing=None)
        some = torch.arange(min(len(data), _PROBE)).split(default_batch(data.shape, device))  # type: ignore[no-untyped-call]
        probe: list[Moments] = []
        with heard.frozen(device) as live:
            layers = find_layers(live, data.batch(some[0][:1]).to(live.device), patterns)
            for rows in some if weight is not None else some[:1]:
                z, found, _ = responses(live, layers, data.batch(rows).to(live.device))
                probe = probe or [Moments(layer.units, 1) for layer in layers]
                for m, r in zip(probe, found, strict=True):
                    m.add(r.cpu(), torch.zeros(len(rows), dtype=torch.int64))
            names = (CLEAN, ATTACKED) if weight is None else (CLEAN, ATTACKED, HIDDEN)
            fresh = {name: [Moments(layer.units, z.shape[1], live.device) for layer in layers] for name in names}
        scale = torch.stack([m.psi[~m.psi.isnan()].std(correction=0) for m in probe]).nan_to_num(0.0)
        spent = 1 + probe[0].n
        return cls(model, heard, data, threat, attack, seed, device, weight, layers, scale, fresh,
                   {name: [] for name in names}, spent)  # fmt: skip

    def measure(self, rows: Rows) -> None:
        """Measure samples ``rows`` clean, attacked and, where that is wanted, by the attack that knows."""
        x, y = self.data.batch(rows), self.data.labels[rows]
        how: dict[str, Any] = {"seed": self.seed, "indices": rows, "device": self.device}
        first = self._listen(CLEAN, x, y)
        r = self.attack(self.model, x, y, self.threat, full=True, **how)
        self._spend(int(r.forwards.sum()), int(r.backwards.sum()))
        self._listen(ATTACKED, r.x, y)
        if self.weight is None:
            return
        goal: dict[str, Any] = {"wanted": first, "scale": self.scale.to(first.device), "weight": self.weight}
        x, *spent = hide(self.heard, self.layers, x, y, self.threat, **goal, **how)
        self._spend(*spent)
        self._listen(HIDDEN, x, y)

    def _listen(self, condition: str, x: Inputs, y: Labels) -> Tensor:
        """Add what the layers answer to inputs x (b, *f), and return the PSI (b, layers)."""
        with self.heard.frozen(self.device) as live:
            z, found, door = responses(live, self.layers, x.to(live.device))
            y = y.to(live.device)
            for m, r in zip(self.moments[condition], found, strict=True):
                m.add(r, y)
        self._spend(int(door.forwards.sum()), 0)
        self.right[condition].append((z.argmax(1) == y).cpu())
        return torch.stack([m.last for m in self.moments[condition]], 1).to(z.device)

    def _spend(self, forwards: int, backwards: int) -> None:
        self.forwards += forwards
        self.backwards += backwards

    def result(self, bins: int, about: dict[str, Any], seconds: float) -> Sparseness:
        y = self.data.labels
        clean = torch.cat(self.right[CLEAN])
        right = {name: (torch.cat(hits) & clean).numpy() for name, hits in self.right.items()}
        classes = self.moments[CLEAN][0].classes
        names = self.data.class_names or ()
        names = (*names, *map(str, range(len(names), classes)))[:classes]
        accuracy = {name: by_class(torch.from_numpy(hits).double(), y, classes).numpy() for name, hits in right.items()}
        layers = tuple(
            _about_layer(
                layer, {name: Side.of(self.moments[name][i], y, bins) for name in right}, right, accuracy, self.seed
            )
            for i, layer in enumerate(self.layers)
        )
        return Sparseness(layers, y.numpy(), right, names, about, self.forwards, self.backwards, seconds)


def _about_layer(
    layer: Layer, sides: dict[str, Side], right: dict[str, Hits], accuracy: dict[str, Values], seed: int
) -> LayerSparseness:
    fooled = {name: right[CLEAN] & ~hits for name, hits in right.items()}
    before = sides[CLEAN].psi

    def area(name: str, mask: Hits | slice) -> float | None:
        return separation(before[mask], sides[name].psi[mask]) if name in sides else None

    return LayerSparseness(
        layer,
        sides,
        relations={name: Relation.of(side.of_means, accuracy[name], seed) for name, side in sides.items()},
        shift=Shift.of(before, sides[ATTACKED].psi),
        auc=area(ATTACKED, slice(None)),
        auc_fooled=area(ATTACKED, fooled[ATTACKED]),
        auc_adaptive=area(HIDDEN, fooled[HIDDEN]) if HIDDEN in fooled else None,
    )


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Any]:
    """Yield what is to be told the number of samples just done."""
    console = Console(stderr=True)
    if not wanted or not console.is_terminal:
        yield lambda _: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("samples", total=total)
        yield lambda n: bar.advance(task, n)
