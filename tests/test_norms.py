"""Norms: sizes, duals, steepest directions, samples, and the nearest point of ball and box together."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.core.random import Draws
from assay.threats import L0, L1, L2, NORMS, Linf, Norm
from assay.threats.norms import largest

SHAPES = [(7,), (2, 5), (3, 4, 4)]
CONVEX = [Linf(), L2(), L1()]

shapes = st.sampled_from(SHAPES)
norms = st.sampled_from(list(NORMS.values()))
dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 10**6)
radii = st.sampled_from([0.0, 1e-6, 0.3, 1.0, 4.0, 1e6, math.inf])
scales = st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 30.0])


def room(shape: tuple[int, ...], seed: int, dtype: torch.dtype, b: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return d (b, *shape), and the room lo <= 0 <= hi around it; some coordinates have none on one side or both."""
    g = torch.Generator().manual_seed(seed)
    d, lo, hi = (torch.randn(b, *shape, generator=g, dtype=dtype) for _ in range(3))
    lo, hi = -lo.abs(), hi.abs()
    lo[torch.rand(lo.shape, generator=g) < 0.2] = 0
    hi[torch.rand(hi.shape, generator=g) < 0.2] = 0
    return d, lo, hi


def check_projection(norm: Norm, d: Tensor, radius: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Check that what comes back is inside, idempotent, what was there if that was inside, and the nearest point."""
    eps = 1e-12 if d.dtype == torch.float64 else 2e-6
    p = norm.project(d, radius, lo, hi)
    assert p.shape == d.shape
    assert p.dtype == d.dtype
    assert ((p >= lo) & (p <= hi)).all(), "outside the box"
    assert (norm.size(p) <= radius * (1 + eps) + 1e-14 * norm.size(d)).all(), "outside the ball"
    again = norm.project(p, radius * (1 + eps), lo, hi)
    assert torch.allclose(again, p, rtol=2 * eps, atol=0), "not idempotent"
    inside = ((d >= lo) & (d <= hi)).flatten(1).all(1) & (norm.size(d) <= radius)
    assert torch.equal(p[inside], d[inside]), "a point inside was moved"
    if d.ndim == 4:
        last = [v.contiguous(memory_format=torch.channels_last) for v in (d, lo, hi)]
        assert torch.equal(norm.project(last[0], radius, *last[1:]), p), "the memory format matters"
    for i in range(len(d)):
        best = nearest(norm, *(v[i].double().flatten() for v in (d, radius, lo, hi)))
        near, true = ((d[i].double().flatten() - v).norm().item() for v in (p[i].double().flatten(), best))
        assert near <= true * (1 + 10 * eps) + 10 * eps * min(1, true + best.norm().item()), "not the nearest point"
    return p


def nearest(norm: Norm, d: Tensor, radius: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Return the nearest point of ball and box by bisection over the multiplier (l0: by trying all supports)."""
    if norm.name == "linf":
        return d.clamp(lo.maximum(-radius), hi.minimum(radius))
    if norm.name == "l0":
        inside = d.clamp(lo, hi)
        supports = itertools.combinations(range(len(d)), min(int(min(radius.item(), len(d))), len(d)))
        tried = [
            torch.zeros_like(d).index_copy(0, torch.tensor(s, dtype=torch.long), inside[list(s)]) for s in supports
        ]
        return min(tried, key=lambda p: (d - p).norm().item())

    def at(multiplier: float) -> Tensor:
        if norm.name == "l2":
            return (d / (1 + multiplier)).clamp(lo, hi)
        return (d.sign() * (d.abs() - multiplier).clamp_min(0)).clamp(lo, hi)

    low, high = 0.0, 1e12 if norm.name == "l2" else d.abs().max().item()
    if norm.size(at(0.0)[None])[0] <= radius:
        return at(0.0)
    for _ in range(200):
        middle = math.sqrt((low + 1e-12) * high) if norm.name == "l2" else (low + high) / 2
        low, high = (middle, high) if norm.size(at(middle)[None])[0] > radius else (low, middle)
    return at(high)


@given(norm=st.sampled_from(CONVEX), shape=shapes, dtype=dtypes, seed=seeds, radius=radii, scale=scales)
def test_projection_is_the_nearest_point_of_ball_and_box(
    norm: Norm, shape: tuple[int, ...], dtype: torch.dtype, seed: int, radius: float, scale: float
) -> None:
    d, lo, hi = room(shape, seed, dtype)
    check_projection(norm, d * scale, torch.full((len(d),), radius, dtype=dtype), lo, hi)


@given(
    shape=st.sampled_from([(5,), (2, 3), (1, 2, 3)]), dtype=dtypes, seed=seeds, count=st.sampled_from([0, 1, 2, 5, 99])
)
def test_l0_projection_is_the_best_of_all_supports(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, count: int
) -> None:
    d, lo, hi = room(shape, seed, dtype)
    check_projection(L0(), d, torch.full((len(d),), float(count), dtype=dtype), lo, hi)


@pytest.mark.parametrize("norm", CONVEX, ids=lambda n: n.name)
def test_projection_agrees_with_a_general_solver(norm: Norm) -> None:
    for seed in range(5):
        d, lo, hi = room((4,), seed, torch.float64, b=1)
        d = 3 * d
        p = norm.project(d, torch.tensor([0.8], dtype=torch.float64), lo, hi)[0]
        split = [*(h.item() for h in hi[0]), *(-v.item() for v in lo[0])]  # p = plus - minus makes l1 smooth
        ball = {
            "l2": lambda v: 0.64 - ((v[:4] - v[4:]) ** 2).sum(),
            "l1": lambda v: 0.8 - v.sum(),
        }
        if norm.name == "linf":
            split = [min(s, 0.8) for s in split]
        found = scipy.optimize.minimize(
            partial(_square_distance, d[0].numpy()),
            np.zeros(8),
            bounds=[(0, s) for s in split],
            constraints=[{"type": "ineq", "fun": ball[norm.name]}] if norm.name in ball else [],
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert np.allclose(found.x[:4] - found.x[4:], p.numpy(), atol=1e-5)


def _square_distance(d: np.ndarray, v: np.ndarray) -> float:
    return float(((v[:4] - v[4:] - d) ** 2).sum())


@given(norm=st.sampled_from(CONVEX), seed=seeds, radius=st.floats(1e-3, 5))
def test_no_random_point_of_ball_and_box_is_nearer(norm: Norm, seed: int, radius: float) -> None:
    """The nearest point p of a convex set is the one that sees d and no other point q on the same side."""
    d, lo, hi = room((2, 6), seed, torch.float64)
    r = torch.full((len(d),), radius, dtype=torch.float64)
    p = norm.project(d, r, lo, hi)
    for k in range(20):
        q = norm.sample(d, r, Draws.of(k, torch.arange(len(d)))).clamp(lo, hi)
        assert (((d - p) * (q - p)).flatten(1).sum(1) <= 1e-9).all()


@pytest.mark.parametrize("norm", NORMS.values(), ids=lambda n: n.name)
def test_each_sample_has_its_own_radius(norm: Norm) -> None:
    d, lo, hi = room((3, 2, 2), 0, torch.float64, b=4)
    radius = torch.tensor([0.0, 1.0, 3.0, math.inf], dtype=torch.float64)
    together = norm.project(d, radius, lo, hi)
    for i in range(4):
        assert torch.equal(together[i], norm.project(d[i : i + 1], radius[i : i + 1], lo[i : i + 1], hi[i : i + 1])[0])
    assert not together[0].any()
    assert torch.equal(together[3], d[3].clamp(lo[3], hi[3]))


@pytest.mark.parametrize("norm", NORMS.values(), ids=lambda n: n.name)
def test_where_there_is_no_room_nothing_moves(norm: Norm) -> None:
    d = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    none = torch.zeros_like(d)
    assert not norm.project(d, torch.ones(2), none, none).any()


@pytest.mark.parametrize("spread", [1, 4, 12])
def test_l2_projection_converges_for_coordinates_of_any_spread(spread: int) -> None:
    """Newton's method walks over the corners where coordinates meet their bounds: the more magnitudes, the more."""
    d = torch.logspace(-spread, spread, 200, dtype=torch.float64)[None]
    hi = torch.logspace(spread, -spread, 200, dtype=torch.float64)[None] * 0.5
    check_projection(L2(), d, torch.tensor([1.5], dtype=torch.float64), -hi, hi)


@given(shape=shapes, seed=seeds, dtype=dtypes, scale=st.sampled_from([1e-30, 1e-12, 1.0, 1e12]))
def test_steepest_attains_the_dual_norm_in_the_unit_ball(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype, scale: float
) -> None:
    g = room(shape, seed, dtype)[0] * scale
    for norm in NORMS.values():
        s = norm.steepest(g)
        assert (norm.size(s) <= 1 + 1e-6).all(), norm.name
        assert torch.allclose((s * g).flatten(1).sum(1), norm.dual(g), rtol=1e-5, atol=0), norm.name
        if g.ndim == 4:
            assert torch.equal(norm.steepest(g.contiguous(memory_format=torch.channels_last)), s)


@pytest.mark.parametrize("norm", NORMS.values(), ids=lambda n: n.name)
def test_no_point_of_the_unit_ball_gains_more_than_the_dual_norm(norm: Norm) -> None:
    g = room((9,), 3, torch.float64)[0]
    for k in range(50):
        d = norm.sample(g, torch.ones(len(g), dtype=torch.float64), Draws.of(k, torch.arange(len(g))))
        assert ((d * g).sum(1) <= norm.dual(g) + 1e-12).all()


@pytest.mark.parametrize("norm", NORMS.values(), ids=lambda n: n.name)
def test_without_a_gradient_there_is_no_direction(norm: Norm) -> None:
    assert torch.equal(norm.steepest(torch.zeros(2, 3, 2, 2)), torch.zeros(2, 3, 2, 2))


def test_sparse_norms_spread_a_step_over_the_support_asked_for() -> None:
    g = torch.tensor([[3.0, -2.0, 1.0, 0.0], [0.0, 0.0, -5.0, 0.0]])
    third = 1 / 3
    assert torch.allclose(L1().steepest(g, 3), torch.tensor([[third, -third, third, 0], [0, 0, -1, 0]]))
    each = torch.tensor([1, 4])
    assert torch.equal(L1().steepest(g, each), torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0]]))
    assert torch.equal(L0().steepest(g, 2), torch.tensor([[1.0, -1, 0, 0], [0, 0, -1, 0]]))


@pytest.mark.parametrize(
    ("norm", "size", "dual", "diameter"),
    [(Linf(), 4.0, 8.0, 2.0), (L2(), 26**0.5, 26**0.5, 4.0), (L1(), 8.0, 4.0, 8.0), (L0(), 3.0, 4.0, 4.0)],
    ids=lambda v: v.name if isinstance(v, Norm) else "",
)
def test_sizes_duals_and_diameters_in_closed_form(norm: Norm, size: float, dual: float, diameter: float) -> None:
    v = torch.tensor([[[1.0, -4.0], [0.0, 3.0]]])
    assert norm.size(v).item() == pytest.approx(size)
    assert norm.dual(v).item() == pytest.approx(dual)
    assert norm.diameter(2.0, 4) == pytest.approx(diameter)


@pytest.mark.parametrize("norm", CONVEX, ids=lambda n: n.name)
def test_samples_fill_the_ball_uniformly(norm: Norm) -> None:
    """In d dimensions, the share of a ball within a fraction t of its radius is t ** d; no axis or sign is special."""
    n, radius = 4000, 0.7
    d = norm.sample(torch.zeros(n, 2, 2), torch.full((n,), radius), Draws.of(0, torch.arange(n)))
    share = norm.size(d) / radius
    assert share.max() <= 1 + 1e-6
    assert scipy.stats.kstest((share**4).numpy(), "uniform").pvalue > 1e-3
    assert (d.flatten(1).mean(0).abs() < 4 * d.std() / n**0.5).all()
    assert torch.allclose(d.flatten(1).square().mean(0), d.square().mean().expand(4), rtol=0.1)
    assert np.abs(np.corrcoef(d.flatten(1).T) - np.eye(4)).max() < 5 / n**0.5


def test_l0_samples_change_as_many_coordinates_as_allowed_wherever_they_are() -> None:
    d = L0().sample(torch.zeros(3000, 6), torch.full((3000,), 2.0), Draws.of(0, torch.arange(3000)))
    assert (L0().size(d) == 2).all()
    assert scipy.stats.chisquare((d != 0).sum(0)).pvalue > 1e-3


def test_largest_marks_the_first_of_equals_and_as_many_as_asked_for() -> None:
    score = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert largest(score, 2).tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    assert largest(score, torch.tensor([1, 9])).tolist() == [[0, 1, 0, 0], [1, 1, 1, 1]]
    assert largest(score, 0).sum() == 0


@pytest.mark.parametrize("norm", NORMS.values(), ids=lambda n: n.name)
def test_nothing_is_done_in_place(norm: Norm) -> None:
    d, lo, hi = room((2, 3), 0, torch.float32)
    kept = [v.clone() for v in (d, lo, hi)]
    radius = torch.ones(3)
    for result in (norm.project(10 * d, radius, lo, hi), norm.project(d, radius, lo, hi), norm.steepest(d)):
        result.fill_(7.0)
    assert all(torch.equal(v, k) for v, k in zip((d, lo, hi), kept, strict=True))
