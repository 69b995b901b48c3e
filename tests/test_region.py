"""Regions: the least value of a linear function over a ball cut with a box, against linear and convex programs."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from assay.certification.region import Region
from assay.threats import L0, L1, L2, Linf
from bound_cases import moved, seeded

seeds = st.integers(0, 10**6)
NORMS = {"linf": Linf(), "l2": L2(), "l1": L1(), "l0": L0()}


def draw(norm: str, seed: int, d: int = 5, n: int = 3) -> tuple[Region, Tensor]:
    """Return regions in the unit box, some of whose centres lie on its faces, and slopes (n, s, d)."""
    g = seeded(seed)
    x = torch.rand(n, d, generator=g, dtype=torch.float64).mul(1.4).sub(0.2).clamp(0, 1)
    radius = torch.randint(0, d + 2, (n,), generator=g).double() if norm == "l0" else 2 * torch.rand(n, generator=g)
    slope = torch.randn(n, 4, d, generator=g, dtype=torch.float64) * (torch.rand(n, 4, d, generator=g) > 0.2)
    return Region.ball(x, radius.double(), norm, 0.0, 1.0), slope


def by_program(region: Region, slope: Tensor, k: int, s: int) -> float:
    """Return the least value of one slope over one region by an independent method."""
    x, a, r = region.x[k], slope[k, s], float(region.radius[k])
    low, high, d = region.low[k], region.high[k], region.x[k].numel()
    if region.norm == "linf":
        return float(linprog(a.numpy(), bounds=[*zip(low.tolist(), high.tolist(), strict=True)]).fun)
    if region.norm == "l1":  # z = x + p - q, sum(p + q) <= r
        limits = [*((0, 1 - v) for v in x.tolist()), *((0, v) for v in x.tolist())]
        found = linprog(torch.cat([a, -a]).numpy(), A_ub=[[1.0] * 2 * d], b_ub=[r], bounds=limits)
        return float(a @ x) + float(found.fun)
    if region.norm == "l0":
        gains = torch.minimum(a * -x, a * (1 - x))
        chosen = itertools.combinations(range(d), min(d, int(r)))
        return float(a @ x) + min(float(gains[list(c)].sum()) for c in chosen)
    return ball_in_box(a, x, r)


def ball_in_box(a: Tensor, x: Tensor, r: float) -> float:
    """Return min <a, z> over ||z - x||_2 <= r in the unit box: z = clip(x - t a) is optimal for the right t."""

    def at(t: float) -> Tensor:
        return (x - t * a).clamp(0, 1)

    low, high = 0.0, 1e9
    if float((at(high) - x).norm()) <= r:
        return float(a @ at(high))
    for _ in range(90):
        middle = (low + high) / 2
        low, high = (middle, high) if float((at(middle) - x).norm()) <= r else (low, middle)
    return float(a @ at(low))


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=30)
@given(seed=seeds)
def test_the_least_value_is_that_of_an_independent_program(norm: str, seed: int) -> None:
    region, slope = draw(norm, seed)
    found = region.least(slope)
    exact = torch.tensor([[by_program(region, slope, k, s) for s in range(4)] for k in range(3)], dtype=torch.float64)
    slack = 1e-6 if norm in ("l2", "linf") else 1e-9  # linf is rounded outward
    assert (found <= exact + 1e-9).all(), "never above"
    assert (found >= exact - slack * (1 + slope.abs().sum(2))).all(), "and close"


@pytest.mark.parametrize("norm", NORMS)
@given(seed=seeds)
def test_no_point_of_the_threat_lies_outside(norm: str, seed: int) -> None:
    region, slope = draw(norm, seed)
    g = seeded(seed)
    least = region.least(slope)
    for _ in range(20):
        z = moved(region, torch.randn(region.x.shape, generator=g, dtype=torch.float64), torch.ones(()), g)
        assert (NORMS[norm].size(z - region.x) <= region.radius * (1 + 1e-6) + 1e-6).all()
        assert (z >= region.low).all()
        assert (z <= region.high).all()
        assert ((slope @ z[..., None]).squeeze(-1) >= least - 1e-12).all()


def test_a_point_that_float32_puts_on_the_sphere_of_linf_lies_inside() -> None:
    x = torch.rand(10_000, 1, generator=seeded(0))
    eps = torch.full((10_000,), 8 / 255)
    region = Region.ball(x, eps, "linf", 0.0, 1.0)
    for z in ((x + 8 / 255).clamp(0, 1), (x - 8 / 255).clamp(0, 1)):
        assert (z.double() >= region.low).all()
        assert (z.double() <= region.high).all()


def test_a_radius_of_0_is_the_centre_and_a_large_one_the_box() -> None:
    a = torch.tensor([[[2.0, -1.0, 0.0]]], dtype=torch.float64)
    x = torch.tensor([[0.25, 0.5, 0.75]])
    for norm in NORMS:
        centre = Region.ball(x, torch.zeros(1), norm, 0.0, 1.0).least(a)
        assert math.isclose(float(centre), 0.0, abs_tol=1e-6), norm
        box = Region.ball(x, torch.full((1,), 100.0), norm, 0.0, 1.0).least(a)
        assert math.isclose(float(box), -1.0, abs_tol=1e-6), norm


def test_a_box_is_a_region_of_its_own() -> None:
    region = Region.between(torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[2.0, 1.5]]).double())
    assert region.least(torch.tensor([[[1.0, -2.0]]]).double()).item() == -3.0
    assert len(region.take(slice(0, 0))) == 0
