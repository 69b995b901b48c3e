"""What has to be on record of a run, in words: the same on a model card and on a sheet of evidence."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

from assay.core.plain import plain
from assay.reports.gates import command
from assay.reports.natural import natural
from assay.reports.summary import ClassRow, Manifest, Rate, Summary, dig, read, summarize
from assay.reports.table import audited, interrupted, median_radius, median_size, sentence, stopped
from assay.reports.text import count, duration, percent, plural
from assay.runs import Run
from assay.runs.totals import number, rows

_DIGEST: Final = 64
"""Characters of a SHA-256."""


@final
@dataclass(frozen=True, slots=True)
class Used:
    """Attacks of one class: their names, their MITRE ATLAS techniques, their class in NIST AI 100-2."""

    names: tuple[str, ...]
    atlas: tuple[str, ...] = ()
    nist: str = ""


@final
@dataclass(frozen=True, slots=True)
class Figure:
    """A share with what it says, ``of`` how many samples."""

    title: str
    note: str
    rate: Rate
    hits: int
    of: int


@final
@dataclass(frozen=True, slots=True)
class Record:
    """A run on record. Everything that it says of itself is plain text of one line."""

    s: Summary
    run: str
    date: str
    verdict: str
    figures: tuple[Figure, ...]
    sizes: tuple[tuple[str, str], ...]
    shares: tuple[tuple[str, str, float], ...]
    tested: tuple[tuple[str, str], ...]
    threat: tuple[str, ...]
    used: tuple[Used, ...]
    work: tuple[str, ...]
    limits: tuple[str, ...]
    command: str
    settings: tuple[tuple[str, str], ...]
    digests: tuple[tuple[str, str], ...]


def record(run: Run, longest: int = 1000) -> Record:
    """Return what has to be on record of a run; names in it have no more characters than ``longest``.

    Raises:
        RunError: the run cannot be read.
    """
    manifest, samples = read(run)
    s = _tame(summarize(manifest), longest)
    used = tuple(_used(manifest, longest))
    return Record(
        s=s,
        run=clip(run.path.resolve().name, longest),
        date=_date(manifest),
        verdict=sentence(s, samples),
        figures=tuple(_figures(s)),
        sizes=tuple(_sizes(s, samples)),
        shares=tuple(_shares(s)),
        tested=tuple((k, clip(v, max(longest, _DIGEST))) for k, v in _tested(manifest, s)),
        threat=tuple(_threat(manifest, s, used)),
        used=used,
        work=tuple(_work(manifest, s)),
        limits=tuple(_limits(manifest, s)),
        command=command(run),
        settings=tuple((k, clip(v, longest)) for k, v in _settings(manifest)),
        digests=tuple(_digests(run)),
    )


def clip(text: Any, longest: int) -> str:
    """Return a text as one line, its middle left out where it is too long.

    Example:
        >>> clip("a name that is long", 10)
        'a nam…long'
    """
    line = plain(text)
    return line if len(line) <= longest else f"{line[: longest // 2]}…{line[-(longest - longest // 2 - 1) :]}"


def _tame(s: Summary, longest: int) -> Summary:
    """Return a summary whose texts are single lines."""
    return replace(
        s,
        model=clip(s.model, longest),
        data=clip(s.data, longest),
        norm=clip(s.norm, 12),
        eps_text=clip(s.eps_text, 20),
        threat=clip(s.threat, 32),
        bounded=clip(s.bounded, 80),
        classes=tuple(replace(c, name=clip(c.name, longest)) for c in s.classes),
        findings=tuple(
            replace(n, code=clip(n.code, 28), message=plain(n.message), remedy=plain(n.remedy)) for n in s.findings
        ),
    )


def _date(manifest: Manifest) -> str:
    """Return when the run ended, ``2026-01-02 03:05 UTC``."""
    told = plain(manifest.get("updated") or manifest.get("created") or "")
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(?::\d\d)?(\+00:00|Z)?.*", told)
    return f"{found[1]} {found[2]}{' UTC' if found[3] else ''}" if found else clip(told, 30)


def _figures(s: Summary) -> Iterator[Figure]:
    told = (
        ("Clean accuracy", "no attacker", s.clean),
        ("Robust accuracy", "an upper bound", s.robust),
        ("Certified accuracy", "proven, a lower bound", s.certified),
    )
    for title, note, rate in told:
        if rate.value is not None and 0 <= rate.value <= 1:
            yield Figure(title, note, rate, round(rate.value * s.n), s.n)


def _sizes(s: Summary, samples: Any) -> Iterator[tuple[str, str]]:
    """Yield what a run without an eps measured."""
    if s.eps is not None:
        return
    middle, radius = median_size(samples), median_radius(samples)
    if s.attacked and middle is not None:
        yield f"Median size that fools ({s.norm})", s.units.show(middle)
    if s.prove is not None and radius is not None:
        yield f"Median proven radius ({s.norm})", s.units.show(radius)


def _shares(s: Summary) -> Iterator[tuple[str, str, float]]:
    """Yield the parts of all samples, which add up to 1: (kind, name, share)."""
    clean, robust, proven = s.clean.value, s.robust.value, s.certified.value
    if s.eps is None or clean is None or not s.n:
        return
    top, low = clean if robust is None else robust, proven or 0.0
    stood = "not fooled" if robust is not None else "open"
    parts = (
        ("proven", "proven", low),
        ("stood", f"{stood}, not proven" if proven is not None and robust is not None else stood, top - low),
        ("fooled", "fooled", clean - top),
        ("wrong", "wrong without an attacker", 1 - clean),
    )
    for kind, name, share in parts:
        if 0 < share <= 1:
            yield kind, name, share


def _tested(manifest: Manifest, s: Summary) -> Iterator[tuple[str, str]]:
    parameters = number(dig(manifest, "model", "parameters"))
    yield "Model", s.model + ("" if parameters is None else f", {count(parameters)} parameters")
    yield "fingerprint", str(dig(manifest, "model", "fingerprint") or dig(manifest, "identity", "model") or "unknown")
    yield "Data", f"{s.data}, {_of(s)}"
    yield "fingerprint", str(dig(manifest, "data", "fingerprint") or dig(manifest, "identity", "data") or "unknown")
    weakest = min((c for c in s.classes if c.robust.value is not None), key=_robust, default=None)
    if weakest:
        said = f"{weakest.name}: {percent(weakest.robust.value)} robust, of {plural(weakest.n, s.noun)}"
        yield "Weakest class", said


def _robust(row: ClassRow) -> float:
    return row.robust.value or 0.0


def _of(s: Summary) -> str:
    """Say how many samples there are."""
    planned = f" of {count(s.planned)}" if s.planned and s.planned != s.n else ""
    return f"{count(s.n)}{planned} {s.noun}{'' if s.n == 1 else 's'}"


_WORDS: Final[Mapping[str, str]] = {
    "linf": "change every value of {a} by at most {eps}",
    "l2": "change {a} by at most {eps} in Euclidean length",
    "l1": "change the values of {a} by at most {eps} in sum",
    "l0": "change at most {eps} values of {a}, each by any amount",
}


def _threat(manifest: Manifest, s: Summary, used: Iterable[Used]) -> Iterator[str]:
    """Say in words what the attacker may do, wants and knows."""
    a = f"{'an' if s.noun == 'image' else 'a'} {s.noun}"
    box = dig(manifest, "identity", "threat", "box")
    plain_box = isinstance(box, list | tuple) and len(box) == 2 and all(number(v) is not None for v in box)
    inside = f", inside the box [{box[0]:g}, {box[1]:g}]" if plain_box else ""
    if s.eps is None:
        may = f"change {a} as little as it takes, measured in {s.norm}"
    else:
        may = _WORDS.get(s.norm, "do what {eps} allows").format(a=a, eps=s.eps_text)
    yield f"An attacker may {may}{inside}."
    yield f"The aim is {'a chosen wrong class' if s.targeted else 'any wrong class'}, at the time of use."
    bits = number(dig(manifest, "identity", "threat", "quantize"))
    if bits is not None:
        yield f"Only inputs whose values have {bits:g} bits count."
    known = " ".join(u.nist for u in used)
    if "white-box" in known:
        yield "The attacker knows the model, its weights and its gradients."
    elif known:
        yield "The attacker sees the answers of the model only."


def _used(manifest: Manifest, longest: int) -> Iterator[Used]:
    """Yield the attacks of the plan, by their class, where the run knows it."""
    known = manifest.get("taxonomy")
    if not isinstance(known, Mapping):
        plan = dig(manifest, "identity", "plan")
        attacks = (r.get("attack") for part in ("rounds", "ladder") for r in rows(dig(plan, part)))
        if found := tuple(dict.fromkeys(clip(name, longest) for attack in attacks for name in _names(attack))):
            yield Used(found)
        return
    by_class: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for name, told in known.items():
        atlas, nist = dig(told, "atlas"), dig(told, "nist")
        listed = atlas if isinstance(atlas, list | tuple) else ()
        techniques = tuple(t for t in map(str, listed) if _ATLAS.fullmatch(t))[:4]
        label = nist if isinstance(nist, str) and _NIST.fullmatch(nist) else ""
        by_class.setdefault((techniques, label), []).append(clip(name, longest))
    for (techniques, label), same in by_class.items():
        yield Used(tuple(same), techniques, label)


_ATLAS: Final = re.compile(r"AML\.T\d{4}(\.\d{3})? [A-Za-z -]{1,32}")
_NIST: Final = re.compile(r"NISTAML\.\d{2,3} [A-Za-z :,-]{1,48}")
"""What a class looks like; nothing else that a run may hold is taken for one."""


def _names(attack: Any) -> Iterator[str]:
    """Yield the names of the attacks that an attack is made of, its own where there are none."""
    if isinstance(attack, list | tuple):
        for part in attack:
            yield from _names(part)
    elif isinstance(attack, Mapping):
        inner = [name for value in attack.values() for name in _names(value)]
        yield from inner or ([str(attack["name"])] if "name" in attack else [])


def _work(manifest: Manifest, s: Summary) -> Iterator[str]:
    """Say how hard was tried, and what was spent, verified, audited and proven."""
    effort = dig(manifest, "identity", "effort")
    if s.attacked and effort:
        yield f"Effort: {clip(effort, 24)}."
    if s.passes:
        each = f"{count(s.per_sample)} per {s.noun}"
        yield f"{count(s.passes)} forward and backward passes, {each}, in {duration(s.seconds)}."
    if s.claimed is not None and s.attacked:
        held = s.claimed - (s.rejected or 0)
        how = f"{'was' if held == 1 else 'were'} verified by a fresh forward pass outside the attack"
        yield f"{plural(held, 'adversarial input')} {how}." if held else "No adversarial input was found."
    if s.audit:
        yield audited(s.audit)
    if s.method:
        yield f"Proofs: {clip(s.method, 24)}."
    if harmed := natural(manifest):
        yield harmed.sentence


def _limits(manifest: Manifest, s: Summary) -> Iterator[str]:
    """Say what does not follow from the result."""
    if not s.complete:
        yield f"{interrupted(s)}: the figures hold for those only."
    serious = [n for n in s.findings if n.severity != "info"]
    if serious:
        yield f"{plural(len(serious), 'finding')} may change what the figures mean."
    if s.attacked and s.eps is not None:
        yield "Robust accuracy is an upper bound: an attack that was not tried may find more."
    elif s.attacked:
        yield "The sizes that were found are upper bounds: smaller changes may exist."
    else:
        yield "Nothing was attacked: what is not proven may be robust, or not."
    if s.smoothed:
        alpha = number(dig(s.prove, "alpha"))
        sure = "" if alpha is None else f", each proof with a probability of at least {100 * (1 - alpha):g} %"
        yield f"Proven is the smoothed classifier, not the network itself{sure}."
    often = dig(manifest, "identity", "until_interval") is not None
    kind = "hold however often they are looked at" if often else "are exact binomial ones"
    yield (
        f"The {100 * s.confidence:g} % intervals {kind}, for {s.noun}s drawn as these were; of other data or "
        "conditions nothing is said."
    )
    yield (
        "It holds for this threat alone, not for larger or other changes, poisoned training data, or theft of the "
        "model or its data."
    )
    if s.bounded:
        yield stopped(s)


def _settings(manifest: Manifest) -> Iterator[tuple[str, str]]:
    identity, machine = dig(manifest, "identity"), dig(manifest, "machine")
    yield "assay", str(manifest.get("assay") or "unknown")
    for name, told in (("seed", identity), ("python", machine), ("torch", machine)):
        if (value := dig(told, name)) is not None:
            yield name, str(value)
    for name in ("device", "platform"):
        if (value := dig(machine, name)) is not None:
            yield name, str(value)


def _digests(run: Run) -> Iterator[tuple[str, str]]:
    """Yield what ``sha256sum manifest.json`` and ``cat samples/*.parquet | sha256sum`` say in the run's folder."""
    yield "manifest.json", _sha256([run.path / "manifest.json"])
    yield "samples/*.parquet", _sha256(sorted((run.path / "samples").glob("*.parquet")))


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
