"""What a library costs on top of the network: PGD steps of assay, a bare loop, and four other libraries.

Every contestant takes the same number of gradient steps of the same length from a uniform random start, on
its own copy of the same network, on one thread. The contestants take turns, so that a disturbance of the machine
hits all alike; a ratio compares runs of one round. CPU time is the measure; wall time is given beside it.

Example:
    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py --weights pgd_madry.pth --json step_overhead.json
"""

import argparse
import copy
import gc
import gzip
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from _peers import CONTESTANTS, Attack, Contestant, Task
from torch import Tensor, nn

NOTE = """\
assay's time includes what the others leave to the caller: checks of inputs and logits, the best point so far
and the test for success at every step, a last forward pass, and the verification of every success in one more
pass. Passes are rows that went through the network divided by samples, rows that fill a batch included."""


@dataclass(frozen=True)
class Row:
    """What was measured of one contestant; ratios are to the bare loop, times in seconds."""

    name: str
    version: str
    problem: str = ""  # why nothing was measured
    cpu_min: float = float("nan")
    cpu_median: float = float("nan")
    wall_min: float = float("nan")
    wall_median: float = float("nan")
    cpu_ratio: float = float("nan")  # the median of the ratios of all rounds
    cpu_ratio_of_min: float = float("nan")
    wall_ratio: float = float("nan")
    wall_ratio_of_min: float = float("nan")
    forwards: float = float("nan")  # per sample
    backwards: float = float("nan")
    fooled: float = float("nan")  # share of the returned points that the network gets wrong
    largest: float = float("nan")  # largest change of any coordinate


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    cpu: list[float]
    wall: list[float]


def mnist_case(weights: Path | None) -> Task:
    """Return 200 images, PGD-40 with eps 0.3 and steps of 0.01, against a small convolutional network."""
    net = SmallNet()
    if weights:
        net.layers.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    net.eval()
    x, y = _demo_images(200) or (torch.rand(200, 1, 28, 28), None)
    labels = y if y is not None and weights else _predictions(net, x)
    return Task(net, x, labels, eps=0.3, step=0.01, steps=40)


def resnet18_case() -> Task:
    """Return 16 random images, 5 steps of 2/255 with eps 8/255, against a ResNet-18 with random weights."""
    net, x = ResNet18(), torch.rand(16, 3, 32, 32)
    with torch.no_grad():
        net.train()(x)  # gives the normalisation layers statistics that fit
    return Task(net.eval(), x, _predictions(net, x), eps=8 / 255, step=2 / 255, steps=5)


class SmallNet(nn.Module):
    """Two strided convolutions and two dense layers, for 28x28 images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(1568, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, 10)."""
        out: Tensor = self.layers(x)
        return out


class ResNet18(nn.Module):
    """The ResNet-18 in use for 32x32 images: 3x3 stem, no pooling after it, widths 64 to 512."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        widths = [width, width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
        strides = [1, 1, 2, 1, 2, 1, 2, 1]
        convolution = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            *(BasicBlock(a, b, s) for a, b, s in zip(widths[:-1], widths[1:], strides, strict=True))
        )
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, classes)."""
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        plain = stride == 1 and inner == outer
        self.shortcut = (
            nn.Sequential()
            if plain
            else nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the features after the block."""
        return torch.relu(self.branch(x) + self.shortcut(x))


def measure(task: Task, contestants: Sequence[Contestant], rounds: int) -> list[Row]:
    """Run all contestants ``rounds`` times in turn, each on its own copy of the network."""
    rows, runs = [], {}
    for contestant in contestants:
        own = replace(task, net=copy.deepcopy(task.net))
        try:
            row = Row(contestant.name, contestant.version())
            runs[contestant.name] = contestant.make(own)
        except ImportError as e:  # also what is raised for a package without metadata
            rows.append(Row(contestant.name, "-", problem=_why(e, contestant.package)))
            continue
        rows.append(_counted(row, own, runs[contestant.name]))
    times = _take_turns(runs, rounds)
    reference = times[CONTESTANTS[0].name]
    return [_timed(row, times[row.name], reference) if row.name in times else row for row in rows]


def _why(error: ImportError, package: str) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return f"does not import: {error}"
    return "not installed" if error.name in (None, package) else f"not installed: {error.name}"


def _counted(row: Row, task: Task, run: Attack) -> Row:
    """Run once without a clock: count passes, and look at what comes out."""
    count = {"forwards": 0, "backwards": 0}

    def after(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        count["forwards"] += len(inputs[0])
        if out.requires_grad:
            out.register_hook(before)  # type: ignore[no-untyped-call]

    def before(grad: Tensor) -> None:
        count["backwards"] += len(grad)

    hook = task.net.register_forward_hook(after)
    x = torch.as_tensor(run())
    hook.remove()
    n = len(task.x)
    fooled = (_predictions(task.net, x) != task.y).float().mean().item()
    return replace(
        row,
        forwards=count["forwards"] / n,
        backwards=count["backwards"] / n,
        fooled=fooled,
        largest=(x - task.x).abs().max().item(),
    )


def _take_turns(runs: dict[str, Attack], rounds: int) -> dict[str, Times]:
    times = {name: Times([], []) for name in runs}
    order = list(runs)
    for _ in range(rounds):
        for name in order:
            cpu, wall = _clock(runs[name])
            times[name].cpu.append(cpu)
            times[name].wall.append(wall)
        order = order[1:] + order[:1]  # nobody always follows the same one
    return times


def _clock(run: Callable[[], Any]) -> tuple[float, float]:
    gc.collect()
    gc.disable()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    gc.enable()
    return cpu, wall


def _timed(row: Row, own: Times, bare: Times) -> Row:
    values = {}
    for kind in ("cpu", "wall"):
        a, b = getattr(own, kind), getattr(bare, kind)
        values[f"{kind}_min"], values[f"{kind}_median"] = min(a), statistics.median(a)
        values[f"{kind}_ratio"] = statistics.median(s / t for s, t in zip(a, b, strict=True))
        values[f"{kind}_ratio_of_min"] = min(a) / min(b)
    return replace(row, **values)


def show(rows: Sequence[Row]) -> str:
    """Write the rows as a table in Markdown."""
    head = (
        "contestant",
        "version",
        "CPU s min / median",
        "ratio",
        "ratio of min",
        "wall s median",
        "wall ratio",
        "forwards",
        "backwards",
        "fooled",
    )
    body = [(r.name, r.version, r.problem, *[""] * 7) if r.problem else _cells(r) for r in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [head, tuple("-" * w for w in widths), *body]
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _cells(r: Row) -> tuple[str, ...]:
    return (
        r.name,
        r.version,
        f"{r.cpu_min:.3f} / {r.cpu_median:.3f}",
        f"{r.cpu_ratio:.3f}",
        f"{r.cpu_ratio_of_min:.3f}",
        f"{r.wall_median:.3f}",
        f"{r.wall_ratio:.3f}",
        f"{r.forwards:.2f}",
        f"{r.backwards:.2f}",
        f"{r.fooled:.1%}",
    )


def _plain(row: Row) -> dict[str, Any]:
    """Return the row for JSON, which knows no NaN."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(row).items()}


def _demo_images(n: int) -> tuple[Tensor, Tensor] | None:
    """Return the first n of assay's demonstration images and labels; None where there are none."""
    try:
        import assay
    except ImportError:
        return None
    folder = Path(assay.__file__).parent / "data" / "demo"
    images, labels = (next(folder.glob(f"*{kind}-ubyte.gz"), None) for kind in ("idx3", "idx1"))
    if not images or not labels:
        return None
    pixels = torch.frombuffer(bytearray(gzip.decompress(images.read_bytes())[16:]), dtype=torch.uint8)
    classes = torch.frombuffer(bytearray(gzip.decompress(labels.read_bytes())[8:]), dtype=torch.uint8)
    return pixels.view(-1, 1, 28, 28)[:n].float() / 255, classes[:n].long()


def _predictions(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        guess: Tensor = net(x).argmax(1)
        return guess


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--case", choices=["mnist", "resnet18"], action="append", help="default: both")
    add("--only", action="append", metavar="NAME", help="time this contestant and the bare loop only")
    add("--rounds", type=int, help="default: 21 for mnist, 11 for resnet18")
    add("--weights", type=Path, help="state_dict of the mnist network; default: random weights")
    add("--frozen", action="store_true", help="parameters without requires_grad, for every contestant")
    add("--threads", type=int, default=1)
    add("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the JSON file where one is wanted."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    machine = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "threads": args.threads,
        "cores": os.cpu_count(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    print(", ".join(f"{k} {v}" for k, v in machine.items()))
    chosen = [c for i, c in enumerate(CONTESTANTS) if not (args.only and i) or c.name in args.only]
    result: dict[str, Any] = {"machine": machine, "note": NOTE, "cases": {}}
    for name in args.case or ["mnist", "resnet18"]:
        torch.manual_seed(0)
        task = mnist_case(args.weights) if name == "mnist" else resnet18_case()
        task.net.requires_grad_(not args.frozen)
        rounds = args.rounds or {"mnist": 21, "resnet18": 11}[name]
        rows = measure(task, chosen, rounds)
        print(f"\n{name}: batch {len(task.x)}, {task.steps} steps, {rounds} rounds\n{show(rows)}", flush=True)
        result["cases"][name] = {
            "batch": len(task.x),
            "steps": task.steps,
            "rounds": rounds,
            "contestants": [_plain(r) for r in rows],
        }
    print(f"\n{NOTE}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
