"""How small the perturbations are that attacks of assay, adv-lib, Foolbox, ART and torchattacks find, at equal passes.

    python benchmarks/minimal_norm.py                                            the demo network, assay alone or all
    python benchmarks/minimal_norm.py --mnist pgd_madry.pth                      an outside network of its architecture
    python benchmarks/minimal_norm.py --cifar resnet20.th cifar10-test.parquet   and a ResNet-20 (option A) beside it

Every result of every library is verified here, in one place: a fresh pass of the network, inside the box, its size
measured in float64; a sample without a verified point has size inf. Only samples that the network gets right are
attacked. A pass is one row forward or one row backward; ``passes`` are those really used, counted by a wrapper round
the network, for assay at its own door to the model (the wrapper would also count the rows that fill up a batch).

The *area* is that under robust accuracy against eps, up to the size d_max at which the best attack of all leaves
nothing; *optimality* sets it between the best of all, sample by sample (1), and an attack that finds nothing (0).
Everything in the cache for the same network and samples counts as "all", up to the passes of the table; for *overall*
everything on any budget does. *Others* leaves out of "all" the rows of the same attack, ours and theirs: above 1, it
is better than all other attacks together. *Ratio* is assay's median size over the smallest median of the same attack
elsewhere. *Seconds* are of CPU time, on one thread.

Each row is kept under --cache, so that an interrupted run goes on where it stopped; --redo repeats what it names.

The peers, in an environment of their own beside the one of ``README.md`` (without their dependencies; visdom and
torchvision, which adv-lib imports, are not needed):
    pip install --no-deps adv-lib==0.2.8 torchattacks==3.5.1 foolbox==3.3.4 adversarial-robustness-toolbox==1.20.1
    pip install eagerpy scipy scikit-learn six tqdm requests GitPython packaging setuptools numba
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _minimal_area import Best, best_of, verified_sizes
from _minimal_peers import FEW, MANY, PEERS, Counted, Peer, Task
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import assay
from assay.attacks.combine import Bisect, Targets
from assay.models.demo.nets import mnist_cnn

NORMS = ("linf", "l2", "l1", "l0")
PACKAGES = {"adv-lib": "adv-lib", "Foolbox": "foolbox", "torchattacks": "torchattacks"}
PACKAGES["ART"] = "adversarial-robustness-toolbox"

COST = {"deepfool": 10, "fab": 3, "superdeepfool": 4, "sparsefool": 4, "vfga": 12, "jsma": 3}
"""Passes a step (in each round, where an attack has rounds) of assay's attacks; 2 where nothing is said."""

UNDOING = 1.8
"""Passes a step of ``inward`` in l0, where every fifth step needs no gradient."""

SHORTEST = 8
"""Steps of a round of assay's attacks at least: on small budgets rounds are fewer, not shorter."""


@dataclass(frozen=True)
class Case:
    """A network and the samples it gets right among the first ``n``."""

    name: str
    net: nn.Module
    x: Tensor
    y: Tensor
    right: Tensor  # (n,) bool

    @property
    def digest(self) -> str:
        """Tells this network and these samples from all others."""
        tensors = [*self.net.state_dict().values(), self.x, self.y]
        return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:8]


@dataclass(frozen=True)
class Row:
    """An attack on a case: what was run, and what came out."""

    norm: str
    budget: int
    library: str
    attack: str
    variant: str = ""
    problem: str = ""
    forwards: float = math.nan  # a sample
    backwards: float = math.nan
    cpu: float = math.nan
    wall: float = math.nan

    @property
    def key(self) -> str:
        parts = (self.norm, str(self.budget), self.library, self.attack, self.variant)
        return re.sub(r"[^a-z0-9]+", "-", "_".join(filter(None, parts)).lower().replace("_", "--")).strip("-")

    @property
    def missing(self) -> bool:
        return self.problem.startswith("not installed")


Found = tuple[Row, Tensor]
"""A row and its sizes (n,)."""

Runner = Callable[[Case, Row], tuple[Tensor, float, float]]
"""Returns points (b, *f) for the samples that are right, forwards and backwards a sample."""


# --- the networks


def mnist_case(weights: Path | None, limit: int) -> Case:
    """Return the demo network, or outside weights for its architecture, and MNIST test images."""
    if weights is None:
        net = assay.load_model("demo:mnist-robust").net
        assert isinstance(net, nn.Module)
    else:
        net = mnist_cnn()
        net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return case(weights.stem if weights else "mnist-robust", net, "demo:mnist", limit)


def cifar_case(weights: Path, images: Path, limit: int) -> Case:
    """Return a ResNet-20 with weights of the usual layout, and the first CIFAR-10 images of a file."""
    state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    net = ResNet20()
    net.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    return case(weights.stem, net, str(images), limit)


def case(name: str, net: nn.Module, data: str, limit: int) -> Case:
    """Return a case in which the network is frozen and its right samples are known."""
    net.eval().requires_grad_(False)
    batches = list(assay.load_data(data, limit=limit))
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    return Case(name, net, x, y, net(x).argmax(1) == y)


class ResNet20(nn.Module):
    """The ResNet-20 for 32x32 images, shortcuts without parameters (He et al. 2016, sec. 4.2), inputs in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, 10)."""
        h = torch.relu(self.bn1(self.conv1((x - self.mean) / self.std)))
        out: Tensor = self.linear(self.layer3(self.layer2(self.layer1(h))).mean((2, 3)))
        return out


class Thinned(nn.Module):
    """The shortcut where the width doubles: every other pixel, and channels of zeros on both sides."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.inner, self.outer, self.stride = inner, outer, outer // inner

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (b, outer, h / stride, w / stride)."""
        pad = (self.outer - self.inner) // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, pad, pad))

    def convolution(self) -> nn.Conv2d:
        """Return the same as a convolution with fixed weights."""
        made = nn.Conv2d(self.inner, self.outer, 1, self.stride, bias=False).requires_grad_(False)
        made.weight.zero_()[(self.outer - self.inner) // 2 :][: self.inner, :, 0, 0] = torch.eye(self.inner)
        return made


class Block(nn.Module):
    """Two 3x3 convolutions beside the identity, or, where the width doubles, a thinned and padded one."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.short = Thinned(inner, outer) if outer > inner else nn.Identity()
        self.conv1 = nn.Conv2d(inner, outer, 3, outer // inner, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features after the block."""
        h = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(h + self.short(x))


# --- the attacks


def ours(norm: str) -> dict[tuple[str, str], Callable[[int], Any]]:
    """Return assay's minimal-norm attacks for a norm: name and variant, and how each is made for a budget."""
    names = assay.attacks.names(norm=norm, kind="minimal", access="gradient")
    made: dict[tuple[str, str], Callable[[int], Any]] = {(name, ""): partial(sized, name, norm) for name in names}
    if norm == "l0":
        return made
    made["fab", "targets"] = targeted
    return made | {(f"bisect({name})", ""): partial(bisected, name, norm) for name in ("apgd", "pgd")}


def sized(name: str, norm: str, budget: int) -> Any:
    """Return the attack of that name with the steps that a budget buys, shared out among the rounds it may have."""
    attack = assay.attacks.get(name)
    knobs = {f.name for f in fields(attack)}
    closing = 2 * attack.closing if "closing" in knobs else 0
    # What is left is for the last queries and for verification.
    cost = UNDOING if (name, norm) == ("inward", "l0") else COST.get(name, 2)
    queries = int((budget - 5 - closing) / cost)
    if "starts" in knobs:  # these queries of each walk need no gradient
        free = attack.starts + (attack.undo if norm == "l0" else 0)
        queries = queries * 2 * attack.walk // (2 * attack.walk - free)
    if "rounds" in knobs and attack.rounds > 2 * attack.steps:  # short rounds, each goes on from the last
        return replace(attack, rounds=max(1, queries // attack.steps))
    if "rounds" in knobs:
        steps = max(SHORTEST, queries // attack.rounds)
        return replace(attack, steps=steps, rounds=max(1, min(attack.rounds, queries // steps)))
    return replace(attack, steps=max(1, queries)) if "steps" in knobs else attack


def targeted(budget: int) -> Any:
    """Return FAB toward one class after the other, as adv-lib's: as many as a binary search has rounds."""
    count = FEW if budget < 600 else MANY
    attack = replace(assay.attacks.get("fab"), rivals=1)
    queries = (budget - 3) // count - attack.search - 1  # a clean pass and verification are for all
    return Targets(replace(attack, steps=max(1, queries // 2)), count)


def bisected(name: str, norm: str, budget: int) -> Any:
    """Return a bisection over the radius, its rounds sharing the budget.

    A round ends at its first success, so that rounds half as long again fit; the limit on passes holds all the same.
    """
    rounds = 10
    return Bisect(sized(name, norm, 3 * budget // (2 * rounds)), rounds)


def run_ours(case: Case, row: Row) -> tuple[Tensor, float, float]:
    """Run an attack of assay on the samples that are right."""
    attack = ours(row.norm)[row.attack, row.variant](row.budget)
    x, y = case.x[case.right], case.y[case.right]
    r = attack(assay.Model(case.net), x, y, assay.Threat(row.norm), 0, max_passes=row.budget)
    return r.x, float(r.forwards.double().mean()), float(r.backwards.double().mean())


def runner_of(peer: Peer, seconds: float) -> Runner:
    """Return how a peer's attack is run, for at most that many seconds."""

    def run(case: Case, row: Row) -> tuple[Tensor, float, float]:
        net = Counted(case.net, seconds).eval()
        x, y = case.x[case.right].clone(), case.y[case.right].clone()
        points = torch.as_tensor(peer.run(Task(net, x, y, row.norm, row.budget)))
        return points, net.forwards / len(x), net.backwards / len(x)

    return run


def plan(norm: str, budget: int, args: argparse.Namespace) -> Iterator[tuple[Row, Runner]]:
    """Yield what is to be run for a norm and a budget."""
    rows: list[tuple[Row, Runner]] = [(Row(norm, budget, "assay", *name), run_ours) for name in ours(norm)]
    rows += [
        (Row(norm, budget, p.library, p.attack, p.variant), runner_of(p, args.seconds))
        for p in PEERS
        if norm in p.norms
    ]
    for row, run in rows:
        if chosen(row.library, args.libraries) and chosen(row.attack, args.only):
            yield row, run


def chosen(name: str, wanted: Sequence[str] | None) -> bool:
    """Say whether a name is among those wanted, in any case of letters; None wants all."""
    return wanted is None or name.lower() in {w.lower() for w in wanted}


def measured(case: Case, row: Row, run: Runner) -> Found:
    """Run one attack under the clock and verify what it returns."""
    sizes = torch.where(case.right, torch.inf, 0.0).double()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # the global generator is the one that the peers draw from
    torch.manual_seed(0)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        points, forwards, backwards = run(case, row)
    except Exception as e:  # a row of the table, whatever it is
        return replace(row, problem=_why(e)), sizes
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    right = case.right
    sizes[right] = verified_sizes(case.net, case.x[right], case.y[right], points, row.norm)
    return replace(row, forwards=forwards, backwards=backwards, cpu=cpu, wall=wall), sizes


def _why(e: Exception) -> str:
    if isinstance(e, ModuleNotFoundError):
        return f"not installed: {e.name}"
    return f"{type(e).__name__}: {str(e).strip()}".splitlines()[0][:80]


# --- the cache


def path_of(folder: Path, row: Row) -> Path:
    """Return where a row is kept."""
    return folder / f"{row.key}.npz"


def save(folder: Path, found: Found) -> None:
    """Write a row and its sizes, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{os.getpid()}.part"
    with part.open("wb") as f:
        np.savez(f, sizes=found[1].numpy(), row=json.dumps(asdict(found[0])))
    part.replace(path_of(folder, found[0]))


def load(path: Path) -> Found:
    """Read a row and its sizes."""
    with np.load(path) as f:
        return Row(**json.loads(str(f["row"]))), torch.from_numpy(f["sizes"])


def kept(folder: Path, row: Row, redo: Sequence[str]) -> Found | None:
    """Return what the cache has of a row, unless it is to be done again: by attack, library, or ``errors``."""
    path = path_of(folder, row)
    if chosen(row.attack, redo) or chosen(row.library, redo) or not path.exists():
        return None
    found = load(path)
    return None if found[0].problem and "errors" in redo else found


# --- tables

SHARES = ("optimality", "overall", "others")
HEAD = ("attack", "library", "median", "ratio", "area", *SHARES, "success", "passes", "seconds")


@dataclass(frozen=True)
class Line:
    """A row with its figures: what a table shows."""

    row: Row
    median: float = math.nan
    ratio: float = math.nan  # of assay alone
    area: float = math.nan
    optimality: float = math.nan  # against the best on at most this budget
    overall: float = math.nan  # against the best on any budget
    others: float = math.nan  # against the best of other attacks, on at most this budget
    success: float = math.nan

    def cells(self) -> tuple[str, ...]:
        r = self.row
        name = f"{r.attack}, {r.variant}" if r.variant else r.attack
        if r.problem:
            return (name, r.library, r.problem, *[""] * (len(HEAD) - 3))
        shares = (f"{self.optimality:.3f}", f"{self.overall:.3f}", _number(self.others, ".3f"))
        numbers = (f"{self.median:.4g}", _number(self.ratio, ".3f"), f"{self.area:.4g}", *shares)
        passes = f"{r.forwards + r.backwards:.0f} ({r.forwards:.0f} + {r.backwards:.0f})"
        return (name, r.library, *numbers, f"{self.success:.1%}", passes, f"{r.cpu:.1f}")

    def plain(self) -> dict[str, Any]:
        """Return the line for JSON, which knows neither NaN nor infinity."""
        values = {**asdict(self.row), **{k: v for k, v in asdict(self).items() if k != "row"}}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _number(v: float, form: str) -> str:
    return "" if math.isnan(v) else format(v, form)


def lines_of(found: Sequence[Found], pool: Sequence[Found], overall: Best) -> list[Line]:
    """Return the figures of the rows of one norm and budget, attack by attack, assay first, then by area.

    They are measured against the ``pool``, the rows on at most this budget.
    """
    best, others = best_of([sizes for _, sizes in pool]), best_of_others(pool)
    medians = {row: _median(sizes) for row, sizes in found if not row.problem}
    lines = [
        Line(
            row,
            medians[row],
            _ratio(row, medians),
            best.area(sizes),
            best.optimality(sizes),
            overall.optimality(sizes),
            others[row.attack].optimality(sizes) if row.attack in others else math.nan,
            float(sizes[sizes > 0].isfinite().double().mean()),
        )
        if row in medians
        else Line(row)
        for row, sizes in found
    ]
    return sorted(lines, key=lambda line: (line.row.attack, line.row.library != "assay", line.area))


def best_of_others(pool: Sequence[Found]) -> dict[str, Best]:
    """Return for each attack the best of all rows of other attacks; none where there are no other ones."""
    others = {row.attack: [sizes for other, sizes in pool if other.attack != row.attack] for row, _ in pool}
    return {attack: best_of(sizes) for attack, sizes in others.items() if sizes}


def _median(sizes: Tensor) -> float:
    """Return the median over the samples that were attacked."""
    return float(np.median(sizes[sizes > 0].numpy()))


def _ratio(row: Row, medians: dict[Row, float]) -> float:
    others = [median for other, median in medians.items() if other.attack == row.attack and other.library != "assay"]
    least = min(others, default=math.inf)
    return medians[row] / least if row.library == "assay" and math.isfinite(least) and least > 0 else math.nan


def as_table(title: str, lines: Sequence[Line]) -> Table:
    """Return the lines as a table for the terminal."""
    table = Table(*HEAD, title=title, title_justify="left")
    for line in lines:
        table.add_row(*line.cells(), style="bold" if line.row.library == "assay" else "")
    return table


def as_markdown(title: str, lines: Sequence[Line]) -> str:
    """Return the lines as a table in Markdown."""
    body = [HEAD, tuple("-" * len(h) for h in HEAD), *(line.cells() for line in lines)]
    return "\n".join([f"### {title}", "", *(f"| {' | '.join(c.replace('|', '/') for c in cells)} |" for cells in body)])


# --- the run


def fill(case: Case, folder: Path, args: argparse.Namespace) -> dict[tuple[str, int], list[Found]]:
    """Run what the cache lacks, where that is wanted; return the rows of each norm and budget."""
    done: dict[tuple[str, int], list[Found]] = {}
    for budget in args.budgets:  # small ones first: all attacks are seen early
        for norm in args.norms:
            rows = done.setdefault((norm, budget), [])
            for row, run in plan(norm, budget, args):
                found = kept(folder, row, args.redo)
                if found is None and not args.cached:
                    found = _run(case, folder, row, run)
                rows += [found] if found is not None else []
    return done


def _run(case: Case, folder: Path, row: Row, run: Runner) -> Found:
    found = measured(case, row, run)
    row = found[0]
    if not row.missing:
        save(folder, found)
    what = row.problem or f"median {_median(found[1]):.4g}, {row.forwards + row.backwards:.0f} passes, {row.cpu:.1f} s"
    print(f"{case.name} {row.norm} {row.budget} {row.library} {row.attack} {row.variant}: {what}", flush=True)
    return found


def report(case: Case, folder: Path, done: dict[tuple[str, int], list[Found]]) -> Iterator[tuple[str, list[Line]]]:
    """Yield the title and the lines of each table."""
    cached = [load(path) for path in folder.glob("*.npz")]
    for (norm, budget), found in done.items():
        if not found:
            continue
        every = [(row, sizes) for row, sizes in cached if row.norm == norm] or found
        pool = [(row, sizes) for row, sizes in every if row.budget <= budget]
        best, overall = (best_of([sizes for _, sizes in rows]) for rows in (pool, every))
        title = (
            f"{case.name}, {norm}, {budget} passes: {int(case.right.sum())} samples of {len(case.x)}, "
            f"d_max {best.d_max:.4g}, best area {best.area(best.sizes):.4g}"
        )
        yield title + (f", {best.unknown} never fooled" if best.unknown else ""), lines_of(found, pool, overall)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mnist", type=Path, metavar="WEIGHTS", help="state dict of the MNIST network; without it the demo network")
    add("--cifar", type=Path, nargs=2, metavar=("WEIGHTS", "PARQUET"), help="a ResNet-20 and CIFAR-10 images")
    add("--models", nargs="+", choices=("mnist", "cifar"), default=("mnist", "cifar"))
    add("--limit", type=int, default=200, help="images of each data set")
    add("--norms", nargs="+", choices=NORMS, default=NORMS)
    add("--budgets", nargs="+", type=int, default=(200, 1000, 2000), help="passes a sample")
    add("--libraries", nargs="+", metavar="NAME", help="assay, adv-lib, Foolbox, torchattacks, ART; default: all")
    add("--only", nargs="+", metavar="ATTACK", help="these attacks")
    add("--redo", nargs="+", metavar="NAME", default=(), help="attacks or libraries to run again, or: errors")
    add("--seconds", type=float, default=360, help="the longest that one row of a peer may take")
    add("--cache", type=Path, default=Path("runs/minimal-norm"))
    add("--cached", action="store_true", help="run nothing: the tables of what the cache has")
    add("--markdown", type=Path, metavar="FILE", help="write the tables in Markdown")
    add("--json", type=Path, metavar="FILE", help="write all rows")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, print the tables, and write the files that are wanted."""
    args = _arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers' warnings about each other's versions
    cases = [mnist_case(args.mnist, args.limit)] if "mnist" in args.models else []
    if args.cifar and "cifar" in args.models:
        cases.append(cifar_case(args.cifar[0], args.cifar[1], args.limit))
    texts, everything = [], []
    for each in cases:
        folder = args.cache / f"{each.name}-{len(each.x)}-{each.digest}"
        for title, lines in report(each, folder, fill(each, folder, args)):
            Console(width=150).print(as_table(title, lines))
            texts.append(as_markdown(title, lines))
            everything += [{"model": each.name, "samples": len(each.x), **line.plain()} for line in lines]
    if args.markdown:
        args.markdown.write_text("\n\n".join(texts) + "\n")
    if args.json:
        args.json.write_text(json.dumps({"versions": versions(), "rows": everything}, indent=1, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed."""
    out = {"assay": assay.__version__, "torch": torch.__version__}
    for name, package in PACKAGES.items():
        try:
            out[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


if __name__ == "__main__":
    main()
