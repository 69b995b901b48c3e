"""The nearest point of the box on a plane, against solvers that know nothing of it."""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.core.random import Draws
from assay.threats.norms import NORMS
from assay.threats.planes import inner, to_plane


def planes(seed: int, n: int, share: float, b: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return slopes, gaps, and how far down and up the box reaches; ``share`` of all that the box allows is needed."""
    draws = Draws.of(seed, torch.arange(b))
    slope = draws.normal((n,), torch.float64)
    slope = torch.where(draws.fold(1).uniform((n,)) < 0.2, 0.0, slope)
    x = draws.fold(2).uniform((n,), torch.float64)
    x = torch.where(draws.fold(3).uniform((n,)) < 0.2, x.round(), x)
    most = torch.where(slope > 0, slope * (1 - x), -slope * x).sum(1)
    return slope, -share * most, -x, 1 - x


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 12), share=st.floats(0.01, 0.99))
def test_no_point_of_the_box_on_the_plane_is_nearer(norm: str, seed: int, n: int, share: float) -> None:
    slope, gap, lo, hi = planes(seed, n, share)
    move = to_plane(NORMS[norm], slope, gap, lo, hi)
    assert ((move.d >= lo) & (move.d <= hi)).all()
    assert move.arrives.all()
    assert torch.allclose(gap + inner(slope, move.d), torch.zeros_like(gap), atol=1e-9)
    size = NORMS[norm].size(move.d)
    for i in range(len(gap)):
        assert float(size[i]) == pytest.approx(solved(norm, *(v[i].numpy() for v in (slope, gap, lo, hi))), abs=1e-6)


def solved(norm: str, slope: np.ndarray, gap: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> float:
    """Return the least size of d on the plane, from a general solver."""
    n = len(slope)
    if norm == "l2":
        if abs(gap) < 1e-12:
            return 0.0

        # The dual of the projection: one number, t >= 0, with d = clip(t slope).
        def short(t: float) -> float:
            return float(slope @ np.clip(t * slope, lo, hi) + gap)

        t = scipy.optimize.brentq(short, 0, 1e9, xtol=1e-14) if short(1e9) > 0 else 1e9
        return float(np.linalg.norm(np.clip(t * slope, lo, hi)))
    # d and, for l1, one bound a coordinate, for linf, one for all.
    bounds = n if norm == "l1" else 1
    own = np.eye(n) if norm == "l1" else np.ones((n, 1))
    above = np.block([[np.eye(n), -own], [-np.eye(n), -own]])
    cost = np.concatenate([np.zeros(n), np.ones(bounds)])
    found = scipy.optimize.linprog(
        cost,
        A_ub=above,
        b_ub=np.zeros(2 * n),
        A_eq=np.concatenate([slope, np.zeros(bounds)])[None],
        b_eq=[-gap],
        bounds=[*zip(lo, hi, strict=True), *[(0, None)] * bounds],
    )
    return float(found.fun)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 7), share=st.floats(0.01, 0.99))
def test_no_fewer_coordinates_reach_the_plane(seed: int, n: int, share: float) -> None:
    slope, gap, lo, hi = planes(seed, n, share)
    move = to_plane(NORMS["l0"], slope, gap, lo, hi)
    assert torch.allclose(gap + inner(slope, move.d), torch.zeros_like(gap), atol=1e-9)
    gain = torch.where(slope > 0, slope * hi, slope * lo)
    chosen = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * n).view(-1, n)
    counts = torch.where(chosen @ gain.T >= -gap - 1e-12, chosen.sum(1, keepdim=True), torch.inf).amin(0)
    assert torch.equal(NORMS["l0"].size(move.d), counts)


@pytest.mark.parametrize("norm", list(NORMS))
@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_the_other_side_is_reached_by_the_mirror_image(norm: str, seed: int) -> None:
    slope, gap, lo, hi = planes(seed, 6, 0.4)
    there, mirror = (to_plane(NORMS[norm], s, g, lo, hi).d for s, g in ((slope, gap), (-slope, -gap)))
    assert torch.allclose(there, mirror)


@pytest.mark.parametrize("norm", list(NORMS))
def test_a_plane_outside_the_box_is_approached_as_far_as_the_box_goes(norm: str) -> None:
    slope, gap, lo, hi = planes(1, 8, 1.5)
    move = to_plane(NORMS[norm], slope, gap, lo, hi)
    assert not move.arrives.any()
    corner = torch.where(slope > 0, hi, lo)
    assert torch.equal(move.d[slope != 0], corner[slope != 0])


@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e20])
def test_slopes_of_any_scale_make_no_nan(norm: str, scale: float) -> None:
    slope, gap, lo, hi = (v.float() for v in planes(2, 8, 0.5))
    for g in (gap, gap * scale, torch.zeros_like(gap)):
        move = to_plane(NORMS[norm], slope * scale, g, lo, hi)
        assert move.d.isfinite().all()
        assert ((move.d >= lo) & (move.d <= hi)).all()
    if scale > 0 and scale != 1e-38:
        plain = to_plane(NORMS[norm], slope, gap, lo, hi).d
        assert torch.allclose(to_plane(NORMS[norm], slope * scale, gap * scale, lo, hi).d, plain, atol=1e-4)


def test_images_are_vectors() -> None:
    slope, gap, lo, hi = planes(3, 12, 0.5)
    flat = to_plane(NORMS["l2"], slope, gap, lo, hi).d
    cube = to_plane(NORMS["l2"], *(v.view(-1, 3, 2, 2) if v.ndim > 1 else v for v in (slope, gap, lo, hi))).d
    assert torch.equal(flat, cube.flatten(1))
