"""Lightning: any module whose batches are (x, y) learns from adversarial points, and from nothing else."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from needs import framework
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import assay
from assay.core.errors import DataError, ThreatError
from assay.core.registry import UsageError
from assay.integrations.batch import Look

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what frameworks say while they are imported
    lightning = framework("lightning.pytorch")
    AdversarialTraining = framework("assay.integrations.lightning").AdversarialTraining

pytestmark = pytest.mark.filterwarnings("ignore")

EPS, MEAN, STD = 0.2, 0.1307, 0.3081


@pytest.fixture(scope="module")
def digits():
    data = assay.load_data("demo:mnist", limit=700)
    x, y = data.batch(range(700)), data.labels
    return x, y


class Digits(lightning.LightningModule):
    """What a tutorial writes, with a note of what its steps were given."""

    def __init__(self, lr=3e-3, batch_norm=True):
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(8) if batch_norm else nn.Identity()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), norm, nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2),
                                 nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))  # fmt: skip
        self.lr, self.seen, self.checked = lr, [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(x)
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.checked.append(batch[0])
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


def fitted(module, x, y, callbacks, epochs=1, **how):
    torch.manual_seed(1)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **quiet, **how)
    loader = DataLoader(TensorDataset(x[:500], y[:500]), batch_size=100)
    trainer.fit(module, loader, DataLoader(TensorDataset(x[500:], y[500:]), batch_size=100))
    return module


def test_eps_is_in_units_of_the_box_and_validation_is_untouched(digits):
    x, y = digits
    seen = (x - MEAN) / STD
    clean = seen.clone()
    module = fitted(Digits(), seen, y, [AdversarialTraining(f"linf:{EPS}", steps=3, mean=MEAN, std=STD)])
    found = Look(mean=MEAN, std=STD).pixels(torch.cat(module.seen))
    moved = (found - x[:500]).abs().flatten(1).amax(1)
    assert float(moved.max()) <= EPS + 1e-6
    assert float((moved > 0.99 * EPS).float().mean()) > 0.95
    assert torch.equal(torch.cat(module.checked[-2:]), clean[500:])
    assert torch.equal(seen, clean)
    assert "training_step" not in vars(module)


class Given(lightning.Callback):
    """Plain training on points that are handed over."""

    def __init__(self, points):
        self.points = points

    def on_train_batch_start(self, trainer, module, batch, k):
        batch[0] = self.points[trainer.fit_loop.total_batch_idx]


def test_statistics_of_batches_never_see_an_attack(digits):
    hard = fitted(Digits(), *digits, [AdversarialTraining(f"linf:{EPS}", steps=3)], epochs=2)
    plain = fitted(Digits(), *digits, [Given(hard.seen)], epochs=2)
    for a, b in zip(hard.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_it_raises_robust_accuracy(digits):
    x, y = digits
    plain = fitted(Digits(), x, y, [], epochs=6)
    hard = fitted(Digits(), x, y, [AdversarialTraining("linf:0.1", steps=5)], epochs=6)
    low, high = (
        assay.evaluate(m, (x[500:600], y[500:600]), "linf:0.1", "quick", progress=False).robust_accuracy
        for m in (plain, hard)
    )
    assert high > low + 0.15


@pytest.mark.parametrize("method", ["trades", "mart", "ibp"])
def test_methods_with_a_loss_of_their_own_take_the_place_of_the_step(digits, method):
    module = fitted(Digits(), *digits, [AdversarialTraining(f"linf:{EPS}", method)])
    assert not module.seen
    assert int(module.trainer.callback_metrics["train_loss"] > 0)
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_adversarial_weights_are_put_back_before_the_step(digits):
    module = fitted(Digits(lr=0.0), *digits, [AdversarialTraining(f"linf:{EPS}", steps=1, awp=0.05, awp_from=0)])
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), Digits().parameters(), strict=True))


@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_an_interruption_leaves_the_module_as_it_was(digits, method):
    class Interrupted(lightning.Callback):
        def on_before_backward(self, trainer, module, loss):
            raise KeyboardInterrupt

    module = Digits(batch_norm=False)
    adversarial = AdversarialTraining(f"linf:{EPS}", method, steps=1, awp=0.05, awp_from=0)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fitted(module, *digits, [adversarial, Interrupted()])
    assert "training_step" not in vars(module)
    for a, b in zip(module.parameters(), Digits(batch_norm=False).parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", ["fast", "trades"])
def test_the_attack_is_in_float32_and_the_loss_in_the_trainers_precision(digits, method):
    module, seen = Digits(), []
    module.net[0].register_forward_hook(lambda m, _, out: seen.append((m.training, out.dtype)))
    fitted(module, *digits, [AdversarialTraining(f"linf:{EPS}", method)], precision="bf16-mixed")
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert (False, torch.float32) in seen


def test_a_module_in_half_precision_learns_from_points_of_full_precision(digits):
    module = fitted(Digits(), *digits, [AdversarialTraining(f"linf:{EPS}", steps=2)], precision="bf16-true")
    assert {x.dtype for x in module.seen} == {torch.bfloat16}
    moved = (torch.cat(module.seen).float() - digits[0][:500]).abs()
    assert 0.9 * EPS < float(moved.max()) < EPS + 0.01  # bfloat16 has steps of 1/256 below 1


def test_what_does_not_fit_is_refused_by_name(digits):
    x, y = digits
    with pytest.raises(ThreatError, match="8/255"):
        AdversarialTraining("linf:8")
    with pytest.raises(UsageError, match=r"free.*assay\.harden"):
        AdversarialTraining(method="free")
    with pytest.raises(DataError, match="once mean and std are undone"):
        fitted(Digits(), (x - MEAN) / STD, y, [AdversarialTraining()])
    by_hand = Digits()
    by_hand.automatic_optimization = False
    with pytest.raises(UsageError, match="automatic_optimization=False"):
        fitted(by_hand, x, y, [AdversarialTraining(method="trades")])
    assert "training_step" not in vars(by_hand)

    class Triple(Digits):
        def on_before_batch_transfer(self, batch, k):
            return [*batch, batch[1]] if self.trainer.training else batch

    with pytest.raises(DataError, match=r"\(x, y\).*list of 3"):
        fitted(Triple(), x, y, [AdversarialTraining()])


def test_the_example_runs(capsys):
    example = Path(__file__).parents[2] / "docs" / "examples" / "lightning_digits.py"
    spec = importlib.util.spec_from_file_location("lightning_digits", example)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main(train=300, epochs=1, limit=40)
    assert {"plain", "pgd", "trades"} == {*found}
    assert "robust" in capsys.readouterr().out
