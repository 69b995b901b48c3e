"""How many queries black-box attacks of assay, torchattacks, Foolbox and ART need to fool a network.

    python benchmarks/black_box.py                                       the demo network, assay alone or all
    python benchmarks/black_box.py --mnist pgd_madry.pth --limit 100     an outside network of its architecture
    python benchmarks/black_box.py --cifar resnet20.th test.parquet      a ResNet-20 (option A) and CIFAR-10 images
    python benchmarks/black_box.py --kinds decision --only rays          some of them

A query is one row that goes through the network. What counts is the first row inside ball and box at which the network
is wrong: a sample's *queries* are those up to it; a sample without such a row within ``--budget`` is a failure, and
counts as infinitely many in the median, and as the whole budget in *mean of all*; *mean* is over the others; *spread*
is the standard deviation of the *mean of all* from seed to seed. Only samples that the network gets right are
attacked. Attacks of assay count at their own door to the model (the first success is verified by one more query, which
is left out), all samples together; the others get one sample at a time and a recorder round the network, which also
ends them: what an attack knows, or makes of what it has seen, does not matter. The ball is meant as a float32 number: a
size may exceed it by a rounding error.

Parameters of the peers are their defaults, except for: what the budget says; and where a comment gives a reason.
Decision attacks are those of ``_black_box_decision.py``. The peers are installed as ``minimal_norm.py`` says.
"""

import argparse
import contextlib
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from _black_box_decision import DECISION, Recorder, SpentError, art_scores
from minimal_norm import Case, chosen, cifar_case, mnist_case
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import assay

MNIST = ("linf:0.35", "l2:3", "l1:20", "l0:12")
CIFAR = ("linf:4/255", "l2:0.5", "l1:8", "l0:24")
CLASSES = 10
ROUNDING = 1e-5
"""By how much a size in float32 may be off, as a share."""

Attack: TypeAlias = Callable[[nn.Module, Tensor, Tensor, int], Any]
"""From the network, one sample (1, *f), its label (1,) and the budget; what it returns is not looked at."""


@dataclass(frozen=True)
class Ours:
    """An attack of assay, by its name in the registry; ``params`` besides those that the budget says."""

    attack: str
    norms: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    per_step: int = 1  # queries
    one_draw: bool = False  # all samples draw the same random numbers, as if they were one batch of an original
    library: str = "assay"


@dataclass(frozen=True)
class Peer:
    """An attack of another library: ``make`` builds it for a norm and an eps."""

    attack: str
    library: str
    norms: tuple[str, ...]
    make: Callable[[str, float], Attack]
    variant: str = ""


class Until(nn.Module):
    """A recorded network that ends an attack at the first success inside the ball."""

    def __init__(self, recorder: Recorder, eps: float) -> None:
        super().__init__()
        self.recorder, self.eps = recorder, eps * (1 + ROUNDING)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, c)."""
        z: Tensor = self.recorder(x)
        if self.recorder.sizes[-1] <= self.eps:
            raise SpentError
        return z

    def queries(self) -> float:
        """Return how many queries there were up to the first success; inf without one."""
        inside = [size <= self.eps for size in self.recorder.sizes]
        return inside.index(True) + 1 if True in inside else math.inf


# --- score attacks of other libraries


@dataclass(frozen=True)
class Setting:
    """What the parameters of an attack follow from."""

    norm: str
    eps: float
    budget: int


Params: TypeAlias = Callable[[Setting], dict[str, Any]]


def torchattacks_attack(name: str, params: Params) -> Callable[[str, float], Attack]:
    """Make an attack of torchattacks."""

    def make(norm: str, eps: float) -> Attack:
        import torchattacks

        def run(net: nn.Module, x: Tensor, y: Tensor, budget: int) -> Any:
            return getattr(torchattacks, name)(net, **params(Setting(norm, eps, budget)))(x, y)

        return run

    return make


def art_attack(name: str, params: Params) -> Callable[[str, float], Attack]:
    """Make an attack of ART; it sees probabilities."""

    def make(norm: str, eps: float) -> Attack:
        from art.attacks import evasion

        def run(net: nn.Module, x: Tensor, y: Tensor, budget: int) -> Any:
            attack = getattr(evasion, name)(art_scores(net, x), **params(Setting(norm, eps, budget)), verbose=False)
            return attack.generate(x.numpy(), np.eye(CLASSES)[y.numpy()])

        return run

    return make


def _ta_square(s: Setting) -> dict[str, Any]:
    # Its seed is 0 for every call: all samples would draw the same windows.
    return {"norm": s.norm.capitalize(), "eps": s.eps, "n_queries": s.budget, "seed": torch.initial_seed()}


def _ta_spsa(s: Setting) -> dict[str, Any]:
    return {"eps": s.eps, "nb_iter": s.budget // 256 + 1}


def _ta_one_pixel(s: Setting) -> dict[str, Any]:
    return {"pixels": int(s.eps), "steps": s.budget // 10}


def _art_square(s: Setting) -> dict[str, Any]:
    return {"norm": {"linf": "inf", "l2": 2}[s.norm], "eps": s.eps, "max_iter": s.budget, "batch_size": 1}


def _art_simba(s: Setting) -> dict[str, Any]:
    # Its defaults are for images of side 224: as many waves and as long a step as ours.
    return {"attack": "dct", "max_iter": s.budget, "epsilon": 0.1 * s.eps, "freq_dim": 14}


def _art_simba_pixel(s: Setting) -> dict[str, Any]:
    return _art_simba(s) | {"attack": "px"}


def _art_zoo(s: Setting) -> dict[str, Any]:
    # Its weight of the loss, 0.001, moves nothing without a search for a better one; it resizes to 32 x 32 only.
    return {"max_iter": s.budget, "initial_const": 10.0, "use_resize": False, "use_importance": False}


def _art_pixel(s: Setting) -> dict[str, Any]:
    return {"th": int(s.eps), "es": 1, "max_iter": s.budget}


SCORE: tuple[Ours | Peer, ...] = (
    Ours("square", ("linf", "l2", "l1")),
    Ours("square", ("linf", "l2", "l1"), {}, "one window a batch", one_draw=True),
    Peer("square", "torchattacks", ("linf", "l2"), torchattacks_attack("Square", _ta_square)),
    Peer("square", "ART", ("linf", "l2"), art_attack("SquareAttack", _art_square)),
    Ours("spsa", ("linf", "l2"), per_step=65),
    Peer("spsa", "torchattacks", ("linf",), torchattacks_attack("SPSA", _ta_spsa)),
    Ours("nes", ("linf", "l2"), per_step=51),
    Ours("bandits", ("linf", "l2")),
    Ours("simba", ("l2",)),
    Ours("simba", ("l2",), {"basis": "pixel"}, "pixel"),
    Peer("simba", "ART", ("l2",), art_attack("SimBA", _art_simba)),
    Peer("simba", "ART", ("l2",), art_attack("SimBA", _art_simba_pixel), "pixel"),
    Ours("zoo", ("l2",)),
    Ours("zoo", ("l2",), {"solver": "newton"}, "newton"),
    Peer("zoo", "ART", ("l2",), art_attack("ZooAttack", _art_zoo)),
    Ours("sparse-rs", ("l0",)),
    Ours("one-pixel", ("l0",)),
    Peer("one-pixel", "torchattacks", ("l0",), torchattacks_attack("OnePixel", _ta_one_pixel)),
    Peer("one-pixel", "ART", ("l0",), art_attack("PixelAttack", _art_pixel)),
)


def _decision() -> Iterator[Ours | Peer]:
    """Yield the decision attacks; they look for the smallest perturbation, so an eps only tells when to stop."""
    for c in DECISION:
        if c.library == "assay":
            yield Ours(c.attack, c.norms)
        else:
            yield Peer(c.attack, c.library, c.norms, lambda norm, _, make=c.make: make(norm))  # type: ignore[misc]


KINDS: dict[str, tuple[Ours | Peer, ...]] = {"score": SCORE, "decision": tuple(_decision())}


# --- measuring


@dataclass(frozen=True)
class Row:
    """What came out: the queries of each sample up to its first success, inf without one, seed after seed."""

    threat: str
    attack: str
    library: str
    queries: tuple[tuple[float, ...], ...]
    budget: int
    seconds: float  # of CPU time
    problem: str = ""

    def cells(self) -> tuple[str, ...]:
        if self.problem:
            return (self.attack, self.library, self.problem, "", "", "", "", "")
        queries = np.array(self.queries)
        found, spent = queries[queries <= self.budget], np.minimum(queries, self.budget)
        middle, failures = float(np.median(queries)), 1 - len(found) / queries.size
        mean = f"{found.mean():.0f}" if len(found) else ""
        spread = f"{spent.mean(1).std(ddof=1):.1f}" if len(queries) > 1 else ""
        median = f"{middle:.0f}" if math.isfinite(middle) else f"> {self.budget}"
        overall = f"{spent.mean():.0f}"
        return (self.attack, self.library, median, mean, overall, spread, f"{failures:.0%}", f"{self.seconds:.0f}")


HEAD = ("attack", "library", "median", "mean", "mean of all", "spread", "failures", "seconds")


def ours(c: Ours, case: Case, threat: assay.Threat, budget: int, seed: int) -> tuple[float, ...]:
    """Attack all samples together; the last pass of each that fell was to verify."""
    attack = assay.attacks.get(c.attack, steps=-(-budget // c.per_step), **c.params)
    x, y = case.x[case.right], case.y[case.right]
    draws = {"indices": torch.zeros(len(x), dtype=torch.int64)} if c.one_draw else {}
    r = attack(assay.Model(case.net), x, y, threat, seed, max_passes=budget + 1, **draws)
    queries = torch.where(r.success, (r.forwards - 1).double(), torch.inf)
    return tuple(queries.tolist())


def theirs(c: Peer, case: Case, threat: assay.Threat, budget: int, seed: int) -> tuple[float, ...]:
    """Attack one sample after the other, each until its first success."""
    assert threat.eps is not None
    attack, found = c.make(threat.norm.name, threat.eps), []
    for i in case.right.nonzero()[:, 0].tolist():
        x, y = case.x[i : i + 1], case.y[i : i + 1]
        net = Until(Recorder(case.net, x, int(y), threat.norm.name, budget), threat.eps)
        word = 100_000 * seed + i
        random.seed(word)
        np.random.seed(word)  # noqa: NPY002  # the global generator is the one that the peers draw from
        torch.manual_seed(word)
        with contextlib.suppress(SpentError):
            attack(net.eval(), x.clone(), y.clone(), budget)
        found.append(net.queries())
    return tuple(found)


def measured(c: Ours | Peer, case: Case, text: str, budget: int, seeds: int) -> Row:
    """Run one attack under the clock, once for each seed."""
    threat, name = assay.Threat.parse(text), f"{c.attack}, {c.variant}" if c.variant else c.attack
    queries: tuple[tuple[float, ...], ...] = ((math.inf,),)
    run: Callable[..., tuple[float, ...]] = ours if isinstance(c, Ours) else theirs
    begun, problem = time.process_time(), ""
    try:
        queries = tuple(run(c, case, threat, budget, seed) for seed in range(seeds))
    except Exception as e:  # a row of the table, whatever it is
        missing = isinstance(e, ModuleNotFoundError)
        problem = f"not installed: {e.name}" if missing else f"{type(e).__name__}: {e}".splitlines()[0][:60]  # type: ignore[attr-defined]
    return Row(text, name, c.library, queries, budget, time.process_time() - begun, problem)


def rows(case: Case, args: argparse.Namespace) -> Iterator[Row]:
    """Yield what is to be measured, threat by threat, one kind of attack after the other."""
    for text in args.threats:
        for c in (c for kind in args.kinds for c in KINDS[kind]):
            wanted = chosen(c.attack, args.only) and chosen(c.library, args.libraries)
            if wanted and text.split(":")[0] in c.norms:
                yield measured(c, case, text, args.budget, args.seeds)


# --- tables


def as_markdown(title: str, found: Sequence[Row]) -> str:
    """Return the rows as a table in Markdown."""
    body = [HEAD, tuple("-" * len(h) for h in HEAD), *(row.cells() for row in found)]
    return "\n".join([f"### {title}", "", *(f"| {' | '.join(c.replace('|', '/') for c in cells)} |" for cells in body)])


def as_table(title: str, found: Sequence[Row]) -> Table:
    """Return the rows as a table for the terminal."""
    table = Table(*HEAD, title=title, title_justify="left")
    for row in found:
        table.add_row(*row.cells(), style="bold" if row.library == "assay" else "")
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mnist", type=Path, metavar="WEIGHTS", help="state dict of the MNIST network; without it the demo network")
    add("--limit", type=int, default=100, help="images")
    add("--cifar", type=Path, nargs=2, metavar=("WEIGHTS", "PARQUET"), help="a ResNet-20 and CIFAR-10 images instead")
    add("--threats", nargs="+", metavar="NORM:EPS", help=f"default: {' '.join(MNIST)}; CIFAR: {' '.join(CIFAR)}")
    add("--budget", type=int, default=2000, help="queries a sample")
    add("--seeds", type=int, default=1, help="runs of each attack; medians and means are over all of them")
    add("--kinds", nargs="+", choices=tuple(KINDS), default=("score",))
    add("--only", nargs="+", metavar="ATTACK", help="these attacks")
    add("--libraries", nargs="+", metavar="NAME", help="assay, torchattacks, Foolbox, ART; default: all")
    add("--markdown", type=Path, metavar="FILE", help="write the tables in Markdown")
    return parser.parse_args()


def main() -> None:
    """Measure, print each row as it comes, then the tables."""
    args = _arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers' warnings about each other's versions
    case = cifar_case(args.cifar[0], args.cifar[1], args.limit) if args.cifar else mnist_case(args.mnist, args.limit)
    args.threats = args.threats or (CIFAR if args.cifar else MNIST)
    found: list[Row] = []
    for row in rows(case, args):
        found.append(row)
        print(row.threat, *row.cells(), sep="\t", flush=True)
    texts = []
    for text in args.threats:
        part = [row for row in found if row.threat == text]
        title = f"{case.name}, {text}: {int(case.right.sum())} samples, at most {args.budget} queries each"
        Console(width=120).print(as_table(title, part))
        texts.append(as_markdown(title, part))
    if args.markdown:
        args.markdown.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
