"""How often a gate cries wolf, and how often it sleeps: the drop that `assay gate --max-drop` sees, over many seeds.

    python benchmarks/gate.py                                       50 seeds of everything, about half an hour
    python benchmarks/gate.py --seeds 5 --limit 200                 a taste of it
    python benchmarks/gate.py --markdown benchmarks/gate.md         the tables

The baseline is the demo network `mnist-robust`, trained a little further on adversarial images, evaluated with seed 0.
It is compared with

- *evaluated again*: the same network, evaluated with another seed: noise of the attacks alone;
- *trained again*: the network from the same recipe with another seed: noise of training and attacks. Such a network may
  really be a little worse, so an alarm is not always a false one;
- *without adversarial images*: the planted regression. The same recipe, steps and seeds, on the clean images.

An alarm is a gate that fails. All runs of a case have one baseline in common, and so its luck: intervals are those of
the rate with this baseline. Where only noise differs, each run is also compared with each other one, in both orders.

Every run is kept under --runs; an interrupted benchmark goes on where it stopped.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import permutations
from pathlib import Path

import torch

import assay
from assay.reports.text import percent, span
from assay.runs import Run, exact_interval
from assay.runs.policy import Policy, hold

START, THREAT = "demo:mnist-robust", "linf:0.3"
TRAINING, VALIDATION = range(2000, 5000), range(1000, 1100)
"""Which images training sees; the first of the data are for evaluation."""

LIMITS = (0.0, 0.01, 0.02)

Build = Callable[[int], assay.Model]


@dataclass(frozen=True)
class Case:
    """A way to get a network from a seed, and what its runs are to be called."""

    name: str
    folder: str
    build: Build
    noise: bool = False


@cache
def trained(seed: int, method: str = "pgd", epochs: int = 1) -> assay.Model:
    """Train the demo network further, 30 steps an epoch."""
    data = assay.load_data("demo:mnist")
    return assay.harden(
        START,
        data.take(TRAINING),
        THREAT,
        method,
        valid=data.take(VALIDATION),
        epochs=epochs,
        seed=seed,
        batch_size=100,
        lr=5e-4,
        schedule="constant",
        select="last",
        valid_steps=1,
        monitor="off",
        progress=False,
    ).model


def cases() -> Iterator[Case]:
    """Return what is compared with the baseline."""
    yield Case("evaluated again", "again", lambda _: trained(0), noise=True)
    yield Case("trained again, 30 steps", "pgd", trained, noise=True)
    for epochs in (1, 2, 4):
        build = partial(trained, method="plain", epochs=epochs)
        yield Case(f"without adversarial images, {30 * epochs} steps", f"plain-{epochs}", build)


def run_of(build: Build, seed: int, folder: Path, limit: int) -> Run:
    """Return the run of a seed, from disk where it is there."""
    if (folder / "manifest.json").exists() and (run := Run.read(folder)).manifest["complete"]:
        return run
    data = assay.load_data("demo:mnist", limit=limit)
    return assay.evaluate(build(seed), data, THREAT, "quick", seed=seed, out=folder, progress=False).run


def row(name: str, pairs: Sequence[tuple[Run, Run]], *, sure: bool = True) -> list[str]:
    """Return how often gates fail, and what the drops were, of pairs of baseline and run; ``sure``: with intervals."""
    drops = sorted(100 * (robust(before) - robust(now)) for before, now in pairs)
    cells = [
        name,
        f"{len(pairs):,}",
        f"{round(sum(drops) / len(drops), 2) + 0.0:+.2f}",
        f"{drops[0]:+.1f} to {drops[-1]:+.1f}",
    ]
    for limit in LIMITS:
        alarms = sum(not hold(Policy(max_drop=limit), now, before).held for before, now in pairs)
        interval = f"; {span(*exact_interval(alarms, len(pairs)))}" if sure else ""
        cells.append(f"{alarms} ({percent(alarms / len(pairs))}{interval})")
    return cells


def robust(run: Run) -> float:
    """Return the robust accuracy of a run."""
    return float(run.manifest["totals"]["robust_accuracy"])


def lines(found: Sequence[Sequence[str]]) -> Iterator[str]:
    """Return a table in Markdown."""
    heads = [
        "",
        "runs",
        "mean drop, points",
        "range",
        *(f"alarms at max-drop {limit:g} (share; 95 % interval)" for limit in LIMITS),
    ]
    yield "| " + " | ".join(heads) + " |"
    yield "|---|" + "---:|" * (len(heads) - 1)
    yield from ("| " + " | ".join(cells) + " |" for cells in found)


def main() -> None:
    """Print the table, row by row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--runs", type=Path, default=Path("runs/gate-benchmark"))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table in Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    home, found = options.runs / str(options.limit), []
    baseline = run_of(trained, 0, home / "baseline", options.limit)
    for case in cases():
        seeds = range(1, options.seeds + 1)
        runs = [run_of(case.build, seed, home / case.folder / str(seed), options.limit) for seed in seeds]
        found.append(row(case.name, [(baseline, run) for run in runs]))
        if case.noise:
            pairs = [*permutations([baseline, *runs], 2)]
            found.append(row(f"{case.name}: each with each", pairs, sure=False))
        print(*map(" | ".join, found[-2 if case.noise else -1 :]), sep="\n", flush=True)
    if options.markdown:
        command = shlex.join(["python", "benchmarks/gate.py", *sys.argv[1:]])
        about = f"{options.limit} images, {THREAT}, effort quick; the baseline is {percent(robust(baseline))} robust."
        head = f"`{command}`\n\n{about}\n\n"
        options.markdown.write_text(head + "\n".join(lines(found)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
