"""A second chance: where gradients are masked or attacks get stuck, repairs are judged by what attacks then break.

The ladder looks at gradients at the clean samples. A network may be sound there, and flat a little farther out: one
that returns the same scores for whatever it takes for an attack, say.
"""

from dataclasses import replace

import torch

from assay.data import Data
from assay.evaluation.diagnosis import EXCEPTIONS, Probe, masking, probe
from assay.evaluation.finding import Finding
from assay.evaluation.health import Bench
from assay.evaluation.ladder import FREE
from assay.evaluation.preflight import Preflight
from assay.threats import Threat

_LOOKED_AT = 64


def examine(
    checked: Preflight, data: Data, threat: Threat, seed: int = 0, device: torch.device | str | None = None
) -> Preflight:
    """Probe a model that was ``checked``; where it seems to mask its gradients, also with repairs that cost nothing.

    Kept is the repair behind which attacks break most, if that is more than chance. A random model has no second
    chance, nor one of which every question has its price: attacks on it are dear.

    Returns:
        The model and what there is to say about it.
    """
    model, found = checked.model, checked.findings
    first = probe(model, data, threat, seed, device)
    found += first.findings
    checked = replace(checked, findings=found, masked=checked.masked or _masked(first))
    dear = model.samples > 1 or getattr(model.module, "dear", False)
    if first.counts.left <= EXCEPTIONS or dear or not masking(found):
        return checked
    rows = torch.arange(min(len(data), _LOOKED_AT))
    bench, bare = Bench(data.batch(rows), data.labels[rows], threat, device), replace(model, smoothing=None)
    tried = [
        (_fallen(probe(repaired, data, threat, seed, device)), code, repaired)
        for code, attempts in FREE.items()
        for repaired in attempts(bare, bench)
    ]
    most, code, best = max(tried, key=lambda t: t[0], default=(0, "", model))
    before, n = _fallen(first), first.counts.n
    if most - before <= EXCEPTIONS:
        return checked
    return replace(checked, model=best, findings=(*found, _rescued(code, before, most, n)))


def _masked(probed: Probe) -> bool:
    """Tell whether gradients are masked for more than cross-entropy: the race has other losses."""
    return masking(f for f in probed.findings if f.code != "loss-disagreement")


def _fallen(probed: Probe) -> int:
    return probed.counts.ce + probed.counts.margin


def _rescued(code: str, before: int, after: int, n: int) -> Finding:
    return Finding(
        code,
        "warning",
        f"The model's gradients lead attacks astray: they break {before} of {n} samples, and {after} with another "
        f"backward pass ({code.removeprefix('repaired-')}), which attacks now use. Successes are verified on the "
        "network as it is.",
        {"before": before, "after": after, "n": n},
        "Look for outputs that turn flat where an input looks attacked; for a detector, give it a class of its own.",
    )
