"""Adversarial inputs that survive being saved: every attack under ``quantize``, through a PNG file and back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from assay import attacks, evaluate
from assay.attacks import APGD, PGD, Bisect, Cascade, Restarts, Result, Runnable, Targets
from assay.attacks.testing import Line, _small_net
from assay.core.errors import DataError, ThreatError
from assay.core.levels import at_level
from assay.core.random import Draws
from assay.data.png import read_png, write_png
from assay.evaluation.block import _shrink
from assay.models import Door, Model
from assay.threats import Box, Problem, Threat
from assay.threats.problem import exact_size
from test_attacks import SHORT

SHAPE = (3, 6, 6)
EPS: dict[str, float] = {"linf": 0.08, "l2": 0.6, "l1": 6.0, "l0": 12.0}
"""In units of the width of the box."""

BOXES = [Box(), Box(0, 255), Box(-1, 1)]
NET = _small_net(SHAPE)


class InBox(nn.Module):
    """The small network, for inputs in another box."""

    def __init__(self, box: Box) -> None:
        super().__init__()
        self.net, self.box = NET, box

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.box.lo) / self.box.width)


def clean(box: Box, steps: int = 255, b: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return inputs whose values are multiples of width / steps: on the grid of 8 bits where steps is 255."""
    k = (steps * (0.2 + 0.6 * Draws.of(3, torch.arange(b)).uniform(SHAPE, torch.float64))).round()
    x = at_level(k.to(dtype), box.lo, box.hi, steps)
    return x, InBox(box)(x.float()).argmax(1)


def eps_of(norm: str, box: Box) -> float:
    return EPS[norm] * (1 if norm == "l0" else box.width)


def check_files(r: Result, x: Tensor, threat: Threat, box: Box, met: Any, folder: Path) -> None:
    """Save every success, and look at what is read back."""
    for i in r.success.nonzero()[:, 0].tolist():
        write_png(folder / f"{i}.png", r.x[i], box.lo, box.hi)
        back = read_png(folder / f"{i}.png", box.lo, box.hi, r.x.dtype)
        assert torch.equal(back, r.x[i])
        assert met(InBox(box)(back[None].float()).argmax(1), i)
        size = exact_size(threat.norm, back[None], x[i : i + 1])
        assert threat.eps is None or float(size) <= threat.eps
        assert float(size) == pytest.approx(float(r.size[i]), rel=1e-6)


REGISTERED = [(n, norm) for n in SHORT for norm in attacks.ATTACKS.traits(n)["norm"]]


@pytest.mark.parametrize(("name", "norm"), REGISTERED)
def test_what_any_attack_finds_is_what_is_read_back_and_fools(name: str, norm: str, tmp_path: Path) -> None:
    attack, (x, y) = attacks.get(name, **SHORT[name]), clean(Box())
    sizes: tuple[float | None, ...] = (EPS[norm],)
    if getattr(attack, "any_size", False):
        sizes = (None,) if getattr(attack, "sizeless", False) else (None, EPS[norm])
    found = 0
    for eps in sizes:
        threat = Threat(norm, eps, quantize=8)
        r = attack(NET, x, y, threat)
        check_files(r, x, threat, Box(), lambda guess, i: guess != y[i], tmp_path)
        found += int(r.success.sum())
    wanted = (y + 1) % 4
    t = attack(NET, x, wanted, replace(threat, targeted=True))
    check_files(t, x, threat, Box(), lambda guess, i: guess == wanted[i], tmp_path)
    found += int(t.success.sum())
    assert found, "a budget of this size is enough for something"


@pytest.mark.parametrize("box", BOXES, ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("steps", [255, 256, 1000], ids=["on the grid", "256ths", "thousandths"])
def test_the_ball_is_kept_to_whatever_the_box_and_wherever_the_clean_input_is(
    box: Box, norm: str, steps: int, tmp_path: Path
) -> None:
    for dtype in (torch.float32, torch.float64):
        x, y = clean(box, steps, dtype=dtype)
        threat = Threat(norm, eps_of(norm, box), quantize=8)
        r = APGD(steps=12)(Model(InBox(box), box), x, y, threat)
        check_files(r, x, threat, box, lambda guess, i, y=y: guess != y[i], tmp_path)
        assert r.success.any()


@pytest.mark.parametrize(
    "attack",
    [
        Bisect(PGD(steps=8), rounds=6),
        Restarts(PGD(steps=4), 2),
        Targets(APGD(steps=8), 2),
        Cascade((PGD(steps=2), Bisect(Targets(PGD(steps=5), 2), rounds=4))),
    ],
    ids=lambda a: type(a).__name__,
)
def test_combinations_keep_to_the_grid_too(attack: Runnable, tmp_path: Path) -> None:
    x, y = clean(Box())
    for norm in ("linf", "l2"):
        threat = Threat(norm, EPS[norm], quantize=8)
        r = attack(NET, x, y, threat)
        check_files(r, x, threat, Box(), lambda guess, i: guess != y[i], tmp_path)
        assert r.success.any()


STEPS_BELOW_A_LEVEL = {"trust-region"}
"""Attacks that judge a step by what it gains, and shorten it while rounding undoes it."""


def test_the_least_number_of_levels_is_found() -> None:
    """All values are 150 of 255; the mean falls below a half where all fall by 23 levels, and not by 22."""
    x, y = torch.full((2, 1, 4, 4), 150 / 255), torch.ones(2, dtype=torch.long)
    for name in set(attacks.names(norm="linf", kind="minimal", access="gradient")) - STEPS_BELOW_A_LEVEL:
        r = attacks.get(name)(Line(), x, y, Threat("linf", quantize=8))
        assert r.success.all(), name
        assert (r.size * 255 < 23.01).all(), (name, r.size * 255)
    assert PGD()(Line(), x, y, Threat("linf", 23.1 / 255, quantize=8)).success.all()
    assert not PGD()(Line(), x, y, Threat("linf", 22.9 / 255, quantize=8)).success.any()
    assert PGD()(Line(), x, y, Threat("linf", 22.9 / 255)).success.all()  # off the grid, 22.5 levels are enough


def problem(x: Tensor, norm: str, eps: float | None, box: Box, quantize: int = 8) -> Problem:
    rows = torch.arange(len(x))
    return Problem.pose(x, torch.zeros_like(rows), Threat(norm, eps, box, quantize=quantize), Draws.of(0, rows), rows)


@given(
    st.integers(0, 10**6),
    st.sampled_from([*BOXES, Box(-2.1, 2.6)]),
    st.sampled_from(["linf", "l2", "l1"]),
    st.sampled_from([0.5, 1.0, 2.0, 8.0, 16.0, 76.5]),
    st.sampled_from([1, 4, 8]),
)
def test_snapped_points_are_on_the_grid_inside_the_ball_and_stay_where_they_are(
    seed: int, box: Box, norm: str, levels: float, bits: int
) -> None:
    steps = 2**bits - 1
    draws = Draws.of(seed, torch.arange(3))
    x0 = at_level(draws.integers(steps + 1, (40,)).float(), box.lo, box.hi, steps)
    eps = levels / steps * box.width * {"linf": 1, "l2": 40**0.5, "l1": 40}[norm]
    p = problem(x0, norm, min(eps, p_max(norm, box)), box, bits)
    for x in (p.start(), p.project(box.lo + box.width * draws.fold(1).uniform((40,))), p.upper, p.lower, x0):
        inside = p.project(x)
        snapped = p.snap(inside)
        k = (snapped.double() - box.lo) / box.width * steps
        assert torch.allclose(k, k.round(), atol=1e-3)
        assert p.allows(snapped).all()
        assert (exact_size(p.norm, snapped, x0) <= p.radius.double()).all()
        assert torch.equal(p.snap(snapped), snapped) or norm != "linf"
        assert torch.equal(p.unbounded().snap(snapped), snapped)
        gap = (snapped - inside).abs() / box.width * steps
        assert float(gap.max()) <= 1.001
    assert torch.equal(p.snap(x0), x0)


def p_max(norm: str, box: Box) -> float:
    return box.width * {"linf": 1, "l2": 40**0.5, "l1": 40}[norm]


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_little_of_a_round_ball_is_lost_to_rounding(norm: str) -> None:
    """Rounding all values towards the clean input would lose half a level of each, a fifth of this ball."""
    x0 = at_level(Draws.of(1, torch.arange(4)).integers(200, (3, 32, 32)).float() + 20, 0, 1)
    n = x0[0].numel()
    p = problem(x0, norm, 2.5 / 255 * {"l2": n**0.5, "l1": n}[norm], Box())
    x = p.start("sphere")
    kept, moved = p.size(p.snap(x)) / p.radius, (p.snap(x) - x).flatten(1).abs().mean(1) * 255
    assert (kept > 0.99).all()
    assert (moved < 0.27).all()  # rounding to the nearest moves by a quarter of a level


def test_small_balls_around_values_between_two_levels_hold_nothing() -> None:
    x = torch.full((1, 1, 4, 4), 130.5 / 255)
    r = PGD(steps=5)(Line(), x, torch.ones(1, dtype=torch.long), Threat("linf", 0.4 / 255, quantize=8))
    assert not r.success.any()
    assert torch.equal(r.x, x)


def test_shrinking_stays_on_the_grid() -> None:
    x, y = clean(Box())
    for norm in ("linf", "l2"):
        threat = Threat(norm, EPS[norm], quantize=8)
        r = PGD(steps=20)(NET, x, y, threat, full=True)
        at = r.success.nonzero()[:, 0]
        assert len(at)
        with Model(NET).frozen("cpu") as live:
            p = problem(x[at], norm, EPS[norm], Box())
            p = Problem.pose(x[at], y[at], replace(threat, box=Box()), p.draws)
            small, z = _shrink(Door(live, len(at)), p, r.x[at])
        assert torch.equal(small, at_level((small * 255).round(), 0, 1))
        assert (z.argmax(1) != y[at]).all()
        assert (p.size(small) <= p.size(r.x[at]) * 1.001).all()


def test_an_evaluation_at_8_bits_loses_nothing_to_rounding(tmp_path: Path) -> None:
    x, y = clean(Box(), b=12)
    result = evaluate(NET, (x, y), Threat("linf", 0.06, quantize=8), "quick", out=tmp_path / "run", progress=False)
    assert result.run.manifest["identity"]["threat"]["quantize"] == 8
    assert "lost-at-8-bit" not in {f.code for f in result.findings}
    assert "fooled" in result.samples["status"].to_pylist()


def test_files_hold_images_only_and_appear_whole(tmp_path: Path) -> None:
    for shape in ((2, 4, 4), (4, 4), (3,)):
        with pytest.raises(DataError, match="cannot be saved as PNG"):
            write_png(tmp_path / "x.png", torch.zeros(shape))
    write_png(tmp_path / "x.png", torch.full((3, 4, 5), 0.5))
    write_png(tmp_path / "x.png", torch.full((1, 4, 5), 1.0))
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert torch.equal(read_png(tmp_path / "x.png"), torch.ones(1, 4, 5))
    assert read_png(tmp_path / "x.png", -1, 3, torch.float64).unique().tolist() == [3.0]


def test_levels_are_read_as_data_of_type_uint8_are(tmp_path: Path) -> None:
    from assay import load_data

    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    for box in (*BOXES, Box(-2.1, 2.6)):
        x = load_data((levels, np.zeros(1, dtype=np.int64))).scaled(box.lo, box.hi).batch(torch.arange(1))
        assert torch.equal(x, at_level(torch.from_numpy(levels).float(), box.lo, box.hi))
        assert torch.equal(problem(x, "linf", None, box).snap(x), x)


@pytest.mark.parametrize("bits", [0, 17, -8, 2.5])
def test_bits_that_make_no_sense_are_refused(bits: Any) -> None:
    with pytest.raises(ThreatError, match="bits from 1 to 16"):
        Threat("linf", 0.1, quantize=bits)
