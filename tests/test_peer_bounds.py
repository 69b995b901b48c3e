"""Our bounds beside those of auto_LiRPA 0.3, where it is installed (see benchmarks/_auto_lirpa.py)."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from assay.certification.bounds import REAL, Bounds
from assay.certification.methods import refine
from assay.certification.prover import differences
from assay.certification.region import Region
from bound_cases import CLASSES, draw, recorded, seeded
from test_bounds import Residual, mlp

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto_LiRPA is not installed"),
]

NETS = {
    "mlp": (mlp, (6,)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(54, CLASSES),
        ),
        (1, 10, 10),
    ),
    "residual": (Residual, (2, 6, 6)),
    "maxpool": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, CLASSES),
        ),
        (1, 10, 10),
    ),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_margins_are_those_of_auto_lirpa(name: str, method: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from _auto_lirpa import Bounded

    make, shape = NETS[name]
    for seed in range(3):
        net = draw(make(), seed)
        x, radius = torch.rand(3, *shape, generator=seeded(seed)), 0.03
        y = torch.tensor([0, 1, 2])
        c = differences(y, CLASSES)
        peer, rows = Bounded(net, x[:1]), c[:, :, 0].float()
        theirs = torch.cat([peer.margins(x[k : k + 1], radius, rows[k : k + 1], method) for k in range(3)]).double()
        graph = recorded(net, shape).graph()
        region = Region.ball(x, torch.full((3,), radius), "linf", 0.0, 1.0)
        bounds = Bounds.by_intervals(graph, region, REAL)
        if method == "crown":
            refine(bounds)
        ours = bounds.lower(graph.out, c, since=graph.out + 1 if method == "ibp" else 0)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
