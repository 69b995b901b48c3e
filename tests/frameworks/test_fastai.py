"""fastai: the lines of tutorials on a real folder of images, and what adversarial training has to keep to."""

import importlib.util
import json
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from needs import framework
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import assay
import assay.data
from assay.cli.app import app
from assay.core.errors import DataError, ModelError, ThreatError
from assay.core.registry import UsageError
from assay.hardening import OBJECTIVES, BrokenDefence
from assay.integrations.batch import Look, planned
from assay.models.fingerprint import fingerprint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what frameworks say while they are imported
    vision = framework("fastai.vision.all")
    ours = framework("assay.integrations.fastai")

pytestmark = pytest.mark.filterwarnings("ignore")
AdversarialLearner, AdversarialTrainer, NothingFoundError = (
    ours.AdversarialLearner,
    ours.AdversarialTrainer,
    ours.NothingFoundError,
)

MEAN, STD = [0.1307], [0.3081]
EPS = 0.2


def written(root, train, valid):
    """Write a folder of images as people have them: train/3/0017.png."""
    data = assay.load_data("demo:mnist", limit=train + valid)
    for i in range(len(data)):
        folder = root / ("train" if i < train else "valid") / str(int(data.labels[i]))
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (data.batch([i])[0, 0] * 255).round().byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return root


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Enough images to learn from."""
    return written(tmp_path_factory.mktemp("digits"), 500, 150)


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """Enough images to take a few steps on."""
    return written(tmp_path_factory.mktemp("few"), 150, 60)


def normalize():
    return vision.Normalize.from_stats(MEAN, STD, cuda=False)


def loaders(root, *, norm=True, **how):
    norms = [normalize()] if norm else []
    options = {"img_cls": vision.PILImageBW, "bs": 50, "num_workers": 0, "device": torch.device("cpu")}
    random.seed(0)  # from which loaders take their order
    return vision.ImageDataLoaders.from_folder(root, **{**options, "batch_tfms": norms, **how})


def small(batch_norm=True):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8) if batch_norm else nn.Identity()
    return nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), norm, nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU(),
                         nn.Flatten(), nn.Linear(256, 10))  # fmt: skip


def learner(root, net=None, loss=None, **how):
    learn = vision.Learner(
        loaders(root, **how), net or small(), loss_func=loss or vision.CrossEntropyLossFlat(), metrics=vision.accuracy
    )
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == "progress"])
    learn.logger = lambda *_: None
    return learn


class Watch(vision.Callback):
    """Keeps what goes into the model, before (order 59) or after (order 61) adversarial training has been there."""

    def __init__(self, order):
        self.order, self.train, self.valid = order, [], []

    def before_batch(self):
        (self.train if self.training else self.valid).append(self.learn.xb[0].detach().clone())


def seeded_fit(learn, cbs, epochs=1, lr=1e-3):
    torch.manual_seed(1)
    learn.fit(epochs, lr, cbs=cbs)
    return learn


# ----------------------------------------------------------------------------------------------- the tutorial's lines


def test_the_lines_of_a_tutorial_run_on_a_folder_of_images(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("matplotlib.pyplot.show", lambda *_, **__: None)
    normalize = vision.Normalize.from_stats([0.5] * 3, [0.25] * 3, cuda=False)
    how = {"item_tfms": vision.Resize(32), "batch_tfms": normalize, "bs": 75, "num_workers": 0}
    dls = vision.ImageDataLoaders.from_folder(few, **how)
    learn = vision.vision_learner(dls, vision.resnet18, pretrained=False, normalize=False, metrics=vision.accuracy)
    adv = learn.to_learner(AdversarialLearner)
    with adv.no_bar(), adv.no_logging():
        adv.fit_one_cycle(1, cbs=[AdversarialTrainer(eps=8 / 255, steps=1)])
        path = next((few / "valid" / "7").glob("*.png"))
        now = int(adv.predict(path)[1])
        wanted = (now + 1) % 10
        adv_example = adv.generate_adv_example(path, target_label=wanted, eps=64 / 255)
        assert isinstance(adv_example, Image.Image)
        assert adv_example.size == (32, 32)
        assert int(adv.predict(adv_example)[1]) == wanted
    result = adv.evaluate_robustness(limit=10)
    assert result.n == 10
    assert "robust" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- adversarial training


@pytest.mark.parametrize("norm", [True, False], ids=["normalised", "as it is"])
def test_eps_is_in_units_of_pixels_whatever_the_learner_normalises(few, norm):
    before, after = Watch(59), Watch(61)
    learn = learner(few, norm=norm)
    seeded_fit(learn, [before, AdversarialTrainer(EPS, steps=3), after])
    look = Look(mean=MEAN, std=STD) if norm else Look()
    for clean, found in zip(before.train, after.train, strict=True):
        moved = (look.pixels(found) - look.pixels(clean)).abs()
        assert float(moved.max()) <= EPS + 1e-6
        assert float((moved.flatten(1).amax(1) > 0.99 * EPS).float().mean()) > 0.95
        assert 0 <= float(look.pixels(found).min()) <= float(look.pixels(found).max()) <= 1


def test_the_l2_ball_is_that_of_pixels_too(few):
    before, after = Watch(59), Watch(61)
    seeded_fit(learner(few), [before, AdversarialTrainer(1.5, "l2", steps=3), after])
    look = Look(mean=MEAN, std=STD)
    sizes = (look.pixels(after.train[0]) - look.pixels(before.train[0])).flatten(1).norm(dim=1)
    assert 1.4 < float(sizes.max()) <= 1.5 + 1e-4


def test_validation_is_untouched(few):
    before, after = Watch(59), Watch(61)
    learn = learner(few)
    seeded_fit(learn, [before, AdversarialTrainer(EPS, steps=2), after])
    assert before.valid
    assert all(torch.equal(a, b) for a, b in zip(before.valid, after.valid, strict=True))
    assert list(learn.recorder.values[-1][1:]) == pytest.approx(list(learn.validate()))


class Given(vision.Callback):
    """Plain training on points that are handed over."""

    order, run_valid = 60, False

    def __init__(self, points):
        self.points = points

    def before_batch(self):
        self.learn.xb = (self.points[self.learn.train_iter],)


@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_statistics_of_batches_never_see_an_attack(few, method):
    """The same points without any attack leave the same statistics, and the same weights, to the last bit."""
    after = Watch(61)
    hardened = seeded_fit(learner(few), [AdversarialTrainer(EPS, method=method, steps=3, seed=3), after])
    if method == "trades":  # learns from clean points and then from those found, a pass each
        s = hardened.model[1]
        assert int(s.num_batches_tracked) == 2 * len(after.train)
        return
    plain = seeded_fit(learner(few), [Given(after.train)])
    for a, b in zip(hardened.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_adversarial_training_raises_robust_accuracy(digits):
    plain, hard = learner(digits), learner(digits)
    seeded_fit(plain, [], epochs=6, lr=3e-3)
    seeded_fit(hard, [AdversarialTrainer(0.1, steps=5)], epochs=6, lr=3e-3)
    verdicts = [AdversarialLearner(v).evaluate_robustness("linf:0.1", limit=100, show=False) for v in (plain, hard)]
    before, after = (e.robust_accuracy for e in verdicts)
    assert verdicts[0].clean_accuracy > 0.7
    assert after > before + 0.15


@pytest.mark.parametrize("method", ["trades", "mart", "mixed", "ibp"])
def test_a_loss_of_the_methods_own_is_the_one_that_is_learned_from(few, method):
    """One step of plain SGD on one batch, against the objective asked directly."""

    class Kept(vision.Callback):
        order, run_valid = 61, False

        def before_batch(self):
            self.x = self.learn.xb[0].clone()

        def before_step(self):
            self.grads = [p.grad.clone() for p in self.learn.model.parameters()]
            self.seen = float(self.learn.loss)
            raise vision.CancelFitException

    first, kept = Watch(59), Kept()
    learn = learner(few, small(batch_norm=False))
    seeded_fit(learn, [first, AdversarialTrainer(EPS, method=method), kept])
    net, plan = small(batch_norm=False), planned(assay.Threat("linf", EPS), method, {})
    y = kept_labels(learn, first.train[0])
    s = plan.step(net, first.train[0], y, Look(mean=MEAN, std=STD), at=0, share=0.0)
    terms = plan.loss(s, plan.find(s))
    terms.loss.backward()
    assert kept.seen == pytest.approx(float(terms.loss), rel=1e-5)
    for g, p in zip(kept.grads, net.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-6)


def kept_labels(learn, x):
    """Find the labels of a batch by its images."""
    known = {}
    for xs, ys in learn.dls.train.new(shuffle=False, drop_last=False):
        known.update({a.numpy().tobytes(): int(b) for a, b in zip(xs.as_subclass(Tensor), ys, strict=True)})
    return torch.tensor([known[row.numpy().tobytes()] for row in x])


LOOPS_OF_THEIR_OWN = {"distillation", "ensemble", "free"}


@pytest.mark.parametrize("method", OBJECTIVES.names())
def test_every_method_trains_or_is_refused_by_its_name(few, method):
    norm = "l2" if "linf" not in OBJECTIVES[method].norms else "linf"
    if method in LOOPS_OF_THEIR_OWN:
        with pytest.raises(UsageError, match=f"{method}.*assay.harden"):
            AdversarialTrainer(EPS, norm, method=method)
        return
    learn = learner(few, small(batch_norm=False), bs=75)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BrokenDefence)
        trainer = AdversarialTrainer(EPS, norm, method=method)
    before = [p.detach().clone() for p in learn.model.parameters()]
    seeded_fit(learn, [trainer])
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, learn.model.parameters(), strict=True))
    assert "forward" not in vars(learn.model)
    assert isinstance(learn.loss_func, vision.CrossEntropyLossFlat)


def test_a_share_of_the_batch_stays_clean_where_that_is_wanted(few):
    before, after = Watch(59), Watch(61)
    seeded_fit(learner(few), [before, AdversarialTrainer(EPS, steps=1, mix=0.4), after])
    same = (before.train[0] - after.train[0]).abs().flatten(1).amax(1) < 1e-5
    assert same.tolist() == [False] * 30 + [True] * 20


@pytest.mark.parametrize("method", ["pgd", "trades"])
@pytest.mark.parametrize("mixer", [vision.MixUp, vision.CutMix])
def test_mixed_labels_are_attacked_as_they_are_learned_from(few, mixer, method):
    class Posed(vision.Callback):
        order, run_valid = 61, False

        def before_batch(self):
            self.y, self.soft = self.learn.adversarial_trainer._mixed(self.learn.yb[0])

    posed = Posed()
    learn = seeded_fit(learner(few), [mixer(), AdversarialTrainer(EPS, method=method, steps=1), posed])
    torch.testing.assert_close(posed.soft.sum(1), torch.ones(len(posed.y)))
    lam = torch.as_tensor(posed.soft.gather(1, posed.y.as_subclass(Tensor)[:, None])[:, 0])
    assert float(lam.mean()) < 1
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


def test_label_smoothing_goes_into_the_methods_own_loss(few):
    smooth = learner(few, loss=vision.LabelSmoothingCrossEntropyFlat(eps=0.3))
    trainer = AdversarialTrainer(EPS, method="trades", steps=1)
    seeded_fit(smooth, [trainer])
    assert trainer._smoothing == 0.3


def test_a_loss_that_a_method_cannot_stand_for_is_refused_by_name(few):
    for loss in (vision.FocalLossFlat(), vision.CrossEntropyLossFlat(weight=torch.rand(10))):
        with pytest.raises(UsageError, match=r"trades.*(Focal|CrossEntropy)"):
            learner(few, loss=loss).fit(1, cbs=[AdversarialTrainer(EPS, method="trades")])
        seeded_fit(learner(few, loss=loss, bs=75), [AdversarialTrainer(EPS, steps=1)])


@pytest.mark.parametrize("precision", ["to_fp16", "to_bf16"])
@pytest.mark.parametrize("method", ["fast", "trades"])
def test_mixed_precision_goes_through(few, precision, method):
    learn = getattr(learner(few, bs=75), precision)()
    seeded_fit(learn, [AdversarialTrainer(EPS, method=method)])
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in learn.model.parameters())


class OnCPU(vision.MixedPrecision):
    """fastai's mixed precision is for CUDA; the same, with the autocast of a CPU."""

    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("method", ["fast", "trades"])
def test_the_attack_is_in_float32_and_the_loss_in_the_learners_precision(few, method):
    seen = []
    learn = learner(few, bs=75)
    learn.model[0].register_forward_hook(lambda m, _, out: seen.append((m.training, out.dtype)))
    seeded_fit(learn, [OnCPU(amp_mode="bf16"), AdversarialTrainer(EPS, method=method)])
    in_training = [(mode, dtype) for mode, dtype in seen]
    assert (True, torch.bfloat16) in in_training
    assert (True, torch.float32) not in in_training
    assert (False, torch.float32) in in_training  # the attack; validation is in bfloat16


def test_gradients_add_up_over_batches(few):
    learn = learner(few, bs=25)
    seeded_fit(learn, [vision.GradientAccumulation(75), AdversarialTrainer(EPS, method="trades", steps=1)])
    assert learn.opt.state[next(learn.model.parameters())]["step"] == 2


def test_adversarial_weights_are_put_back_before_the_step(few):
    learn = learner(few, bs=75)
    before = [p.detach().clone() for p in learn.model.parameters()]
    for method in ("pgd", "trades"):
        seeded_fit(learn, [AdversarialTrainer(EPS, method=method, steps=1, awp=0.05, awp_from=0)], lr=0.0)
        assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters(), strict=True))


class Interrupted(vision.Callback):
    """Somebody who has seen enough."""

    run_valid = False

    def __init__(self, when):
        self.when = when

    def __call__(self, event):
        if event == self.when and self.learn.training:
            raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["after_pred", "after_loss", "before_backward", "before_step"])
@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_an_interruption_at_any_moment_leaves_the_learner_as_it_was(few, method, when):
    learn = learner(few, small(batch_norm=False))
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        seeded_fit(learn, [AdversarialTrainer(EPS, method=method, steps=1, awp=0.05, awp_from=0), Interrupted(when)])
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters(), strict=True))
    assert "forward" not in vars(learn.model)
    assert isinstance(learn.loss_func, vision.CrossEntropyLossFlat)
    seeded_fit(learn, [AdversarialTrainer(EPS, method=method, steps=1)])
    assert "_do_one_batch" not in vars(learn)


def test_finding_a_rate_and_fine_tuning_take_the_callback(few, tmp_path):
    learn = learner(few, bs=100)
    learn.path = tmp_path
    learn.add_cb(AdversarialTrainer(EPS, steps=1))
    assert learn.lr_find(num_it=8, show_plot=False).valley > 0
    learn.remove_cb(AdversarialTrainer)
    learn.fine_tune(1, cbs=[AdversarialTrainer(EPS, steps=1)])


def test_what_makes_no_sense_is_said_before_training(few):
    with pytest.raises(ThreatError, match="8/255"):
        AdversarialTrainer(eps=8)
    with pytest.raises(UsageError, match="batch_size"):
        AdversarialTrainer(batch_size=3)
    with pytest.raises(UsageError, match="stepz"):
        AdversarialTrainer(stepz=3)
    with pytest.raises(UsageError, match="mix=0 for trades"):
        AdversarialTrainer(method="trades", mix=0.5)
    twice = learner(few, net=small(), norm=True)
    twice.dls.train.after_batch.fs[-1].mean, twice.dls.train.after_batch.fs[-1].std = (
        torch.full((1, 1, 1, 1), v) for v in (0.5, 0.1))  # fmt: skip
    twice.dls.valid.after_batch = type(twice.dls.valid.after_batch)(
        [vision.Normalize.from_stats(MEAN, STD, cuda=False)]
    )
    with pytest.raises(DataError, match="once mean and std are undone"):
        twice.fit(1, cbs=[AdversarialTrainer()])


# ------------------------------------------------------------------------------------------------ adversarial examples


@pytest.fixture(scope="session")
def trained(digits):
    return seeded_fit(learner(digits), [], epochs=5, lr=3e-3)


@pytest.fixture
def adv(trained):
    return AdversarialLearner(trained)


@pytest.fixture
def picture(digits, adv):
    """A digit that is taken for what it is."""
    return next(p for p in sorted((digits / "valid").rglob("*.png")) if adv.predict(p)[0] == p.parent.name)


def test_an_image_comes_back_as_an_image_that_is_taken_for_something_else(adv, picture):
    for given in (picture, str(picture), Image.open(picture), vision.PILImageBW.create(picture)):
        found = adv.generate_adv_example(given, eps=0.2)
        assert isinstance(found, Image.Image)
        assert isinstance(found, vision.PILImageBW) == isinstance(given, vision.PILImageBW)
        assert adv.predict(found)[0] != picture.parent.name
        moved = np.abs(np.asarray(found, float) - np.asarray(Image.open(picture), float))
        assert 0 < moved.max() <= 0.2 * 255


def test_it_survives_being_saved_as_a_file(adv, picture, tmp_path):
    adv.generate_adv_example(picture, eps=0.2).save(tmp_path / "adversarial.png")
    assert adv.learn.predict(tmp_path / "adversarial.png")[0] != picture.parent.name


def test_a_wanted_class_is_reached_by_index_or_by_name(adv, picture):
    wanted = (int(picture.parent.name) + 1) % 10
    assert int(adv.predict(adv.generate_adv_example(picture, target_label=wanted, eps=0.4))[1]) == wanted
    assert adv.predict(adv.generate_adv_example(picture, str(wanted), eps=0.4))[0] == str(wanted)


def test_tensors_come_back_as_tensors(adv, picture):
    eight = torch.from_numpy(np.array(Image.open(picture)))[None]
    found = adv.generate_adv_example(eight, eps=0.2)
    assert (found.dtype, found.shape) == (torch.uint8, eight.shape)
    assert adv.predict(found)[0] != picture.parent.name
    floats = adv.generate_adv_example(eight / 255, eps=0.2)
    assert floats.dtype == torch.float32
    assert float((floats - eight / 255).abs().max()) <= 0.2 + 1e-6
    assert adv.predict(floats)[0] != picture.parent.name


def test_without_an_eps_the_change_is_a_small_one(adv, picture):
    found = adv.generate_adv_example(picture, eps=None, norm="l2")
    moved = (np.asarray(found, float) - np.asarray(Image.open(picture), float)) / 255
    assert adv.predict(found)[0] != picture.parent.name
    assert np.linalg.norm(moved) < 3


def test_presizing_does_not_undo_what_was_found(digits, trained, picture):
    """Items of 48 pixels, batches of 28, as fastai recommends: an example of 28 pixels is taken as it is."""
    how = {"item_tfms": vision.Resize(48), "batch_tfms": [*vision.aug_transforms(size=28), normalize()]}
    learn = learner(digits, net=trained.model, **how)
    adv = AdversarialLearner(learn)
    assert adv.predict(picture)[0] == picture.parent.name
    found = adv.generate_adv_example(picture.parent / picture.name, eps=0.2)
    assert found.size == (28, 28)
    assert adv.predict(found)[0] != picture.parent.name
    assert assay.Model(learn).fit == assay.data.Fit(28, 28, 28, "bilinear")


def test_images_get_the_size_that_the_learner_gives_them(few):
    squished = learner(few, item_tfms=vision.Resize((28, 32), method="squish"))
    assert assay.Model(squished).fit == assay.data.Fit(28, 32, 0, "bilinear")
    assert assay.Model(learner(few, item_tfms=vision.Resize(28))).fit == assay.data.Fit(28, 28, 28, "bilinear")
    assert assay.Model(learner(few, item_tfms=vision.Resize(28, method="pad"))).fit is None
    assert assay.Model(learner(few)).fit is None


class Blurred(vision.Transform):
    order = 50

    def encodes(self, x: vision.TensorImage):
        return vision.TensorImage(nn.functional.avg_pool2d(x, 5, stride=1, padding=2))


def test_what_the_learners_transforms_undo_is_not_handed_out(digits, trained, picture):
    """The network is fooled by an image that was blurred already; read from a file, it is blurred once more."""
    blurred = learner(digits, net=trained.model)
    blurred.dls.valid.after_batch.add([Blurred()])
    with pytest.raises(NothingFoundError, match="transforms undo"):
        AdversarialLearner(blurred).generate_adv_example(picture, eps=None, norm="l2")


def test_where_nothing_is_found_that_is_said(adv, picture):
    with pytest.raises(NothingFoundError, match=r"linf:1/255.*larger eps"):
        adv.generate_adv_example(picture, eps=1 / 255)
    with pytest.raises(UsageError, match="other than the one predicted"):
        adv.generate_adv_example(picture, target_label=picture.parent.name)
    with pytest.raises(UsageError, match="'dog'"):
        adv.generate_adv_example(picture, target_label="dog")
    with pytest.raises(DataError, match="normalisation"):
        adv.generate_adv_example(torch.randn(1, 28, 28))


def test_images_are_resized_as_the_learner_does_it(digits, trained):
    adv = AdversarialLearner(learner(digits, net=trained.model, item_tfms=vision.Resize(28)))
    large = Image.open(next((digits / "valid" / "7").glob("*.png"))).resize((90, 60))
    found = adv.generate_adv_example(large, eps=0.3)
    assert found.size == (28, 28)


# ------------------------------------------------------------------------------------------------- the rest of it


def test_it_is_the_same_learner_with_more_to_it(trained, tmp_path):
    adv = trained.to_learner(AdversarialLearner)
    assert adv.model is trained.model
    assert adv.dls is trained.dls
    adv.lr = 0.125
    assert trained.lr == 0.125
    assert {"fit_one_cycle", "generate_adv_example"} <= {*dir(adv)}
    with pytest.raises(ModelError, match="fastai Learner"):
        AdversarialLearner(trained.model)


def test_the_verdict_is_that_of_the_engine_on_the_same_pixels(adv, capsys):
    mine = adv.evaluate_robustness("linf:0.05", limit=50)
    assert "robust" in capsys.readouterr().out
    order = [(p.parent.name, p) for p in adv.dls.valid_ds.items][:: 150 // 50]
    assert len({name for name, _ in order}) == 10  # not the first classes only
    x = torch.stack([torch.from_numpy(np.array(Image.open(p)))[None] for _, p in order])
    y = torch.tensor([int(name) for name, _ in order])
    model = assay.Model(adv.model, mean=MEAN, std=STD)
    theirs = assay.evaluate(model, (x, y), "linf:0.05", effort="quick", progress=False)
    assert mine.samples["fooled"].to_pylist() == theirs.samples["fooled"].to_pylist()
    assert 0 < mine.robust_accuracy < mine.clean_accuracy


def test_adversarials_are_shown_beside_what_they_were(adv):
    import matplotlib

    matplotlib.use("agg")
    axes = adv.show_adversarials(3)
    assert len(axes) == 6
    titles = [ax.get_title() for ax in axes]
    assert all(a != b for a, b in zip(titles[::2], titles[1::2], strict=True))


def test_a_learner_is_a_model_with_its_normalisation_and_its_classes(trained):
    model = assay.Model(trained)
    assert (model.mean, model.std) == (pytest.approx(MEAN), pytest.approx(STD))
    assert model.class_names == tuple("0123456789")
    x = torch.rand(5, 1, 28, 28)
    trained.model.eval()
    torch.testing.assert_close(model(x), trained.model((x - MEAN[0]) / STD[0]))
    assert "Normalize" in model.notes[0]


def test_a_learner_of_several_labels_is_refused(few):
    learn = learner(few, loss=nn.BCEWithLogitsLoss())
    with pytest.raises(ModelError, match="one label"):
        assay.Model(learn)


def test_an_exported_learner_is_loaded_only_where_it_is_trusted(trained, tmp_path):
    trained.path = tmp_path
    trained.logger = print
    trained.export("learn.pkl")
    with pytest.raises(ModelError, match=r"would run code of .*fastai.*--trust-pickle"):
        assay.load_model(tmp_path / "learn.pkl")
    model = assay.load_model(tmp_path / "learn.pkl", trust_pickle=True)
    assert fingerprint(model) == fingerprint(assay.Model(trained, box=(0, 1)))


def test_an_exported_learner_is_evaluated_from_the_command_line(trained, digits, tmp_path):
    trained.path = tmp_path
    trained.export("learn.pkl")
    line = [
        "evaluate",
        str(tmp_path / "learn.pkl"),
        str(digits / "valid"),
        "--threat",
        "linf:0.05",
        "--effort",
        "quick",
    ]
    done = CliRunner().invoke(app, [*line, "--limit", "40", "--json"])
    assert done.exit_code == 3
    assert "--trust-pickle" in done.output
    done = CliRunner().invoke(app, [*line, "--limit", "40", "--json", "--trust-pickle", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["clean_accuracy"] > 0.7


def test_a_hostile_file_runs_nothing_and_is_described(tmp_path):
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(ModelError, match=r"os\.system"):
        assay.load_model(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "odd.pkl").write_bytes(b"\x80\x04no pickle at all")
    with pytest.raises(ModelError, match="cannot be told"):
        assay.load_model(tmp_path / "odd.pkl")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ModelError, match="found list"):
        assay.load_model(tmp_path / "list.pkl", trust_pickle=True)


def test_the_example_runs(tmp_path, capsys):
    example = Path(__file__).parents[2] / "docs" / "examples" / "fastai_digits.py"
    spec = importlib.util.spec_from_file_location("fastai_digits", example)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain, hard = module.main(tmp_path, train=200, valid=30, epochs=2, limit=20)
    assert 0 <= plain <= 1
    assert 0 <= hard <= 1
    assert "A 7 is taken for a 3" in capsys.readouterr().out
