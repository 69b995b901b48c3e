"""Steps without a gradient: plain attacks get nothing through them, and with a stand-in they get all there is."""

import pytest
import torch
from torch import Tensor, nn

from assay import BPDA, Model, Threat
from assay.attacks import APGD, FGSM, PGD, Runnable
from assay.attacks.losses import margin
from assay.attacks.testing import Line, check_attack
from assay.core.errors import ModelError, ModelOutputError

LEVELS = 4


def rounded(x: Tensor) -> Tensor:
    return (x * LEVELS).round() / LEVELS


def thermometer(x: Tensor) -> Tensor:
    """Write each value (b, n) as one bit a threshold: (b, LEVELS, n)."""
    at = (torch.arange(LEVELS) + 0.5) / LEVELS
    return (x[:, None] > at[:, None].to(x)).to(x.dtype)


def soft_thermometer(x: Tensor) -> Tensor:
    at = (torch.arange(LEVELS) + 0.5) / LEVELS
    return ((x[:, None] - at[:, None].to(x)) * LEVELS + 0.5).clamp(0, 1)


class Blocks(nn.Module):
    """Rounds the cosine coefficients of blocks of eight values: what JPEG does to a row of pixels."""

    def __init__(self, step: float = 0.5) -> None:
        super().__init__()
        k, n = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        basis = torch.cos(torch.pi * (n + 0.5) * k / 8) * 0.5
        basis[0] /= 2**0.5
        self.register_buffer("basis", basis)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        basis = self.basis.to(x)
        coefficients = x.unflatten(1, (-1, 8)) @ basis.T
        return ((coefficients / self.step).round() * self.step @ basis).flatten(1)


ATTACKS = [FGSM(), PGD(steps=20), APGD(steps=20), APGD(steps=20, loss=margin)]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize(
    ("step", "stand_in", "head"),
    [(rounded, None, Line()), (thermometer, soft_thermometer, Line())],
    ids=["rounding", "thermometer"],
)
def test_the_least_distance_is_reached_through_the_stand_in_and_by_nothing_else(
    attack: Runnable, step: object, stand_in: object, head: nn.Module
) -> None:
    """All values are 3/4, which is what they are rounded to down to 5/8; below, half of the thresholds are passed."""
    x, y = torch.full((3, 16), 0.75), torch.ones(3, dtype=torch.long)
    bare = nn.Sequential(_Plain(step), _Down(), head)
    repaired = nn.Sequential(BPDA(step, stand_in), _Down(), head)
    wide, close = Threat("linf", 0.126), Threat("linf", 0.124)
    assert not FGSM()(bare, x, y, wide).success.any()
    assert not attack(repaired, x, y, close).success.any()
    assert attack(repaired, x, y, wide).success.all()


class _Plain(nn.Module):
    def __init__(self, step: object) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x.detach())


class _Down(nn.Module):
    """Lowers inputs, so that one level less than 3/4 is the other class of :class:`Line`."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.1


def test_a_compression_in_front_of_a_plane_is_broken_where_the_plane_alone_is() -> None:
    """The constant part of each block carries the mean: the answers differ from the bare plane's by its rounding."""
    x, y = torch.full((2, 32), 0.6), torch.ones(2, dtype=torch.long)
    defended = nn.Sequential(BPDA(Blocks()), Line())
    bare = nn.Sequential(Blocks(), Line())
    assert not PGD(start="clean")(bare, x, y, Threat("linf", 0.2)).success.any()
    assert PGD(start="clean")(defended, x, y, Threat("linf", 0.2)).success.all()
    assert not PGD(start="clean")(defended, x, y, Threat("linf", 0.08)).success.any()


def test_values_are_those_of_the_step_to_the_last_bit() -> None:
    x = torch.rand(5, 7, dtype=torch.float64)
    assert torch.equal(BPDA(rounded)(x.requires_grad_()), rounded(x))
    assert torch.equal(BPDA(thermometer, soft_thermometer)(x), thermometer(x))
    assert torch.equal(BPDA(rounded)(x.detach()), rounded(x))
    overflowing = BPDA(rounded, lambda x: x / 0)  # the stand-in's value plays no part
    assert torch.equal(overflowing(x), rounded(x))


def test_the_gradient_is_that_of_the_stand_in() -> None:
    x, seed = torch.rand(3, 4, requires_grad=True), torch.rand(3, 4)
    (through,) = torch.autograd.grad(BPDA(rounded, lambda v: v**3)(x), x, seed)
    assert torch.allclose(through, 3 * x.detach() ** 2 * seed)
    (half,) = torch.autograd.grad(BPDA(lambda v: v.half().round())(x), x, seed.half())
    assert half.dtype == x.dtype


def test_steps_with_parameters_are_frozen_and_put_back_with_the_model() -> None:
    step = nn.Linear(4, 4)
    net = nn.Sequential(BPDA(step, nn.Identity()), Line()).train()
    PGD(steps=2)(net, torch.rand(2, 4), torch.zeros(2, dtype=torch.long), Threat("linf", 0.1))
    assert all(p.requires_grad for p in net.parameters())
    assert step.weight.grad is None
    assert step.training


def test_an_attack_keeps_its_contract_through_a_step_without_gradient() -> None:
    net = nn.Sequential(nn.Flatten(), BPDA(lambda x: (x * 50).round() / 50), nn.Linear(108, 4))
    with torch.no_grad():
        net[2].weight.copy_(torch.sin(torch.arange(432.0)).view(4, 108) / 10)
    check_attack(PGD(steps=20), norms=("linf",), model=Model(net))


@pytest.mark.parametrize(
    ("step", "stand_in", "says"),
    [
        (thermometer, None, r"\(2, 4, 3\).*the identity's \(2, 3\)"),
        (thermometer, lambda x: x[:, None], r"\(2, 4, 3\).*\(2, 1, 3\)"),
        (lambda x: x > 0.5, None, "torch.bool"),
        (lambda x: x.tolist(), None, "list"),
    ],
)
def test_a_step_and_a_stand_in_that_do_not_fit_are_refused(step: object, stand_in: object, says: str) -> None:
    with pytest.raises(ModelOutputError, match=says):
        BPDA(step, stand_in)(torch.rand(2, 3, requires_grad=True))


def test_the_refusal_reaches_whoever_calls_an_attack() -> None:
    net = nn.Sequential(BPDA(thermometer), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(ModelError, match="the identity's"):
        PGD(steps=2)(net, torch.rand(2, 3), torch.zeros(2, dtype=torch.long), Threat("linf", 0.1))
