"""Work that is shared: every task is answered once whatever dies, and results are those of one process."""

import heapq
import itertools
import multiprocessing
import os
import pickle
import signal
import statistics
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import assay
from assay.cli.app import app
from assay.cli.workers import executor_of
from assay.core.errors import ContradictionError, DataError, ModelError, RunError
from assay.core.registry import UsageError
from assay.distributed import Processes
from assay.distributed.pool import Answered, Died, Failed, Ready, drive
from assay.distributed.processes import shares
from assay.distributed.schedule import Schedule
from assay.evaluation import course, reading
from assay.runs import Run


class Stage:
    """A pool of workers on a clock of its own; ``fate`` says what becomes of each task that is given to a worker.

    A fate is a number of seconds and "answer", "fail" or "die"; of a new worker, the same for its beginning.
    """

    def __init__(self, fate, birth=lambda: (1.0, "ready")):
        self.fate, self.birth = fate, birth
        self.now, self.coming, self.order = 0.0, [], itertools.count()
        self.numbers, self.alive, self.busy, self.most, self.given, self.closed = itertools.count(), set(), {}, 0, [], 0

    def start(self):
        worker = next(self.numbers)
        seconds, end = self.birth()
        self.alive.add(worker)
        self._later(seconds, Ready(worker) if end == "ready" else Died(worker, "a bad start"))
        return worker

    def give(self, worker, ticket, task):
        assert worker in self.alive
        assert worker not in self.busy, "a worker has one task at a time"
        self.busy[worker] = ticket
        self.most = max(self.most, len(self.busy))
        self.given.append((worker, ticket))
        seconds, end = self.fate(worker, task)
        ends = {"answer": Answered(worker, ticket, task * 10), "die": Died(worker, "a fall")}
        self._later(seconds, ends.get(end) or Failed(worker, ticket, end))

    def _later(self, seconds, event):
        heapq.heappush(self.coming, (self.now + seconds, next(self.order), event))

    def wait(self, until):
        assert self.coming or until is not None, "nothing will ever happen: the driver waits in vain"
        if not self.coming or (until is not None and until < self.coming[0][0]):
            self.now = max(self.now, until)
            return
        at, _, event = heapq.heappop(self.coming)
        self.now = max(self.now, at)
        self.busy.pop(event.worker, None)
        if isinstance(event, Died):
            self.alive.discard(event.worker)
        yield event

    def close(self):
        self.closed += 1


def play(stage, tasks, workers):
    return [*drive(stage, tasks, workers, clock=lambda: stage.now)]


def steadily(worker, task):
    return 1.0, "answer"


@given(st.integers(0, 30), st.integers(1, 6), st.randoms(use_true_random=False))
def test_every_task_is_answered_exactly_once_whatever_dies(n, workers, chance):
    """Workers answer in any order, die over a task or before they begin, fail, and take a hundred times as long."""
    accidents, pulled = {}, itertools.count()

    def fate(worker, task):
        seconds = chance.choice([1.0, 1.0, 1.2, 100.0])
        end = chance.choice(["answer", "answer", "die", ValueError("now and then")])
        if end != "answer":
            accidents[task, str(end)] = accidents.get((task, str(end)), 0) + 1
        return seconds, "answer" if accidents.get((task, str(end)), 0) > 2 else end

    def birth():
        end = chance.choice(["ready", "ready", "die"])
        accidents["birth"] = accidents.get("birth", 0) + (end == "die")
        return chance.random(), "ready" if accidents["birth"] > 2 else end

    def tasks():
        for task in range(n):
            next(pulled)
            yield task

    stage = Stage(fate, birth=birth)
    answers = []
    for answer in drive(stage, tasks(), workers, clock=lambda: stage.now):
        answers.append(answer)
        taken = next(pulled)
        pulled = itertools.count(taken)
        assert taken <= len(answers) + workers, "tasks are taken when somebody is free for them"
    assert sorted(answers) == [task * 10 for task in range(n)]
    assert stage.most <= workers
    assert stage.closed == 1


def test_what_a_dead_worker_had_is_done_by_the_one_that_takes_its_place():
    stage = Stage(lambda worker, _: (1.0, "die" if worker == 0 else "answer"))
    assert sorted(play(stage, range(4), 2)) == [0, 10, 20, 30]
    assert next(stage.numbers) == 3  # workers 0, 1, and one more


def test_a_straggler_does_not_hold_up_the_rest():
    """Worker 1 takes an hour for what takes others a second: at the end another does it too."""
    stage = Stage(lambda worker, _: (3600.0 if worker == 1 else 1.0, "answer"))
    assert sorted(play(stage, range(8), 2)) == [*range(0, 80, 10)]
    assert stage.now == pytest.approx(1 + 7 + 1)
    assert [ticket for _, ticket in stage.given].count(1) == 2


def test_nothing_is_doubled_while_it_takes_no_longer_than_usual():
    stage = Stage(lambda _, task: (1.0 if task else 1.2, "answer"))
    assert sorted(play(stage, range(5), 2)) == [*range(0, 50, 10)]
    assert len(stage.given) == 5


def test_the_first_answer_counts_and_the_other_is_dropped():
    plan = Schedule(iter(["a", "b"]))
    plan.joined(7)
    plan.joined(8)
    assert [*plan.assign(0.0)] == [(7, 0, "a"), (8, 1, "b")]
    assert plan.answered(8, 1, 1.0)
    assert [*plan.assign(1.0)] == []
    assert plan.due() == 1.25
    assert [*plan.assign(1.25)] == [(8, 0, "a")]
    assert plan.answered(7, 0, 2.0)
    assert plan.over
    assert not plan.answered(8, 0, 2.5)


def test_a_free_worker_gets_its_next_task_before_an_answer_is_handed_on():
    stage = Stage(steadily)
    answers = drive(stage, range(3), 1, clock=lambda: stage.now)
    next(answers)
    assert stage.busy == {0: 1}
    answers.close()
    assert stage.closed == 1


def test_an_exception_that_comes_again_and_again_is_the_task_s_own():
    stage = Stage(lambda _, task: (1.0, ValueError("odd") if task == 2 else "answer"))
    with pytest.raises(ValueError, match="odd"):
        play(stage, range(5), 2)
    assert [ticket for _, ticket in stage.given].count(2) == 3
    assert stage.closed == 1


def test_what_assay_says_of_a_task_is_not_asked_for_again():
    stage = Stage(lambda *_: (1.0, DataError("a picture", "noise", "Look at it.")))
    with pytest.raises(DataError, match="a picture"):
        play(stage, range(1), 1)
    assert len(stage.given) == 1


def test_a_task_that_kills_its_workers_is_named():
    stage = Stage(lambda _, task: (1.0, "die" if task == [4, 5, 6, 7] else "answer"))
    with pytest.raises(RunError, match=r"task 1, samples 4 to 7; found 3 of them died over it, the last by a fall"):
        play(stage, [[0, 1, 2, 3], [4, 5, 6, 7]], 2)


def test_a_long_task_among_workers_that_die_often_is_not_accused():
    """Every worker lives for ten seconds; the last task takes nine, and five workers die over it."""
    lived, mishaps = {}, itertools.count()

    def fate(worker, task):
        left = 10.0 - lived.get(worker, 0.0)
        if task == 59 and next(mishaps) < 5:
            return min(left, 8.5), "die"
        length = 9.0 if task == 59 else 1.0
        lived[worker] = lived.get(worker, 0.0) + length
        return (length, "answer") if length <= left else (left, "die")

    stage = Stage(fate)
    assert sorted(play(stage, range(60), 3)) == [*range(0, 600, 10)]
    assert [ticket for _, ticket in stage.given].count(59) >= 6


def test_workers_that_never_begin_are_given_up():
    stage = Stage(steadily, birth=lambda: (1.0, "die"))
    with pytest.raises(RunError, match="3 in a row ended before, the last by a bad start"):
        play(stage, range(3), 1)


def test_no_more_workers_than_tasks_are_started():
    stage = Stage(steadily)
    assert play(stage, range(2), 64) == [0, 10]
    assert next(stage.numbers) == 2


def test_an_answer_takes_a_fair_share_of_the_time():
    """A hundred tasks of about a second on ten workers, of which one in twenty dies: 10 s were ideal."""
    lengths = itertools.cycle([0.8, 1.0, 1.2])
    died = set()

    def fate(worker, task):
        if task % 20 == 7 and task not in died:
            died.add(task)
            return 0.5, "die"
        return next(lengths), "answer"

    stage = Stage(fate)
    assert len(play(stage, range(100), 10)) == 100
    assert 11 <= stage.now < 14


# Real processes.


@pytest.fixture(scope="module")
def digits():
    return assay.load_model("demo:mnist-robust"), assay.load_data("demo:mnist", limit=36)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(course, "BLOCK", 9)


def run(digits, **options):
    model, data = digits
    return assay.evaluate(model, data, "linf:0.35", "quick", progress=options.pop("progress", False), **options)


def contradict(n):
    error = ContradictionError("sense", "none", "Report it.")
    error.evidence = {"index": torch.tensor(n)}
    raise error


def test_processes_give_the_table_of_one_process_also_when_one_is_killed_in_the_middle(digits, small):
    """And so are all figures but the seconds."""
    whole, killed = run(digits), []

    def kill(snapshot):
        if snapshot.done and not killed:
            victim = multiprocessing.active_children()[0]
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim)

    shared = run(digits, executor=Processes(2), progress=kill)
    assert killed
    assert shared.samples.equals(whole.samples)
    assert shared.passes == whole.passes
    assert shared.robust_accuracy == whole.robust_accuracy
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("assay-worker")]


def test_ctrl_c_keeps_what_is_done_and_frees_the_workers(digits, small, tmp_path):
    """The same run then goes on in this process."""

    def interrupt(snapshot):
        if snapshot.done:
            raise KeyboardInterrupt

    part = run(digits, executor=Processes(2), progress=interrupt, out=tmp_path / "run")
    assert not part.complete
    assert 0 < part.n < 36
    assert not multiprocessing.active_children()
    assert run(digits, out=tmp_path / "run").samples.equals(run(digits).samples)


def test_an_exception_comes_back_with_the_lines_of_the_worker():
    """Also the evidence of a contradiction does."""
    with pytest.raises(ContradictionError) as told:
        [*Processes(1)(contradict, [5])]
    assert told.value.evidence["index"] == 5
    assert "test_executor.py" in told.value.__notes__[0]


def test_a_model_that_cannot_be_sent_is_refused_before_any_work(digits):
    _, data = digits
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    net.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="a model and data that can be sent"):
        assay.evaluate(net, data, "linf:0.1", "quick", progress=False, executor=Processes(2))


def test_a_run_that_may_stop_early_stops_where_one_process_does(digits, monkeypatch):
    """Parts are looked at in the order of their blocks, whichever is done first."""
    monkeypatch.setattr(course, "_SIP", 6)

    def shuffled(work, tasks):
        parts = [work(task) for task in tasks]
        return iter([*parts[1::2], *parts[::2]])

    options = {"until_interval": 0.9}
    whole = run(digits, **options)
    assert 0 < whole.n < 36
    assert run(digits, executor=shuffled, **options).samples.equals(whole.samples)


def test_no_block_is_handed_out_after_the_time_is_over(digits, small):
    def together(work, tasks):
        time.sleep(0.01)
        return map(work, [*tasks])

    result = run(digits, executor=together, max_seconds=0)
    assert result.n == 9
    assert "max-seconds" in result.bounded


def test_large_data_are_checked_where_the_work_is_shared(monkeypatch):
    """What is said is what one process says; of samples that are not as they should be, the same are named."""
    monkeypatch.setattr(reading, "SHARED_FROM", 10)
    monkeypatch.setattr(reading, "_AT_ONCE", 4)
    x, box = torch.rand(11, 1, 4, 4, generator=torch.Generator().manual_seed(0)), assay.Box()
    x[9] = x[2]

    def say(executor):
        try:
            return reading.check_data(assay.load_data((x, torch.zeros(11, dtype=torch.int64))), box, executor)
        except DataError as e:
            return e.expected, e.code, e.found.partition("first")[2] or e.found

    def backwards(work, tasks):
        return map(work, reversed([*tasks]))

    assert say(backwards) == say(None)
    assert [f.code for f in say(backwards)] == ["duplicate-samples"]
    x[[3, 10]] = 1.5
    assert say(backwards) == say(None)
    assert say(backwards)[1] == "input-outside-box"
    x[6] = torch.nan
    assert say(backwards) == say(None)
    assert say(backwards)[1] == "non-finite-input"


@pytest.mark.parametrize(
    "command",
    [
        "attack demo:mnist-plain demo:mnist --with fgsm --threat linf:0.1 --limit 600 --out found",
        pytest.param(
            "certify demo:mnist-plain demo:mnist --threat l2:0.25 --method smoothing --sigma 0.25 --n 50 --limit 1100",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_attack_and_certify_share_their_work(command, tmp_path, monkeypatch):
    tables = []
    for options in ([], ["--workers", "2"]):
        monkeypatch.chdir(tmp_path)
        folder = tmp_path / ("shared" if options else "alone")
        folder.mkdir()
        monkeypatch.chdir(folder)
        result = CliRunner().invoke(app, [*command.split(), "--quiet", *options], catch_exceptions=False)
        assert result.exit_code == 0
        found = folder / "found" / "adversarials.npz"
        tables.append(found.read_bytes() if found.exists() else Run.read(next(folder.glob("runs/*"))).samples())
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("dask", 2, None, None), "an executor out of"),
        (("processes", 2, None, "ray://host:1"), "--address with --executor ray"),
        ((None, 2, 1.0, None), "GPUs to give to workers"),
        ((None, None, None, "ray://host:1"), "--workers with --address"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(asked, said):
    with pytest.raises(UsageError, match=said):
        executor_of(*asked, device="cpu")


def test_options_choose_an_executor():
    assert executor_of(None, None, None, None, "cpu") is None
    assert executor_of(None, 3, None, None, "cpu") == Processes(3)
    assert executor_of(None, 3, None, None, "cuda") == Processes(3, gpus_per_worker=1)
    assert executor_of(None, 3, None, None, "cuda").device == "cuda"
    cluster = executor_of(None, 3, 2, "ray://host:1", "cpu")
    assert (cluster.workers, cluster.gpus_per_worker, cluster.address) == (3, 2, "ray://host:1")
    assert pickle.loads(pickle.dumps(cluster)) == cluster


@given(st.integers(1, 12), st.sampled_from([0.25, 0.5, 1, 2]))
def test_workers_get_gpus_of_their_own(workers, gpus):
    count = max(1, -(-int(workers * gpus * 4) // 4))
    dealt = shares([], count, workers, gpus)
    names = [name for place in dealt for name in place.split(",")]
    assert {len(place.split(",")) for place in dealt} == {max(1, int(gpus))}
    assert max(map(names.count, names)) <= max(1, 1 / gpus)
    assert statistics.mean(map(int, names)) < count
