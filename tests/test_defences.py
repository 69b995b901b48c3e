"""Defences: what they return where that is known, what attacks get through them, what a verdict makes of them."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

import assay
from assay.attacks import PGD
from assay.core.errors import AssayError, DataError, ModelError
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.defences import (
    JPEG,
    BitDepth,
    Detector,
    Ensemble,
    FeatureSqueezing,
    GaussianBlur,
    GaussianNoise,
    Median,
    RandomResizePad,
    Thermometer,
    TotalVariation,
    calibrated,
    defended,
)
from assay.models.fingerprint import fingerprint


def images(n: int = 3, channels: int = 3, side: tuple[int, int] = (12, 15), seed: int = 0) -> Tensor:
    return Draws.of(seed, torch.arange(n)).uniform((channels, *side))


KEEP_SHAPE = {
    "jpeg": lambda box: JPEG(75, box),
    "bits": lambda box: BitDepth(3, box),
    "median": lambda _: Median(3),
    "blur": lambda _: GaussianBlur(1.5),
    "variation": lambda box: TotalVariation(0.1 * (box[1] - box[0])),
    "noise": lambda box: GaussianNoise(0.3 * (box[1] - box[0]), box),
    "resize": lambda box: RandomResizePad(0.7, 1.0, box),
}


def slope(step: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = step(x)
    (grad,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), x)
    return grad


# ---------------------------------------------------------------- exact values


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [10, 75])
def test_jpeg_is_what_pillow_writes_and_reads(channels: int, quality: int) -> None:
    x = images(channels=channels, side=(16, 21))
    for one, got in zip(x, JPEG(quality)(x), strict=True):
        levels = (one * 255).round().to(torch.uint8).numpy()
        file = io.BytesIO()
        Image.fromarray(levels[0] if channels == 1 else levels.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        back = np.atleast_3d(np.array(Image.open(file))).transpose(2, 0, 1)
        assert torch.equal((got * 255).round(), torch.from_numpy(back.astype(np.float32)))


def test_bit_depth_rounds_to_levels_of_the_box() -> None:
    x = torch.tensor([[0.0, 0.16, 0.17, 0.5001, 0.84, 1.0]])
    assert torch.allclose(BitDepth(2)(x), torch.tensor([[0, 0, 1, 2, 3, 3]]) / 3)
    assert torch.allclose(BitDepth(2, box=(-2, 4))(6 * x - 2), 6 * BitDepth(2)(x) - 2)
    eight = torch.arange(256.0)[None] / 255
    assert torch.equal(BitDepth(8)(eight), eight)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_median_is_scipys(size: int) -> None:
    x = images()
    wanted = ndimage.median_filter(x.numpy(), size=(1, 1, size, size), mode="reflect")
    assert torch.equal(Median(size)(x), torch.from_numpy(wanted))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_gaussian_blur_is_scipys(sigma: float) -> None:
    x = images()
    wanted = ndimage.gaussian_filter(x.double().numpy(), (0, 0, sigma, sigma))
    assert np.allclose(GaussianBlur(sigma)(x).numpy(), wanted, atol=1e-6)


def test_sequences_are_smoothed_along_their_one_axis() -> None:
    x = images()[:, :, 0]
    wanted = ndimage.gaussian_filter1d(x.double().numpy(), 1.0, axis=2)
    assert np.allclose(GaussianBlur(1.0)(x).numpy(), wanted, atol=1e-6)
    assert torch.equal(Median(3)(x), torch.from_numpy(ndimage.median_filter(x.numpy(), size=(1, 1, 3), mode="reflect")))


def test_total_variation_moves_the_two_sides_of_an_edge_towards_each_other() -> None:
    """The minimum for a step between two areas m wide: each side moves by weight / m."""
    x = torch.full((1, 1, 6, 10), 0.2)
    x[..., 5:] = 0.8
    u = TotalVariation(weight=0.1, steps=400)(x)
    assert torch.allclose(u[..., :5], torch.tensor(0.2 + 0.1 / 5), atol=2e-3)
    assert torch.allclose(u[..., 5:], torch.tensor(0.8 - 0.1 / 5), atol=2e-3)


def test_total_variation_comes_nearer_to_its_minimum_with_every_step() -> None:
    x = images(1)

    def objective(u: Tensor) -> float:
        across, down = u.diff(dim=3, append=u[..., -1:]), u.diff(dim=2, append=u[:, :, -1:])
        return float((u - x).square().sum() / 2 + 0.2 * (across**2 + down**2).sqrt().sum())

    values = [objective(x), *(objective(TotalVariation(0.2, steps)(x)) for steps in (1, 5, 20, 100))]
    assert values == sorted(values, reverse=True)
    assert values[4] < 1.02 * objective(TotalVariation(0.2, 1000)(x))


def test_a_thermometer_has_one_bit_for_each_threshold_below_the_value() -> None:
    x = torch.tensor([[[0.0, 0.12, 0.13, 0.5, 0.88, 1.0]]])
    codes = Thermometer(4)(x)
    assert codes.shape == (1, 4, 6)
    assert codes.sum(1).tolist() == [[0, 0, 1, 2, 4, 4]]
    assert ((codes[:, 1:] <= codes[:, :-1]).all()).item()
    assert torch.equal(Thermometer(4, box=(-1, 3))(4 * x - 1), codes)
    two = images(channels=2)
    both = Thermometer(5)(two)
    assert both.shape == (3, 10, 12, 15)
    assert torch.equal(both[:, 5:], Thermometer(5)(two[:, 1:]))
    assert torch.allclose(both.unflatten(1, (2, 5)).mean(2), (two * 5).round() / 5)


def test_a_resized_image_is_pytorchs_at_a_place_of_a_black_frame() -> None:
    x = images(40, 2, (10, 20))
    torch.manual_seed(0)
    y = RandomResizePad(0.5, 1.0)(x)
    sizes = set()
    for one, got in zip(x, y, strict=True):
        rows, columns = (got.abs().amax((0, d)).nonzero()[:, 0] for d in (2, 1))
        top, left, h, w = int(rows[0]), int(columns[0]), len(rows), len(columns)
        wanted = F.interpolate(one[None], (h, w), mode="bilinear", align_corners=False)[0]
        frame = F.pad(wanted, (left, 20 - left - w, top, 10 - top - h))
        assert torch.allclose(got, frame, atol=1e-6)
        sizes.add((h, w))
    assert {h for h, _ in sizes} == {5, 6, 7, 8, 9, 10}


def test_a_frame_may_be_larger_than_the_image_and_is_filled_with_the_low_end() -> None:
    y = RandomResizePad(1.0, 1.5, box=(-1, 1))(torch.ones(4, 1, 8, 8))
    assert y.shape == (4, 1, 12, 12)
    assert y.unique().tolist() == [-1, 1]


def test_noise_has_its_size_and_stays_in_the_box() -> None:
    torch.manual_seed(0)
    y = GaussianNoise(0.1)(torch.full((1, 100_000), 0.5))
    assert y.std().item() == pytest.approx(0.1, rel=0.02)
    assert GaussianNoise(0.1)(torch.ones(1, 1000)).max() == 1


# ---------------------------------------------------------------- what all have in common


@pytest.mark.parametrize("box", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
@pytest.mark.parametrize("name", KEEP_SHAPE)
def test_outputs_stay_in_the_box_and_follow_it(name: str, box: tuple[float, float]) -> None:
    lo, hi = box
    step, unit = KEEP_SHAPE[name](box), KEEP_SHAPE[name]((0.0, 1.0))
    flat = torch.stack([torch.zeros(3, 12, 15), torch.ones(3, 12, 15)])
    for x in (images(), flat, images().round()):
        torch.manual_seed(1)
        y = step(lo + (hi - lo) * x)
        assert y.shape == x.shape
        assert y.min() >= lo
        assert y.max() <= hi
        torch.manual_seed(1)
        assert torch.allclose(y, lo + (hi - lo) * unit(x), atol=2e-5 * (hi - lo))


@pytest.mark.parametrize("name", [*KEEP_SHAPE, "thermometer"])
def test_every_defence_passes_a_gradient_on(name: str) -> None:
    torch.manual_seed(0)
    step = Thermometer(4) if name == "thermometer" else KEEP_SHAPE[name]((0.0, 1.0))
    for x in (images(), images().round(), torch.zeros(2, 1, 12, 15)):
        grad = slope(step, x)
        assert torch.isfinite(grad).all()
        assert (grad != 0).flatten(1).any(1).all()
    for step in (JPEG(), BitDepth(3)):  # BPDA with the identity, and nothing else
        assert torch.equal(slope(step, images()).flatten(), torch.linspace(-1, 1, images().numel()))


@pytest.mark.parametrize("name", ["blur", "variation", "median"])
def test_gradients_of_steps_that_have_one_are_their_own(name: str) -> None:
    step, x = KEEP_SHAPE[name]((0.0, 1.0)), images(1, 1, (5, 6)).double()
    assert torch.autograd.gradcheck(step, x.requires_grad_(), eps=1e-7, atol=1e-4)


def test_no_average_gets_lost_at_the_ends_of_the_box() -> None:
    """Blurred white may be a rounding error above 1: to clip that must not take the gradient away."""
    assert torch.allclose(slope(GaussianBlur(1.0), torch.ones(1, 1, 9, 9)).sum(), torch.tensor(0.0), atol=1e-4)
    x = torch.ones(1, 1, 9, 9, requires_grad=True)
    (grad,) = torch.autograd.grad(GaussianBlur(1.0)(x).sum(), x)
    assert torch.allclose(grad, torch.ones_like(x), atol=1e-5)


@pytest.mark.parametrize("name", [*KEEP_SHAPE, "thermometer"])
def test_defences_can_be_copied_pickled_and_told_apart(name: str) -> None:
    step = Thermometer(4) if name == "thermometer" else KEEP_SHAPE[name]((0.0, 1.0))
    other = Thermometer(5) if name == "thermometer" else KEEP_SHAPE[name]((0.0, 2.0))
    x = images()
    torch.manual_seed(0)
    y = step(x)
    for again in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        torch.manual_seed(0)
        assert torch.equal(again(x), y)
    marks = [fingerprint(assay.Model(v)) for v in (step, copy.deepcopy(step), other)]
    assert marks[0] == marks[1]
    assert (marks[0] == marks[2]) == (name in ("median", "blur"))  # these know no box


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: JPEG(0), UsageError, "quality from 1 to 95; found 0"),
        (lambda: BitDepth(0), UsageError, "bits from 1"),
        (lambda: Median(1), UsageError, "window"),
        (lambda: GaussianBlur(0), UsageError, "sigma in pixels"),
        (lambda: TotalVariation(0.0), UsageError, "weight > 0"),
        (lambda: TotalVariation(0.1, 0), UsageError, "steps"),
        (lambda: Thermometer(0), UsageError, "levels"),
        (lambda: GaussianNoise(-1.0), UsageError, "sigma >= 0"),
        (lambda: RandomResizePad(0.9, 0.8), UsageError, "greatest share"),
        (lambda: RandomResizePad(0.0, 0.8), UsageError, "least share"),
        (lambda: Ensemble([]), UsageError, "at least one net"),
        (lambda: Ensemble([nn.Flatten()], "vots"), UsageError, "Did you mean 'vote'"),
        (FeatureSqueezing, UsageError, "squeezer"),
        (lambda: Detector(nn.Flatten(), FeatureSqueezing(Median()), 0.1, scale=0), UsageError, "scale > 0"),
        (lambda: JPEG()(images(channels=2)), DataError, r"\(3, 2, 12, 15\)"),
        (lambda: Median()(torch.rand(2, 3)), DataError, r"\(2, 3\)"),
        (lambda: calibrated(nn.Flatten(), FeatureSqueezing(Median()), images(), rate=1.0), UsageError, "below 1"),
        (lambda: calibrated(nn.Flatten(), FeatureSqueezing(Median()), images(0)), DataError, "at least one"),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, error: type[AssayError], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


# ---------------------------------------------------------------- in front of a model


class Linear(nn.Module):
    """Logits of random planes; the planes are fixed by a seed."""

    def __init__(self, features: int = 540, classes: int = 4, seed: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(Draws.of(seed, torch.arange(classes)).normal((features,)) / features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


def test_defences_come_before_normalisation_and_the_rest_of_the_model_stays() -> None:
    net, x = Linear(), 255 * images()
    model = assay.Model(net, box=(0, 255), mean=[10.0, 20.0, 30.0], std=[50.0, 60.0, 70.0], rows=5, name="planes")
    whole = defended(model, BitDepth(2, model.box), Median(3))
    assert torch.equal(whole(x), model(Median(3)(BitDepth(2, (0, 255))(x))))
    assert torch.equal(defended(model)(x), model(x))
    assert (whole.domain, whole.rows, whole.samples, whole.name) == (model.domain, 5, 1, "BitDepth + Median + planes")
    other = assay.Model(net, box=(0, 255), mean=0.0, std=[50.0, 60.0, 70.0])
    assert fingerprint(defended(other)) != fingerprint(defended(model))


def test_probabilities_become_logits_inside() -> None:
    net, x = Linear(), images()
    sure = assay.Model(nn.Sequential(net, nn.Softmax(1)), probabilities=True)
    assert torch.allclose(defended(sure, Median(3))(x).float(), net(Median(3)(x)).log_softmax(1), atol=1e-5)


def test_a_net_of_any_kind_is_frozen_and_restored() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), Linear()).train()
    before = copy.deepcopy(net.state_dict())
    PGD(steps=2)(defended(net, JPEG()), images(), torch.tensor([0, 1, 2]), "linf:0.1")
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    whole = defended(lambda x: x.flatten(1)[:, :4], Median(3))
    assert whole(images()).shape == (3, 4)


@pytest.mark.parametrize(
    ("whole", "samples", "judged"),
    [
        (lambda: defended(Linear(), JPEG()), 1, 0),
        (lambda: defended(Linear(), JPEG(), GaussianNoise(0.1)), 16, 50),
        (lambda: defended(Linear(), RandomResizePad(), samples=80), 80, 80),
        (lambda: defended(assay.Model(Linear(), samples=5, judged=9), GaussianNoise(0.1)), 5, 9),
        (lambda: defended(Ensemble([Linear(), nn.Sequential(GaussianNoise(0.1), Linear())])), 16, 50),
    ],
)
def test_random_defences_and_no_others_are_averaged(whole: object, samples: int, judged: int) -> None:
    model = whole()
    assert (model.samples, model.judged) == (samples, judged)


def test_an_attack_on_a_random_defence_is_repeatable_and_leaves_the_generator_as_it_was() -> None:
    model, x, y = defended(Linear(), GaussianNoise(0.1), samples=3, judged=5), images(), torch.tensor([0, 1, 2])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a, b = (PGD(steps=3)(model, x, y, "linf:0.1") for _ in range(2))
    assert torch.equal(a.x, b.x)
    assert torch.equal(torch.get_rng_state(), state)
    assert (a.forwards > 5).all()


def test_boxes_that_differ_are_refused() -> None:
    model = assay.Model(Linear(), box=(0, 255))
    with pytest.raises(ModelError, match=r"\[0, 255\] in all defences; found \[0, 1\] in JPEG"):
        defended(model, JPEG())
    with pytest.raises(ModelError, match=r"found \[0, 255\] in Inside"):
        defended(Detector(model, FeatureSqueezing(Median()), 0.1))


# ---------------------------------------------------------------- ensembles and detectors


def test_ensembles_combine_as_they_say() -> None:
    nets, x = [Linear(seed=s) for s in range(5)], images(20)
    each = torch.stack([net(x) for net in nets])
    mean = each.softmax(2).mean(0)
    assert torch.allclose(Ensemble(nets)(x), mean.log(), atol=1e-5)
    assert torch.allclose(Ensemble(nets, "logits")(x), each.mean(0), atol=1e-6)
    votes = F.one_hot(each.argmax(2), 4).sum(0)
    got = Ensemble(nets, "vote")(x).argmax(1)
    leading = votes == votes.amax(1, keepdim=True)
    assert (leading.sum(1) > 1).any()
    assert torch.equal(got, mean.where(leading, -1.0).argmax(1))


def test_a_vote_is_fooled_through_what_decides_equal_votes() -> None:
    """Five planes that agree: their votes are flat, and yet the attack crosses all of them."""
    x, y = torch.full((2, 30), 0.5), torch.tensor([0, 1])
    nets = [Linear(30, 2, seed=7) for _ in range(5)]
    x = x + 0.02 * torch.stack([nets[0].weight.detach()[k] - nets[0].weight.detach()[1 - k] for k in (0, 1)]).sign()
    alone, together = (PGD(steps=20)(v, x, y, "linf:0.03") for v in (nets[0], Ensemble(nets, "vote")))
    assert alone.success.all()
    assert together.success.all()
    assert not PGD(steps=20)(Ensemble(nets, "vote"), x, y, "linf:0.01").success.any()


def test_a_detector_rejects_above_its_threshold_whatever_its_scale() -> None:
    net, x = Linear(), images(30)

    def bright(net: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        return x.flatten(1).mean(1)

    s = bright(net, x, net(x))
    for scale in (0.1, 10.0):
        z = Detector(net, bright, float(s.median()), scale)(x)
        assert torch.equal(z[:, :4], net(x))
        assert torch.equal(z.argmax(1) == 4, s > s.median())


def test_suspicion_is_the_largest_change_of_the_prediction() -> None:
    net, x = Linear(), images()
    gaps = [(net(x).softmax(1) - net(g(x)).softmax(1)).abs().sum(1) for g in (BitDepth(1), Median(2))]
    s = FeatureSqueezing(BitDepth(1), Median(2))(net, x, net(x))
    assert torch.allclose(s, torch.maximum(*gaps))
    whole = Detector(net, FeatureSqueezing(BitDepth(1), Median(2)), 0.1)
    alone = slope(net, x)
    through = slope(nn.Sequential(whole, nn.ZeroPad1d((0, -1))), x)
    assert torch.allclose(through, alone, atol=1e-6)  # the classes' logits are the network's
    assert not torch.allclose(slope(whole, x), alone, atol=1e-3)  # the last one sees through the squeezers


@pytest.mark.parametrize(("rate", "rejected"), [(0.0, 0), (0.05, 3), (0.1, 6), (0.5, 30)])
def test_a_calibrated_threshold_rejects_its_share(rate: float, rejected: int) -> None:
    net, x = assay.Model(Linear(), mean=0.5, std=0.1), images(60)
    detector = calibrated(net, FeatureSqueezing(Median(3)), x, rate)
    assert int((detector(x).argmax(1) == 4).sum()) == rejected


# ---------------------------------------------------------------- verdicts


@pytest.fixture(scope="module")
def digits() -> tuple[assay.Model, Tensor, Tensor]:
    data = assay.load_data("demo:mnist", limit=24)
    return assay.load_model("demo:mnist-plain"), data.batch(range(24)), data.labels


def stand(model: assay.Model, x: Tensor, y: Tensor, points: Tensor) -> float:
    """Return the share of samples that points found without the defence leave right."""
    with model.frozen() as live, torch.no_grad():
        return float(((live(x).argmax(1) == y) & (live(points).argmax(1) == y)).float().mean())


@pytest.mark.parametrize(
    "step", [Median(2), TotalVariation(0.2, 10), RandomResizePad(0.8, 1.0)], ids=lambda s: type(s).__name__
)
def test_the_verdict_is_below_what_a_blind_attack_leaves(
    step: nn.Module, digits: tuple[assay.Model, Tensor, Tensor]
) -> None:
    model, x, y = digits
    blind = PGD(steps=20)(model, x, y, "linf:0.09", full=True).x
    whole = defended(model, step, samples=4, judged=8)
    e = assay.evaluate(whole, (x, y), "linf:0.09", "quick", progress=False)
    assert e.clean_accuracy > 0.9
    assert e.robust_accuracy is not None
    assert e.robust_accuracy <= stand(whole, x, y, blind) - 2 / 24


def test_the_verdict_looks_through_a_detector(digits: tuple[assay.Model, Tensor, Tensor]) -> None:
    """A blind attack is rejected on most samples; one that knows the detector is accepted on many."""
    (_, x, y), model = digits, assay.load_model("demo:mnist-robust")
    clean = assay.load_data("demo:mnist").batch(range(1000, 1200))
    guarded = defended(calibrated(model, FeatureSqueezing(BitDepth(3), Median(2)), clean, rate=0.05))
    assert guarded.rejects
    blind = PGD(steps=20)(model, x, y, "linf:0.4", full=True).x
    with guarded.frozen() as live, torch.no_grad():
        says = live(blind).argmax(1)
    held = float(((says == y) | (says == 10)).float().mean())
    e = assay.evaluate(guarded, (x, y), "linf:0.4", "quick", progress=False)
    assert e.clean_accuracy > 0.8
    assert e.robust_accuracy is not None
    assert e.robust_accuracy < held - 0.2
