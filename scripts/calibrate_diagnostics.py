"""Print what the thresholds of the diagnostics were set by: the figures of sound networks, and of masked ones.

python scripts/calibrate_diagnostics.py                        # controls that ship or are trained here
python scripts/calibrate_diagnostics.py --masked               # the masked zoo of the tests, too
python scripts/calibrate_diagnostics.py --bounds               # how far the best attack gets on each of the zoo
python scripts/calibrate_diagnostics.py --more net.onnx linf:0.1,l2:0.5
python scripts/calibrate_diagnostics.py --more w.pth linf:0.1 --arch module:callable --data images.parquet
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import assay  # noqa: E402  (works from a checkout, installed or not)
from assay.attacks import APGD, PGD, Cascade, Restarts, Runnable, Square, Targets  # noqa: E402
from assay.attacks.losses import dlr, margin  # noqa: E402
from assay.data import Data  # noqa: E402
from assay.evaluation.diagnosis import probe  # noqa: E402
from assay.evaluation.health import Bench  # noqa: E402
from assay.evaluation.preflight import check_model  # noqa: E402
from assay.models import Model  # noqa: E402
from assay.threats import Threat  # noqa: E402

THREATS = "linf:0.02,linf:0.05,linf:0.1,linf:0.3,l2:0.5,l2:2,l1:10,l0:20,linf,l2"

HEAD = (
    f"{'model':24} {'threat':10} {'no grad':>9} {'linear':>7} {'steep':>8} | {'n':>3} {'ce':>3} {'+m':>3} {'one':>4} "
    f"{'+one':>4} {'+noise':>6} {'due':>4} {'fell':>4} {'box':>4} {'passes':>6} | findings"
)


def show(name: str, model: Model, data: Data, threat: Threat) -> None:
    """Print one line: gradients as they are, and the probe of the model as it would be attacked."""
    threat = threat.within(model.domain, int(torch.tensor(data.shape).prod()))
    checked = check_model(model, data, threat, None)
    hits = right(model, data, 64)
    h = Bench(*hits, threat, None).health(model)
    found = probe(checked.model, data, threat)
    c, passes = found.counts, (found.forwards + found.backwards) / max(found.counts.n, 1)
    codes = [f.code for f in (*checked.findings, *found.findings)]
    print(
        f"{name:24} {threat!s:10} {h.blind_ce:4.2f} {h.blind:4.2f} {h.linearity:7.2f} {h.steepest:8.3g} | {c.n:3} "
        f"{c.ce:3} {c.margin:3} {'-' if c.one_step is None else c.one_step:>4} {c.step_more:4} {c.noise_more:6} "
        f"{c.promised:4} {c.kept:4} {c.unreached:4} {passes:6.0f} | {', '.join(codes) or '-'}",
        flush=True,
    )


def right(model: Model, data: Data, n: int) -> tuple[Tensor, Tensor]:
    """Give those of the first n samples that the model has right."""
    rows = range(min(n, len(data)))
    x, y = data.batch(rows), data.labels[list(rows)]
    with model.frozen() as live, torch.no_grad():
        hits = live(x).argmax(1) == y
    return x[hits], y[hits]


def strongest() -> Runnable:
    """Give an attack that spends what it takes."""
    sprint = PGD(steps=100, rel_step=2.0, decay="cosine", momentum=0.75, loss=margin)
    return Cascade((Restarts(sprint, 3), Targets(APGD(steps=100, loss=dlr), 9), Square(steps=5000)))


def bound(model: Model, data: Data, threat: Threat) -> float:
    """Attack the first hundred samples on the repaired model; give the share of all that stands."""
    threat = threat.within(model.domain, int(torch.tensor(data.shape).prod()))
    repaired = check_model(model, data, threat, None).model
    if repaired.samples > 1:
        attack: Runnable = PGD(steps=100, rel_step=2.0, decay="cosine", momentum=0.75, loss=margin)
    else:
        attack = strongest()
    x, y = right(model, data, 100)
    return float((~attack(repaired, x, y, threat).success).sum()) / min(100, len(data))


def main() -> None:
    """Parse the command line and print the tables asked for."""
    parser = argparse.ArgumentParser(description="Print the figures behind the thresholds of the diagnostics.")
    parser.add_argument("--masked", action="store_true", help="the masked zoo too")
    parser.add_argument("--bounds", action="store_true", help="only how far the best attack gets on each of the zoo")
    parser.add_argument("--more", nargs=2, metavar=("MODEL", "THREATS"), help="only this model, at these threats")
    parser.add_argument("--arch", help="its architecture, for weights")
    parser.add_argument("--data", default="demo:mnist", help="its data")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    data = assay.load_data(wanted.data, limit=100)
    if wanted.more:
        name, threats = wanted.more
        model = assay.load_model(name, arch=wanted.arch) if wanted.arch else assay.load_model(name)
        print(HEAD)
        for text in threats.split(","):
            show(Path(name).name, model, data, Threat.parse(text))
        return
    import zoo

    if wanted.bounds:
        for animal in (*zoo.MASKED, *zoo.CONTROLS):
            print(
                animal.name, animal.threat, bound(Model(animal.build()), data, Threat.parse(animal.threat)), flush=True
            )
        return
    print(HEAD)
    for animal in zoo.CONTROLS:
        for text in THREATS.split(","):
            show(animal.name, Model(animal.build()), data, Threat.parse(text))
    for animal in zoo.MASKED if wanted.masked else ():
        show(animal.name, Model(animal.build()), data, Threat.parse(animal.threat))


if __name__ == "__main__":
    main()
