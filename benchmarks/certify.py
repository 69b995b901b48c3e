"""What is proven, how fast, and how much stays open between proof and attack.

    python benchmarks/certify.py                                         the demo networks
    python benchmarks/certify.py --mnist pgd_madry.pth --nets mnist      an outside network of their architecture
    python benchmarks/certify.py --cifar resnet20.th cifar10-test.parquet --nets cifar --methods crown --limit 2
    python benchmarks/certify.py --mnist pgd_madry.pth --nets mnist --parts peers    beside auto_LiRPA 0.3
    python benchmarks/certify.py --vnncomp FOLDER --parts vnncomp        properties, their agreed answers (verdicts.csv)
    python benchmarks/certify.py --cached --mnist ... --out certify.md   the tables of what the cache has

``share``: at each eps, what each method proves, what an attack (``standard``) leaves standing, and what is open between
them. ``alpha`` and ``complete`` are asked about what the attack left standing, ``complete`` for --seconds a sample.
``bracket``: radii, by bisection up to a quarter beyond the smallest perturbation found (``inward``), --seconds a sample
in all; the ratio is the mean of the proven radii over the mean of those perturbations.
``peers``: each method alone on all margins of --few samples, for two arithmetics, beside auto_LiRPA.

Each answer is kept under --cache, so that an interrupted run goes on where it stopped; tables show as many of the
first samples as every answer is known for. Seconds are of CPU time on one thread; a limit is one of wall time.
"""

import argparse
import copy
import csv
import hashlib
import json
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import torch
from _auto_lirpa import Bounded
from minimal_norm import ResNet20, Thinned, cifar_case
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import assay
from assay.certification import METHODS, Proof
from assay.certification.bounds import Bounds
from assay.certification.methods import refine
from assay.certification.prover import Prover, differences
from assay.certification.radius import BEYOND
from assay.certification.region import Region
from assay.certification.skeleton import best_of, express, fold
from assay.certification.vnnlib import verify_file
from assay.models.demo.nets import mnist_cnn

DEMOS = ("mnist-plain", "mnist-robust", "mnist-certified")
EPS = {"cifar": (0.01 / 255, 0.02 / 255)}
USUAL = (0.1, 0.2, 0.3)
LIMITS = {"mnist-certified": 1000}
TOGETHER = {"cifar": 1}
"""Samples, at most, that are asked about together."""

PEER = "auto_LiRPA"
SEARCHED = ("alpha", "complete")
"""Methods that take one sample after the other."""

Solve: TypeAlias = Callable[[Tensor], Tensor]
"""From the numbers of samples (k,) to a value for each (k,)."""


@dataclass(frozen=True)
class Task:
    """One question about every sample; ``method`` is one of proof, an effort or an attack."""

    part: str  # attack, share, upper, lower, peers
    method: str
    eps: float = 0.0
    by: str = "float32"  # an arithmetic, or a library
    limit: float = 0.0  # seconds a sample; 0 for none

    @property
    def file(self) -> str:
        limit = f"-{self.limit:g}s" if self.limit else ""
        return f"{self.part}-{self.method}-{self.eps:.6g}-{self.by}{limit}.jsonl"

    @property
    def label(self) -> str:
        return f"{self.method}, {self.limit:g} s" if self.limit else self.method

    @property
    def together(self) -> int:
        """Samples that are asked about together, before what was found is kept."""
        if self.part in ("attack", "upper"):
            return 1000
        return (
            {"share": 1, "lower": 4, "peers": 1}[self.part] if self.method in SEARCHED or self.part == "peers" else 20
        )


@dataclass(frozen=True)
class Found:
    """The answer for one sample: a margin, a size, a radius, 1 where an attack failed; and seconds, CPU and wall."""

    index: int
    value: float
    seconds: float
    wall: float


@dataclass(frozen=True)
class Case:
    """A network, and the samples x (n, *f), y (n,) that it is asked about."""

    kind: str
    name: str
    model: assay.Model
    x: Tensor
    y: Tensor
    cache: Path
    seconds: float  # for a search

    @property
    def net(self) -> nn.Module:
        assert isinstance(self.model.net, nn.Module)
        return self.model.net

    @cached_property
    def folder(self) -> Path:
        """Tells this network and its samples from all others."""
        parts = [*self.net.state_dict().values(), self.x[0]]
        digest = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in parts)).hexdigest()
        return self.cache / f"{self.name}-{digest[:8]}"

    @cached_property
    def right(self) -> set[int]:
        with torch.no_grad():
            hits = torch.cat([self.net(x).argmax(1) == y for x, y in zip(*self._parts(), strict=True)])
        return {*hits.nonzero()[:, 0].tolist()}

    def _parts(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return self.x.split(100), self.y.split(100)  # type: ignore[no-untyped-call]

    def proof(self, part: str, method: str, eps: float = 0.0) -> Task:
        return Task(part, method, eps, limit=self.seconds if method == "complete" else 0.0)

    def known(self, task: Task) -> dict[int, Found]:
        """Return what is kept about a task, by sample."""
        path = self.folder / task.file
        lines = path.read_text().splitlines() if path.exists() else []
        return {f.index: f for f in (Found(**json.loads(line)) for line in lines) if f.index < len(self.x)}

    def wanted(self, task: Task) -> list[int]:
        """Return the samples that a task is about: the right ones, for slow proofs those that no attack fooled."""
        if task.part in ("attack", "upper"):
            return [*range(len(self.x))]
        if task.part == "share" and task.method in SEARCHED:
            return sorted(self.standing(task.eps))
        return sorted(self.right)

    def standing(self, eps: float) -> set[int]:
        return {i for i, f in self.known(Task("attack", "standard", eps)).items() if f.value > 0}

    def reach(self, task: Task) -> int:
        """Return of how many of the first samples everything is known that the task is about."""
        known = self.known(task)
        if not known:
            return 0
        return next((i for i in self.wanted(task) if i not in known), len(self.x))


# --- the networks


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield the networks that are asked for."""
    for kind in args.nets or [*DEMOS, *(k for k in ("mnist", "cifar") if getattr(args, k))]:
        name, model, source = network(kind, args)
        data = assay.load_data(source, limit=args.limit or LIMITS.get(kind, 100))
        x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        yield Case(kind, name, model, x, y, args.cache, args.seconds)


def network(kind: str, args: argparse.Namespace) -> tuple[str, assay.Model, str]:
    """Return a network, its name, and where its samples are."""
    if kind == "mnist":
        return args.mnist.stem, assay.load_model(str(args.mnist), arch=mnist_cnn), "demo:mnist"
    if kind == "cifar":
        weights, images = args.cifar
        return "resnet20", assay.Model(cifar_case(weights, images, 1).net), str(images)
    return kind, assay.load_model(f"demo:{kind}"), "demo:mnist"


# --- what is asked


def attack(case: Case, task: Task) -> Solve:
    """Return what says which samples an evaluation leaves standing."""

    def solve(rows: Tensor) -> Tensor:
        e = assay.evaluate(case.model, (case.x[rows], case.y[rows]), f"linf:{task.eps!r}", "standard")
        return torch.tensor([status == "robust" for status in e.samples["status"].to_pylist()], dtype=torch.float64)

    return solve


def share(case: Case, task: Task) -> Solve:
    """Return what finds the smallest margin, by a method and those before it."""
    prover = Proof(task.method, case.seconds, task.by).prover(case.model, tuple(case.x.shape[1:]), None)

    def solve(rows: Tensor) -> Tensor:
        radius = torch.full((len(rows),), task.eps, dtype=torch.float64)
        margins: Tensor = prover.margins(case.x[rows], case.y[rows], radius, "linf")
        return margins.amin(1)

    return solve


def upper(case: Case, task: Task) -> Solve:
    """Return what finds small perturbations that fool."""

    def solve(rows: Tensor) -> Tensor:
        given = case.model, case.x[rows], case.y[rows]
        sizes: Tensor = assay.bracket(*given, method="ibp", attack=task.method, steps=1).upper
        return sizes

    return solve


def lower(case: Case, task: Task) -> Solve:
    """Return what finds how far a proof reaches."""
    known = case.known(Task("upper", "inward"))

    def solve(rows: Tensor) -> Tensor:
        most = BEYOND * torch.tensor([known[i].value for i in rows.tolist()], dtype=torch.float64)
        given = case.model, case.x[rows], case.y[rows], "linf", task.method, most
        radius: Tensor = assay.certified_radius(*given, seconds=case.seconds, arithmetic=task.by)
        return radius

    return solve


def peers(case: Case, task: Task) -> Solve:
    """Return what finds the mean margin of a sample against the other classes, by one method alone."""
    rival = Bounded(plainer(case.net), case.x[:1]) if task.by == PEER else None
    arithmetic = "float32" if rival else task.by
    prover = Proof(task.method, case.seconds, arithmetic).prover(case.model, tuple(case.x.shape[1:]), None)

    def solve(rows: Tensor) -> Tensor:
        x, y = case.x[rows], case.y[rows]
        c = differences(y, prover.exact.classes)
        c = c[:, c[0, :, 0].any(1)]  # not the label against itself
        found = rival.margins(x, task.eps, c[:, :, 0].float(), task.method) if rival else alone(prover, x, c, task)
        return found.double().mean(1)

    solve(torch.zeros(1, dtype=torch.long))  # at first, both set something up
    return solve


@torch.no_grad()
def alone(prover: Prover, x: Tensor, c: Tensor, task: Task) -> Tensor:
    """Return lower bounds (1, s) of c (1, s, 1, classes) @ logits by one method: none is skipped, none tried before."""
    graph, box, ascent = prover.exact, prover.model.domain, prover.ascent
    region = Region.ball(x, torch.full((1,), task.eps, dtype=torch.float64), "linf", box.lo, box.hi)
    bounds = Bounds.by_intervals(graph, region, prover.arithmetic)
    if task.method == "ibp":
        return bounds.lower(graph.out, c, since=graph.out)
    if task.method == "crown-ibp":
        return bounds.lower(graph.out, c)
    refine(bounds, quick=prover.quick)
    if task.method == "crown":
        return bounds.lower(graph.out, c)
    skeleton = fold(bounds, ascent.steps, ascent.rate)
    rows = express(bounds, skeleton.layers, graph.out, c)
    return best_of(skeleton, rows, 2 * ascent.steps, ascent.rate)[0][None]


SOLVE: Mapping[str, Callable[[Case, Task], Solve]] = {
    "attack": attack,
    "share": share,
    "upper": upper,
    "lower": lower,
    "peers": peers,
}


def tasks(case: Case, args: argparse.Namespace) -> Iterator[Task]:
    """Yield what is asked about a network, in order."""
    sizes = args.eps or EPS.get(case.kind, USUAL)
    if "share" in args.parts:
        yield from (Task("attack", "standard", eps) for eps in sizes)
        yield from (case.proof("share", method, eps) for eps, method in product(sizes, args.methods))
    if "bracket" in args.parts:
        yield Task("upper", "inward")
        yield from (case.proof("lower", method) for method in args.methods)
    if "peers" in args.parts:
        alone = [m for m in args.methods if m != "complete"]
        yield from (Task("peers", *each) for each in product(alone, sizes, ("float32", "real", PEER)))


def plainer(net: nn.Module) -> nn.Module:
    """Return the same function in layers that the peer can follow.

    A ResNet-20 gets convolutions in the place of padded shortcuts, and of the normalisation of its inputs.
    """
    net = copy.deepcopy(net)
    for block in net.modules():
        for name, part in [*block.named_children()]:
            if isinstance(part, Thinned):
                setattr(block, name, part.convolution())
    if not isinstance(net, ResNet20):
        return net
    first = nn.Conv2d(3, 3, 1)
    first.weight.data = torch.diag(1 / net.std.flatten())[:, :, None, None]
    first.bias = nn.Parameter(-(net.mean / net.std).flatten())
    stages = net.conv1, net.bn1, nn.ReLU(), net.layer1, net.layer2, net.layer3
    return nn.Sequential(first, *stages, nn.AvgPool2d(8), nn.Flatten(), net.linear).eval().requires_grad_(False)


def fill(case: Case, task: Task, few: int) -> None:
    """Ask about the samples that the cache lacks, and keep each answer."""
    known = case.known(task)
    wanted = case.wanted(task)[: few if task.part == "peers" else None]
    missing = torch.tensor([i for i in wanted if i not in known], dtype=torch.long)
    if not len(missing):
        return
    case.folder.mkdir(parents=True, exist_ok=True)
    solve = SOLVE[task.part](case, task)
    for rows in missing.split(min(task.together, TOGETHER.get(case.kind, 1000))):  # type: ignore[no-untyped-call]
        begin, start = time.process_time(), time.perf_counter()
        values = solve(rows)
        spent = (time.process_time() - begin) / len(rows), (time.perf_counter() - start) / len(rows)
        found = [Found(i, v, *spent) for i, v in zip(rows.tolist(), values.tolist(), strict=True)]
        with (case.folder / task.file).open("a") as journal:
            journal.write("".join(json.dumps(asdict(f)) + "\n" for f in found))
        print(f"{case.name} {task.file}: {rows[-1]} {values.tolist()[-1]:.4f} {spent[1]:.1f} s", flush=True)


# --- properties of the competition


def properties(folder: Path, cache: Path, seconds: float) -> None:
    """Answer the properties that the cache lacks."""
    cache.mkdir(parents=True, exist_ok=True)
    (net,) = folder.glob("*.onnx")
    known = {a["property"] for a in answers(folder, cache)}
    for name in [row["property"] for row in agreed(folder) if row["property"] not in known]:
        found = next(folder.glob(f"{name}*"))
        begin = time.process_time()
        v = verify_file(net, found, seconds)
        line = {"property": name, "answer": v.answer, "seconds": time.process_time() - begin, "wall": v.seconds}
        with (cache / f"vnncomp-{folder.name}.jsonl").open("a") as journal:
            journal.write(json.dumps(line) + "\n")
        print(line, flush=True)


def agreed(folder: Path) -> list[dict[str, str]]:
    """Return the properties of a folder, each with the verdict of the competition."""
    with (folder / "verdicts.csv").open() as file:
        return [*csv.DictReader(file)]


def answers(folder: Path, cache: Path) -> list[dict[str, Any]]:
    """Return what is kept about the properties of a folder."""
    path = cache / f"vnncomp-{folder.name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- tables

Body: TypeAlias = tuple[str, Sequence[str], list[tuple[str, ...]]]
"""Title, head, lines."""

SHARE = ("eps", "method", "images", "proven", "robust", "open", "s a sample", "s in all", "wall s in all")
BRACKET = ("method", "images", "mean lower", "mean upper", "ratio", "s a sample", "wall s a sample")
PEERS = (
    "eps",
    "method",
    "images",
    "mean margin, float32",
    "real",
    PEER,
    "s, float32",
    "s, real",
    f"s, {PEER}",
    "time ratio",
)
PROPERTIES = ("property", "answer", "agreed", "s", "wall s")


def shares(case: Case, sizes: Sequence[float]) -> Iterator[tuple[str, ...]]:
    """Yield a line for each eps and method that something is known of."""
    for eps, method in product(sizes, METHODS):
        task, attacked = case.proof("share", method, eps), Task("attack", "standard", eps)
        n = min(case.reach(task), case.reach(attacked))
        if n:
            known, asked = case.known(task), {i for i in case.wanted(task) if i < n}
            proven = {i for i, f in known.items() if i < n and f.value > 0}
            standing = {i for i in case.standing(eps) if i < n}
            if not proven <= standing:
                raise SystemExit(f"{case.name}, {task}: proven and fooled: {sorted(proven - standing)}")
            parts = [f"{len(s) / n:.1%}" for s in (proven, standing, standing - proven)]
            cpu, wall = (sum(getattr(known[i], k) for i in asked) for k in ("seconds", "wall"))
            each = f"{cpu / len(asked):.3g}" if asked else ""
            yield size(eps), task.label, str(n), *parts, each, f"{cpu:.1f}", f"{wall:.1f}"


def size(eps: float) -> str:
    """Write an eps, a small one in steps of a byte."""
    return f"{eps:g}" if eps > 1 / 255 else f"{eps * 255:g}/255"


def brackets(case: Case) -> Iterator[tuple[str, ...]]:
    """Yield a line for each method whose radii are known."""
    top = case.known(Task("upper", "inward"))
    for method in METHODS:
        task = case.proof("lower", method)
        n = min(case.reach(task), len(top))
        if n:
            found = [f for i, f in case.known(task).items() if i < n]
            above = [i for i, f in ((f.index, f) for f in found) if f.value >= top[i].value]
            if above:
                raise SystemExit(f"{case.name}, {task}: proven beyond what fools: {above}")
            low, high = sum(f.value for f in found) / n, sum(top[i].value for i in range(n)) / n
            spent = (f"{sum(getattr(f, k) for f in found) / len(found):.3g}" for k in ("seconds", "wall"))
            yield task.label, str(n), f"{low:.4f}", f"{high:.4f}", f"{low / high:.3f}", *spent


def rivals(case: Case, sizes: Sequence[float]) -> Iterator[tuple[str, ...]]:
    """Yield a line for each method and eps that all three are known of."""
    for eps, method in product(sizes, METHODS):
        known = [case.known(Task("peers", method, eps, by)) for by in ("float32", "real", PEER)]
        both = {*known[0]} & {*known[1]} & {*known[2]}
        if both:
            values = [sum(k[i].value for i in both) / len(both) for k in known]
            spent = [sum(k[i].seconds for i in both) / len(both) for k in known]
            written = [f"{v:.4f}" for v in values], [f"{s:.3g}" for s in spent]
            yield size(eps), method, str(len(both)), *written[0], *written[1], f"{spent[0] / spent[2]:.3g}"


def tables(case: Case, args: argparse.Namespace) -> Iterator[Body]:
    """Yield the tables of a network that have lines."""
    sizes = args.eps or EPS.get(case.kind, USUAL)
    found = (
        (f"{case.name}: proven, robust, open", SHARE, shares(case, sizes)),
        (f"{case.name}: brackets, linf", BRACKET, brackets(case)),
        (f"{case.name}: each method alone, beside {PEER}", PEERS, rivals(case, sizes)),
    )
    for title, head, lines in found:
        if body := [*lines]:
            yield title, head, body


def solved(folder: Path, cache: Path) -> Body:
    """Return the table of the properties."""
    verdicts = {row["property"]: row["verdict"] for row in agreed(folder)}
    known = answers(folder, cache)
    done = [a for a in known if a["answer"] != "unknown"]
    wrong = sum(a["answer"] != verdicts[a["property"]] for a in done)
    body: list[tuple[str, ...]] = [
        (a["property"], a["answer"], verdicts[a["property"]], f"{a['seconds']:.1f}", f"{a['wall']:.1f}") for a in known
    ]
    return f"{folder.name}: {len(done)} of {len(verdicts)} solved, {wrong} wrong", PROPERTIES, body


def show(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Print a table, and return it in Markdown."""
    table = Table(*head, title=title, title_justify="left")
    for line in body:
        table.add_row(*line)
    Console(width=150).print(table)
    lines = (head, ["-" * len(h) for h in head], *body)
    return "\n".join([f"### {title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def note(cache: Path) -> None:
    """Keep the command, each path as its last part."""
    words = [Path(word).name if os.sep in word and not word[0].isdigit() else word for word in sys.argv[1:]]
    path = cache / "commands.txt"
    cache.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"python benchmarks/certify.py {shlex.join(words)}\n")


def page(texts: Sequence[str], cache: Path) -> str:
    """Return the page of tables, with what ran and where."""
    path = cache / "commands.txt"
    commands = dict.fromkeys(path.read_text().splitlines()) if path.exists() else ()
    where = f"{os.cpu_count()} cores ({platform.machine()}), one thread a process"
    versions = f"assay {assay.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    head = f"{versions}; {where}; {time.strftime('%d %B %Y')}. How to read it: [README.md](README.md)."
    ran = "What ran, in the order of its beginning:\n\n" + "\n".join(["```sh", *commands, "```"])
    return "\n\n".join(["# Tables of certify.py", head, ran, *texts]) + "\n"


def fraction(text: str) -> float:
    """Read a number, or a quotient of two."""
    top, *below = map(float, text.split("/"))
    return top / below[0] if below else top


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mnist", type=Path, metavar="WEIGHTS", help="state dict of a network of the demos' architecture")
    add("--cifar", type=Path, nargs=2, metavar=("WEIGHTS", "DATA"), help="a ResNet-20 and CIFAR-10 images")
    add("--vnncomp", type=Path, nargs="*", default=(), metavar="FOLDER", help="one network, properties, verdicts.csv")
    add("--nets", nargs="+", choices=[*DEMOS, "mnist", "cifar"], help="default: the demos and whose files are given")
    add("--parts", nargs="+", choices=("share", "bracket", "peers", "vnncomp"), default=("share", "bracket"))
    add("--eps", nargs="+", type=fraction, help="default: 0.1, 0.2, 0.3; CIFAR-10: 0.01/255, 0.02/255")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--limit", type=int, help=f"samples; default: 100, {LIMITS}")
    add("--few", type=int, default=10, help="samples beside the peer")
    add("--seconds", type=float, default=30.0, help="for ``complete``: wall time a sample")
    add("--timeout", type=float, default=60.0, help="for a property: wall time")
    add("--cache", type=Path, default=Path("runs/certify"))
    add("--cached", action="store_true", help="run nothing: the tables of what the cache has")
    add("--out", type=Path, metavar="FILE", help="write the tables in Markdown")
    args = parser.parse_args()
    if absent := [k for k in ("mnist", "cifar") if k in (args.nets or ()) and not getattr(args, k)]:
        parser.error(f"--nets {absent[0]} needs --{absent[0]}")
    return args


def main() -> None:
    """Run what is missing, print the tables, and write the file that is wanted."""
    args = _arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the peer
    if not args.cached:
        note(args.cache)
    texts = []
    for case in cases(args) if {*args.parts} - {"vnncomp"} else ():
        for task in () if args.cached else tasks(case, args):
            fill(case, task, args.few)
        texts += [show(*table) for table in tables(case, args)]
    for folder in args.vnncomp:
        if not args.cached:
            properties(folder, args.cache, args.timeout)
        texts.append(show(*solved(folder, args.cache)))
    if args.out:
        args.out.write_text(page(texts, args.cache))


if __name__ == "__main__":
    main()
