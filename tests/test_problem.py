"""The problem posed for a batch: its bounds are exact, and cutting it changes nothing."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.core.random import Draws
from assay.threats import NORMS, Box, Goal, Problem, Threat
from assay.threats.problem import exact_size

EPS = st.sampled_from([8 / 255, 4 / 255, 0.3, 0.1, 0.7, 0.35, 1e-3, 1e-7]) | st.floats(1e-6, 1.0)


def pose(x: Tensor, threat: Threat, y: int = 0, seed: int = 0) -> Problem:
    rows = torch.arange(len(x))
    return Problem.pose(x, torch.full_like(rows, y), threat, Draws.of(seed, rows))


@given(st.integers(0, 10**6), EPS, st.sampled_from([torch.float32, torch.float64]))
def test_linf_bounds_are_inside_the_ball_in_exact_arithmetic_and_not_far_inside(
    seed: int, eps: float, dtype: torch.dtype
) -> None:
    x0 = torch.rand(1, 12, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    x0[0, :3] = torch.tensor([0.0, 1.0, 1e-12], dtype=dtype)
    p = pose(x0, Threat("linf", eps, Box()))
    for end in (p.lower, p.upper):
        for x, clean in zip(end[0].tolist(), x0[0].tolist(), strict=True):
            size = abs(Fraction(x) - Fraction(clean))
            assert size <= Fraction(eps)
            assert x in (0.0, 1.0) or size >= Fraction(eps) * (1 - Fraction(1, 10**6)) - Fraction(1, 10**7)
            assert 0 <= x <= 1
    assert (exact_size(p.norm, p.lower, x0) <= eps).all()
    assert p.allows(p.lower).all()
    assert p.allows(p.upper).all()


@given(
    st.integers(0, 10**6), EPS, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([torch.float32, torch.float64])
)
def test_projected_points_are_allowed_in_exact_measure(seed: int, eps: float, norm: str, dtype: torch.dtype) -> None:
    """Also where rounding many coordinates adds up: a thousand coordinates, each moved by a little."""
    eps = max(eps, 1e-5)  # below, float64 sums of a thousand numbers near 1 are no longer exact enough
    g = torch.Generator().manual_seed(seed)
    x0 = torch.rand(2, 1000, generator=g, dtype=dtype)
    p = pose(x0, Threat(norm, eps, Box()))
    for far in (1.0, eps, eps / 30, eps / 900):
        x = p.project(x0 + far * torch.randn(2, 1000, generator=g, dtype=dtype))
        assert (exact_size(p.norm, x, x0) <= eps).all()
        assert p.allows(x).all()
    assert p.allows(p.start()).all()
    assert torch.equal(p.project(x0), x0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_size_is_wanted_where_no_eps_is_given(norm: str) -> None:
    x0 = torch.rand(3, 2, 4)
    p = pose(x0, Threat(norm, None, Box()))
    assert p.minimal
    assert p.radius.isinf().all()
    assert torch.equal(p.project(torch.full_like(x0, 2.0)), torch.ones_like(x0))
    assert p.allows(p.start()).all()
    bounded = p.with_radius(torch.tensor([1.0, 2.0, 3.0]) if norm == "l0" else torch.tensor([0.1, 0.2, 0.3]))
    assert not bounded.minimal
    sizes = bounded.size(bounded.project(torch.ones_like(x0)))
    assert (sizes <= bounded.radius).all()
    assert (sizes >= bounded.radius * 0.999).all()


def test_taking_rows_takes_everything_of_them() -> None:
    x0, y, order = torch.rand(4, 2, 3), torch.tensor([3, 1, 2, 0]), torch.tensor([2, 0])
    draws = Draws.of(5, torch.arange(4))
    p = Problem.pose(x0, y, Threat("linf", 0.1, Box()), draws).stage(4).toward(y + 1)
    q = (
        Problem.pose(x0[order], y[order], Threat("linf", 0.1, Box()), draws.take(order), order)
        .stage(4)
        .toward(y[order] + 1)
    )
    cut = p.take(order)
    for name in ("x0", "lower", "upper", "radius", "rows"):
        assert torch.equal(getattr(cut, name), getattr(q, name)), name
    assert torch.equal(cut.start(), q.start())
    assert torch.equal(cut.goal.label, q.goal.label)
    assert torch.equal(cut.goal.target, q.goal.target)
    assert len(cut) == 2


def test_stages_draw_anew_and_radii_may_differ_by_sample() -> None:
    x0 = torch.full((2, 50), 0.5)
    p = pose(x0, Threat("linf", 0.1, Box()))
    assert not torch.equal(p.stage(0).start(), p.stage(1).start())
    assert torch.equal(p.stage(1).start(), p.stage(1).start())
    wide = p.with_radius(torch.tensor([0.01, 0.4]))
    sizes = wide.size(wide.start())
    assert sizes[0] <= 0.01
    assert 0.3 < sizes[1] <= 0.4


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_step_stays_in_the_ball_in_any_memory_format(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x0 = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for norm in ("linf", "l2", "l1"):
        p = pose(x0, Threat(norm, 0.5, Box()))
        grad = torch.sin(37 * x0).contiguous(memory_format=layout)
        step = p.ascend(x0.contiguous(memory_format=layout), grad, p.full(0.5))
        assert torch.equal(step, p.ascend(x0, torch.sin(37 * x0), p.full(0.5)))
        assert p.allows(step).all()
        assert ((step - x0) * grad).sum() > 0


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal(torch.tensor([0, 1])), [False, True]),
        (Goal(None, torch.tensor([0, 1])), [True, False]),
        (Goal(torch.tensor([1, 1]), torch.tensor([2, 2])), [True, True]),
    ],
    ids=["leave the label", "reach the target", "leave it by way of a target"],
)
def test_goals(goal: Goal, met: list[bool]) -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 0.0]])
    assert goal.reached(logits).tolist() == met
    assert goal.take(torch.tensor([1])).reached(logits[1:]).tolist() == met[1:]
