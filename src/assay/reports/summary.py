"""A run in numbers, read from its manifest and completed from its table; what is missing is no error."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import pyarrow as pa

from assay.reports.text import Units
from assay.runs import Run

Manifest = Mapping[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Rate:
    """A share of all samples with its exact interval."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@final
@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage of the cascade did; ``left`` is the share of all samples that are right after it."""

    name: str
    entered: int | None
    broken: int | None
    forwards: int | None
    backwards: int | None
    seconds: float | None
    left: float | None
    share: float | None

    @property
    def passes(self) -> int:
        return (self.forwards or 0) + (self.backwards or 0)

    @property
    def per_broken(self) -> float | None:
        """Return the passes paid for each sample that fell here; to the clean pass nothing falls."""
        return self.passes / self.broken if self.broken and self.name != "clean" else None

    def per_sample(self, passes: int | None) -> float | None:
        return passes / self.entered if passes is not None and self.entered else None


@final
@dataclass(frozen=True, slots=True)
class ClassRow:
    """One class: how many samples, how many of them right, and robust."""

    number: int | None
    name: str
    n: int
    clean: Rate
    robust: Rate


@final
@dataclass(frozen=True, slots=True)
class Note:
    """A finding, ready to be shown."""

    code: str
    severity: str
    message: str
    evidence: tuple[tuple[str, str], ...]
    remedy: str


@final
@dataclass(frozen=True, slots=True)
class Summary:
    """A run in numbers; ``n`` samples are done of ``planned``."""

    model: str
    data: str
    noun: str
    norm: str
    eps: float | None
    eps_text: str
    threat: str
    targeted: bool
    complete: bool
    n: int
    planned: int | None
    confidence: float
    clean: Rate
    robust: Rate
    certified: Rate
    forwards: int | None
    backwards: int | None
    seconds: float | None
    claimed: int | None
    rejected: int | None
    stages: tuple[Stage, ...]
    classes: tuple[ClassRow, ...]
    findings: tuple[Note, ...]
    names: tuple[str, ...]

    @property
    def units(self) -> Units:
        return Units.of(self.threat)

    @property
    def passes(self) -> int | None:
        """Return all passes, of every sample."""
        if self.forwards is None and self.backwards is None:
            return None
        return (self.forwards or 0) + (self.backwards or 0)

    @property
    def per_sample(self) -> float | None:
        return self.passes / self.n if self.passes is not None and self.n else None

    def label(self, number: Any) -> str:
        """Return the name of a class, or its number."""
        if not isinstance(number, int | np.integer):
            return "?"
        i = int(number)
        return self.names[i] if 0 <= i < len(self.names) else str(i)


def dig(value: Any, *keys: str) -> Any:
    """Return what is under nested keys, or ``None`` where the way ends."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def number(value: Any) -> float | None:
    """Return a finite number, or ``None`` for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def whole(value: Any) -> int | None:
    """Return a whole number, or ``None`` for everything else."""
    found = number(value)
    return None if found is None else int(found)


def rows(value: Any) -> list[Mapping[str, Any]]:
    """Return the mappings in a list, nothing of anything else."""
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, list | tuple) else []


def exact(right: Any, n: int, confidence: float) -> tuple[Any, Any]:
    """Return the binomial interval (Clopper & Pearson 1934), elementwise over ``right``."""
    from scipy.special import betaincinv

    k, tail = np.asarray(right, dtype=float), (1 - confidence) / 2
    low = np.where(k > 0, betaincinv(np.maximum(k, 1), n - k + 1, tail), 0.0)
    high = np.where(k < n, betaincinv(k + 1, np.maximum(n - k, 1), 1 - tail), 1.0)
    return low, high


def rate(right: int, n: int, confidence: float) -> Rate:
    """Return the share ``right / n`` with its exact interval."""
    if not n:
        return Rate()
    low, high = exact(right, n, confidence)
    return Rate(right / n, float(low), float(high))


def noun_of(shape: Any) -> str:
    """Call samples images where their shape is that of one."""
    image = isinstance(shape, list | tuple) and len(shape) == 3 and (shape[0] in (1, 3, 4) or shape[-1] in (1, 3, 4))
    return "image" if image else "sample"


def read(run: Run) -> tuple[Manifest, pa.Table]:
    """Return a run's manifest and table; totals that a killed run left behind are summed up from its batches."""
    samples = run.samples()
    totals = run.manifest.get("totals")
    if whole(dig(totals, "n")) == len(samples):
        return run.manifest, samples
    tallies = [*run.tallies()]
    summed = {key: _sum(t.get(key) for t in tallies) for key in ("seconds", "claimed", "rejected")}
    interval = {"confidence": dig(totals, "interval", "confidence")}
    known = summed | {"n": len(samples), "stages": _merged(tallies), "interval": interval}
    return {**run.manifest, "totals": known}, samples


def _sum(values: Iterable[Any]) -> float | None:
    found = [v for v in map(number, values) if v is not None]
    return sum(found) if found else None


def _merged(tallies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add up the stages of all batches by name, in the order of their first appearance."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for tally in tallies:
        for stage in rows(tally.get("stages")):
            by_name.setdefault(str(stage.get("name", "?")), []).append(stage)
    columns = ("entered", "broken", "forwards", "backwards", "seconds")
    return [{"name": n} | {c: _sum(s.get(c) for s in same) for c in columns} for n, same in by_name.items()]


def summarize(manifest: Manifest, samples: pa.Table | None = None) -> Summary:
    """Read a run's numbers; where the table is given and holds other samples than the totals, it decides."""
    threat = dig(manifest, "identity", "threat")
    eps, text = (
        number(dig(threat, "eps")),
        str(dig(threat, "text") or dig(threat, "norm") or "an unknown threat"),
    )
    confidence = number(dig(manifest, "totals", "interval", "confidence")) or 0.95
    names = _names(manifest)
    counted = _counted(manifest, samples, eps, confidence)
    stages = _stages(manifest)
    stale = bool(stages) and counted["n"] != (whole(dig(manifest, "totals", "n")) or 0)
    return Summary(
        model=str(dig(manifest, "model", "name") or dig(manifest, "model", "source") or "the model"),
        data=str(dig(manifest, "data", "name") or dig(manifest, "data", "source") or "the data"),
        noun=noun_of(dig(manifest, "data", "shape")),
        norm=str(dig(threat, "norm") or ""),
        eps=eps,
        eps_text=text.partition(":")[2] or ("" if eps is None else f"{eps:.4g}"),
        threat=text,
        targeted=bool(dig(threat, "targeted")),
        complete=manifest.get("complete") is True,
        planned=whole(dig(manifest, "data", "n")),
        confidence=confidence,
        seconds=number(dig(manifest, "totals", "seconds")),
        claimed=None if stale else whole(dig(manifest, "totals", "claimed")),
        rejected=None if stale else whole(dig(manifest, "totals", "rejected")),
        stages=() if stale else stages,
        classes=_classes(manifest, samples, names, eps, confidence),
        findings=notes(manifest.get("findings")),
        names=names,
        **counted,
    )


def _names(manifest: Manifest) -> tuple[str, ...]:
    given = dig(manifest, "data", "class_names")
    return tuple(map(str, given)) if isinstance(given, list | tuple) else ()


def _counted(manifest: Manifest, samples: pa.Table | None, eps: float | None, confidence: float) -> dict[str, Any]:
    """Return n, the rates and the passes: of the totals, or of the table where those are not about it."""
    totals = dig(manifest, "totals")
    n, clean = whole(dig(totals, "n")), number(dig(totals, "clean_accuracy"))
    if samples is not None and (n != len(samples) or (clean is None and n)):
        return _recounted(samples, eps, confidence)
    return {
        "n": n or 0,
        "clean": _rate(totals, "clean"),
        "robust": _rate(totals, "robust") if eps is not None else Rate(),
        "certified": _rate(totals, "certified"),
        "forwards": whole(dig(totals, "passes", "forwards")),
        "backwards": whole(dig(totals, "passes", "backwards")),
    }


def _rate(totals: Any, what: str) -> Rate:
    low, high = (dig(totals, "interval", what) or (None, None))[:2]
    return Rate(number(dig(totals, f"{what}_accuracy")), number(low), number(high))


def _recounted(samples: pa.Table, eps: float | None, confidence: float) -> dict[str, Any]:
    n, status = len(samples), samples["status"].to_pylist()
    proven = [c for c in samples["certified"].to_pylist() if c is not None]
    return {
        "n": n,
        "clean": rate(n - status.count("misclassified"), n, confidence),
        "robust": rate(status.count("robust"), n, confidence) if eps is not None else Rate(),
        "certified": rate(sum(proven), n, confidence) if proven else Rate(),
        "forwards": sum(samples["forwards"].to_pylist()),
        "backwards": sum(samples["backwards"].to_pylist()),
    }


def _stages(manifest: Manifest) -> tuple[Stage, ...]:
    n = whole(dig(manifest, "totals", "n"))
    found = rows(dig(manifest, "totals", "stages"))
    costs = [(whole(s.get("forwards")) or 0) + (whole(s.get("backwards")) or 0) for s in found]
    fallen, stages = 0, []
    for stage, cost in zip(found, costs, strict=True):
        broken = whole(stage.get("broken"))
        fallen += broken or 0
        stages.append(
            Stage(
                name=str(stage.get("name", "?")),
                entered=whole(stage.get("entered")),
                broken=broken,
                forwards=whole(stage.get("forwards")),
                backwards=whole(stage.get("backwards")),
                seconds=number(stage.get("seconds")),
                left=max(0.0, 1 - fallen / n) if n else None,
                share=cost / sum(costs) if sum(costs) else None,
            )
        )
    return tuple(stages)


def _classes(
    manifest: Manifest, samples: pa.Table | None, names: tuple[str, ...], eps: float | None, confidence: float
) -> tuple[ClassRow, ...]:
    """Count by class: from the table where it is given, otherwise as the totals say."""
    if samples is None:
        return tuple(
            ClassRow(
                number=whole(c.get("class")),
                name=str(c.get("name") if c.get("name") is not None else c.get("class")),
                n=whole(c.get("n")) or 0,
                clean=Rate(number(c.get("clean"))),
                robust=Rate(number(c.get("robust"))),
            )
            for c in rows(dig(manifest, "totals", "per_class"))
        )
    label, status = samples["label"].to_numpy(), np.asarray(samples["status"].to_pylist(), dtype=object)
    counted = []
    for c in np.unique(label).tolist():
        of, n = status[label == c], int((label == c).sum())
        right, robust = int((of != "misclassified").sum()), int((of == "robust").sum())
        counted.append(
            ClassRow(
                number=c,
                name=names[c] if 0 <= c < len(names) else str(c),
                n=n,
                clean=rate(right, n, confidence),
                robust=rate(robust, n, confidence) if eps is not None else Rate(),
            )
        )
    return tuple(counted)


_SEVERITY = {"error": 0, "warning": 1, "info": 2}


def notes(findings: Any) -> tuple[Note, ...]:
    """Read the findings, the severest first."""
    found = [
        Note(
            code=str(f.get("code", "?")),
            severity=str(f.get("severity")) if f.get("severity") in _SEVERITY else "info",
            message=str(f.get("message") or ""),
            evidence=_evidence(f.get("evidence")),
            remedy=str(f.get("remedy") or ""),
        )
        for f in rows(findings)
    ]
    return tuple(sorted(found, key=lambda note: _SEVERITY[note.severity]))


def _evidence(evidence: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(evidence, Mapping):
        return tuple((str(k), _brief(v)) for k, v in evidence.items())
    return (("evidence", _brief(evidence)),) if evidence not in (None, "", []) else ()


def _brief(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_brief, value[:12])) + (f", ... ({len(value)} in all)" if len(value) > 12 else "")
    return f"{value:.6g}" if isinstance(value, float) else str(value)
