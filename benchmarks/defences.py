"""What defences claim and what they hold: a blind attack beside the adaptive verdict, on the demo networks.

    python benchmarks/defences.py                                          the plain network at linf:0.1
    python benchmarks/defences.py --model demo:mnist-robust --threat linf:0.4
    python benchmarks/defences.py --only JPEG,Median --limit 20

*Blind* is how most defences were first reported: PGD of 40 steps on the network without the defence, and then the
points that it returns shown to the network with it. *Verdict* is ``assay.evaluate`` on the whole, which attacks through
the defence. Both count samples that are right without an attack and after it, on the same images. A point that a
detector rejects does not fool; a clean image that it rejects is not right.

With the plain network there are also networks trained here, on images that the evaluation does not see: two further
members of an ensemble, and one behind a thermometer code. Passes are those of the verdict; each random pass is one.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

import assay
from assay.attacks import PGD
from assay.data import Data
from assay.defences import (
    JPEG,
    BitDepth,
    Ensemble,
    FeatureSqueezing,
    GaussianBlur,
    GaussianNoise,
    Median,
    RandomResizePad,
    Thermometer,
    TotalVariation,
    calibrated,
    defended,
)
from assay.models.demo.nets import mnist_cnn
from assay.threats import Goal

TRAINING, CALIBRATION = range(2000, 10_000), range(1000, 2000)
"""Which of the images training sees, and which the threshold of a detector; the first thousand are for evaluation."""

PLAIN = "demo:mnist-plain"


@dataclass(frozen=True)
class Row:
    """A defence, and what it makes of a model."""

    name: str
    build: Callable[[assay.Model], assay.Model]


def step(*defences: nn.Module) -> Row:
    """Return the row of defences in front of the model."""
    names = (f"{type(d).__name__}({d.extra_repr().split(', box=')[0]})" for d in defences)
    return Row(", ".join(names), lambda model: defended(model, *defences))


@cache
def images() -> Data:
    """Return all images that ship."""
    return assay.load_data("demo:mnist")


@cache
def trained(seed: int, levels: int = 0, epochs: int = 4) -> nn.Module:
    """Train the demo network as it is, or behind a thermometer code of some levels."""
    torch.manual_seed(seed)
    net = mnist_cnn()
    if levels:
        net = nn.Sequential(Thermometer(levels), nn.Conv2d(levels, 16, 4, stride=2, padding=1), *net[1:])
    data = images().take(TRAINING)
    return assay.harden(net, data, "linf:0.1", "plain", epochs=epochs, seed=seed, batch_size=100, progress=False).net


def together(model: assay.Model, combine: str) -> assay.Model:
    """Return an ensemble of a model and two others."""
    return defended(Ensemble([model, trained(1), trained(2)], combine))


def watched(model: assay.Model, bits: int) -> assay.Model:
    """Return a model that rejects what is suspicious, and 5 % of clean images."""
    squeezing = FeatureSqueezing(BitDepth(bits), Median(2))
    return defended(calibrated(model, squeezing, images().batch(CALIBRATION), rate=0.05))


def table(model: str) -> Iterator[Row]:
    """Return the rows for a model."""
    yield Row("none", lambda model: model)
    yield from map(step, (JPEG(75), BitDepth(3), BitDepth(1), Median(2), Median(3), GaussianBlur(1.0)))
    yield from map(step, (TotalVariation(0.2, 10), GaussianNoise(0.2), RandomResizePad(0.8, 1.0)))
    yield step(TotalVariation(0.2, 10), RandomResizePad(0.8, 1.0))
    if model == PLAIN:
        yield Row("Thermometer(levels=16), trained", lambda _: assay.Model(trained(0, levels=16)))
        yield from (Row(f"Ensemble of 3 ({how})", partial(together, combine=how)) for how in ("probabilities", "vote"))
    yield from (Row(f"FeatureSqueezing(BitDepth({n}), Median(2))", partial(watched, bits=n)) for n in (3, 1))


def blind(model: assay.Model, x: Tensor, y: Tensor, points: Tensor) -> float:
    """Return the share of samples that a model has right, and that these points do not fool it about."""
    goal = Goal(y)
    with model.frozen() as live, torch.no_grad():
        before, after = live(x), model.joint(live(points), goal)
    return float(((before.argmax(1) == y) & ~goal.reached(after)).float().mean())


def measured(row: Row, model: assay.Model, data: Data, points: Tensor, threat: str, effort: str) -> list[str]:
    """Return the cells of a row: shares right, passes a sample and CPU seconds."""
    began, whole = time.process_time(), row.build(model)
    claim = blind(whole, data.batch(range(len(data))), data.labels, points)
    e = assay.evaluate(whole, data, threat, effort, progress=False)
    assert e.robust_accuracy is not None
    passes, seconds = (e.passes.forwards + e.passes.backwards) / e.n, time.process_time() - began
    shares = (e.clean_accuracy, claim, e.robust_accuracy)
    return [row.name, *(f"{v:.0%}" for v in shares), f"{passes:,.0f}", f"{seconds:.0f}"]


def main() -> None:
    """Print the table, row by row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PLAIN)
    parser.add_argument("--threat", default="linf:0.1")
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--only", default="", help="parts of the names of defences, separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, data = assay.load_model(options.model), assay.load_data("demo:mnist", limit=options.limit)
    points = PGD(steps=40)(model, data.batch(range(len(data))), data.labels, options.threat, full=True).x
    print("| defence | clean | blind | verdict | passes | seconds |\n|---|---|---|---|---|---|")
    for row in table(options.model):
        if any(part in row.name for part in options.only.split(",")):
            print("|", " | ".join(measured(row, model, data, points, options.threat, options.effort)), "|", flush=True)


if __name__ == "__main__":
    main()
