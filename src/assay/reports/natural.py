"""Natural robustness in reports: accuracy under corruptions, by group and severity."""

from dataclasses import dataclass
from typing import Any, final

from assay.reports.summary import Manifest, Rate, dig, whole
from assay.reports.text import percent
from assay.runs.natural import GROUPS, SEVERITIES
from assay.runs.totals import number, rows


@final
@dataclass(frozen=True, slots=True)
class Harm:
    """Accuracy under one corruption at each severity from 1 to 5."""

    name: str
    rates: tuple[Rate, ...]

    @property
    def mean(self) -> float | None:
        return _mean([r.value for r in self.rates])


@final
@dataclass(frozen=True, slots=True)
class Natural:
    """Accuracy under corruptions, by group; the mean weighs every corruption and severity alike."""

    n: int
    groups: tuple[tuple[str, tuple[Harm, ...]], ...]

    @property
    def harms(self) -> tuple[Harm, ...]:
        return tuple(h for _, harms in self.groups for h in harms)

    @property
    def mean(self) -> float | None:
        return _mean([h.mean for h in self.harms])

    @property
    def worst(self) -> Harm:
        """Return the corruption that harms most, over its severities."""
        return min(self.harms, key=lambda h: 1.0 if h.mean is None else h.mean)

    @property
    def sentence(self) -> str:
        """Say it in one sentence."""
        how = f"under {len(self.harms)} natural corruptions at five severities it is right in {percent(self.mean)}"
        if len(self.harms) == 1:
            return f"Nobody being against it, {how.replace('1 natural corruptions', self.worst.name)} of cases."
        return f"Nobody being against it, {how} of cases; worst is {self.worst.name}, {percent(self.worst.mean)}."


def natural(manifest: Manifest) -> Natural | None:
    """Read what corruptions did from a manifest; None where none was tried."""
    told = {str(r.get("name")): r for r in rows(dig(manifest, "natural"))}
    groups = [(group, tuple(_harm(n, told[n]) for n in names if n in told)) for group, names in GROUPS.items()]
    found = tuple((group, harms) for group, harms in groups if harms)
    n = max((whole(r.get("n")) or 0 for r in told.values()), default=0)
    return Natural(n, found) if found else None


def _harm(name: str, told: Any) -> Harm:
    levels, values, spans = (_listed(told.get(key)) for key in ("severities", "accuracy", "interval"))
    known = {whole(s): _rate(v, i) for s, v, i in zip(levels, values, spans, strict=False)}
    return Harm(name.replace("_", " "), tuple(known.get(s, Rate()) for s in SEVERITIES))


def _rate(value: Any, interval: Any) -> Rate:
    share, ends = number(value), _listed(interval)
    low, high = (number(e) for e in ends) if len(ends) == 2 else (None, None)
    return Rate(share, low, high) if share is not None and 0 <= share <= 1 else Rate()


def _listed(value: Any) -> list[Any]:
    return [*value] if isinstance(value, list | tuple) else []


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
