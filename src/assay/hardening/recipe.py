"""Recipes that ship: settings as data, each with the figures that they were measured to reach."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, final

from assay.core.registry import UsageError, closest


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """How to harden a network of one kind against one threat.

    Args:
        title: what it is for, in a sentence.
        net: the network it was measured with, as a MODEL form of the command line.
        threat, method, epochs, settings: what :func:`assay.harden` takes.
        measured: what came out, shares and minutes by name, and the ``command`` that measures it.
    """

    title: str
    net: str
    threat: str
    method: str
    epochs: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shares = [f"{n} {self.measured[n]:.1%}" for n in ("clean", "robust", "proven") if n in self.measured]
        return f"{self.title} ({', '.join(shares) or 'not measured'})"


def names() -> list[str]:
    """Return the names of the recipes that ship."""
    files = resources.files("assay.hardening").joinpath("recipes").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def load(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        UsageError: no such recipe.
    """
    if name not in names():
        raise UsageError("the name of a recipe", repr(name), closest(name, names()))
    text = resources.files("assay.hardening").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8")
    return Recipe(**tomllib.loads(text))
