"""A threat model is plain data: it can be printed, compared and written to JSON."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, final

from assay.core.errors import DataError, ThreatError
from assay.threats.norms import NORMS, Norm


@final
@dataclass(frozen=True, slots=True)
class Box:
    """The valid input domain before any normalisation. Every eps and every distance is in its units."""

    lo: float = 0.0
    hi: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lo", "hi"):
            object.__setattr__(self, name, float(getattr(self, name)))  # (0, 1) is the box (0.0, 1.0)
        if not (math.isfinite(self.lo) and math.isfinite(self.hi) and self.lo < self.hi):
            raise ThreatError("a box (lo, hi) of finite numbers with lo < hi", f"({self.lo}, {self.hi})", "Swap them?")

    @property
    def width(self) -> float:
        return self.hi - self.lo


def outside_box(box: Box, found: tuple[float, float], rows: Sequence[int], n: int, where: str = "") -> DataError:
    """Return the error about samples ``rows``, of n with values from ``found[0]`` to ``found[1]``, outside the box."""
    low, high = found
    return DataError(
        f"inputs inside the box [{box.lo:g}, {box.hi:g}]",
        f"values from {low:g} to {high:g}{where}, {len(rows)} of {n} samples outside (first: {rows[0]})",
        _unit_hint(low, high),
        code="input-outside-box",
    )


def _unit_hint(low: float, high: float) -> str:
    if low >= 0 and high <= 255 and high > 2:
        return "These look like 0..255: divide them by 255, or say so with --box 0 255 (and give eps in those units)."
    return (
        "If they are normalised, pass them as they were before, and give --mean and --std (assay.Model(mean, std)); "
        "if this is their natural range, give it with --box."
    )


@final
@dataclass(frozen=True, slots=True)
class Threat:
    """What the adversary may do.

    Args:
        norm: ``linf``, ``l2``, ``l1``, ``l0``, or a :class:`Norm`.
        eps: radius of the ball in units of the box (l0: a count); None asks for the smallest perturbation instead.
        box: the input domain; None takes the model's.
        targeted: labels given to an attack are the wanted ones.
        quantize: number of bits a value has when saved; 8 asks for points that survive the rounding to uint8.

    Raises:
        ThreatError: unknown norm, an eps that is not positive, or a number of bits that is not from 1 to 16.
    """

    norm: Norm
    eps: float | None = None
    box: Box | None = None
    targeted: bool = False
    quantize: int | None = None

    def __init__(
        self,
        norm: str | Norm,
        eps: float | None = None,
        box: "Box | tuple[float, float] | None" = None,
        targeted: bool = False,
        quantize: int | None = None,
    ) -> None:
        if not hasattr(norm, "name") and not (isinstance(norm, str) and norm in NORMS):
            raise ThreatError(f"a norm out of {', '.join(NORMS)}", repr(norm), "Write for example linf:8/255.")
        norm = NORMS[norm] if isinstance(norm, str) else norm
        if eps is not None and not (_is_number(eps) and math.isfinite(eps) and eps > 0):
            raise ThreatError("eps > 0, or none for the smallest perturbation", repr(eps), "Write for example l2:0.5.")
        if norm.name == "l0" and eps is not None and eps != round(eps):
            raise ThreatError("a whole number of coordinates for l0", f"{eps}", "Write for example l0:20.")
        if quantize is not None and not (quantize == int(quantize) and 1 <= quantize <= 16):
            raise ThreatError("quantize as a number of bits from 1 to 16", f"{quantize}", "Write 8 for PNG images.")
        values = {
            "norm": norm,
            "eps": None if eps is None else float(eps),
            "box": Box(*box) if isinstance(box, tuple) else box,
            "targeted": targeted,
            "quantize": quantize,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, text: str) -> "Threat":
        """Read ``norm`` or ``norm:eps``, where eps is a number or a fraction: ``linf:8/255``, ``l2:0.5``, ``l0``."""
        norm, colon, eps = text.strip().partition(":")
        norm = norm.strip()
        if not colon:
            return cls(norm)
        number = r"\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
        found = re.fullmatch(rf"\s*({number})\s*(?:/\s*({number}))?\s*", eps)
        if not found or (found[2] and float(found[2]) == 0):
            raise ThreatError("norm:eps with eps a number or a fraction", repr(text), "Write for example linf:8/255.")
        return cls(norm, float(found[1]) / float(found[2] or 1))

    def __str__(self) -> str:
        return self.norm.name + ("" if self.eps is None else f":{show_eps(self.eps)}")

    def to_json(self) -> dict[str, Any]:
        box = [self.box.lo, self.box.hi] if self.box else None
        plain = {"norm": self.norm.name, "eps": self.eps, "box": box, "targeted": self.targeted, "text": str(self)}
        return plain | ({} if self.quantize is None else {"quantize": self.quantize})

    def within(self, box: Box, features: int) -> "Threat":
        """Return this threat with its box settled, after checking that eps and box make sense for such inputs.

        Raises:
            ThreatError: ``eps-wider-than-box``, ``eps-looks-like-8-not-8/255``, or a box other than the model's.
        """
        if self.box not in (None, box):
            raise ThreatError(f"the model's {box}", f"the threat's {self.box}", "Give the box once, with the model.")
        most = self.norm.diameter(box.width, features)
        if self.eps is None or self.eps <= most * (1 + 1e-9):
            return replace(self, box=box)
        if self.norm.name == "linf" and self.eps == round(self.eps) and self.eps / 255 <= box.width <= 1:
            raise ThreatError(
                f"eps in units of the box [{box.lo:g}, {box.hi:g}]",
                f"eps = {self.eps:g}",
                f"Write {self.norm.name}:{self.eps:g}/255 if you mean {self.eps:g} grey levels of 255.",
                code="eps-looks-like-8-not-8/255",
            )
        raise ThreatError(
            f"eps of at most {most:g}, the largest {self.norm.name} size inside the box [{box.lo:g}, {box.hi:g}]",
            f"eps = {self.eps:g}",
            "Give eps in units of the box, or the box that the data is in (--box).",
            code="eps-wider-than-box",
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real)


def show_eps(eps: float) -> str:
    """Write eps as people do, so that reading it gives it back: short, as a fraction of 255, or with all digits."""
    levels = round(eps * 255, 2)
    if float(f"{eps:.4g}") != eps and levels / 255 == eps:
        return f"{levels:g}/255"
    return f"{eps:g}" if float(f"{eps:g}") == eps else repr(eps)
