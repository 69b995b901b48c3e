"""Intervals for one look and for any number of looks: what they promise, checked by exact probabilities."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from assay.runs.statistics import exact_interval, sequential_interval, upper_bound

LOOKS = np.arange(1, 2001)


def ever_missed(p, least, most):
    """The exact probability that the interval of some look does not hold the share p.

    ``least`` and ``most`` (looks,) are, for n = 1, 2, ..., the fewest and the most hits whose interval holds p. The
    distribution of the hits goes from look to look, without those paths that left.
    """
    chances = np.ones(1)
    for n, (low, high) in enumerate(zip(least, most, strict=True), 1):
        grown = np.append(chances * (1 - p), 0) + np.append(0, chances * p)
        grown[: max(low, 0)] = grown[high + 1 :] = 0
        chances = grown
        assert len(chances) == n + 1
    return 1 - chances.sum()


def fewest_kept(p):
    """The fewest hits whose sequential interval reaches up to p, for each n: by halving, all looks in one call."""
    no, yes = np.full_like(LOOKS, -1), LOOKS.copy()
    while (yes - no > 1).any():
        middle = np.maximum((no + yes) // 2, 0)
        reaches = sequential_interval(middle, LOOKS)[1] >= p
        no, yes = np.where(reaches, no, middle), np.where(reaches, middle, yes)
    return yes


@pytest.mark.parametrize("p", [0.001, 0.03, 0.3, 0.5, 0.858, 0.999])
def test_the_sequential_interval_holds_the_share_at_all_looks_at_once(p):
    missed = ever_missed(p, fewest_kept(p), LOOKS - fewest_kept(1 - p))
    assert 0 < missed <= 0.05


def test_an_interval_for_one_look_does_not():
    """Who looks at the exact interval after each of 500 samples sees it miss a share far more often than promised."""
    looks, p = range(1, 501), 0.858
    ends = [exact_interval(np.arange(n + 1), n) for n in looks]
    kept = [np.flatnonzero((low <= p) & (p <= high)) for low, high in ends]
    assert ever_missed(p, [k[0] for k in kept], [k[-1] for k in kept]) > 0.2


def test_of_simulated_runs_few_are_ever_missed():
    """The same on 1,000 sequences of 2,000 draws: at most 5 %, and two standard errors (1.4 %)."""
    p, draws = 0.858, np.random.default_rng(0).random((1000, len(LOOKS)))
    hits = (draws < p).cumsum(1)
    kept = (hits >= fewest_kept(p)) & (LOOKS - hits >= fewest_kept(1 - p))
    assert 1 - kept.all(1).mean() <= 0.05 + 0.014


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_it_contains_the_share_and_the_exact_interval(confidence):
    for n in (1, 2, 10, 57, 500):
        k = np.arange(n + 1)
        (low, high), (inner_low, inner_high) = (f(k, n, confidence) for f in (sequential_interval, exact_interval))
        assert (low <= inner_low + 1e-12).all()
        assert (high >= inner_high - 1e-12).all()
        assert ((low <= k / n) & (k / n <= high)).all()


def test_it_is_monotone_in_the_hits_and_treats_hits_and_misses_alike():
    for n in (1, 7, 200):
        k = np.arange(n + 1)
        low, high = sequential_interval(k, n)
        assert (np.diff(low) > 0).all()
        assert (np.diff(high) > 0).all()
        assert low == pytest.approx(1 - high[::-1], abs=1e-12)


def test_its_ends_are_where_the_martingale_reaches_its_bound():
    """Of all hits the equation has a closed form: p^n = 0.05 / (n + 1)."""
    for n in (1, 10, 300):
        assert sequential_interval(n, n) == (pytest.approx((0.05 / (n + 1)) ** (1 / n)), 1.0)
        assert sequential_interval(0, n) == (0.0, pytest.approx(1 - (0.05 / (n + 1)) ** (1 / n)))


def test_its_width_falls_with_the_samples_like_one_over_their_root_but_for_a_logarithm():
    n = 86 * 10 ** np.arange(5)
    low, high = sequential_interval(n * 43 // 50, n)
    width = high - low
    assert (np.diff(width) < 0).all()
    assert width[-1] < width[0] / 50
    assert sequential_interval(4325, 5000)[1] - sequential_interval(4325, 5000)[0] == pytest.approx(0.0372, abs=1e-4)


def test_nothing_seen_is_nothing_known():
    assert sequential_interval(0, 0) == (0.0, 1.0)


def test_elementwise_is_one_by_one():
    hits, n = np.array([0, 3, 10, 431]), np.array([5, 7, 10, 500])
    low, high = sequential_interval(hits, n)
    one = [sequential_interval(int(k), int(m)) for k, m in zip(hits, n, strict=True)]
    assert list(zip(low, high, strict=True)) == one


def test_an_audit_that_breaks_none_of_60_bounds_what_was_missed_by_5_percent():
    assert upper_bound(0, 60) == pytest.approx(0.0487, abs=1e-4)
    assert upper_bound(0, 60) == pytest.approx(1 - 0.05 ** (1 / 60))


@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_the_bound_is_the_one_sided_exact_one(confidence):
    for k, n in [(0, 1), (3, 60), (59, 60), (60, 60)]:
        bound = upper_bound(k, n, confidence)
        assert bound == pytest.approx(binomtest(k, n, alternative="less").proportion_ci(confidence).high, abs=1e-9)
        assert k == n or binom.cdf(k, n, bound) == pytest.approx(1 - confidence)
