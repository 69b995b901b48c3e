"""Sparseness of AlexNet and VGG11 under FGSM, beside the published tables, and the verdict on each claim of theirs.

    python benchmarks/sparseness.py --small                                     minutes on a core
    python benchmarks/sparseness.py --device cuda --train train.npz             as published, as far as that is known
    python benchmarks/sparseness.py --small --write docs/studies/sparseness.md  and the page about it, with its figures

Both networks are defined here as torchvision defines them, for 10 classes, and trained from the start on MNIST, in
three equal channels, resized bilinearly to the input of the network (224 pixels). Then each test image is attacked by
FGSM at linf:0.03, in units of [0, 1], and all layers with an activation are measured. Only MNIST's 10,000 test images
ship: without ``--train``, training takes those from the 2,001st on, and the study the 2,000 before. With ``--train``,
all of ``--test`` are for the study.

``--small`` differs: images of 64 pixels, the first 1,000 of them, 3,000 for training; AlexNet pools its last features
to 1x1 instead of 6x6 (they are 1x1 at that size) and has hidden layers of 1,024 instead of 4,096; VGG11 has a quarter
of the channels, pools to 2x2 instead of 7x7 (they are 2x2), and has hidden layers of 1,024. Kernels, strides and the
number of layers are the same. The attack that knows of the index takes 40 steps where FGSM takes one, so it sees fewer
images.

The figures need matplotlib, which nothing else here does (pip install matplotlib). ``--again`` draws and writes what is
in ``--out`` without training anything.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import assay
from assay.data import Data
from assay.study import sparseness

EPS, SEED = 0.03, 0

PUBLISHED = {
    "AlexNet": {
        "clean": (39.4, 93.4, 84.2, 60.2, 60.3, 79.6, 94.2),
        "attacked": (68.2, 82.1, 59.2, 63.4, 63.4, 99.8, 99.4),
    },
    "VGG11": {
        "clean": (18.6, 11.2, 47.3, 58.2, 77.6, 77.5, 98.3, 99.8, 60.1, 78.4),
        "attacked": (28.8, 78.3, 36.3, 36.6, 36.5, 80.7, 60.5, 61.2, 70.2, 51.4),
    },
}
"""Peaks of the histograms in per cent, layer by layer; weights and bins were not published."""


@dataclass(frozen=True)
class Size:
    """What the small version has less of."""

    pixels: int = 224
    hidden: int = 4096
    pools: tuple[int, int] = (6, 7)
    share: int = 1
    images: int = 2000
    learn: int = 8000


FULL, SMALL = Size(), Size(64, 1024, (1, 2), 4, 1000, 3000)


def head(features: list[nn.Module], channels: int, pool: int, hidden: int, *, first: bool) -> nn.Sequential:
    """Return features with pooling and three linear layers behind; dropout comes first in AlexNet, later in VGG11."""
    drop = [nn.Dropout(), nn.Dropout()]
    one, two = nn.Linear(channels * pool**2, hidden), nn.Linear(hidden, hidden)
    before = [drop[0], one, nn.ReLU(), drop[1], two, nn.ReLU()]
    after = [one, nn.ReLU(), drop[0], two, nn.ReLU(), drop[1]]
    middle = [nn.AdaptiveAvgPool2d(pool), nn.Flatten(), *(before if first else after)]
    return nn.Sequential(*features, *middle, nn.Linear(hidden, 10))


def alexnet(size: Size) -> nn.Sequential:
    """Build AlexNet: Krizhevsky 2014, arXiv:1404.5997, without the parallel towers."""
    pool, relu = nn.MaxPool2d(3, 2), nn.ReLU
    features = [nn.Conv2d(3, 64, 11, 4, 2), relu(), pool, nn.Conv2d(64, 192, 5, padding=2), relu(), pool]
    features += [nn.Conv2d(192, 384, 3, padding=1), relu(), nn.Conv2d(384, 256, 3, padding=1), relu()]
    features += [nn.Conv2d(256, 256, 3, padding=1), relu(), nn.MaxPool2d(3, 2)]
    return head(features, 256, size.pools[0], size.hidden, first=True)


def vgg11(size: Size) -> nn.Sequential:
    """Build VGG11: Simonyan & Zisserman 2015, arXiv:1409.1556, configuration A."""
    features: list[nn.Module] = []
    inputs = 3
    for item in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        if not item:
            features.append(nn.MaxPool2d(2))
            continue
        conv = nn.Conv2d(inputs, item // size.share, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(conv.bias)
        features += [conv, nn.ReLU()]
        inputs = item // size.share
    return head(features, inputs, size.pools[1], size.hidden, first=False)


SIDES = ("clean", "attacked")

FEW = 10
"""Samples below which an area under the ROC is not shown."""

Found = dict[str, Any]
"""What the study of a network found, as it is stored."""

NETS = {"AlexNet": alexnet, "VGG11": vgg11}


def grown(x: Tensor, pixels: int) -> Tensor:
    """Return images (b, 1, 28, 28) as (b, 3, pixels, pixels)."""
    return F.interpolate(x, (pixels, pixels), mode="bilinear").clamp(0, 1).expand(-1, 3, -1, -1)


class Resized(torch.utils.data.Dataset):
    """Images of the size that a network takes, made when they are asked for."""

    def __init__(self, data: Data, pixels: int) -> None:
        self.data, self.pixels = data, pixels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return grown(self.data.batch([i]), self.pixels)[0], int(self.data.labels[i])


def trained(net: nn.Module, data: Data, size: Size, epochs: int, device: str) -> nn.Module:
    """Train on samples by AdamW, the rate falling to 0 along half a cosine."""
    net, steps = net.to(device).train(), -(-len(data) // 50) * epochs
    optimiser = torch.optim.AdamW(net.parameters(), 5e-4)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(data)).split(50):
            x, y = grown(data.batch(rows).to(device), size.pixels), data.labels[rows].to(device)
            optimiser.zero_grad()
            F.cross_entropy(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            rate.step()
    return net.eval()


def studied(name: str, o: argparse.Namespace, size: Size, learn: Data, test: Data) -> None:
    """Train a network, measure it, and once more on a few images with the attack that knows of the index."""
    began = time.process_time()
    torch.manual_seed(SEED)
    net = trained(NETS[name](size), learn, size, o.epochs, o.device)
    learned = time.process_time() - began
    model, how = assay.Model(net, name=name), {"seed": SEED, "device": o.device, "progress": False}
    data = Resized(test, size.pixels)
    sparseness(model, data, f"linf:{EPS}", adaptive=False, **how).save(o.out / name)
    sparseness(model, data, f"linf:{EPS}", limit=o.adaptive, **how).save(o.out / f"{name}-adaptive")
    print(f"{name}: {time.process_time() - began:.0f} s CPU, {learned:.0f} s of them training", flush=True)


# ----------------------------------------------------------------------------------------------------------- the words


def table(name: str, found: Found, hidden: Found) -> Iterator[str]:
    """Yield the lines of a table of layers: our figures beside the published peaks."""
    yield "| layer | published peak, clean → attacked | our peak | our mean | effect | ROC, fooled | ROC, adaptive |"
    yield "|---|---|---|---|---|---|---|"
    for i, (layer, other) in enumerate(zip(found["layers"], hidden["layers"], strict=True)):
        told = " → ".join(f"{PUBLISHED[name][side][i]:.1f}" for side in SIDES)
        ours = [" → ".join(f"{100 * layer['sides'][side][what]:.1f}" for side in SIDES) for what in ("mode", "psi")]
        areas = (shown(layer["auc_fooled"], fooled(found)), shown(other["auc_adaptive"], fooled(hidden, "adaptive")))
        yield f"| {' | '.join([layer['name'], told, *ours, f'{effect(layer):+.2f}', *areas])} |"


def fooled(found: Found, side: str = "attacked") -> int:
    """Return how many samples that are right an attack fooled."""
    return round(found["n"] * (found["accuracy"]["clean"] - found["accuracy"][side]))


def shown(area: float | None, n: int) -> str:
    """Write an area, where it is of so many samples that it means something."""
    return "-" if area is None or n < FEW else f"{area:.2f}"


def effect(layer: Found) -> float:
    """Return the effect of the attack on a layer's index; 0 where it may be chance."""
    shift = layer["shift"]
    return 0.0 if shift is None or shift["p"] > 0.01 else float(shift["rank_biserial"])


def verdicts(found: dict[str, Found]) -> Iterator[str]:
    """Yield a sentence on each claim; what counts as holding was settled before the figures were known."""
    if "AlexNet" in found:
        effects = [effect(layer) for layer in found["AlexNet"]["layers"] if layer["name"].startswith("fc")]
        said = "holds" if min(effects) > 0 else "does not hold"
        values = ", ".join(f"{v:+.2f}" for v in effects)
        yield f"*AlexNet's fully connected layers answer more sparsely when attacked*: {said} (effects {values})."
    if "VGG11" in found:
        layers = found["VGG11"]["layers"]
        falls = sum(effect(layer) < 0 for layer in layers)
        clean, attacked = (sum(layer["sides"][side]["psi"] for layer in layers) for side in SIDES)
        change = 100 * (attacked - clean) / len(layers)
        said = "holds" if falls > len(layers) / 2 and change < 0 else "does not hold"
        yield (
            f"*VGG11 answers less sparsely under attack, overall*: {said} ({falls} of {len(layers)} layers fall, mean "
            f"change {change:+.1f} points)."
        )
    for name, one in found.items():
        for side in SIDES:
            known = [layer["relations"][side] for layer in one["layers"] if layer["relations"][side] is not None]
            sure, layers = sum(r["low"] > 0 for r in known), len(one["layers"])
            yield (
                f"*Classes of low sparseness have low accuracy* ({name}, {side}): "
                f"{'holds' if sure > layers / 2 else 'does not hold'} (Spearman and its interval are above 0 in {sure} "
                f"of {layers} layers, below 0 in {sum(r['high'] < 0 for r in known)})."
            )


def page(found: dict[str, Found], hidden: dict[str, Found], how: str, stem: str = "") -> Iterator[str]:
    """Yield the lines of the page about the study; with a stem, those of its figures are among them."""
    yield "# Sparseness of AlexNet and VGG11 under FGSM\n"
    yield f"{BEFORE.format(how=how)}"
    for name, one in found.items():
        clean, attacked = (f"{100 * one['accuracy'][side]:.1f} %" for side in SIDES)
        n, at = hidden[name]["n"], {k: f"{100 * v:.0f} %" for k, v in hidden[name]["accuracy"].items()}
        yield f"## {name}\n"
        yield f"{one['n']} images: accuracy {clean} clean, {attacked} under FGSM, which fools {fooled(one)}."
        yield f"The first {n} of them: {at['clean']} clean, {at['attacked']} under FGSM, {at['adaptive']} under the"
        yield f"attack that knows of the index, which fools {fooled(hidden[name], 'adaptive')}.\n"
        yield from table(name, one, hidden[name])
        yield ""
        if stem:
            yield f"![Histograms and classes of {name}]({drawing(stem, name)})\n"
            yield f"{CAPTION.format(name=name)}\n"
    yield "## The claims\n"
    yield from (f"- {line}" for line in verdicts(found))


CAPTION = """\
{name}, layer by layer: above, how many of the images have which index, with the published peaks as dashed lines;
below, each digit's index (of its mean responses) and accuracy, and Spearman's correlation of the two, clean and
attacked. Every panel has an axis of its own."""

BEFORE = """\
Written by `python benchmarks/sparseness.py {how}`, whose docstring says what the networks
are, and what the small version has less of. The claims are those of a published measurement of both networks.

*Peak* is the middle of the fullest bin of 1 % (the published bins are not known), *mean* that over samples, both in
per cent. *Effect* is the rank-biserial correlation of clean and attacked pairs, 0 where Wilcoxon's test gives p > 0.01.
*ROC* is the area for telling fooled samples from the same samples clean by this layer alone; 0.5 is guessing, and a
dash stands for fewer than 10 samples. A claim on sparseness holds here if the effects agree (all of AlexNet's fully
connected layers; most of VGG11's, and the mean change), one on classes if in most layers Spearman's correlation of
class index and class accuracy has an interval above 0.

Absolute values cannot be compared, for the published weights are not known; only the direction in which an attack moves
them can be. These are one training of each network, and ten classes: what does not hold here may hold for others.

"""


# --------------------------------------------------------------------------------------------------------- the figures

COLOURS = {"clean": "#0b6b63", "attacked": "#c2571a"}


def drawing(stem: str, name: str) -> str:
    """Return the name of the file with the figure of a network, beside the page ``stem``.md."""
    return f"{stem}-{name.lower()}.png"


def publish(path: Path, text: str, found: dict[str, Found]) -> None:
    """Write the page, and its figures beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    for name, one in found.items():
        draw(name, one, path.with_name(drawing(path.stem, name)))


def draw(name: str, found: Found, path: Path) -> None:
    """Draw the histograms of the index and the classes' index and accuracy, a column a layer, in two rows of layers."""
    from matplotlib import pyplot, rcParams

    rcParams.update({"font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False})
    layers, columns = found["layers"], -(-len(found["layers"]) // 2)
    figure, grid = pyplot.subplots(4, columns, figsize=(9.5, 7.4), layout="constrained", squeeze=False)
    for ax in grid.flat:
        ax.set_axis_off()
    for i, layer in enumerate(layers):
        above, below = (grid[2 * (i // columns) + k, i % columns] for k in (0, 1))
        histograms(above, layer, {side: PUBLISHED[name][side][i] for side in SIDES})
        classes(below, layer, found["class_accuracy"])
    for row in (0, 2):
        grid[row, 0].set_ylabel("images, %")
        grid[row + 1, 0].set_ylabel("accuracy of class, %")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def histograms(ax: Any, layer: Found, peaks: dict[str, float]) -> None:
    """Draw the share of images by index, clean and attacked, and the published peaks; the axis spans both."""
    ax.set_axis_on()
    seen = list(peaks.values())
    for side, fill in zip(SIDES, (True, False), strict=True):
        counts = layer["sides"][side]["counts"]
        edges = [100 * i / len(counts) for i in range(len(counts) + 1)]
        shares = [100 * n / max(1, sum(counts)) for n in counts]
        ax.stairs(shares, edges, fill=fill, alpha=0.5 if fill else 1, color=COLOURS[side], label=f"{side}, measured")
        seen += [edge for n, *ends in zip(counts, edges, edges[1:], strict=False) if n for edge in ends]
    for side in SIDES:
        ax.axvline(peaks[side], color=COLOURS[side], dashes=(3, 2), lw=1.2, label=f"{side}, published peak")
    ax.set(xlim=(max(0, min(seen) - 3), min(100.5, max(seen) + 3)), title=layer["name"], xlabel="index, %")


def classes(ax: Any, layer: Found, accuracy: dict[str, list[float]]) -> None:
    """Draw each class at its index and its accuracy, clean and attacked, with Spearman's correlations."""
    ax.set_axis_on()
    for side in SIDES:
        at = zip(layer["sides"][side]["of_means"], accuracy[side], strict=True)
        for k, (index, right) in enumerate(at):
            if index is None or right is None:  # no image of the class, or no answer to any
                continue
            ax.plot(100 * index, 100 * right, marker=f"${k}$", ms=5.5, mew=0.3, ls="", color=COLOURS[side])
    known = [layer["relations"][side] for side in SIDES]
    rhos = ", ".join("none" if r is None else f"{r['rho']:+.2f}" for r in known)
    least = 100 * min(v for values in accuracy.values() for v in values if v is not None)
    ax.set(ylim=(10 * (least // 10) - 3, 103), xlabel="index of class, %")
    ax.set_title(f"Spearman {rhos}", fontsize=7.5)
    ax.margins(x=0.12)


def samples(o: argparse.Namespace, size: Size) -> tuple[Data, Data]:
    """Return what to train on and what to measure."""
    test = assay.load_data(o.test)
    if o.train:
        return assay.load_data(o.train, limit=o.learn), test.head(o.limit or (size.images if o.small else len(test)))
    rows = range(2000, min(len(test), 2000 + (o.learn or size.learn)))
    return test.take(rows), test.head(o.limit or size.images)


def main() -> None:
    """Train, measure, print the page and, where asked, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default="AlexNet,VGG11")
    parser.add_argument("--train", help="training data, 28 pixels; else a part of the images that ship")
    parser.add_argument("--test", default="demo:mnist")
    parser.add_argument("--limit", type=int, help="test images")
    parser.add_argument("--learn", type=int, help="training images")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--adaptive", type=int, default=50, help="images for the attack that knows of the index")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for all figures, and their pages")
    parser.add_argument("--write", type=Path, help="file for the page on both, with figures beside it")
    parser.add_argument("--again", action="store_true", help="only write the page, from the figures in --out")
    o = parser.parse_args()
    torch.set_num_threads(1)
    size, nets = SMALL if o.small else FULL, o.only.split(",")
    if o.write:
        import matplotlib.pyplot  # noqa: F401 - rather missing now than after minutes of training
    if not o.again:
        learn, test = samples(o, size)
        for name in nets:
            studied(name, o, size, learn, test)
    found, hidden = (
        {name: json.loads((o.out / f"{name}{part}" / "sparseness.json").read_text()) for name in nets}
        for part in ("", "-adaptive")
    )
    how, stem = "--small" if o.small else "--device cuda --train train.npz", o.write.stem if o.write else ""
    how += f" --write {stem}.md" if stem else ""
    text = "\n".join(page(found, hidden, how, stem)) + "\n"
    print(text)
    if o.write:
        publish(o.write, text, found)


if __name__ == "__main__":
    main()
