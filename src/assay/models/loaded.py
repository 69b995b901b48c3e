"""What a loader or a bridge makes of what the user has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from torch import Tensor

from assay.data.fit import Fit

Net: TypeAlias = Callable[[Tensor], Any]


@final
@dataclass(frozen=True, slots=True)
class Loaded:
    """A network from tensors (b, *f) to logits (b, c), and what is known of it, as :class:`assay.Model` takes it.

    ``notes`` say, a sentence each, what was changed or assumed; a report shows them. ``reference`` is what the network
    was converted from, asked for logits only: the two are compared on the user's data before anything is attacked.
    """

    net: Net
    rows: int | None = None
    fixed_rows: bool = False
    mean: Sequence[float] | float | None = None
    std: Sequence[float] | float | None = None
    probabilities: bool = False
    fit: Fit | None = None
    reference: Net | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    name: str = ""
