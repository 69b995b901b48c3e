"""The table of attacks: found by name or by what they need, built from text, written as JSON."""

from collections.abc import Callable
from typing import Any

from assay.attacks.attack import Runnable
from assay.attacks.losses import LOSSES
from assay.core.registry import Registry, build, describe, one_of

ATTACKS: Registry[Callable[..., Runnable]] = Registry("attack")
"""Classes of attacks, and functions that build a named combination.

Traits: ``norm`` (a tuple), ``access`` (gradient, score, decision), ``kind`` (budget, minimal)."""


def names(norm: str | None = None, access: str | None = None, kind: str | None = None) -> tuple[str, ...]:
    """Return the names of the attacks for a norm, an access and a kind; None stands for all.

    Raises:
        UsageError: no attack has such a trait.
    """
    for what, value in (("norm", norm), ("access", access), ("kind", kind)):
        if value is not None:
            one_of(what, value, sorted(ATTACKS.values(what)))
    return ATTACKS.names(norm=norm, access=access, kind=kind)


def get(name: str, **params: Any) -> Runnable:
    """Return the attack of that name; parameters may be given as text, a loss by its name.

    Raises:
        UsageError: no such attack, parameter or loss, or text that the parameter does not take.
    """
    if isinstance(params.get("loss"), str):
        params["loss"] = LOSSES[params["loss"]]
    return build(ATTACKS[name], params, name)


def describe_attack(attack: Runnable) -> Any:
    """Return an attack, and every attack inside it, as plain JSON."""

    def name_of(item: Any) -> str:
        return LOSSES.name_of(item) if callable(item) and not isinstance(item, Runnable) else ATTACKS.name_of(item)

    return describe(attack, name_of)
