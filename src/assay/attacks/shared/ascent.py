"""Ascent on one thing that all samples share; an attack says what it is, and how a sample looks with it."""

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor, nn

from assay.attacks.attack import Outcome, Runnable
from assay.core.errors import AssayError, ThreatError
from assay.core.types import Inputs, Labels, Logits, PerSample, Rows
from assay.models.door import Door, Loss
from assay.models.model import Model
from assay.threats.problem import Goal, Problem
from assay.threats.threat import Threat


class SharedAttack(Runnable):
    """Looks for one tensor ``v`` (1, *f) that makes as many samples of the call as possible meet their goal.

    An epoch walks once through the samples, in an order that is drawn, ``batch`` at a time: each batch gives one
    gradient, its mean over the samples, and one step. Then all samples are asked; the v that most of them meet their
    goal with is kept. What a sample gets thus depends on the others of the call, by nature.
    """

    __slots__ = ()
    norms: ClassVar[tuple[str, ...]]
    shared: ClassVar[bool] = True
    epochs: int
    batch: int
    rel_step: float
    clip: float
    loss: Loss

    @abstractmethod
    def init(self, p: Problem) -> Tensor:
        """Return v before the first step."""

    @abstractmethod
    def place(self, p: Problem, v: Tensor) -> Inputs:
        """Return how the samples look with v, or with copies of it (b, *f), one each; differentiable in v."""

    @abstractmethod
    def step(self, p: Problem, v: Tensor, grad: Tensor, share: float) -> Tensor:
        """Return v after a step of this share of the first one, in the direction of the mean gradient (1, *f)."""

    @abstractmethod
    def cut(self, p: Problem, v: Tensor) -> Tensor:
        """Return v in the form in which users get it."""

    @final
    def find(self, door: Door, p: Problem) -> tuple[Tensor, Outcome]:
        """Return the best v, and what came of it."""
        self._fits(p)
        v, out, best = self.init(p), Outcome.nothing(p), (-1, -math.inf)
        kept = v
        for epoch in range(self.epochs):
            if door.affords(p.rows, 3) is not None:
                break
            v = self._epoch(door, p.stage(epoch + 1), v, epoch)
            x = p.snap(p.project(self.place(p, v)))
            e = door.score(x, p, self.loss)
            success = e.success & p.allows(x)
            value = int(success.sum()), float(e.loss.double().mean())
            if value > best:
                best, kept, out = value, v, Outcome(x, success, torch.where(success, 0, -1))
            if success.all():
                break
        return kept, out

    def _epoch(self, door: Door, p: Problem, v: Tensor, epoch: int) -> Tensor:
        parts = p.draws.uniform().argsort(stable=True).split(self.batch)  # type: ignore[no-untyped-call]
        for i, rows in enumerate(parts):
            done = (epoch + i / len(parts)) / self.epochs
            q = p.take(rows)
            e = door.gradient(v.expand_as(q.x0).contiguous(), q, self._clipped, through=self._through(q))
            v = self.step(p, v, e.grad.mean(0, keepdim=True), (1 + math.cos(math.pi * done)) / 2)
        return v

    def _through(self, p: Problem) -> "_Placed":
        return _Placed(self, p)

    def _clipped(self, logits: Logits, goal: Goal) -> PerSample:
        """Stop pushing samples that are far past their goal already, in favour of the others."""
        return self.loss(logits, goal).clamp_max(self.clip)

    @final
    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        return self.find(door, p)[1]

    @final
    def fit(
        self,
        model: Model | nn.Module,
        x: Inputs,
        y: Labels,
        threat: Threat | str,
        seed: int = 0,
        *,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return what the samples share, to use it on others; arguments are those of the attack's own call."""
        keeper = _Keeper(self)
        keeper(model, x, y, threat, seed, device=device)
        return keeper.found[0].to(x.device)

    def _fits(self, p: Problem) -> None:
        what = type(self).__name__
        if p.norm.name not in self.norms:
            raise ThreatError(f"one of {', '.join(self.norms)} for {what}", p.norm.name, "Choose another attack.")
        if min(self.epochs, self.batch) < 1:
            raise AssayError(f"epochs and batch >= 1 for {what}", f"{self.epochs} and {self.batch}", "Raise them.")


class _Places(Protocol):
    def place(self, p: Problem, v: Tensor) -> Inputs: ...


@final
@dataclass(frozen=True, slots=True)
class _Placed:
    """From copies of v to samples: what stands between v and the model."""

    attack: _Places
    p: Problem

    def __call__(self, v: Inputs, rows: Rows) -> Inputs:
        return self.attack.place(self.p.take(rows), v)


@final
@dataclass(frozen=True, slots=True)
class _Keeper(Runnable):
    """Runs a shared attack for what it finds, and not for what came of it."""

    attack: SharedAttack
    found: list[Tensor] = field(default_factory=list)

    def run(self, door: Door, p: Problem, *, full: bool = False) -> Outcome:
        self.found.append(self.attack.cut(p, self.attack.find(door, p)[0])[0])
        return Outcome.nothing(p)
