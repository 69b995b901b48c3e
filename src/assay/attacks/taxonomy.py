"""What attacks are called by those who keep lists of them: MITRE ATLAS and NIST AI 100-2."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, final

from assay.attacks.attack import Runnable
from assay.attacks.loop import DecisionAttack, GradientAttack, ScoreAttack
from assay.attacks.noise.strength import Noise
from assay.attacks.registry import ATTACKS, get
from assay.attacks.score.estimated import Estimated
from assay.attacks.shared.ascent import SharedAttack
from assay.attacks.transfer.transfer import Transfer
from assay.core.registry import UsageError

_EVADE: Final = "AML.T0015 Evade AI Model"
_ASKS: Final = "AML.T0040 AI Model Inference API Access"
_KNOWS: Final = "AML.T0044 Full AI Model Access"
_OPTIMISED: Final = "AML.T0043.001 Black-Box Optimization"


@final
@dataclass(frozen=True, slots=True)
class Taxonomy:
    """The class of an attack in two taxonomies.

    Args:
        atlas: MITRE ATLAS techniques, each as its identifier, a space and its name: how the input is made (AML.T0043
            and its sub-techniques), what access that takes, and what it is for (AML.T0015).
        nist: the class in NIST AI 100-2, with its identifier there.

    References:
        MITRE ATLAS, data of version 5.6.0 (2026), https://atlas.mitre.org; Vassilev et al. 2025, NIST AI 100-2e2025,
        https://doi.org/10.6028/NIST.AI.100-2e2025, sec. 2.2.
    """

    atlas: tuple[str, ...]
    nist: str

    def to_json(self) -> dict[str, Any]:
        return {"atlas": [*self.atlas], "nist": self.nist}


_BY_ACCESS: Final = {
    "gradient": Taxonomy(("AML.T0043.000 White-Box Optimization", _KNOWS, _EVADE), "NISTAML.022 Evasion: white-box"),
    "score": Taxonomy((_OPTIMISED, _ASKS, _EVADE), "NISTAML.025 Black-box Evasion: score-based"),
    "decision": Taxonomy((_OPTIMISED, _ASKS, _EVADE), "NISTAML.025 Black-box Evasion: decision-based"),
}

_UNIVERSAL: Final = Taxonomy(_BY_ACCESS["gradient"].atlas, "NISTAML.022 Evasion: white-box, universal")

_NOISE: Final = Taxonomy(
    ("AML.T0043.003 Manual Modification", _ASKS, _EVADE), "NISTAML.025 Black-box Evasion: decision-based"
)
"""Nothing is optimised: an input is changed, and the model asked whether that was enough."""

_TRANSFER: Final = Taxonomy(
    ("AML.T0043.002 Black-Box Transfer", "AML.T0005 Create Proxy AI Model", _ASKS, _EVADE),
    "NISTAML.025 Black-box Evasion: transfer",
)


def taxonomy(attack: str | Runnable) -> Taxonomy:
    """Return the class of an attack, given by its name or as a value, by what it may see of the model.

    An attack that is not registered has the class of its one part (``Restarts(PGD())``).

    Raises:
        UsageError: no attack of that name, or a combination of attacks of several classes: ask for each of them,
            or take :func:`tags`.

    Example:
        >>> taxonomy("square").nist
        'NISTAML.025 Black-box Evasion: score-based'
        >>> taxonomy("pgd").atlas[0]
        'AML.T0043.000 White-Box Optimization'
    """
    if isinstance(attack, str):
        return _class_of(get(attack), ATTACKS.traits(attack)["access"])
    found = {_class_of(one, _access(one)) for one in _parts(attack)}
    if len(found) != 1:
        raise UsageError("an attack of one class", ATTACKS.name_of(attack), "Take tags([attack]), one class a part.")
    return found.pop()


def tags(attacks: Iterable[Runnable]) -> dict[str, dict[str, Any]]:
    """Return the class of every attack in these and inside them, by name, as plain JSON: for a run's manifest.

    Example:
        >>> from assay.attacks import PGD, Chain, Square
        >>> [*tags([Chain((Square(), PGD()))])]
        ['pgd', 'square']
    """
    parts = {ATTACKS.name_of(one): one for attack in attacks for one in _parts(attack)}
    return {name: taxonomy(parts[name]).to_json() for name in sorted(parts)}


def _class_of(attack: Runnable, access: str) -> Taxonomy:
    if isinstance(attack, Transfer):
        return _TRANSFER
    if isinstance(attack, Noise):
        return _NOISE
    return _UNIVERSAL if isinstance(attack, SharedAttack) else _BY_ACCESS[access]


def _parts(attack: Runnable) -> Iterator[Runnable]:
    """Yield the attacks that ask the model. Those inside a transfer or an estimate do not: something else answers."""
    if _access(attack):
        yield attack
        return
    for f in dataclasses.fields(attack):  # type: ignore[arg-type]
        value = getattr(attack, f.name)
        for inner in value if isinstance(value, tuple) else (value,):
            if isinstance(inner, Runnable):
                yield from _parts(inner)


def _access(attack: Runnable) -> str:
    """Return what an attack sees; nothing for a combination, which sees what its parts do."""
    name = ATTACKS.name_of(attack)
    if name in ATTACKS.names():
        return str(ATTACKS.traits(name)["access"])
    return next((access for kinds, access in _BY_TYPE if isinstance(attack, kinds)), "")


_BY_TYPE: Final[Any] = (
    (Estimated | ScoreAttack, "score"),
    (Noise | Transfer | DecisionAttack, "decision"),
    (GradientAttack, "gradient"),
)
"""What attacks see that have no name of their own."""
