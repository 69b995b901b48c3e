"""Augmentation: each step does what it says, inside the box, with random numbers of the sample."""

import sys

import pytest
import torch
from scipy import stats
from torch import Tensor

from assay.core.errors import DataError, MissingExtraError
from assay.core.optional import need
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.hardening.augment import (
    AUGMENTATIONS,
    POLICIES,
    Change,
    Crop,
    CutMix,
    Cutout,
    Flip,
    Mixup,
    Policy,
    Shift,
    augmented,
    parse,
)
from assay.threats.threat import Box

UNIT, WIDE = Box(), Box(-1.0, 3.0)
CHANGES = (Flip(), Crop(2), Cutout(3))


def draws(n: int, seed: int = 0) -> Draws:
    return Draws.of(seed, torch.arange(n))


def batch(n: int = 6, channels: int = 3, height: int = 8, width: int = 6, box: Box = UNIT) -> Tensor:
    """Return images of levels that 8 bits have, none of them at the low end of the box."""
    k = 1 + draws(n, 9).integers(255, (channels, height, width))
    return k / 255 * box.width + box.lo


@pytest.fixture
def torchvision() -> None:
    try:
        need("torchvision", "augment")
    except MissingExtraError as e:
        pytest.skip(e.found)


# ------------------------------------------------------------------------------------------------- single samples


def test_flip_mirrors_left_and_right() -> None:
    x = batch()
    assert torch.equal(Flip(chance=1)(x, draws(6), UNIT), x.flip(3))
    assert torch.equal(Flip(chance=0)(x, draws(6), UNIT), x)
    halves = Flip()(x, draws(6), UNIT)
    mirrored = [torch.equal(a, b) for a, b in zip(halves, x.flip(3), strict=True)]
    assert mirrored == (draws(6).uniform() < 0.5).tolist()
    assert 0 < sum(mirrored) < 6


def test_crop_shifts_and_fills_with_the_low_end_of_the_box() -> None:
    """Moved by (top, left) pixels: the same pixels, and the rest is -1."""
    x, p = batch(20, box=WIDE), 2
    out = Crop(p)(x, draws(20), WIDE)
    places = draws(20).integers(2 * p + 1, (2,)).tolist()
    for image, found, (top, left) in zip(x, out, places, strict=True):
        frame = torch.full((3, 8 + 2 * p, 6 + 2 * p), -1.0)
        frame[:, p:-p, p:-p] = image
        assert torch.equal(found, frame[:, top : top + 8, left : left + 6])
    assert {v for place in places for v in place} == {0, 1, 2, 3, 4}, "every shift comes up"
    assert Shift is Crop


def test_cutout_blanks_a_square_that_edges_may_cut() -> None:
    x = batch(200, box=WIDE)
    out = Cutout(3)(x, draws(200), WIDE)
    blank = out == -1
    assert torch.equal(out[~blank], x[~blank])
    assert torch.equal(blank[:, 0], blank[:, 2]), "all channels of a pixel together"
    rows, columns = blank[:, 0].any(2).sum(1), blank[:, 0].any(1).sum(1)
    assert torch.equal(blank[:, 0].sum((1, 2)), rows * columns), "a rectangle"
    assert set(rows.tolist()) == set(columns.tolist()) == {2, 3}
    assert blank[:, 0].any(0).all(), "every pixel can be hit"


@pytest.mark.parametrize("step", CHANGES, ids=str)
@pytest.mark.parametrize("box", [UNIT, WIDE], ids=str)
def test_a_sample_is_changed_in_the_same_way_in_any_batch(step: Change, box: Box) -> None:
    x, order = batch(box=box), torch.tensor([4, 1, 5])
    out = step(x, draws(6), box)
    assert torch.equal(step(x[order], draws(6).take(order), box), out[order])
    assert box.lo <= float(out.min()) <= float(out.max()) <= box.hi
    assert torch.equal(x, batch(box=box)), "nothing is changed in place"
    assert out.shape == x.shape
    assert out.is_contiguous()


# --------------------------------------------------------------------------------------------------- mixed samples


def test_mixup_mixes_samples_and_labels_by_the_same_share() -> None:
    x, soft = batch().double(), torch.eye(6, dtype=torch.float64)
    mixed, labels = Mixup(alpha=1.0)(x, soft, draws(6), UNIT)
    share = draws(6).uniform(dtype=torch.float64)  # Beta(1, 1) is uniform
    for i in range(6):
        s = share[i]
        assert torch.allclose(mixed[i], s * x[i] + (1 - s) * x[5 - i])
        assert torch.allclose(labels[i], s * soft[i] + (1 - s) * soft[5 - i])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_from_a_beta_distribution(alpha: float) -> None:
    soft = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(1000, 0)
    _, labels = Mixup(alpha)(torch.zeros(2000, 1, 1, 1), soft, draws(2000), UNIT)
    shares = torch.cat([labels[:1000, 0], labels[1000:, 1]])
    assert stats.kstest(shares.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_cutmix_mixes_labels_by_the_area_that_is_left() -> None:
    x = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 2, 8, 6) / 40
    mixed, labels = CutMix()(x, torch.eye(40), draws(40), UNIT)
    for i in range(40):
        own = mixed[i] == x[i]
        assert torch.equal(mixed[i][~own], x[39 - i][~own])
        assert labels[i, i].item() == pytest.approx(own.double().mean().item())
        assert labels[i, 39 - i].item() == pytest.approx(1 - own.double().mean().item(), abs=1e-6)
    kept = labels.diagonal()
    assert float(kept.min()) < 0.3
    assert float(kept.max()) > 0.9


def test_the_middle_sample_of_an_odd_batch_is_left_alone() -> None:
    x, soft = batch(5), torch.eye(5)
    for step in (Mixup(), CutMix()):
        mixed, labels = step(x, soft, draws(5), UNIT)
        assert torch.allclose(mixed[2], x[2])
        assert torch.allclose(labels[2], soft[2])


# -------------------------------------------------------------------------------------------------- several steps


def test_steps_follow_each_other_each_with_its_own_random_numbers() -> None:
    x, y = batch(), torch.arange(6)
    out, soft = augmented(x, y, 6, (Crop(2), Crop(2)), draws(6), UNIT)
    assert soft is None
    assert torch.equal(out, Crop(2)(Crop(2)(x, draws(6).fold(0), UNIT), draws(6).fold(1), UNIT))
    assert not torch.equal(draws(6).fold(0).uniform(), draws(6).fold(1).uniform())


def test_mixing_gives_distributions_over_the_classes() -> None:
    out, soft = augmented(
        batch(box=WIDE), torch.tensor([0, 1, 2, 0, 2, 1]), 4, parse("flip,mixup:1,cutmix"), draws(6), WIDE
    )
    assert soft is not None
    assert soft.shape == (6, 4)
    assert torch.allclose(soft.sum(1), torch.ones(6))
    assert not soft[:, 3].any()
    assert ((soft > 0).sum(1) == 2).all()
    assert -1 <= float(out.min()) <= float(out.max()) <= 3


def test_without_steps_nothing_happens_to_any_input() -> None:
    x = torch.zeros(2, 7)
    assert augmented(x, torch.tensor([0, 1]), 2, (), draws(2), UNIT) == (x, None)
    with pytest.raises(DataError, match=r"images .* found inputs \(2, 7\)"):
        augmented(x, torch.tensor([0, 1]), 2, (Flip(),), draws(2), UNIT)


# ------------------------------------------------------------------------------------------------------- by name


def test_augmentations_are_read_in_their_order() -> None:
    assert parse("crop:4, flip,cutout:8") == (Crop(4), Flip(), Cutout(8))
    assert parse("shift:2,mixup:0.4,cutmix,policy:rand") == (Crop(2), Mixup(0.4), CutMix(), Policy("rand"))
    assert parse("") == ()
    assert set(AUGMENTATIONS.names()) == {"crop", "cutmix", "cutout", "flip", "mixup", "policy", "shift"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flpi", "Did you mean 'flip'"),
        ("flip,", "found ''"),
        ("crop:four", "int for crop padding"),
        ("crop:0", "at least 1"),
        ("crop:", "int for crop padding"),
        ("flip:2", "from 0 to 1"),
        ("mixup:0", "above 0"),
        ("mixup:nan", "above 0"),
        ("policy:trival", "Did you mean 'trivial'"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(text)


# ------------------------------------------------------------------------------------------------------ policies


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("box", [UNIT, WIDE], ids=str)
def test_policies_are_reproducible_sample_by_sample(name: str, box: Box) -> None:
    x, order = batch(8, box=box), torch.tensor([7, 2, 3])
    state = torch.get_rng_state()
    out = Policy(name)(x, draws(8), box)
    assert torch.equal(Policy(name)(x[order], draws(8).take(order), box), out[order])
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left as it was"
    assert not torch.equal(out, x)
    assert box.lo <= float(out.min()) <= float(out.max()) <= box.hi


@pytest.mark.usefixtures("torchvision")
def test_a_policy_takes_grey_images_and_keeps_8_bit_values() -> None:
    x = batch(30, channels=1)
    out = Policy()(x, draws(30), UNIT)
    same = (out == x).flatten(1).all(1)
    assert same.any(), "TrivialAugment does nothing at times"
    assert not same.all()


def test_a_policy_needs_a_torchvision_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'assay\[augment\]'"):
        Policy()(batch(), draws(6), UNIT)
    with pytest.raises(DataError, match="1 or 3 channels"):
        Policy()(batch(channels=2), draws(6), UNIT)
