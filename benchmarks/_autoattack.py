"""The published AutoAttack (Croce & Hein 2020, arXiv:2003.01690), as the library torchattacks copies it.

It attacks every sample, also those that are wrong from the start, in one batch, with l-infinity and l2 alone. What it
returns is verified here: a fresh pass of the network, inside the box, no larger than eps. Steps, targets and queries
are those of the paper.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from _minimal_area import verified_sizes
from _minimal_peers import Counted
from torch import Tensor, nn

NAMES = {"linf": "Linf", "l2": "L2"}

SLACK = 1e-5
"""How far, in eps, a point may lie outside the ball: its own rounding."""

STEPS = 100
"""Of each gradient attack, as published; the library's default is 10."""

DAYS = 1e6
"""Seconds that the network may be asked for: no limit."""


@dataclass
class Part:
    """One attack of the ensemble, and what it is given and costs."""

    attack: Any
    net: Counted
    name: str
    entered: int = 0
    forwards: int = 0
    backwards: int = 0

    @property
    def model(self) -> Any:
        return self.attack.model

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        before = self.net.forwards, self.net.backwards
        out: Tensor = self.attack(x, y)
        self.entered += len(x)
        self.forwards, self.backwards = self.net.forwards - before[0], self.net.backwards - before[1]
        return out


@dataclass(frozen=True)
class Published:
    """What the published code left standing, and what it cost: passes over all samples, stage by stage."""

    clean: float
    robust: float
    forwards: int
    backwards: int
    stages: tuple[dict[str, Any], ...]


def autoattack(net: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, seed: int) -> Published:
    """Run the standard ensemble on the samples x (n, *f) in [0, 1] with the labels y (n,).

    Raises:
        ModuleNotFoundError: torchattacks is not installed.
        KeyError: a norm that this code has no attacks for.
    """
    library = importlib.import_module("torchattacks")
    counted = Counted(net, DAYS).eval()
    with torch.no_grad():
        right = net(x).argmax(1) == y
        classes = net(x[:1]).shape[1]
    ensemble = library.AutoAttack(counted, NAMES[norm], eps, n_classes=classes, seed=seed)
    names = ("apgd-ce", "apgd-targeted", "fab-targeted", "square")
    chain = ensemble._autoattack
    for attack in chain.attacks[:3]:
        attack.steps = STEPS
    parts = [Part(attack, counted, name) for name, attack in zip(names, chain.attacks, strict=True)]
    chain.attacks = parts
    points = ensemble(x.clone(), y.clone())
    forwards, backwards = counted.forwards, counted.backwards
    sizes = verified_sizes(net, x[right], y[right], points[right], norm)
    left = int((sizes > eps * (1 + SLACK)).sum())
    return Published(float(right.double().mean()), left / len(x), forwards, backwards, trail(parts, left))


def trail(parts: list[Part], left: int) -> tuple[dict[str, Any], ...]:
    """Return the stages that were reached: each broke what the next one was no longer given."""
    reached = [p for p in parts if p.entered]
    after = [*(p.entered for p in reached[1:]), left]
    return tuple(
        {
            "name": p.name,
            "entered": p.entered,
            "broken": p.entered - rest,
            "forwards": p.forwards,
            "backwards": p.backwards,
        }
        for p, rest in zip(reached, after, strict=True)
    )
