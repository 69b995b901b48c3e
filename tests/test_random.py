"""Random numbers belong to a sample: not to a batch, an order, or a state."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.core.random import Draws

MANY = torch.arange(2000)


@given(seed=st.integers(-(2**70), 2**70), order=st.permutations(range(6)))
def test_a_sample_draws_the_same_in_any_batch_and_order(seed: int, order: list[int]) -> None:
    together = Draws.of(seed, torch.arange(6)).fold(3)
    shuffled = Draws.of(seed, torch.tensor(order)).fold(3)
    for draw in (lambda d: d.uniform((2, 3)), lambda d: d.normal((4,)), lambda d: d.integers(9), lambda d: d.signs()):
        assert torch.equal(draw(shuffled), draw(together)[order])
        assert torch.equal(draw(together.take(torch.tensor([4, 1]))), draw(together)[[4, 1]])
        alone = Draws.of(seed, torch.tensor([5])).fold(3)
        assert torch.equal(draw(alone)[0], draw(together)[5])


def test_drawing_has_no_memory_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    d = Draws.of(0, MANY)
    first, _, second = d.uniform((5,)), d.normal((5,)), d.uniform((5,))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    d = Draws.of(1, MANY)
    assert torch.equal(d.uniform((100,))[:, :10], d.uniform((10,)))


@pytest.mark.parametrize("across", ["samples", "positions", "seeds", "folds", "nested folds"])
def test_uniform_numbers_are_uniform_whatever_is_varied(across: str) -> None:
    one = torch.zeros(1, dtype=torch.int64)
    u = {
        "samples": lambda: Draws.of(3, torch.arange(20_000)).uniform(),
        "positions": lambda: Draws.of(3, one).uniform((20_000,))[0],
        "seeds": lambda: torch.cat([Draws.of(s, one).uniform() for s in range(3000)]),
        "folds": lambda: torch.cat([Draws.of(3, one).fold(k).uniform() for k in range(3000)]),
        "nested folds": lambda: torch.cat(
            [Draws.of(3, one).fold(i).fold(j).uniform() for i in range(50) for j in range(60)]
        ),
    }[across]()
    assert len(u.unique()) > 0.99 * len(u)
    assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 4 / len(u) ** 0.5  # neighbours know nothing of each other


def test_normal_numbers_are_normal_and_their_tails_are_finite() -> None:
    z = Draws.of(0, MANY).normal((50,))
    assert torch.isfinite(z).all()
    assert scipy.stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    assert z.mean().abs() < 0.02
    assert (z.var() - 1).abs() < 0.03


@pytest.mark.parametrize("pair", [(0, 1), (7, 8), (0, 1000)])
def test_folds_seeds_and_samples_are_independent(pair: tuple[int, int]) -> None:
    a, b = pair
    streams = {
        "folds": (Draws.of(0, MANY).fold(a), Draws.of(0, MANY).fold(b)),
        "seeds": (Draws.of(a, MANY), Draws.of(b, MANY)),
        "fold and parent": (Draws.of(a, MANY), Draws.of(a, MANY).fold(b)),
        "order of folds": (Draws.of(0, MANY).fold(a).fold(b), Draws.of(0, MANY).fold(b).fold(a)),
    }
    for what, (one, other) in streams.items():
        u, v = one.uniform((20,)).flatten(), other.uniform((20,)).flatten()
        assert abs(np.corrcoef(u, v)[0, 1]) < 4 / len(u) ** 0.5, what
        assert (u == v).float().mean() < 1e-3, what


@given(high=st.integers(1, 2**20 - 1))
def test_integers_cover_their_range_and_never_leave_it(high: int) -> None:
    n = Draws.of(high, MANY).integers(high, (10,))
    assert n.dtype == torch.int64
    assert n.min() >= 0
    assert n.max() < high
    if high <= 20:
        assert len(n.unique()) == high


def test_integers_are_even() -> None:
    counts = Draws.of(0, MANY).integers(7, (50,)).flatten().bincount()
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_signs_are_plus_or_minus_one_in_equal_shares() -> None:
    s = Draws.of(0, MANY).signs((50,))
    assert s.abs().eq(1).all()
    assert s.mean().abs() < 0.02


def test_uniform_numbers_are_exact_in_float32_and_below_one() -> None:
    narrow, wide = (Draws.of(5, MANY).uniform((100,), dtype) for dtype in (torch.float32, torch.float64))
    assert torch.equal(narrow.double(), wide)
    assert torch.equal((wide * 2**24).round(), wide * 2**24)
    assert wide.min() >= 0
    assert wide.max() < 1


def test_the_numbers_themselves_are_fixed() -> None:
    """A change of the generator would change every stored result: it must not happen unnoticed."""
    words = Draws.of(0, torch.arange(2)).fold(1).integers(2**20 - 1, (2,))
    assert words.tolist() == EXPECTED


EXPECTED = [[295198, 1019038], [251316, 837614]]
