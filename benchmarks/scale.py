"""What it takes to share an evaluation: speed-up here, what the driver does for each part, and 256 workers simulated.

``speedup`` runs the same evaluation in this process and with workers, and compares the tables. ``team`` runs it with
one block at a time and with several side by side, whose questions share calls of the network. ``driver`` measures what
the one process that stores parts does with them. ``cluster`` runs the scheduler that the executors use, on a simulated
clock, over workers that die, come back late, and are slow.

Example:
    OMP_NUM_THREADS=1 python benchmarks/scale.py driver
    OMP_NUM_THREADS=1 python benchmarks/scale.py cluster --workers 64 128 256 512
    OMP_NUM_THREADS=1 python benchmarks/scale.py speedup --executor processes
    OMP_NUM_THREADS=1 python benchmarks/scale.py team --device cuda
"""

import argparse
import heapq
import itertools
import os
import pickle
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import assay
from assay.distributed import Processes, RayExecutor
from assay.distributed.pool import Answered, Died, Event, Ready, drive
from assay.distributed.schedule import Rules
from assay.distributed.worker import attempt, outcome
from assay.evaluation import team
from assay.evaluation.block import Part
from assay.evaluation.manifest import finish
from assay.evaluation.result import Evaluation
from assay.models.line import Line
from assay.runs import Run
from assay.runs.store import packed_arrays

BLOCK = 1024
MB = 1e6


def main() -> None:
    """Run one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("speedup")
    one.add_argument("--executor", choices=["processes", "ray"], default="processes")
    one.add_argument("--limit", type=int, default=8192)
    one.add_argument("--effort", default="quick")
    one.add_argument("--rounds", type=int, default=3)
    one.set_defaults(run=speedup)
    _beside(commands.add_parser("team"))
    two = commands.add_parser("driver")
    two.add_argument("--parts", type=int, default=1250)
    two.add_argument("--shape", type=int, nargs=3, default=[3, 224, 224])
    two.add_argument("--rounds", type=int, default=3)
    two.set_defaults(run=driver)
    three = commands.add_parser("cluster")
    three.add_argument("--workers", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    three.add_argument("--samples", type=int, default=1_281_167)
    three.add_argument("--passes", type=float, default=300.0, help="a sample, on average")
    three.add_argument("--pass-seconds", type=float, default=1e-3, help="of one sample, on a worker")
    three.add_argument("--part-seconds", type=float, default=1.0, help="of the driver, to receive and store a part")
    three.add_argument("--life", type=float, default=4.0, help="mean hours until a worker dies; 0: for ever")
    three.add_argument(
        "--start", type=float, default=180.0, help="seconds until a worker, or its replacement, is ready"
    )
    three.add_argument("--spread", type=float, default=0.25, help="of the logarithm of a block's time")
    three.add_argument("--slow", type=float, default=0.02, help="share of workers that are slow")
    three.add_argument("--slowness", type=float, default=4.0, help="how many times as long those take")
    three.add_argument("--seeds", type=int, default=5)
    three.set_defaults(run=cluster)
    options = parser.parse_args()
    options.run(options)


# Speed-up on this machine.


def _beside(parser: argparse.ArgumentParser) -> None:
    for name, default in {"model": "demo:mnist-robust", "data": "demo:mnist", "threat": "linf:0.3"}.items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--limit", type=int, default=8192)
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--device")
    parser.add_argument("--most", type=int, nargs="+", default=[1, 8], help="blocks at a time")
    parser.set_defaults(run=side_by_side)


def speedup(options: argparse.Namespace) -> None:
    """Evaluate the hardened demo model in this process, with one worker and with two, in turn.

    CPU time tells on a busy machine, too, what would be gained on an idle one; that of Ray's workers is not known here.
    """
    model, data = assay.load_model("demo:mnist-robust"), assay.load_data("demo:mnist", limit=options.limit)
    kind = {"processes": Processes, "ray": RayExecutor}[options.executor]
    ways: dict[str, Any] = {"serial": None, "1 worker": kind(1), "2 workers": kind(2)}
    took: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    tables = {}
    for _ in range(options.rounds):
        for name, executor in ways.items():
            begin, before = time.perf_counter(), _cpu()
            result = assay.evaluate(model, data, "linf:0.3", options.effort, progress=False, executor=executor)
            ours, theirs = (now - then for now, then in zip(_cpu(), before, strict=True))
            took[name].append((time.perf_counter() - begin, ours, theirs))
            tables[name] = result.samples
    same = all(t.equals(tables["serial"]) for t in tables.values())
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {options.limit} samples")
    print(f"tables identical: {same}")
    for name, rounds in took.items():
        wall, ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{name:10} {wall:6.1f} s; CPU: {ours:.1f} s here, {theirs:.1f} s in workers")


def side_by_side(options: argparse.Namespace) -> None:
    """Evaluate with so many blocks at a time, and count the calls of the network and the rows that were asked about."""
    model, data = assay.load_model(options.model), assay.load_data(options.data, limit=options.limit)
    print(f"{options.threat}, {options.effort}, {len(data)} samples, load {os.getloadavg()[0]:.1f}")
    tables, whole = [], Line._call
    for most in options.most:
        rows: list[int] = []

        def counted(line: Line, asked: Any, rows: list[int] = rows) -> Any:
            rows.append(sum(at.stop - at.start for _, at in asked))
            return whole(line, asked)

        with patch.object(team, "_MOST", most), patch.object(Line, "_call", counted):
            begin, before = time.perf_counter(), _cpu()[0]
            result = assay.evaluate(model, data, options.threat, options.effort, progress=False, device=options.device)
            wall, cpu = time.perf_counter() - begin, _cpu()[0] - before
        tables.append(result.samples)
        told = f"{len(rows)} calls of {statistics.mean(rows):.0f} rows, {sum(n <= 16 for n in rows)} of at most 16"
        print(
            f"{most} at a time: {told}; {wall:.0f} s, CPU {cpu:.0f} s; robust {result.robust_accuracy:.4f}", flush=True
        )
    print(f"tables identical: {all(t.equals(tables[0]) for t in tables)}")


def _cpu() -> tuple[float, float]:
    """Return the CPU seconds of this process, and of those of its children that have ended."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    ours, theirs = (u.ru_utime + u.ru_stime for u in usage)
    return ours, theirs


# What the driver does.


def driver(options: argparse.Namespace) -> None:
    """Measure what a part costs whoever packs it, carries it and stores it, and what a run of many parts costs."""
    _show_store(options.parts)
    for share in (0.1, 0.5, 1.0):
        _show_part(share, tuple(options.shape), options.rounds)
    _show_data()
    _show_passes()


def _show_part(share: float, shape: tuple[int, ...], rounds: int) -> None:
    arrays = _pictures(round(BLOCK * share), shape)
    begin = time.process_time()
    content = packed_arrays(arrays)
    pack = time.process_time() - begin
    part = Part(_rows(0), content, {"stages": [], "seconds": 1.0})
    send, sent = _timed(lambda: attempt(lambda _: part, 0), rounds)
    receive, _ = _timed(lambda: outcome(sent), rounds)
    with tempfile.TemporaryDirectory() as folder:
        run, numbers = Run.start(folder, {"identity": {}}), itertools.count()
        store, _ = _timed(lambda: run.add(_rows(next(numbers) * BLOCK), content, part.tally), rounds)
        run.close()
    raw = sum(a.nbytes for a in arrays.values()) / MB
    print(
        f"part with {share:.0%} of {BLOCK} samples {shape} fooled: {raw:.0f} MB, packed {len(content) / MB:.0f} MB; "
        f"worker: pack {pack:.1f} s of CPU, send {send:.2f} s; driver: receive {receive:.3f} s, store {store:.3f} s"
    )


def _pictures(n: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return what a block keeps of n samples: 8-bit pictures with some detail, and points beside them."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand((n, shape[0], shape[1] // 8, shape[2] // 8), generator=draw)
    x = torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bicubic")
    clean = ((x + 0.02 * torch.randn(x.shape, generator=draw)).clamp(0, 1) * 255).round() / 255
    near = (clean + (torch.rand(x.shape, generator=draw) * 2 - 1) * 4 / 255).clamp(0, 1)
    index = torch.arange(n)
    return {"index": index.numpy(), "x": near.numpy(), "clean": clean.numpy(), "label": index.numpy()}


def _rows(first: int) -> dict[str, list[Any]]:
    """Return the rows of a block, as a race writes them."""
    chance = random.Random(first)
    index = [*range(first, first + BLOCK)]
    status = [chance.choice(["robust", "fooled", "misclassified"]) for _ in index]
    size = [{"robust": float("inf"), "fooled": chance.random(), "misclassified": 0.0}[s] for s in status]
    return {
        "index": index,
        "label": [i % 1000 for i in index],
        "prediction": [i % 1000 for i in index],
        "margin": [chance.gauss(1, 1) for _ in index],
        "fooled": [s == "fooled" for s in status],
        "adversarial_prediction": [7 if s == "fooled" else None for s in status],
        "size": size,
        "broken_by": ["margin-15" if s == "fooled" else None for s in status],
        "certified": [None] * BLOCK,
        "lower": [0.0] * BLOCK,
        "upper": size,
        "forwards": [150] * BLOCK,
        "backwards": [150] * BLOCK,
        "status": status,
    }


def _show_store(parts: int) -> None:
    """Measure what reading, adding up and going on with a run of many parts takes; all should grow as their number."""
    small = assay.load_model("demo:mnist-plain"), assay.load_data("demo:mnist", limit=8)
    example = assay.evaluate(*small, "linf:0.1", "quick", progress=False)
    (tally,) = example.run.tallies()
    for count in sorted({parts // 4, parts // 2, parts}):
        with tempfile.TemporaryDirectory() as folder:
            run = Run.start(folder, example.run.manifest)
            add, _ = _timed(lambda r=run, n=count: [r.add(_rows(i * BLOCK), {}, tally) for i in range(n)], 1)
            run.close()
            again, run = _timed(lambda f=folder: Run.start(f, example.run.manifest), 1)
            read, result = _timed(lambda r=run: Evaluation(r), 1)
            end, _ = _timed(lambda r=run, e=result: finish(r, e, complete=True), 1)
            report, page = _timed(lambda e=result: e.report(), 1)
            run.close()
            print(
                f"{count} parts, {count * BLOCK} samples: rows stored at {add / count * 1e3:.1f} ms a part, "
                f"opened in {again:.2f} s, read in {read:.2f} s, added up in {end:.2f} s, report in {report:.1f} s "
                f"({Path(page).stat().st_size / MB:.1f} MB); {_memory():.0f} MB"
            )


def _show_data() -> None:
    """Measure what the checks before an evaluation do for each sample: read it, and hash it."""
    data = assay.load_data("demo:mnist", limit=5000)
    mark, _ = _timed(data.fingerprint, 1)
    print(f"fingerprint: {np.prod(data.shape) * len(data) / MB / mark:.0f} MB/s of what is kept in memory")
    one = pickle.dumps([*range(BLOCK)])
    print(f"a task of {BLOCK} samples: {len(one)} bytes")


def _show_passes() -> None:
    """Measure a forward and a backward pass of one sample on one thread of this machine, verification and all."""
    for name, count in (("demo:mnist-robust", 1024),):
        model, data = assay.load_model(name), assay.load_data("demo:mnist", limit=count)
        result = assay.evaluate(model, data, "linf:0.3", "quick", progress=False)
        passes = result.passes.forwards + result.passes.backwards
        print(f"{name}: {passes / count:.0f} passes a sample, {result.seconds / passes * 1e6:.0f} microseconds each")


def _timed(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Return the least time of some rounds, and what the last returned."""
    least, value = float("inf"), None
    for _ in range(rounds):
        begin = time.perf_counter()
        value = work()
        least = min(least, time.perf_counter() - begin)
    return least, value


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# A cluster on a simulated clock.


@dataclass
class Simulated:
    """A pool of workers that live, die and dawdle on a clock of its own; drives the executors' own scheduler."""

    options: argparse.Namespace
    chance: random.Random
    now: float = 0.0
    coming: list[tuple[float, int, Event]] = field(default_factory=list)
    order: Iterator[int] = field(default_factory=itertools.count)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    dies: dict[int, float] = field(default_factory=dict)
    pace: dict[int, float] = field(default_factory=dict)
    begun: dict[int, tuple[float, int]] = field(default_factory=dict)
    worked: float = 0.0
    died: int = 0
    given: int = 0

    def start(self) -> int:
        worker, ready = next(self.numbers), self.now + self.options.start
        hours = self.options.life
        self.dies[worker] = ready + (self.chance.expovariate(1 / (hours * 3600)) if hours else float("inf"))
        self.pace[worker] = self.options.slowness if self.chance.random() < self.options.slow else 1.0
        self._later(ready, Ready(worker))
        if hours:
            self._later(self.dies[worker], Died(worker, "a simulated end"))
        return worker

    def give(self, worker: int, ticket: int, task: float) -> None:
        end = self.now + task * self.pace[worker]
        self.begun[worker] = self.now, ticket
        self.given += 1
        if end <= self.dies[worker]:
            self._later(end, Answered(worker, ticket, task))

    def wait(self, until: float | None) -> Iterator[Event]:
        if until is not None and (not self.coming or until < self.coming[0][0]):
            self.now = max(self.now, until)
            return
        at, _, event = heapq.heappop(self.coming)
        self.now = max(self.now, at)
        if isinstance(event, Answered | Died) and (work := self.begun.pop(event.worker, None)):
            self.worked += max(0.0, at - work[0])  # it may have died before the driver gave it anything
        self.died += isinstance(event, Died)
        yield event

    def close(self) -> None:
        self.worked += sum(self.now - begin for begin, _ in self.begun.values())
        self.begun.clear()

    def _later(self, at: float, event: Event) -> None:
        heapq.heappush(self.coming, (at, next(self.order), event))


@dataclass(frozen=True)
class Outcome:
    """What came of a simulated run; times in seconds, shares of 1."""

    makespan: float
    ideal: float
    useful: float
    driver: float
    died: int
    twice: int
    machinery: float


def cluster(options: argparse.Namespace) -> None:
    """Print a table: for each number of workers the median of some runs, with and without a second copy."""
    blocks, each = -(-options.samples // BLOCK), BLOCK * options.passes * options.pass_seconds
    print(
        f"{options.samples} samples in {blocks} blocks of {each:.0f} s; the driver takes {options.part_seconds:g} s a "
        f"part, so it is busy all the time from {each / max(options.part_seconds, 1e-9):.0f} workers on"
    )
    columns = "workers", "copies", "hours", "ideal", "efficiency", "useful work", "driver busy", "died", "again"
    print("| " + " | ".join([*columns, "scheduler"]) + " |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for workers in options.workers:
        for rules in (Rules(), Rules(copies=1)):
            _print_row(workers, rules, [_simulate(options, workers, rules, seed) for seed in range(options.seeds)])


def _print_row(workers: int, rules: Rules, runs: Sequence[Outcome]) -> None:
    middle = {name: statistics.median(getattr(r, name) for r in runs) for name in Outcome.__dataclass_fields__}
    copies = "yes" if rules.copies > 1 else "no"
    print(
        f"| {workers} | {copies} | {middle['makespan'] / 3600:.2f} | {middle['ideal'] / 3600:.2f} "
        f"| {middle['ideal'] / middle['makespan']:.0%} | {middle['useful']:.0%} | {middle['driver']:.0%} "
        f"| {middle['died']:.0f} | {middle['twice']:.0f} | {middle['machinery'] * 1e3:.0f} ms |"
    )


def _simulate(options: argparse.Namespace, workers: int, rules: Rules, seed: int) -> Outcome:
    """Run one evaluation; the time that the driver takes for a part passes on the same clock."""
    chance = random.Random(seed)
    blocks, each = -(-options.samples // BLOCK), BLOCK * options.passes * options.pass_seconds
    tasks = [each * chance.lognormvariate(-(options.spread**2) / 2, options.spread) for _ in range(blocks)]
    pool, busy, stored, begin = Simulated(options, chance), 0.0, [], time.process_time()
    for task in drive(pool, iter(tasks), workers, rules, clock=lambda: pool.now):
        stored.append(task)
        pool.now += options.part_seconds
        busy += options.part_seconds
    assert sorted(stored) == sorted(tasks), "every block exactly once"
    needed = sum(tasks)
    return Outcome(
        makespan=pool.now,
        ideal=needed / workers,
        useful=needed / pool.worked,
        driver=busy / pool.now,
        died=pool.died,
        twice=pool.given - blocks,
        machinery=time.process_time() - begin,
    )


if __name__ == "__main__":
    main()
