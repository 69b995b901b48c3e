"""Samples attacked, and each looked at clean, attacked and randomly changed, for the label and for the rival class."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from assay.attacks import Runnable, describe_attack, get
from assay.core.errors import ThreatError
from assay.core.optional import need
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.core.types import Inputs, Labels, Mask, Rows
from assay.data import Data, load_data
from assay.models import Door, Model, as_model
from assay.models.line import default_batch
from assay.reports.attribution import per_pixel
from assay.study.attribution.compare import compared
from assay.study.attribution.maps import ANY, INTEGRATED, METHODS, STEPS, How, maps_of
from assay.study.attribution.result import Attribution, Sample
from assay.study.curvature import Classifier, copies, pose_one
from assay.threats import Problem, Threat
from assay.threats.problem import exact_size
from assay.threats.threat import outside_box

_SHUFFLED: Final = 0xA77
"""A stream of random numbers."""


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
    model, how = as_model(model), How(tuple(methods), baseline, steps)
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
        self, model: Model, data: Data, threat: Threat, attack: Runnable, how: How, seed: int,
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
            p = Problem.pose(x0, label, replace(ANY, box=box), Draws.of(self.seed, rows.to(live.device)))
            said = door.decide(x0, p).label
            self._spend(door)
            return (said == label).cpu()

    def _look(self, index: int, x: Tensor, attacked: Tensor, label: int) -> Sample:
        """Compare the maps of a sample x (*f) with those of its attacked version (*f)."""
        keep = len(self.found) < self.shown
        with self.model.frozen(self.device) as live:
            door, p = Door(live, 1, indices=torch.tensor([index])), pose_one(live, x, label, ANY, self.seed, index)
            inputs = torch.stack([p.x0[0], attacked.to(p.x0), shuffled(p, attacked.to(p.x0))])
            z = door.logits(torch.cat([inputs, self.how.start(p)]), copies(p, 4).rows).double()
            classes = torch.tensor([label, rival_of(z[1], label)], device=live.device)
            pair = z[:, classes].cpu()
            rise = (pair[:2] - pair[3]).T.numpy()
            by = {}
            for method in self.how.methods:
                every, known = inputs.repeat(2, *[1] * x.ndim), rise if method == INTEGRATED else rise * np.nan
                maps = maps_of(door, p, every, classes.repeat_interleave(3), method, self.how).view(2, 3, *x.shape)
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
