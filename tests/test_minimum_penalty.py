"""Penalty attacks and walks along the boundary, against the least sizes of linear models and of tiny networks."""

import pytest
import torch
from torch import Tensor, nn

from assay import Threat
from assay.attacks import EAD, BrendelBethge, CarliniWagner, Runnable, Targets
from assay.attacks.minimum.region import Region
from assay.core.types import choose
from assay.models import Model
from assay.threats.norms import NORMS
from minimal_cases import Planes, TinyNet, by_search, inputs, labels, least

# The attack, its norm, and by what factor it may miss the least size.
CASES: list[tuple[Runnable, str, float]] = [
    (CarliniWagner(steps=15, rounds=20, rate=0.1), "l2", 1.01),
    (EAD(), "l1", 1.01),
    (BrendelBethge(steps=60), "l2", 1.01),
    (BrendelBethge(steps=60), "l1", 1.01),
    (BrendelBethge(steps=60), "linf", 1.01),
    (BrendelBethge(steps=60), "l0", 1.0),
]

each_case = pytest.mark.parametrize(
    ("attack", "norm", "slack"), CASES, ids=lambda v: v if isinstance(v, str) else type(v).__name__
)


@each_case
@pytest.mark.parametrize("shape", [(12,), (2, 9), (3, 4, 4)], ids=["vectors", "sequences", "colour"])
def test_the_least_size_of_a_linear_model_is_reached(
    attack: Runnable, norm: str, slack: float, shape: tuple[int, ...]
) -> None:
    net = Planes(shape, 2, seed=2)
    x = inputs(shape)
    y = labels(net, x)
    exact = least(net, x, y, norm)
    size = attack(net, x, y, Threat(norm)).size.double()
    assert (size <= slack * exact).all()
    assert (size >= 0.9999 * exact).all()


def test_a_boundary_nearby_is_not_overshot_in_the_first_round() -> None:
    """Steps fit what a linear model would need, so that eight are enough to get there and stay there."""
    net, x = Planes((3, 8, 8), 2, seed=2), inputs((3, 8, 8))
    net.bias.data += net.bias.new_tensor([0.0, 1.0]) * (-net(x).diff(dim=1).detach().amax() - 0.001)
    y = labels(net, x)
    attack, exact = CarliniWagner(steps=8, rounds=1), least(net, x, y, "l2")
    nearest = exact.argmin()
    assert exact[nearest] < 0.002
    assert attack(net, x, y, Threat("l2")).size[nearest] < 2 * exact[nearest]


@each_case
def test_a_target_one_sample_and_double_precision_make_no_difference(attack: Runnable, norm: str, slack: float) -> None:
    net = Planes((1, 5, 4), 2, seed=2)
    x = inputs((1, 5, 4), b=1, dtype=torch.float64)
    y = labels(net, x)
    size = attack(net, x, 1 - y, Threat(norm, targeted=True)).size
    assert size.dtype == torch.float64
    assert (size <= slack * least(net, x, y, norm)).all()


@each_case
def test_the_nearest_of_many_rivals_is_found_by_trying_them_all(attack: Runnable, norm: str, slack: float) -> None:
    """A walk to one rival ends at the nearest point of that rival: with many, that is a local minimum."""
    net = Planes((2, 9), 4, seed=5)
    x = inputs((2, 9), b=2)
    y = labels(net, x)
    size = Targets(attack, 3)(net, x, y, Threat(norm)).size.double()
    assert (size <= slack * least(net, x, y, norm)).all()


@each_case
def test_a_model_in_bfloat16_is_attacked(attack: Runnable, norm: str, slack: float) -> None:
    """Its margins come in steps, so that the least size is that of the float32 model up to a few of them."""
    net = Planes((12,), 2, seed=2, scale=3.0)
    x = inputs((12,))
    y = labels(net, x)

    class Half(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            z = net(v)
            return (z - z.mean(1, keepdim=True)).bfloat16()

    r = attack(Model(Half()), x, y, Threat(norm))
    assert r.success.all()
    assert (r.size.double() <= 1.1 * least(net, x, y, norm).clamp_min(0.01)).all()


@pytest.mark.parametrize(
    ("attack", "norm", "slack", "share"),
    [
        (Targets(CarliniWagner(), 2), "l2", 1.02, 0.9),
        (EAD(), "l1", 1.1, 0.85),
        (BrendelBethge(steps=200, walk=40), "l2", 1.02, 1.0),
        (BrendelBethge(steps=120, walk=40), "l1", 1.02, 0.95),
        (BrendelBethge(steps=120, walk=40), "linf", 1.02, 1.0),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_most_samples_of_tiny_relu_networks_get_what_exhaustive_search_finds(
    attack: Runnable, norm: str, slack: float, share: float
) -> None:
    """Descent that starts at the clean input ends in a local minimum at some; walks from many sides at few."""
    ratios = []
    for seed in (0, 1):
        net, x = TinyNet(3, seed), inputs((2,), b=20, seed=seed)
        y = labels(net, x)
        exact = by_search(net, x, y, norm, points=301)
        ratios.append(attack(net, x, y, Threat(norm)).size.double() / exact)
    ratio = torch.cat(ratios)
    assert ratio.isfinite().all()
    assert ratio.median() < 1.01
    assert (ratio < slack).double().mean() >= share


@pytest.mark.parametrize("norm", ["l2", "l1", "linf", "l0"])
def test_a_step_of_the_walk_stays_on_the_plane_in_its_trust_region_and_in_the_box(norm: str) -> None:
    region = a_region()
    z = region.smallest(NORMS[norm])
    assert ((z >= region.lo) & (z <= region.hi)).all()
    assert ((z - region.d).norm(dim=1) <= region.radius * (1 + 1e-9)).all()
    off = (region.normal * (z - region.d)).sum(1) - region.aim
    assert (off.abs() <= 2e-3 * region.radius).all(), "the plane is within reach"
    assert (NORMS[norm].size(z) <= NORMS[norm].size(region.d)).all()


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_no_random_point_of_a_region_is_smaller(norm: str) -> None:
    """Points of the plane and of the trust region, drawn around the solution at all scales."""
    region, size = a_region(), NORMS[norm].size
    z = region.smallest(NORMS[norm])
    gain, g = size(region.d) - size(z), torch.Generator().manual_seed(1)
    for k in range(300):
        step = 0.5 ** (k % 12) * torch.randn(z.shape, generator=g, dtype=z.dtype) / 5
        v = (z + step).clamp(region.lo, region.hi)
        short = region.aim - (region.normal * (v - region.d)).sum(1)
        v = v + short[:, None] * region.normal
        allowed = ((v >= region.lo) & (v <= region.hi)).all(1) & ((v - region.d).norm(dim=1) <= region.radius)
        assert (size(choose(allowed, v, z)) >= size(z) - 0.2 * gain).all()


def a_region() -> Region:
    g = torch.Generator().manual_seed(0)
    d = 0.4 * torch.rand(5, 20, generator=g, dtype=torch.float64) - 0.2
    normal = torch.randn(5, 20, generator=g, dtype=torch.float64)
    normal = normal / normal.norm(dim=1, keepdim=True)
    radius = torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    return Region(d, normal, torch.full((5,), 0.01, dtype=torch.float64), radius, d - d - 0.3, d - d + 0.3)
