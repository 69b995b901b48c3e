"""Penalty attacks and the walk along the boundary, against the exact least sizes of linear models."""

import pytest
import torch

from assay import Threat
from assay.attacks import EAD, BrendelBethge, CarliniWagner, Runnable
from assay.threats.norms import NORMS
from minimal_cases import Planes, inputs, labels, least

# The attack, its norm, and by what factor it may miss the least size.
CASES: list[tuple[Runnable, str, float]] = [
    (CarliniWagner(), "l2", 1.05),
    (EAD(), "l1", 1.02),
    (BrendelBethge(steps=40), "l2", 1.02),
    (BrendelBethge(steps=40), "l1", 1.02),
    (BrendelBethge(steps=40), "linf", 1.02),
    (BrendelBethge(steps=40), "l0", 1.0),
]


@pytest.mark.parametrize(("attack", "norm", "slack"), CASES, ids=lambda v: v if isinstance(v, str) else None)
@pytest.mark.parametrize("shape", [(12,), (2, 9), (3, 4, 4)], ids=["vectors", "sequences", "images"])
def test_the_least_size_of_a_linear_model_is_reached(
    attack: Runnable, norm: str, slack: float, shape: tuple[int, ...]
) -> None:
    net = Planes(shape, 2, seed=2)
    x = inputs(shape)
    y = labels(net, x)
    exact = least(net, x, y, norm)
    for targeted, label in ((False, y), (True, 1 - y)):
        size = attack(net, x, label, Threat(norm, targeted=targeted)).size.double()
        assert (size <= slack * exact).all()
        assert (size >= 0.9999 * exact).all()


@pytest.mark.parametrize("norm", ["l2", "l1", "linf", "l0"])
def test_a_step_of_the_walk_stays_in_its_trust_region_and_in_the_box(norm: str) -> None:
    from assay.attacks.minimum.brendel_bethge import PULLS, Region

    g = torch.Generator().manual_seed(0)
    d = 0.4 * torch.rand(5, 20, generator=g, dtype=torch.float64) - 0.2
    normal = torch.randn(5, 20, generator=g, dtype=torch.float64)
    normal = normal / normal.norm(dim=1, keepdim=True)
    radius = torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    region = Region(d, normal, torch.full((5,), 0.01, dtype=torch.float64), radius, d - d - 0.3, d - d + 0.3)
    z = region.smallest(PULLS[norm])
    assert ((z >= region.lo) & (z <= region.hi)).all()
    assert ((z - d).norm(dim=1) <= radius * (1 + 1e-9)).all()
    assert ((normal * (z - d)).sum(1) >= 0.01 - 1e-6).all(), "the plane is within reach"
    assert (NORMS[norm].size(z) <= NORMS[norm].size(region.on_plane(PULLS[norm], 0 * radius)[0]) + 1e-6).all()
