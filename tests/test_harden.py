"""The training loop: resumed trainings end with the same bits, the best weights are kept, trouble is noticed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import assay
from assay.core.errors import DataError, MissingExtraError, ModelError, RunError, ThreatError
from assay.core.registry import UsageError
from assay.data import Data, load_data
from assay.hardening import OBJECTIVES, BrokenDefence, Settings, recipe
from assay.hardening.harden import split_settings
from assay.hardening.source import Batch, Source, split_off
from assay.hardening.watch import Validation, catastrophic, validate
from test_objectives import Centred, temptation

pytest.importorskip("lightning_fabric")


def blobs(n: int = 240, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images (n, 1, 4, 4): each class is bright in columns of its own."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = 0.3 + 0.1 * torch.randn(n, 1, 4, 4, generator=g)
    x[torch.arange(n), 0, :, y] += 0.35
    return x.clamp(0, 1), y


def small(seed: int = 0) -> nn.Sequential:
    """A net with everything that has a state: convolution, batch norm, dropout."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(128, 3),
        )


FAST = {"batch_size": 32, "valid_steps": 3, "progress": False, "steps": 2}


def weights(net: nn.Module) -> bytes:
    return b"".join(v.numpy().tobytes() for v in net.state_dict().values())


# --------------------------------------------------------------------------------------------------- what it brings


def test_adversarial_training_raises_robust_accuracy_by_the_verdict() -> None:
    net, (x, y) = small(), blobs()
    test = blobs(90, seed=1)
    plain = assay.harden(net, (x, y), "linf:0.15", "plain", epochs=8, batch_size=32, valid_steps=3, progress=False)
    robust = assay.harden(net, (x, y), "linf:0.15", "pgd", epochs=8, **FAST)
    before, after = (
        assay.evaluate(h.model, test, "linf:0.15", effort="quick", progress=False).robust_accuracy
        for h in (plain, robust)
    )
    assert after > before + 0.1


def test_the_network_given_is_left_as_it_is() -> None:
    net = small().train()
    mark, state = weights(net), torch.get_rng_state()
    hardened = assay.harden(net, blobs(), "linf:0.1", epochs=1, **FAST)
    assert weights(net) == mark
    assert net.training
    assert hardened.net is not net
    assert not hardened.net.training
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are not touched"


def test_normalisation_belongs_to_the_model_and_stays_with_it() -> None:
    model = assay.Model(small(), mean=0.3, std=0.2)
    hardened = assay.harden(model, blobs(), "linf:0.1", epochs=3, **FAST)
    assert (hardened.model.mean, hardened.model.std) == (0.3, 0.2)
    x, y = blobs(60, seed=2)
    right = (hardened.model(x).argmax(1) == y).float().mean()
    assert right > 0.8, "it was trained on normalised inputs, and is asked about them"


def test_history_has_a_row_for_each_validation_with_its_cost() -> None:
    h = assay.harden(small(), blobs(), "linf:0.1", epochs=2, checks=2, **FAST)
    rows = h.history.to_pylist()
    assert [r["epoch"] for r in rows] == [4 / 7, 1, 1 + 4 / 7, 2]
    n = 7 * 32
    assert h.forwards == 2 * n * 3, "two steps of the attack and one of learning, for each sample and epoch"
    assert h.backwards == h.forwards
    assert all(r["clean"] >= r["pgd"] for r in rows)


def test_parameters_that_are_frozen_stay_as_they_are(tmp_path: Path) -> None:
    net, out = small(), tmp_path / "net.safetensors"
    net[0].requires_grad_(False)
    hardened = assay.harden(net, blobs(), "linf:0.1", epochs=1, out=out, **FAST)
    assert torch.equal(hardened.net[0].weight, net[0].weight)
    assert not torch.equal(hardened.net[5].weight, net[5].weight)
    assert [p.requires_grad for p in hardened.net.parameters()] == [p.requires_grad for p in net.parameters()]
    net[1].requires_grad_(False)
    with pytest.raises(RunError, match="frozen was"):
        assay.harden(net, blobs(), "linf:0.1", epochs=1, out=out, **FAST)


def test_a_network_that_is_frozen_as_a_whole_as_one_from_a_file_is_trained() -> None:
    net = small().requires_grad_(False)
    hardened = assay.harden(net, blobs(), "linf:0.1", epochs=1, **FAST)
    assert not torch.equal(hardened.net[0].weight, net[0].weight)
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_averaged_weights_are_what_is_kept(average: str) -> None:
    how = {**FAST, "average": average, "swa_from": 0.3, "select": "last"}
    mean = assay.harden(small(), blobs(), "linf:0.1", epochs=3, **how)
    last = assay.harden(small(), blobs(), "linf:0.1", epochs=3, **(how | {"average": "none"}))
    assert weights(mean.net) != weights(last.net)
    x, y = blobs(60, seed=2)
    assert (mean.model(x).argmax(1) == y).float().mean() > 0.6


def test_the_best_validation_is_kept_unless_the_last_is_wanted() -> None:
    how = {**FAST, "lr": 1.0, "optimiser": "sgd", "schedule": "constant", "checks": 4}
    data = load_data(blobs())
    train, valid = split_off(data)
    for select, wanted in (("robust", max), ("last", lambda accuracies: accuracies[-1])):
        h = assay.harden(small(), train, "linf:0.15", valid=valid, epochs=3, select=select, **how)
        accuracies = h.history["pgd"].to_pylist()
        assert max(accuracies) > accuracies[-1], "a case where it matters"
        found = validate(h.net, valid, assay.Threat("linf", 0.15, (0, 1)), 3, seed=0)
        assert found.pgd == wanted(accuracies)


# -------------------------------------------------------------------------------------------------- exact resumption


@pytest.mark.filterwarnings("ignore::assay.hardening.BrokenDefence")
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("pgd", {"average": "ema", "augment": "flip,crop:1", "awp": 0.005, "checks": 2}),
        ("free", {"optimiser": "sgd", "lr": 0.05}),
        ("trades", {"average": "swa", "swa_from": 0.2, "label_smoothing": 0.1, "augment": "mixup:0.4"}),
        ("distillation", {}),
    ],
)
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path: Path, method: str, more: dict[str, object]) -> None:
    how = {"batch_size": 32, "valid_steps": 3, **more}
    whole = assay.harden(small(), blobs(), "linf:0.1", method, epochs=3, progress=False, **how)
    out = tmp_path / "net.safetensors"
    for batches in (3, 1, 5, 2):
        with pytest.raises(KeyboardInterrupt), interrupted(batches):
            assay.harden(small(), blobs(), "linf:0.1", method, epochs=3, out=out, progress=False, **how)
    done = assay.harden(small(), blobs(), "linf:0.1", method, epochs=3, out=out, progress=False, **how)
    assert weights(done.net) == weights(whole.net)
    drop = ["seconds", "cpu_seconds", "validation"]
    assert done.history.drop_columns(drop).equals(whole.history.drop_columns(drop))
    again = assay.harden(small(), blobs(), "linf:0.1", method, epochs=3, out=out, progress=False, **how)
    assert weights(again.net) == weights(whole.net), "a finished training is only read"


@contextmanager
def interrupted(batches: int) -> Iterator[None]:
    """Send Ctrl-C while a batch is being read, so many batches from now."""
    kept, seen = Source.batch, []

    def batch(source: Source, order: Tensor, epoch: int, step: int) -> Batch:
        seen.append(step)
        if len(seen) == batches:
            signal.raise_signal(signal.SIGINT)
        return kept(source, order, epoch, step)

    Source.batch = batch  # type: ignore[method-assign]
    try:
        yield
    finally:
        Source.batch = kept  # type: ignore[method-assign]


SCRIPT = """
    import sys, torch, assay
    sys.path.insert(0, {tests!r})
    from test_harden import blobs, small
    torch.set_num_threads(1)
    h = assay.harden(small(), blobs(2400), "linf:0.1", "pgd", epochs=4, out="net.safetensors", progress=False,
                     batch_size=32, valid_steps=3, average="ema", awp=0.005)
    print("done", h.history["pgd"].to_pylist())
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_file(tmp_path: Path) -> None:
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent)))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    subprocess.run([sys.executable, "-c", script], cwd=whole, check=True)
    waits, kills = iter([3.0, 4.1, 3.3, 5.2, 3.9, 4.7, 3.1, 6.0]), 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", script], cwd=broken)
        try:
            assert process.wait(next(waits, 600.0)) == 0
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills > 2
    assert (whole / "net.safetensors").read_bytes() == (broken / "net.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ several devices


FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of later Pythons, about threads


@FORKS
@pytest.mark.parametrize("method", ["pgd", "trades", "gradalign"])
def test_two_processes_train_as_one_does(method: str) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))
    how = {
        "batch_size": 32,
        "valid_steps": 3,
        "progress": False,
        "optimiser": "sgd",
        "lr": 0.1,
        "clip": 1.0,
        "select": "last",
    }
    # In l2: the sign of a slope near 0 would turn roundings, which do differ, into other points to learn from.
    alone, together = (assay.harden(net, blobs(), "l2:0.3", method, epochs=2, devices=n, **how) for n in (1, 2))
    for (name, a), b in zip(alone.net.state_dict().items(), together.net.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    assert (alone.forwards, alone.backwards) == (together.forwards, together.backwards)
    for column in ("loss", "train", "pgd"):
        assert together.history[column].to_pylist() == pytest.approx(alone.history[column].to_pylist(), abs=1e-4)


@pytest.mark.parametrize("method", ["pgd", "ibp"])
def test_half_precision_trains_and_leaves_float32(method: str) -> None:
    how = {"batch_size": 32, "valid_steps": 3, "progress": False, "precision": "bf16-mixed"}
    h = assay.harden(small(), blobs(), "linf:0.05", method, epochs=6, lr=5e-3, **how)
    assert {p.dtype for p in h.net.parameters()} == {torch.float32}
    assert max(h.history["clean"].to_pylist()) > 0.6


@FORKS
def test_errors_of_other_processes_come_back_as_they_were() -> None:
    with pytest.raises(assay.NonFiniteError, match="Lower lr"):
        assay.harden(small(), blobs(), "linf:0.1", "plain", lr=1e30, optimiser="sgd", progress=False, devices=2)


# ---------------------------------------------------------------------------------------- catastrophic overfitting


@pytest.mark.parametrize(
    ("now", "trouble"),
    [
        (Validation(0.9, 0.8, 0.1), True),
        (Validation(0.9, 0.55, 0.5), False),
        (Validation(0.3, 0.1, 0.05), False),
        (Validation(0.9, 0.7, 0.42), False),
    ],
    ids=["fgsm stays, pgd falls", "as before", "everything falls", "a fluctuation"],
)
def test_signs_of_catastrophic_overfitting(now: Validation, trouble: bool) -> None:
    past = [Validation(0.5, 0.3, 0.25), Validation(0.9, 0.55, 0.5)]
    assert catastrophic(past, now, chance=0.1) == trouble
    assert not catastrophic([], now, chance=0.1), "nothing to compare with"
    assert not catastrophic(past, now, chance=0.65), "it never was better than one that always says the same"


def tempted(method: str = "fast", monitor: str = "stop", **how: object) -> assay.Hardened:
    """Train with too large a single step on data where what is always right is not robust."""
    how = {"rel_step": 2.0, "epochs": 12, "lr": 0.02, "schedule": "constant", "batch_size": 64, **how}
    train, valid = temptation(512), temptation(256)
    return assay.harden(Centred(0), train, "linf:0.1", method, valid, monitor=monitor, progress=False, **how)


def test_catastrophic_overfitting_is_caught_and_training_stops() -> None:
    collapsed = tempted(monitor="off", select="last").history.to_pylist()
    assert collapsed[5]["pgd"] > 0.8
    assert collapsed[9]["pgd"] < 0.1, "a case where it happens"
    assert collapsed[9]["fgsm"] > 0.9
    h = tempted()
    assert "catastrophic overfitting" in h.stopped
    rows = h.history.to_pylist()
    assert [bool(r["event"]) for r in rows] == [False] * 7 + [True]
    assert validate(h.net, load_data(temptation(256)), assay.Threat("linf", 0.1, (0, 1)), 10, 0).pgd > 0.8


def test_after_a_rollback_training_goes_on_from_the_best_weights_at_half_the_rate() -> None:
    h = tempted(monitor="rollback")
    rows = h.history.to_pylist()
    assert not h.stopped
    assert len(rows) == 12
    assert "back to the best weights" in rows[7]["event"]
    assert rows[8]["lr"] == rows[7]["lr"] / 2
    assert validate(h.net, load_data(temptation(256)), assay.Threat("linf", 0.1, (0, 1)), 10, 0).pgd > 0.8


def test_training_on_many_steps_gives_no_alarm() -> None:
    h = tempted("pgd", rel_step=0.3, steps=5)
    assert not any(h.history["event"].to_pylist())


# ------------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2", ".onnx"])
def test_files_hold_the_network_that_was_trained(tmp_path: Path, suffix: str) -> None:
    if suffix == ".onnx":
        for package in ("onnx", "onnx2torch", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
    file = tmp_path / f"net{suffix}"
    model = assay.Model(small(), mean=0.3, std=0.2)
    h = assay.harden(model, blobs(), "linf:0.1", epochs=1, out=file, **FAST)
    whole = suffix != ".safetensors"
    read = assay.load_model(file) if whole else assay.load_model(file, arch=small, mean=0.3, std=0.2)
    x = blobs(5)[0]
    assert torch.allclose(read(x), h.model(x), atol=1e-5)
    folder = tmp_path / "net.training"
    assert {p.name for p in folder.iterdir()} >= {"manifest.json", "checkpoint.safetensors", "history.parquet"}
    assert "pgd" in (folder / "history.html").read_text().lower()


def test_a_training_of_other_settings_is_not_mixed_in(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    assay.harden(small(), blobs(), "linf:0.1", epochs=1, out=out, **FAST)
    with pytest.raises(RunError, match=r"settings\.lr was 0\.002 and is 0\.1"):
        assay.harden(small(), blobs(), "linf:0.1", epochs=1, out=out, lr=0.1, **FAST)
    with pytest.raises(RunError, match="a folder without a training"):
        assay.harden(small(), blobs(), "linf:0.1", epochs=1, out=out, resume=False, **FAST)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("error", "said", "change"),
    [
        (ThreatError, "an eps to train against", {"threat": "linf"}),
        (ThreatError, "one of linf for ibp", {"threat": "l2:0.5", "method": "ibp"}),
        (ThreatError, "8/255", {"threat": "linf:8"}),
        (UsageError, "Did you mean 'trades'", {"method": "trade"}),
        (UsageError, "Did you mean 'steps'", {"stepps": 3}),
        (UsageError, "optimiser out of sgd", {"optimiser": "sdg"}),
        (UsageError, "lr of at least 0", {"lr": -1.0}),
        (UsageError, "ramp as 2 shares", {"ramp": "0.5"}),
        (UsageError, "augmentation", {"augment": "flop"}),
        (DataError, "at least one batch", {"batch_size": 1000}),
        (DataError, "labels from 0 to 2", {"train": (torch.rand(90, 1, 4, 4), torch.full((90,), 7))}),
        (DataError, "two classes; found 86", {"train": (torch.ones(90, 1, 4, 4), torch.ones(90).long())}),
        (DataError, "inputs inside the box", {"train": (torch.randn(90, 1, 4, 4), torch.zeros(90).long())}),
        (ModelError, r"a torch\.nn\.Module with parameters", {"net": lambda x: x}),
        (RunError, r"ends in \.safetensors", {"out": "net.bin"}),
        (UsageError, "tracker", {"log": ["tensorbored"]}),
        (UsageError, "epochs: a whole number of at least 1; found 0", {"epochs": 0}),
        (UsageError, "epochs: a whole number of at least 1; found 1.5", {"epochs": 1.5}),
        (UsageError, "epochs: a whole number of at least 1; found '1'", {"epochs": "1"}),
        (ModelError, "logits; found probabilities. Remove the last softmax", {"net": small().append(nn.Softmax(1))}),
        (UsageError, "init=keep", {"net": small()[:1].requires_grad_(False).extend(small()[1:]), "init": "ibp"}),
    ],
)
def test_what_does_not_fit_is_said_before_training(
    error: type[Exception], said: str, change: dict[str, object]
) -> None:
    given = {"net": small(), "train": blobs(), "threat": "linf:0.1", "epochs": 1, "progress": False, **change}
    with pytest.raises(error, match=said):
        assay.harden(**given)


def test_a_loss_that_is_not_finite_ends_training() -> None:
    with pytest.raises(assay.NonFiniteError, match=r"finite.*Lower lr"):
        assay.harden(small(), blobs(), "linf:0.1", "plain", epochs=3, lr=1e30, optimiser="sgd", progress=False)


def test_a_tracker_that_is_not_installed_is_named() -> None:
    try:
        import mlflow  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"assay\[mlflow\]"):
            assay.harden(small(), blobs(), "linf:0.1", epochs=1, log=["mlflow"], **FAST)


@pytest.mark.filterwarnings("error")
def test_methods_that_were_broken_say_so() -> None:
    with pytest.raises(BrokenDefence, match="Engstrom"):
        assay.harden(small(), blobs(), "linf:0.1", "alp", epochs=1, **FAST)


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_no_method_has_a_setting_that_the_loop_has_too(name: str) -> None:
    mine = {f.name for f in fields(OBJECTIVES[name])}
    assert not mine & {f.name for f in fields(Settings)}, "NAME=VALUE could mean either"


@pytest.mark.parametrize("name", recipe.names())
def test_recipes_are_settings_that_exist(name: str) -> None:
    r = recipe.load(name)
    objective, settings = split_settings(r.method, r.settings)
    assert assay.Threat.parse(r.threat).eps
    assert OBJECTIVES.name_of(objective) == r.method
    assert settings.to_json()["lr"] > 0


# --------------------------------------------------------------------------------------------------- data and rates


def as_data(n: int, seed: int = 0) -> Data:
    return load_data(blobs(n, seed=seed))


def test_an_epoch_goes_through_all_samples_once_in_an_order_of_its_own() -> None:
    source = Source(as_data(100), None, 25, 0.5, seed=3)
    orders = [source.order(e) for e in range(3)]
    assert all(sorted(o.tolist()) == list(range(100)) for o in orders)
    assert orders[0].tolist() != orders[1].tolist()
    seen = torch.cat([source.batch(orders[0], 0, k).indices for k in range(source.steps)])
    assert sorted(seen.tolist()) == list(range(100))


def test_a_second_source_fills_its_share_of_each_batch_at_its_own_pace() -> None:
    source = Source(as_data(60), as_data(35, seed=1), 20, 0.5, seed=0)
    assert source.steps == 6
    taken = torch.cat([source.batch(source.order(e), e, k).indices for e in range(2) for k in range(6)])
    own, other = taken[taken < 60], taken[taken >= 60] - 60
    assert len(own) == len(other) == 120
    assert sorted(other[:35].tolist()) == list(range(35)), "the first lap has every sample once"
    x, y = source.data.batch([0]), source.data.labels[0]
    assert x.shape == (1, 1, 4, 4)
    assert int(y) == 0


def test_schedules_start_and_end_where_they_should() -> None:
    cosine = Settings(lr=1.0, schedule="cosine", ramp="0,0.5")
    assert [round(cosine.rate(d), 3) for d in (0, 0.5, 0.75, 1)] == [1, 1, 0.5, 0]
    cyclic = Settings(lr=1.0, schedule="cyclic")
    assert [round(cyclic.rate(d), 3) for d in (0, 0.2, 0.4, 0.7, 1)] == [0, 0.5, 1, 0.5, 0]
    steps = Settings(lr=1.0, schedule="multistep", milestones="0.5,0.75", warmup=0.1)
    assert [round(steps.rate(d), 3) for d in (0, 0.05, 0.2, 0.5, 0.9)] == [0, 0.5, 1, 0.1, 0.01]
    ramp = Settings(ramp="0.2,0.6")
    assert [round(ramp.grown(d), 3) for d in (0, 0.2, 0.4, 0.6, 1)] == [0, 0, 0.5, 1, 1]


# ------------------------------------------------------------------------------------------------- the command line


def run(words: str, folder: Path) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "assay", *words.split()]
    return subprocess.run(command, check=False, cwd=folder, capture_output=True)


def test_the_command_trains_judges_and_says_before_and_after(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_harden import blobs, small\n"
        "data = lambda: blobs()\ntest = lambda: blobs(60, seed=1)\n"
        "def net():\n    net = small()\n    net[-1].reset_parameters()  # the command sets the seed\n    return net\n"
    )
    words = "harden py:mine:net py:mine:data --threat linf:0.1 --epochs 2 --set batch_size=32 --set steps=2"
    words += " --out net.safetensors --test py:mine:test --effort quick --json"
    first, again = (run(words, tmp_path) for _ in range(2))
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    found, same = json.loads(first.stdout), json.loads(again.stdout)
    assert found["before"]["n"] == found["after"]["n"] == 60
    assert found["after"]["robust_accuracy"] > found["before"]["robust_accuracy"]
    assert same["training"]["seconds"] == found["training"]["seconds"], "the second time it is only read"
    assert (tmp_path / "net.safetensors").exists()


def test_images_are_scaled_wherever_they_come_from(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_harden import small\n"
        "import numpy as np\nnet = small\n"
        "data = lambda: (np.random.default_rng(0).integers(0, 256, (48, 8, 8), np.uint8), np.arange(48) % 2)\n"
    )
    words = "harden py:mine:net py:mine:data --valid py:mine:data --extra py:mine:data --size 4 --threat linf:0.1"
    words += " --epochs 1 --set batch_size=16 --method plain --out net.safetensors --effort none --quiet"
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
