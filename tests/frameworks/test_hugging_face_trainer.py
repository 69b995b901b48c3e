"""Hugging Face transformers: a Trainer that learns from adversarial points, with real models from their configs."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from needs import framework
from torch.utils.data import Dataset

import assay
from assay.core.errors import DataError, ThreatError
from assay.core.registry import UsageError
from assay.integrations.batch import Look

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what frameworks say while they are imported
    framework("accelerate")
    transformers = framework("transformers")
    ours = framework("assay.integrations.hugging_face")

pytestmark = pytest.mark.filterwarnings("ignore")

EPS = 0.2
PROCESSOR = transformers.ViTImageProcessor(image_mean=[0.1307], image_std=[0.3081], do_resize=False)


class Digits(Dataset):
    """Digits as an image processor leaves them."""

    def __init__(self, start, stop, mean=0.1307, std=0.3081):
        data = assay.load_data("demo:mnist", limit=stop)
        self.x, self.y = data.batch(range(start, stop)), data.labels[start:stop]
        self.seen = (self.x - mean) / std

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"pixel_values": self.seen[i], "labels": self.y[i]}


def vit():
    torch.manual_seed(0)
    return transformers.AutoModelForImageClassification.from_config(
        transformers.ViTConfig(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=28,
            patch_size=7,
            num_channels=1,
            num_labels=10,
        )
    )


def resnet():
    torch.manual_seed(0)
    return transformers.AutoModelForImageClassification.from_config(
        transformers.ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
        )
    )


class Recording(transformers.Trainer):
    """Keeps what the model's own loss is asked about."""

    asked: list

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.asked = [*getattr(self, "asked", []), (model.training, inputs["pixel_values"].detach().clone())]
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)


def trainer(folder, model, kind=Recording, n=200, args=None, **how):
    settings = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 50,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 3e-3,
        "remove_unused_columns": False,
    }
    made = transformers.TrainingArguments(output_dir=str(folder), **{**settings, **(args or {})})
    data = Digits(0, n)
    return ours.adversarial(kind)(
        model, made, train_dataset=data, eval_dataset=Digits(600, 700), processing_class=PROCESSOR, **how
    )


def test_eps_is_in_units_of_pixels_and_evaluation_is_untouched(tmp_path):
    t = trainer(tmp_path, vit(), threat=f"linf:{EPS}", hyperparameters={"steps": 3})
    t.train()
    t.evaluate()
    found = Look(mean=[0.1307], std=[0.3081]).pixels(torch.cat([x for training, x in t.asked if training]))
    data = t.train_dataset.x
    nearest = torch.cdist(found.flatten(1), data.flatten(1)).argmin(1)
    moved = (found - data[nearest]).abs().flatten(1).amax(1)
    assert sorted(nearest.tolist()) == [*range(200)]
    assert float(moved.max()) <= EPS + 1e-6
    assert float((moved > 0.99 * EPS).float().mean()) > 0.95
    assert torch.equal(torch.cat([x for training, x in t.asked if not training]), t.eval_dataset.seen)


def test_statistics_of_batches_never_see_an_attack(tmp_path):
    hard = trainer(tmp_path, resnet(), threat=f"linf:{EPS}", hyperparameters={"steps": 2})
    hard.train()
    points = iter([x for training, x in hard.asked if training])

    class Given(transformers.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, {**inputs, "pixel_values": next(points)}, num_items_in_batch)

    settings = {**hard.args.to_dict(), "output_dir": str(tmp_path)}
    args = transformers.TrainingArguments(
        **{
            n: settings[n]
            for n in (
                "output_dir",
                "num_train_epochs",
                "per_device_train_batch_size",
                "use_cpu",
                "report_to",
                "save_strategy",
                "disable_tqdm",
                "learning_rate",
                "remove_unused_columns",
            )
        }
    )
    plain = Given(resnet(), args, train_dataset=Digits(0, 200))
    plain.train()
    for (name, a), b in zip(hard.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_it_raises_robust_accuracy(tmp_path):
    plain, hard = resnet(), resnet()
    args = {"num_train_epochs": 6, "per_device_train_batch_size": 25, "learning_rate": 1e-2}
    trainer(tmp_path, plain, n=500, args=args, method="plain").train()
    trainer(tmp_path, hard, n=500, args=args, threat="linf:0.1", hyperparameters={"steps": 3}).train()
    test = Digits(600, 700)
    low, high = (
        assay.evaluate(
            assay.Model(m, mean=[0.1307], std=[0.3081]), (test.x, test.y), "linf:0.1", "quick", progress=False
        ).robust_accuracy
        for m in (plain, hard)
    )
    assert high > low + 0.15


@pytest.mark.parametrize("method", ["trades", "mart"])
def test_methods_with_a_loss_of_their_own_take_the_models_place(tmp_path, method):
    t = trainer(tmp_path, vit(), method=method, threat=f"linf:{EPS}", args={"gradient_accumulation_steps": 2})
    t.train()
    assert not [training for training, _ in getattr(t, "asked", []) if training]
    assert t.state.global_step == 2


@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_gradients_of_small_batches_add_up_to_those_of_a_large_one(tmp_path, method):
    """With plain SGD, one step on 2 x 25 samples moves the weights as one on 50 does; both start from clean points."""
    ends = []
    for size, parts in ((50, 1), (25, 2)):
        args = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": parts,
            "optim": "sgd",
            "max_steps": 1,
            "max_grad_norm": 0.0,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
        }
        how = {"start": "clean"} if method == "pgd" else {"steps": 1, "near": 1e-6}
        t = trainer(tmp_path, vit(), n=50, args=args, method=method, threat=f"linf:{EPS}", hyperparameters=how)
        t.train()
        ends.append(torch.cat([p.detach().flatten() for p in t.model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in vit().parameters()])
    assert float((ends[0] - ends[1]).norm()) < 0.1 * float((ends[0] - start).norm())


def test_the_attack_is_in_float32_and_the_loss_in_the_trainers_precision(tmp_path):
    model, seen = resnet(), []
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_hook(lambda m, _, out: seen.append((m.training, out.dtype)))
    trainer(tmp_path, model, args={"bf16": True}, threat=f"linf:{EPS}", hyperparameters={"steps": 2}).train()
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert {dtype for training, dtype in seen if not training} == {torch.float32}


def test_adversarial_weights_are_put_back_before_the_step(tmp_path):
    class Frozen(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **_):
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    t = trainer(tmp_path, vit(), threat=f"linf:{EPS}", hyperparameters={"steps": 1, "awp": 0.05, "awp_from": 0})
    t.add_callback(Frozen())
    t.train()
    assert all(torch.equal(a, b) for a, b in zip(t.model.parameters(), vit().parameters(), strict=True))


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(ThreatError, match="8/255"):
        trainer(tmp_path, vit(), threat="linf:8")
    with pytest.raises(UsageError, match=r"ensemble.*assay\.harden"):
        trainer(tmp_path, vit(), method="ensemble")
    with pytest.raises(DataError, match="once mean and std are undone"):
        trainer(tmp_path, vit(), mean=[0.5], std=[0.5]).train()
    t = trainer(tmp_path, vit())
    with pytest.raises(DataError, match="pixel_values and labels"):
        t.training_step(t.model, {"input_ids": torch.zeros(1, 3)})


def test_the_normalisation_is_that_of_the_image_processor():
    assert ours.look_of(PROCESSOR) == Look(mean=(0.1307,), std=(0.3081,))
    assert ours.look_of(transformers.ViTImageProcessor(do_normalize=False)) == Look()
    assert ours.look_of(None) == Look()
    assert issubclass(ours.AdversarialTrainer, transformers.Trainer)


def test_the_example_runs(tmp_path, capsys):
    example = Path(__file__).parents[2] / "docs" / "examples" / "hugging_face_trainer.py"
    spec = importlib.util.spec_from_file_location("hugging_face_trainer", example)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main(str(tmp_path), train=200, epochs=1, limit=40)
    assert {"plain", "pgd"} == {*found}
    assert "robust" in capsys.readouterr().out
