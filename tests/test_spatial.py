"""Rotations and shifts: what they do to an image, and how far the worst one is found to be."""

import pytest
import torch
from torch import Tensor, nn

from assay import attacks
from assay.attacks import Spatial, Targets
from assay.attacks.testing import check_attack
from assay.core.errors import AssayError, DataError, ThreatError
from assay.core.random import Draws
from assay.models import Model
from assay.threats import Box, Problem, Threat

SIDE = 20


def problem(x: Tensor, box: Box | None = None) -> Problem:
    rows = torch.arange(len(x))
    return Problem.pose(x, rows, Threat("linf", None, box or Box()), Draws.of(0, rows))


def pose(*values: float) -> Tensor:
    return torch.tensor([values])


def spot(row: int, column: int, half: int = 1, b: int = 2) -> Tensor:
    """Return dark images with one bright square."""
    x = torch.zeros(b, 1, SIDE, SIDE)
    x[:, :, row - half : row + half, column - half : column + half] = 1
    return x


# The images.


@pytest.mark.parametrize("box", [Box(), Box(-1, 1), Box(0, 255)], ids=str)
def test_turning_and_moving_are_what_they_are_called(box: Box) -> None:
    x = box.lo + box.width * Draws.of(1, torch.arange(1)).uniform((3, 8, 8))
    p, attack = problem(x, box), Spatial(max_rotation=90, max_shift=0.25)
    close = {"rtol": 0, "atol": 1e-5 * box.width}
    assert torch.allclose(attack.warp(p, pose(0, 0, 0)), x, **close)
    assert torch.allclose(attack.warp(p, pose(-1, 0, 0)), x.rot90(1, (2, 3)), **close)
    assert torch.allclose(attack.warp(p, pose(1, 0, 0)), x.rot90(-1, (2, 3)), **close)
    down, right = attack.warp(p, pose(0, 1, 0)), attack.warp(p, pose(0, 0, 1))
    assert torch.allclose(down[:, :, 2:], x[:, :, :-2], **close)
    assert torch.allclose(right[:, :, :, 2:], x[:, :, :, :-2], **close)
    assert torch.allclose(down[:, :, :2], torch.full_like(x[:, :, :2], box.lo), **close)
    assert torch.allclose(right[:, :, :, :2], torch.full_like(x[..., :2], box.lo), **close)


def test_an_oblong_image_is_turned_without_being_stretched() -> None:
    x = torch.zeros(1, 1, 8, 20)
    x[:, :, 3:5, 9:15] = 1  # a bar beside the middle, six long and two wide
    turned = Spatial(max_rotation=90).warp(problem(x), pose(1, 0, 0))
    assert torch.allclose(turned.sum((0, 1, 3)), torch.tensor([0, 0, 0, 2.0, 2, 2, 2, 2]), atol=1e-4)
    assert (turned[0, 0].sum(0) > 0.5).nonzero()[:, 0].tolist() == [9, 10]


# The worst pose.


class Right(nn.Module):
    """The second class is an image whose light has its middle to the right of a line (in shares of the width)."""

    def __init__(self, line: float) -> None:
        super().__init__()
        self.line = line

    def forward(self, x: Tensor) -> Tensor:
        where = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
        light = x.sum((1, 2))
        z = (light * where.to(x)).sum(1) / light.sum(1).clamp_min(1e-6) - self.line
        return torch.stack([-z, z], 1)


@pytest.mark.parametrize("attack", [Spatial(max_shift=0.2), Spatial(max_shift=0.2, random=20)], ids=["grid", "random"])
def test_the_least_shift_that_is_needed_is_found(attack: Spatial) -> None:
    x, y = spot(10, 10), torch.zeros(2, dtype=torch.long)
    assert attack(Right(0.195), x, y, Threat("l2")).success.all()
    assert not attack(Right(0.205), x, y, Threat("l2")).success.any()


def test_the_least_rotation_that_is_needed_is_found() -> None:
    """A spot above the middle, three tenths of the side away, comes to the right by sin(angle) of that."""
    x, y = spot(4, 10), torch.zeros(2, dtype=torch.long)
    far = 0.3 * torch.sin(torch.tensor(30.0).deg2rad())
    attack = Spatial(max_shift=0.0)
    assert attack(Right(float(far) * 0.97), x, y, Threat("l2")).success.all()
    assert not attack(Right(float(far) * 1.03), x, y, Threat("l2")).success.any()


def test_gradient_steps_find_what_lies_between_the_poses_of_the_grid() -> None:
    class Window(nn.Module):
        """The second class is light whose middle is within two hundredths of a line."""

        def forward(self, x: Tensor) -> Tensor:
            z = 0.02 - Right(0.13)(x)[:, 1].abs()
            return torch.stack([-z, z], 1)

    x, y = spot(10, 10), torch.zeros(2, dtype=torch.long)
    coarse = Spatial(max_shift=0.2, rotations=1, shifts=3, steps=1, rel_step=1e-6)
    assert not coarse(Window(), x, y, Threat("linf")).success.any()
    fine = Spatial(max_shift=0.2, rotations=1, shifts=3, steps=10)
    r = fine(Window(), x, y, Threat("linf"))
    assert r.success.all()
    assert (r.backwards > 0).all()


def test_a_model_without_a_gradient_is_searched_by_the_grid() -> None:
    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (Right(0.15)(x.detach()) * 100).round()

    x, y = spot(10, 10), torch.zeros(2, dtype=torch.long)
    r = Spatial(max_shift=0.2)(Blind(), x, y, Threat("linf"))
    assert r.success.all()
    assert (r.backwards == 0).all()


def test_mild_poses_come_first() -> None:
    grid = Spatial(rotations=5, shifts=3).grid()
    sizes = [max(map(abs, p)) for p in grid]
    assert grid[0] == (0.0, 0.0, 0.0)
    assert sizes == sorted(sizes)
    assert len(grid) == len(set(grid)) == 5 * 3 * 3
    x, y = spot(10, 10), torch.zeros(2, dtype=torch.long)
    attack = Spatial(max_rotation=0, max_shift=0.4, shifts=9)
    r = attack(Right(0.15), x, y, Threat("l2"))
    assert torch.allclose(r.x, attack.warp(problem(x), pose(0, 0, 0.5).expand(2, 3)), atol=1e-5)


def test_a_wanted_class_is_reached_and_targets_work() -> None:
    x = spot(10, 10)
    wanted = Spatial(max_shift=0.2)(Right(0.15), x, torch.ones(2, dtype=torch.long), Threat("linf", targeted=True))
    assert wanted.success.all()
    both = Targets(Spatial(max_shift=0.2), 1)(Right(0.15), x, torch.zeros(2, dtype=torch.long), Threat("linf"))
    assert both.success.all()


def test_nothing_that_only_the_interpolation_does_counts_as_a_rotation_of_nothing() -> None:
    x, y = spot(10, 10), torch.zeros(2, dtype=torch.long)
    r = Spatial(max_rotation=0, max_shift=0)(Right(0.001), x, y, Threat("linf"))
    assert not r.success.any()
    assert torch.equal(r.x, x)


def test_the_costs_are_those_that_are_said() -> None:
    attack = Spatial(rotations=3, shifts=2, steps=4)
    r = attack(Right(0.9), spot(10, 10), torch.zeros(2, dtype=torch.long), Threat("linf"))
    assert attack.tried == 3 * 2 * 2 + 1  # with the image as it is, which this grid does not hold
    assert r.forwards.tolist() == [attack.tried + 4 + 1] * 2
    assert r.backwards.tolist() == [4] * 2


def test_the_contract_holds_for_random_poses_and_other_boxes() -> None:
    check_attack(Spatial(random=4, steps=3), norms=("l2",))

    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Right(0.15)(x / 255)

    x, y = spot(10, 10) * 255, torch.zeros(2, dtype=torch.long)
    r = Spatial(max_shift=0.2)(Model(Wide(), Box(0, 255)), x, y, Threat("linf", quantize=8))
    assert r.success.all()
    assert torch.equal(r.x, r.x.round())


def test_what_it_is_not_made_for_is_refused() -> None:
    x, y = spot(10, 10), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ThreatError, match="without an eps"):
        Spatial()(Right(0.1), x, y, Threat("linf", 0.1))
    with pytest.raises(DataError, match="images"):
        Spatial()(Right(0.1), x.flatten(1), y, Threat("linf"))
    with pytest.raises(AssayError, match="steps >= 1"):
        Spatial(steps=0)(Right(0.1), x, y, Threat("linf"))
    for how in ({"max_rotation": 200.0}, {"max_shift": -0.1}, {"rotations": 0}, {"random": -1}):
        with pytest.raises(AssayError, match="max_shift a share"):
            Spatial(**how)  # type: ignore[arg-type]
    assert attacks.get("spatial", max_rotation="10", rotations="3") == Spatial(max_rotation=10.0, rotations=3)
