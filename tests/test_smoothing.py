"""Randomized smoothing: models whose smoothed version is known exactly, and what its certificates may not say."""

import json
import math
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from assay import Threat
from assay.attacks import PGD
from assay.certification import smoothing_votes
from assay.certification.smoothing import Smoothed, lower_bound, same_chance
from assay.certification.smoothing_noise import Ablation, Gaussian, Uniform, standard_normal
from assay.core.errors import DataError, NonFiniteError, RunError
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.core.types import per_sample
from assay.data import load_data
from assay.models import Model
from assay.models.loaders import load_model
from assay.threats.norms import L2

BOX = (-4, 4)


class Halves(nn.Module):
    """Class 1 where w.x > b, else class 0."""

    def __init__(self, w=(1.0,), b=0.0):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor(w)), b

    def forward(self, x):
        z = x.flatten(1).float() @ self.w - self.b
        return torch.stack([-z, z], 1)


def wrap(net, sigma=None, **rest):
    return Smoothed(Model(net, box=BOX), sigma, **rest)


def distances(count=40):
    """Inputs (count, 2) at known signed distances (count,) from the boundary of ``Halves((3, 4))``."""
    t = torch.linspace(-1.2, 1.2, count)
    return t[:, None] * torch.tensor([0.6, 0.8]), t


# The statistics


@given(n=st.integers(1, 20_000), share=st.floats(0, 1), alpha=st.floats(1e-6, 0.5))
def test_the_lower_bound_is_that_of_clopper_and_pearson(n, share, alpha):
    k = round(n * share)
    reference = scipy.stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, "exact").low
    assert lower_bound(np.array([k]), n, alpha)[0] == pytest.approx(reference, abs=1e-9)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_the_lower_bound_is_too_high_with_chance_alpha_at_most(p):
    """The exact probability, over all outcomes; a bound of plus or minus two standard errors would fail."""
    n, alpha = 200, 0.01
    k = np.arange(n + 1)
    wrong = lower_bound(k, n, alpha) > p
    assert scipy.stats.binom.pmf(k, n, p)[wrong].sum() <= alpha


@pytest.mark.parametrize(("first", "second"), [(1, 0), (5, 5), (60, 40), (9, 1), (100, 0), (0, 0)])
def test_the_test_of_two_classes_is_the_exact_binomial_one(first, second):
    reference = scipy.stats.binomtest(first, first + second, 0.5).pvalue if first else 1.0
    assert same_chance(np.array([first]), np.array([second]))[0] == pytest.approx(reference)


# The noise


class Extreme:
    """Draws that are all as large as they get."""

    def uniform(self, shape, dtype):
        return torch.full((1, *shape), 1 - 2.0**-24, dtype=dtype)


def test_the_tail_of_normal_noise_ends_at_8_standard_deviations_and_not_at_infinity():
    assert float(standard_normal(Extreme(), (2,))[0, 0]) == pytest.approx(math.sqrt(2 * 48 * math.log(2)))


def test_normal_noise_is_normal():
    z = standard_normal(Draws.of(0, torch.arange(2000)), (3, 17))
    assert z.shape == (2000, 3, 17)
    assert scipy.stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(z[:, 0, 0], z[:, 1, 9])[0, 1]) < 4 / 2000**0.5  # the two numbers of a pair
    tail = standard_normal(Draws.of(1, torch.arange(1000)), (1000,)).abs()
    assert abs((tail > 4).sum() / tail.numel() / (2 * scipy.stats.norm.sf(4)) - 1) < 0.4  # 63 of a million


def test_uniform_noise_is_uniform_with_standard_deviation_sigma():
    z = Uniform(0.5).apply(torch.zeros(2000, 20, dtype=torch.float64), Draws.of(0, torch.arange(2000))).flatten()
    h = math.sqrt(3) / 2
    assert scipy.stats.kstest(z.numpy(), "uniform", (-h, 2 * h)).pvalue > 1e-3
    assert float(z.std()) == pytest.approx(0.5, rel=0.01)


def test_ablation_keeps_every_set_of_coordinates_equally_often():
    x = torch.arange(1.0, 6).expand(20_000, 5)
    seen = Ablation(2, null=0.5).apply(x, Draws.of(0, torch.arange(20_000)))
    kept = seen == x
    assert (kept.sum(1) == 2).all()
    assert (seen[~kept] == 0.5).all()
    counts = np.bincount((kept.long() @ 2 ** torch.arange(5)).numpy())
    assert scipy.stats.chisquare(counts[counts > 0]).pvalue > 1e-3
    assert (counts > 0).sum() == math.comb(5, 2)


def coarse(z):
    """The share of noisy values that are multiples of 2**-26, of those around zero; chance gives 1/16 at most."""
    z = z[z.abs() < 2**-6].double() * 2**26
    assert len(z) > 500
    return float((z == z.round()).double().mean())


def test_the_last_bits_of_a_noisy_input_do_not_tell_where_the_clean_one_was():
    """Sums in float32 do: a network that looks at them gets false certificates (Voracek & Hein 2023)."""
    x, draws = torch.full((300, 400), 0.5), Draws.of(0, torch.arange(300))
    assert coarse(x + 0.25 * draws.normal((400,))) == 1
    for law in (Gaussian(0.25), Uniform(0.4)):
        noisy = law.apply(x, draws)
        assert noisy.dtype == torch.float32
        assert coarse(noisy) < 0.1


def test_noisy_inputs_leave_the_box_and_keep_all_their_digits():
    z = Gaussian(0.5).apply(torch.ones(100, 100), Draws.of(0, torch.arange(100)))
    assert (z > 1).double().mean() > 0.45
    assert len((z * 255 % 1).unique()) > 9000


# What is certified, where the truth is known


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_certified_radii_of_a_linear_model_stay_below_the_exact_ones_and_come_near(sigma):
    """g is the model itself there: its exact radius at x is |w.x - b| / ||w||."""
    x, t = distances()
    certificate = wrap(Halves((3.0, 4.0)), sigma).certify(x, (t > 0).long(), n=4000)
    told = certificate.prediction >= 0
    assert told.sum() >= 36
    assert torch.equal(certificate.prediction[told], (t > 0).long()[told])
    assert (certificate.radius <= t.abs()).all()
    assert (certificate.radius[~told] == 0).all()
    near = t.abs() < 2 * sigma
    assert (t.abs() - certificate.radius)[near].mean() < 0.15 * sigma
    few = wrap(Halves((3.0, 4.0)), sigma).certify(x, n=200).radius
    assert certificate.radius.mean() > few.mean()


def test_the_chance_of_a_radius_that_is_too_large_is_alpha():
    """800 certificates of one point at alpha = 0.2: about 160 may be wrong; 120 to 200 is four standard errors."""
    x = torch.full((800, 1), 0.5)
    certificate = wrap(Halves(), 0.5).certify(x, n0=10, n=300, alpha=0.2)
    assert 120 < int((certificate.radius > 0.5).sum()) < 200


def test_one_poll_for_choice_and_estimate_would_be_unsound_and_ours_are_two():
    """At a tie, the class that leads in a poll leads there by more than a half; fresh votes do not take its side."""
    x = torch.zeros(2000, 1)
    certificate = wrap(Halves(), 1.0).certify(x, n0=50, n=50, alpha=0.2)
    assert (certificate.prediction >= 0).double().mean() < 0.2 + 0.04
    ones = torch.where(certificate.guess == 1, certificate.hits, 50 - certificate.hits).numpy()
    leader = np.maximum(ones, 50 - ones)  # what the same poll would say of its own leader
    assert (lower_bound(leader, 50, 0.2) > 0.5).mean() > 0.3


def test_choice_estimate_and_prediction_draw_noise_of_their_own():
    seen = []

    def net(x):
        seen.append(x.clone())
        return torch.stack([x[:, 0], -x[:, 0]], 1)

    smoothed = wrap(net, 0.5)
    smoothed.certify(torch.zeros(1, 1), n0=64, n=64)
    smoothed.predict(torch.zeros(1, 1), n=64)
    values = torch.cat(seen)
    assert len(values.unique()) == 3 * 64


def test_it_abstains_where_no_class_has_the_majority():
    x = torch.zeros(50, 1)
    certificate = wrap(Halves(), 0.5).certify(x, torch.ones(50, dtype=torch.int64), n=1000)
    assert (certificate.prediction == -1).all()
    assert (certificate.radius == 0).all()
    assert not certificate.certified(0).any()
    assert (wrap(Halves(), 0.5).predict(x) == -1).all()


def test_a_plurality_is_predicted_but_never_certified():
    """Three classes with shares of 45, 30 and 25 %: g is known, yet no majority proves anything."""
    cuts = scipy.stats.norm.ppf([0.45, 0.75]).tolist()

    def net(x):
        label = (x[:, :1] > torch.tensor(cuts)).sum(1)
        return nn.functional.one_hot(label, 3).float()

    x = torch.zeros(3, 1)
    assert wrap(net, 1.0).predict(x, n=4000).tolist() == [0, 0, 0]
    assert wrap(net, 1.0).certify(x, n=4000).prediction.tolist() == [-1, -1, -1]


def test_predictions_that_are_wrong_are_rarer_than_alpha():
    x = torch.full((2000, 1), 0.02)  # class 1 has 52.8 % of the votes under noise of 0.28
    predictions = wrap(Halves(), 0.28).predict(x, n=101, alpha=0.1)
    assert (predictions == 0).double().mean() <= 0.1
    assert (predictions == 1).any()


def test_a_right_class_is_certified_and_a_wrong_one_is_not():
    x, y = torch.full((2, 1), 1.0), torch.tensor([1, 0])
    certificate = wrap(Halves(), 0.5).certify(x, y, n=1000)
    assert certificate.prediction.tolist() == [1, 1]
    assert certificate.certified(0.5).tolist() == [True, False]
    assert certificate.lower.tolist() == [certificate.radius[0], 0]
    assert (certificate.accuracy(0.5), certificate.accuracy(3.0)) == (0.5, 0)


@pytest.mark.parametrize(
    ("n", "sigmas"), [(1000, 2.46), (10_000, 3.20), (100_000, 3.81)], ids=["thousand", "ten thousand", "default"]
)
def test_the_largest_radius_is_given_by_the_number_of_draws(n, sigmas):
    most = Gaussian(0.5).radius(lower_bound(np.array([n]), n, 0.001), 1)[0]
    assert most == pytest.approx(0.5 * scipy.stats.norm.ppf(0.001 ** (1 / n)), rel=1e-8)
    assert most / 0.5 == pytest.approx(sigmas, abs=0.01)


@given(p=st.floats(0.5001, 1 - 1e-9), sigma=st.floats(0.01, 10))
def test_radii_are_short_of_where_the_share_may_fall_to_a_half(p, sigma):
    """The worst model with share p is a half-space; moved by R its share is above 1/2, and by little more below."""
    r = Gaussian(sigma).radius(np.array([p]), 1)[0]
    worst = scipy.stats.norm.ppf(p)
    assert 0 < r / sigma < worst
    assert r / sigma > worst * (1 - 1e-8)
    law = Uniform(sigma)
    r = law.radius(np.array([p]), 1)[0]
    assert 0 < r <= law.half_width
    assert p - r / (2 * law.half_width) > 0.5 - 1e-15


class Noisy(nn.Module):
    """A network that adds Gaussian noise itself: gradients of its mean point to where the smoothed model falls."""

    def __init__(self, model, sigma):
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, x):
        return self.model(x + self.sigma * torch.randn_like(x))


def test_no_attack_on_the_smoothed_demo_model_enters_a_certified_ball():
    model, sigma, n = load_model("demo:mnist-plain"), 0.25, 300
    [(x, y)] = load_data("demo:mnist", limit=12)
    smoothed = Smoothed(model, sigma)
    certificate = smoothed.certify(x, y, n=n)
    assert certificate.accuracy(0.25) > 0.7
    assert torch.equal(certificate.lower > 0, certificate.prediction == y)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attacked = PGD(steps=10)(Model(Noisy(model, sigma), samples=8), x, y, Threat("l2", 0.6))
    d = (attacked.x - x).double()
    d /= per_sample(L2().size(d).clamp_min(1e-9), d)

    def changed(share):
        """Tell at which points, at this share of the proven radius, the prediction is another one."""
        found = smoothed.predict((x + share * per_sample(certificate.radius, d) * d).clamp(0, 1).float(), n=n)
        told = (found >= 0) & (certificate.prediction >= 0)
        return (found != certificate.prediction)[told]

    assert not any(changed(share).any() for share in (0.5, 0.9, 0.999))
    assert changed(5).sum() >= 3  # the direction is one that fools, further out


# l1


@pytest.mark.parametrize("x0", [-0.5, 0.1, 0.3, 0.9])
def test_uniform_noise_on_a_threshold_finds_the_exact_share_and_radius(x0):
    """In one dimension the share is known, and within the width of the noise the bound is exact: |x|."""
    h, n = 0.6, 5000
    certificate = wrap(Halves(), h / math.sqrt(3), noise="uniform").certify(torch.tensor([[x0]]), n=n)
    exact = min(1.0, 0.5 + abs(x0) / (2 * h))
    assert certificate.norm == "l1"
    assert abs(int(certificate.hits) / n - exact) <= 4 * math.sqrt(exact * (1 - exact) / n)
    assert float(certificate.radius) <= min(abs(x0), h)
    assert float(certificate.radius) > 0.8 * min(abs(x0), h) - 0.06


@given(d=st.lists(st.floats(-1, 1), min_size=1, max_size=6))
def test_no_shift_costs_the_cube_more_than_its_l1_size(d):
    """The proof of the l1 radius: the overlap of two cubes of half-width h is at least 1 - |d|_1 / 2h."""
    h = 0.7
    overlap = np.prod([max(0.0, 1 - abs(v) / (2 * h)) for v in d])
    assert overlap >= 1 - sum(map(abs, d)) / (2 * h) - 1e-12


# l0


def shares(net, x, kept, null):
    """The exact shares (c,) of the votes on x (d,) under ablation: all sets are asked about."""
    d = len(x)
    masks = torch.zeros(math.comb(d, kept), d, dtype=torch.bool)
    for row, chosen in enumerate(combinations(range(d), kept)):
        masks[row, list(chosen)] = True
    votes = net(torch.where(masks, x, null)).argmax(1)
    return torch.bincount(votes, minlength=2).double() / len(masks)


@pytest.mark.parametrize(("d", "kept"), [(8, 1), (8, 2), (10, 3)])
def test_no_change_within_the_ablation_radius_changes_the_smoothed_class(d, kept):
    """Against brute force: all sets of radius coordinates, set to all corners; the shares are exact, and so is R."""
    net, seen = Halves([1.0] * d, 0.45 * d), set()
    for ones in range(d + 1):
        x = torch.tensor([1.0] * ones + [0.0] * (d - ones))
        share = shares(net, x, kept, 0.5)
        law = Ablation(kept, 0.5)
        radius = int(law.radius(share.max().numpy()[None], d)[0])
        seen.add(radius)
        for at in combinations(range(d), radius):
            for values in product((0.0, 1.0), repeat=radius):
                moved = x.index_copy(0, torch.tensor(at, dtype=torch.int64), torch.tensor(values))
                assert share.max() <= 0.5 or shares(net, moved, kept, 0.5).argmax() == share.argmax()
        if share.max() > 0.5:  # one more coordinate, and the bound no longer holds
            assert share.max() - (1 - math.comb(d - radius - 1, kept) / math.comb(d, kept)) <= 0.5 + 1e-8
    assert max(seen) > 0


@given(d=st.integers(1, 300), data=st.data())
def test_the_ablation_radius_is_that_of_the_binomial_coefficients(d, data):
    kept = data.draw(st.integers(1, d))
    p = data.draw(st.floats(0.5, 1))
    chance = [1 - math.comb(d - r, kept) / math.comb(d, kept) for r in range(d - kept + 2)]
    assert Ablation(kept).untouched(d) == pytest.approx([1 - c for c in chance[1:]])
    radius = int(Ablation(kept).radius(np.array([p]), d)[0])
    assert radius == 0 or p - chance[radius] > 0.5
    assert p - chance[radius + 1] <= 0.5 + 1e-8


def test_ablation_votes_agree_with_the_exact_shares():
    x, net, n = torch.tensor([1.0] * 7 + [0.0] * 3), Halves([1.0] * 10, 4.5), 4000
    exact = float(shares(net, x, 3, 0.5).max())
    smoothed = Smoothed(net, noise="ablation", kept=3)  # the box is [0, 1], and so the null value 0.5
    certificate = smoothed.certify(x[None], n=n)
    assert certificate.norm == "l0"
    assert abs(int(certificate.hits) / n - exact) < 4 * math.sqrt(exact * (1 - exact) / n)
    assert float(certificate.radius) == Ablation(3).radius(certificate.share.numpy(), 10)[0]


# Votes: the same in any batches, and after any interruption


def same(a, b):
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("guess", "hits", "prediction", "radius"))


NOISES = [{"sigma": 0.5}, {"sigma": 0.5, "noise": "uniform"}, {"noise": "ablation", "kept": 1}]


@pytest.mark.parametrize("noise", NOISES, ids=["gaussian", "uniform", "ablation"])
def test_batches_order_and_company_change_nothing(noise):
    smoothed, (x, _) = wrap(Halves((3.0, 4.0), 1.5), **noise), distances(9)
    whole = smoothed.certify(x, n0=7, n=50)
    assert all(same(smoothed.certify(x, n0=7, n=50, batch_size=b), whole) for b in (1, 13, 1000))
    order = torch.tensor([4, 0, 7])
    part = smoothed.certify(x[order], n0=7, n=50, indices=order)
    assert torch.equal(part.hits, whole.hits[order])
    assert not torch.equal(smoothed.certify(x, n0=7, n=50, seed=1).hits, whole.hits)


class Interrupted(Halves):
    """Is interrupted, as by Ctrl-C, once it has been asked about so many rows; the count is no part of the model."""

    def __init__(self, stop):
        super().__init__((3.0, 4.0))
        self.clock = {"rows": 0, "stop": stop}

    def forward(self, x):
        if self.clock["rows"] >= self.clock["stop"]:
            raise KeyboardInterrupt
        self.clock["rows"] += len(x)
        return super().forward(x)


@pytest.mark.parametrize("stop", [16, 80, 400])
def test_an_interrupted_call_goes_on_where_it_was(stop, tmp_path):
    (x, _), journal = distances(10), tmp_path / "votes.npz"
    net, asked = Interrupted(stop), {"n0": 8, "n": 64, "journal": journal}
    with pytest.raises(KeyboardInterrupt):
        wrap(net, 0.5).certify(x, **asked, batch_size=16)
    kept = np.load(journal)["votes"].sum()
    assert kept == stop
    net.clock = {"rows": 0, "stop": math.inf}
    resumed = wrap(net, 0.5).certify(x, **asked, batch_size=24)
    assert net.clock["rows"] == int(resumed.forwards.sum()) == 10 * 72 - kept
    assert same(resumed, wrap(Halves((3.0, 4.0)), 0.5).certify(x, n0=8, n=64))
    again = wrap(net, 0.5).certify(x, **asked, alpha=0.01)  # all votes are there; alpha is no matter of theirs
    assert int(again.forwards.sum()) == 0
    assert torch.equal(again.hits, resumed.hits)
    assert [p.name for p in tmp_path.iterdir()] == ["votes.npz"]


def test_a_kill_between_two_saves_leaves_a_journal_to_go_on_with(tmp_path, monkeypatch):
    """What a kill leaves is the last file that was renamed into place."""
    monkeypatch.setattr(smoothing_votes, "_SECONDS", 0.0)
    (x, _), journal, copies = distances(4), tmp_path / "votes.npz", []
    asked = {"n0": 8, "n": 40, "journal": journal, "batch_size": 16}
    whole = wrap(Halves((3.0, 4.0)), 0.5).certify(x, **asked, progress=lambda _: copies.append(journal.read_bytes()))
    assert len(copies) > 10
    for saved in copies[::3]:
        journal.write_bytes(saved)
        assert same(wrap(Halves((3.0, 4.0)), 0.5).certify(x, **asked), whole)


def test_a_journal_of_other_settings_is_refused_by_name(tmp_path):
    x, journal = torch.zeros(2, 1), tmp_path / "votes.npz"
    wrap(Halves(), 0.5).certify(x, n0=2, n=8, journal=journal)
    others = {
        "noise": lambda: wrap(Halves(), 0.6).certify(x, n0=2, n=8, journal=journal),
        "seed": lambda: wrap(Halves(), 0.5).certify(x, n0=2, n=8, journal=journal, seed=1),
        "draws": lambda: wrap(Halves(), 0.5).certify(x, n0=2, n=16, journal=journal),
        "inputs": lambda: wrap(Halves(), 0.5).certify(x + 1, n0=2, n=8, journal=journal),
        "indices": lambda: wrap(Halves(), 0.5).certify(x, n0=2, n=8, journal=journal, indices=torch.tensor([5, 6])),
        "model": lambda: wrap(Halves((2.0,)), 0.5).certify(x, n0=2, n=8, journal=journal),
    }
    for name, call in others.items():
        with pytest.raises(RunError, match=f"found {name} .*instead of"):
            call()


def test_a_journal_that_cannot_be_read_or_written_is_named(tmp_path):
    x, broken = torch.zeros(2, 1), tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(RunError, match=r"broken\.npz"):
        wrap(Halves(), 0.5).certify(x, n=8, journal=broken)
    with pytest.raises(RunError, match="No such file"):
        wrap(Halves(), 0.5).certify(x, n=8, journal=tmp_path / "nowhere" / "votes.npz")


def test_every_pass_is_counted_and_progress_is_told():
    x, t = distances(6)
    seen = []
    certificate = wrap(Halves((3.0, 4.0)), 0.1).certify(x, (t > 0).long(), n0=5, n=20, progress=seen.append)
    assert certificate.forwards.tolist() == [25] * 6
    assert (seen[-1].total, seen[-1].done, seen[-1].right, seen[-1].passes) == (6, 6, 6, 150)
    done = [s.done for s in seen]
    assert done == sorted(done)


def test_the_network_and_the_inputs_are_left_as_they_were():
    net, x = Halves((3.0, 4.0)).train(), distances(3)[0]
    before, state = x.clone(), torch.get_rng_state()
    wrap(net, 0.5).certify(x, n=10)
    assert net.training
    assert net.w.requires_grad
    assert torch.equal(x, before)
    assert torch.equal(state, torch.get_rng_state())


def test_half_precision_inputs_get_noise_in_float32():
    seen = []

    def net(x):
        seen.append(x.dtype)
        return torch.stack([x[:, 0], -x[:, 0]], 1)

    wrap(net, 0.5).certify(torch.zeros(1, 1, dtype=torch.float16), n=8)
    assert set(seen) == {torch.float32}


# What is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "sigma > 0"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"sigma": -1.0}, "sigma=-1.0"),
        ({"sigma": math.nan}, "sigma=nan"),
        ({"sigma": 0.5, "noise": "gausian"}, "Did you mean 'gaussian'"),
        ({"sigma": 0.5, "kept": 3}, "no kept"),
        ({"noise": "ablation"}, "kept > 0"),
        ({"noise": "ablation", "kept": 0.1}, "a whole number"),
        ({"noise": "ablation", "kept": 3, "sigma": 0.5}, "no sigma"),
    ],
)
def test_noise_that_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(UsageError, match=said):
        wrap(Halves(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n": 0}, "n of at least 1"),
        ({"n0": 0}, "n0 of at least 1"),
        ({"alpha": 0.0}, "alpha between 0 and 1"),
        ({"alpha": 1.0}, "alpha between 0 and 1"),
        ({"batch_size": 0}, "batch_size of at least 1"),
    ],
)
def test_draws_that_prove_nothing_are_refused(arguments, said):
    with pytest.raises(UsageError, match=said):
        wrap(Halves(), 0.5).certify(torch.zeros(2, 1), **arguments)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (torch.zeros(2, 1), torch.zeros(3, dtype=torch.int64), r"labels \(2,\)"),
        (torch.zeros(2, 1), torch.zeros(2, 2, dtype=torch.int64), r"labels \(2,\)"),
        (torch.zeros(2, 1), torch.zeros(2), "float32"),
        (torch.zeros(2, 1), torch.tensor([0, -1]), "least -1"),
        (torch.zeros(2, 1), torch.tensor([0, 2]), "labels from 0 to 1"),
        (torch.zeros(2, 1), [0, 1], r"\[0, 1\]"),
        (torch.zeros(2), None, "batch axis"),
        (torch.zeros(0, 1), None, "b >= 1"),
        (torch.zeros(2, 1, dtype=torch.uint8), None, "floating-point"),
        (torch.full((2, 1), 9.0), None, "inside the box"),
        (torch.full((2, 1), math.nan), None, "inside the box"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(x, y, said):
    with pytest.raises(DataError, match=said):
        wrap(Halves(), 0.5).certify(x, y, n=8)


def test_more_coordinates_than_there_are_cannot_be_kept():
    with pytest.raises(UsageError, match="kept of at most 2"):
        wrap(Halves((3.0, 4.0)), noise="ablation", kept=3).certify(torch.zeros(1, 2))


def test_a_network_that_answers_nan_is_no_voter():
    with pytest.raises(NonFiniteError, match="sample 7"):
        wrap(lambda x: torch.full((len(x), 2), math.nan), 0.5).certify(torch.zeros(1, 1), indices=torch.tensor([7]))


def test_a_journal_says_what_it_holds(tmp_path):
    wrap(Halves(), 0.5).certify(torch.zeros(2, 1), n0=2, n=8, journal=tmp_path / "votes.npz")
    with np.load(tmp_path / "votes.npz", allow_pickle=False) as arrays:
        settings = json.loads(str(arrays["settings"]))
        assert arrays["votes"].sum((1, 2)).tolist() == [4, 16]
    assert settings["noise"] == repr(Gaussian(0.5))


def test_a_smoothed_model_is_a_value():
    smoothed = Smoothed(Model(Halves(), box=BOX), 0.5)
    assert replace(smoothed, sigma=1.0).law == Gaussian(1.0)
    assert Smoothed(smoothed.model, noise="ablation", kept=1).law == Ablation(1, 0.0)  # the middle of the box
