"""A run in numbers, read from the totals in its manifest; what is missing is no error."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import pyarrow as pa

from assay.core.plain import plain
from assay.reports.text import Units
from assay.runs import Curve, exact_interval, totals
from assay.runs.schema import UNATTACKED
from assay.runs.source import Source
from assay.runs.totals import number, rows

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
    """What one stage of the race did; ``left`` is the share of all samples that are right after it."""

    name: str
    entered: int | None
    broken: int | None
    forwards: int | None
    backwards: int | None
    seconds: float | None
    left: float | None
    share: float | None
    proven: int | None = None

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
class Point:
    """The robust accuracy at one eps, and the certified one where proofs were asked for."""

    eps: float
    rate: Rate
    certified: Rate = Rate()


@final
@dataclass(frozen=True, slots=True)
class Audit:
    """What a much stronger attack did to some of the ``survivors``, and so what share was missed at most."""

    attacked: int
    broken: int
    survivors: int | None
    missed_at_most: float | None
    confidence: float


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
    bounded: str
    audit: Audit | None
    attacked: bool
    prove: Manifest | None

    @property
    def open(self) -> Rate:
        """The share that is neither proven nor broken, nor wrong as it is; nothing where no proofs were asked for."""
        top, low = (self.robust if self.judged else self.clean).value, self.certified.value
        return Rate() if top is None or low is None else _share(max(0.0, top - low), self.n, self.confidence)

    @property
    def judged(self) -> bool:
        """Whether there is a robust accuracy: something was attacked, within an eps."""
        return self.eps is not None and self.attacked

    @property
    def method(self) -> str:
        """How samples were proven; nothing where they were not."""
        return str(dig(self.prove, "method") or "")

    @property
    def smoothed(self) -> bool:
        """Whether what is proven concerns the smoothed classifier, and not the network itself."""
        return self.method == "smoothing"

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


def whole(value: Any) -> int | None:
    """Return a whole number, or ``None`` for everything else."""
    found = number(value)
    return None if found is None else int(found)


def is_right(samples: pa.Table) -> np.ndarray:
    """Return (n,) which samples are classified correctly when nobody interferes."""
    return np.array([status != "misclassified" for status in samples["status"].to_pylist()], dtype=bool)


def noun_of(shape: Any) -> str:
    """Call samples images where their shape is that of one."""
    image = isinstance(shape, list | tuple) and len(shape) == 3 and (shape[0] in (1, 3, 4) or shape[-1] in (1, 3, 4))
    return "image" if image else "sample"


def read(run: Source) -> tuple[Manifest, pa.Table]:
    """Return a run's manifest and table; totals that do not fit the table, as of a killed run, are counted anew."""
    samples, manifest = run.samples(), run.manifest
    known = dig(manifest, "totals")
    if whole(dig(known, "n")) == len(samples) and number(dig(known, "clean_accuracy")) is not None:
        return manifest, samples
    eps, attacked = _eps(manifest), _attacked(manifest)
    counted = totals(samples, run.tallies(), eps=eps, class_names=_names(manifest), attacked=attacked)
    return {**manifest, "totals": counted}, samples


def summarize(manifest: Manifest) -> Summary:
    """Read a run's numbers from its manifest, as :func:`read` returns it."""
    threat, known = dig(manifest, "identity", "threat"), dig(manifest, "totals")
    eps, text = _eps(manifest), plain(dig(threat, "text") or dig(threat, "norm") or "an unknown threat")
    confidence = _confidence(dig(known, "interval"))
    return Summary(
        model=plain(dig(manifest, "model", "name") or dig(manifest, "model", "source") or "the model"),
        data=plain(dig(manifest, "data", "name") or dig(manifest, "data", "source") or "the data"),
        noun=noun_of(dig(manifest, "data", "shape")),
        norm=plain(dig(threat, "norm") or ""),
        eps=eps,
        eps_text=text.partition(":")[2] or ("" if eps is None else f"{eps:.4g}"),
        threat=text,
        targeted=bool(dig(threat, "targeted")),
        complete=manifest.get("complete") is True,
        n=max(0, whole(dig(known, "n")) or 0),
        planned=whole(dig(manifest, "data", "n")),
        confidence=confidence,
        clean=_rate(known, "clean"),
        robust=_rate(known, "robust") if eps is not None and _attacked(manifest) else Rate(),
        certified=_rate(known, "certified"),
        forwards=whole(dig(known, "passes", "forwards")),
        backwards=whole(dig(known, "passes", "backwards")),
        seconds=number(dig(known, "seconds")),
        claimed=whole(dig(known, "claimed")),
        rejected=whole(dig(known, "rejected")),
        stages=_stages(known),
        classes=tuple(_class(c, eps, confidence) for c in rows(dig(known, "per_class"))),
        findings=notes(manifest.get("findings")),
        names=_names(manifest),
        bounded=plain(dig(manifest, "bounded") or "").rstrip("."),
        audit=_audit(manifest),
        attacked=_attacked(manifest),
        prove=proof if isinstance(proof := dig(manifest, "identity", "prove"), Mapping) else None,
    )


def points(manifest: Manifest, samples: pa.Table) -> tuple[Point, ...]:
    """Return what holds at each eps that was asked for, as far as the attack went."""
    limit, wanted = _eps(manifest), dig(manifest, "eps_list")
    asked = [number(v) for v in wanted] if isinstance(wanted, list | tuple) else []
    known = sorted({v for v in asked if v is not None and v >= 0 and (limit is None or v <= limit)})
    n, confidence = len(samples), _confidence(dig(manifest, "totals", "interval"))
    curve = Curve.of(samples["size"].to_numpy(), limit)
    lower = np.where(is_right(samples), samples["lower"].to_numpy(), -1.0)
    asked_for = dig(manifest, "identity", "prove") is not None
    proven = {eps: _share(float((lower >= eps).mean()), n, confidence) for eps in known if n and asked_for}
    robust = {eps: _share(curve(eps), n, confidence) for eps in known if n and _attacked(manifest)}
    return tuple(Point(eps, robust.get(eps, Rate()), proven.get(eps, Rate())) for eps in known if n)


def _share(share: float | None, n: int, confidence: float) -> Rate:
    """Return a share of n samples with its exact interval; nothing where it is none."""
    if share is None or not n or not 0 <= share <= 1:
        return Rate()
    return Rate(share, *exact_interval(round(share * n), n, confidence))


def _audit(manifest: Manifest) -> Audit | None:
    told = dig(manifest, "audit")
    counted = whole(dig(told, "survivors"))
    attacked, broken = (max(0, whole(dig(told, key)) or 0) for key in ("attacked", "broken"))
    if not attacked:
        return None
    n, robust = whole(dig(manifest, "totals", "n")), number(dig(manifest, "totals", "robust_accuracy"))
    standing = None if n is None or robust is None or not 0 <= robust <= 1 else round(robust * n) + broken
    survivors = counted if counted else standing if standing is not None and standing >= attacked else None
    return Audit(attacked, broken, survivors, number(dig(told, "missed_at_most")), _confidence(told))


def _confidence(told: Any) -> float:
    """Return the confidence of what is told, 95 % where it does not say."""
    found = number(dig(told, "confidence"))
    return found if found is not None and 0 < found < 1 else 0.95


def _attacked(manifest: Manifest) -> bool:
    return bool(dig(manifest, "identity", "effort") != UNATTACKED)


def _eps(manifest: Manifest) -> float | None:
    return number(dig(manifest, "identity", "threat", "eps"))


def _names(manifest: Manifest) -> tuple[str, ...]:
    given = dig(manifest, "data", "class_names")
    return tuple(map(plain, given)) if isinstance(given, list | tuple) else ()


def _rate(known: Any, what: str) -> Rate:
    pair, value = dig(known, "interval", what), number(dig(known, f"{what}_accuracy"))
    low, high = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
    return Rate(value, number(low), number(high)) if whole(dig(known, "n")) else Rate()


def _stages(known: Any) -> tuple[Stage, ...]:
    n = whole(dig(known, "n"))
    found = rows(dig(known, "stages"))
    costs = [(whole(s.get("forwards")) or 0) + (whole(s.get("backwards")) or 0) for s in found]
    fallen, stages = 0, []
    for stage, cost in zip(found, costs, strict=True):
        broken = whole(stage.get("broken"))
        fallen += broken or 0
        stages.append(
            Stage(
                name=plain(stage.get("name", "?")),
                entered=whole(stage.get("entered")),
                broken=broken,
                forwards=whole(stage.get("forwards")),
                backwards=whole(stage.get("backwards")),
                seconds=number(stage.get("seconds")),
                left=max(0.0, 1 - fallen / n) if n else None,
                share=cost / sum(costs) if sum(costs) else None,
                proven=whole(stage.get("proven")),
            )
        )
    return tuple(stages)


def _class(row: Mapping[str, Any], eps: float | None, confidence: float) -> ClassRow:
    n, name = max(0, whole(row.get("n")) or 0), row.get("name")
    return ClassRow(
        number=whole(row.get("class")),
        name=plain(row.get("class") if name is None else name),
        n=n,
        clean=_share(number(row.get("clean")), n, confidence),
        robust=_share(number(row.get("robust")), n, confidence) if eps is not None else Rate(),
    )


_SEVERITY = {"error": 0, "warning": 1, "info": 2}


def notes(findings: Any) -> tuple[Note, ...]:
    """Read the findings, the severest first."""
    found = [
        Note(
            code=plain(f.get("code", "?")),
            severity=str(f.get("severity")) if f.get("severity") in _SEVERITY else "info",
            message=plain(f.get("message") or ""),
            evidence=_evidence(f.get("evidence")),
            remedy=plain(f.get("remedy") or ""),
        )
        for f in rows(findings)
    ]
    return tuple(sorted(found, key=lambda note: _SEVERITY[note.severity]))


def _evidence(evidence: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(evidence, Mapping):
        return tuple((plain(k), _brief(v)) for k, v in evidence.items())
    return (("evidence", _brief(evidence)),) if evidence not in (None, "", []) else ()


def _brief(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_brief, value[:12])) + (f", ... ({len(value)} in all)" if len(value) > 12 else "")
    return f"{value:.6g}" if isinstance(value, float) else plain(value)
