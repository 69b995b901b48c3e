"""The attacks that linearise the decision boundary, where the least perturbation is known."""

import copy

import pytest
import torch
from torch import Tensor, nn

import minimal_cases as cases
from assay import Model
from assay.attacks import FAB, DeepFool, Runnable, SparseFool, SuperDeepFool, Targets, TrustRegion
from assay.threats import Threat

ATTACKS: list[tuple[Runnable, str, float]] = [
    (FAB(steps=20, rivals=9), "linf", 1.005),
    (FAB(steps=20, rivals=9), "l2", 1.005),
    (FAB(steps=20, rivals=9), "l1", 1.01),
    (DeepFool(), "linf", 1.021),  # of which 0.02 are its overshoot
    (DeepFool(), "l2", 1.021),
    (DeepFool(overshoot=0.002), "linf", 1.01),
    (DeepFool(overshoot=0.002), "l2", 1.01),
    (SuperDeepFool(rivals=9), "l2", 1.002),
]
"""Attacks that see all rivals, with the share of the least size that each may reach."""

NEAREST: list[tuple[Runnable, str, float]] = [
    (FAB(steps=20), "linf", 1.005),
    (FAB(steps=20), "l2", 1.005),
    (FAB(steps=20), "l1", 1.01),
    (SparseFool(overshoot=0.002), "l1", 1.01),
    (SparseFool(overshoot=0.0002), "l0", 1.0),
    (TrustRegion(), "linf", 1.01),
    (TrustRegion(most=0.02), "l2", 1.01),
]
"""Attacks that go to the strongest rival, or to the nearest in l2, which need not be the nearest in the norm."""


def _id(v: object) -> str:
    return v if isinstance(v, str) else type(v).__name__


def sizes(attack: Runnable, net: nn.Module, x: Tensor, y: Tensor, norm: str, *, targeted: bool = False) -> Tensor:
    return attack(net, x, y, Threat(norm, targeted=targeted)).size.double()


@pytest.mark.parametrize(("attack", "norm", "slack"), ATTACKS, ids=_id)
@pytest.mark.parametrize(
    ("shape", "c"),
    [((20,), 2), ((2, 9), 3), ((1, 5, 5), 5), ((3, 4, 4), 10)],
    ids=["vectors", "sequences", "grey", "colour"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_of_linear_classes_the_least_perturbation_is_found(
    attack: Runnable, norm: str, slack: float, shape: tuple[int, ...], c: int, dtype: torch.dtype
) -> None:
    net, x = cases.Planes(shape, c), cases.inputs(shape, dtype=dtype)
    y = cases.labels(net, x)
    least = cases.least(net, x, y, norm)
    found = sizes(attack, net, x, y, norm)
    assert (found <= slack * least + 1e-5).all(), (found / least).tolist()
    assert (found >= 0.9999 * least - 1e-5).all()


@pytest.mark.parametrize(("attack", "norm", "slack"), ATTACKS + NEAREST, ids=_id)
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_of_two_classes_both_goals_are_met_exactly(attack: Runnable, norm: str, slack: float, targeted: bool) -> None:
    shape = (2, 10)
    net, x = cases.Planes(shape, 2), cases.inputs(shape, b=6)
    y = cases.labels(net, x)
    least = cases.least(net, x, y, norm)
    found = sizes(attack, net, x, 1 - y if targeted else y, norm, targeted=targeted)
    assert (found <= slack * least + 1e-5).all(), (found / least).tolist()


@pytest.mark.parametrize(("attack", "norm", "slack"), NEAREST, ids=_id)
def test_by_way_of_every_class_the_strongest_rival_is_enough(attack: Runnable, norm: str, slack: float) -> None:
    """The smallest of the sizes found toward each class is the least size."""
    shape, c = (18,), 4
    net, x = cases.Planes(shape, c), cases.inputs(shape)
    y = cases.labels(net, x)
    least = cases.least(net, x, y, norm)
    found = sizes(Targets(attack, c - 1), net, x, y, norm)
    assert (found >= 0.9999 * least).all()
    for i in range(len(x)):
        eps = float(least[i]) * slack + (0 if norm == "l0" else 1e-5)
        assert Targets(attack, c - 1)(net, x[i : i + 1], y[i : i + 1], Threat(norm, eps)).success.all(), i


@pytest.mark.parametrize(("attack", "norm", "slack"), ATTACKS[:7:3] + NEAREST, ids=_id)
def test_a_batch_of_one_and_a_coarse_model_are_no_exception(attack: Runnable, norm: str, slack: float) -> None:
    shape = (1, 4, 5)
    net, x = cases.Planes(shape, 2), cases.inputs(shape, b=1)
    y = cases.labels(net, x)
    least = cases.least(net, x, y, norm)
    assert (sizes(attack, net, x, y, norm) <= slack * least + 1e-5).all()
    coarse = Rounded(net)
    assert (sizes(attack, coarse, x, cases.labels(coarse, x), norm) <= 1.3 * least + 0.02).all()


class Rounded(nn.Module):
    """A network that works in bfloat16."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.bfloat16()).float()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fab_comes_close_to_exhaustive_search_on_a_bent_boundary(norm: str) -> None:
    x = cases.inputs((2,), b=20)
    for seed in (0, 1):
        net = cases.TinyNet(seed=seed)
        y = cases.labels(net, x)
        least = cases.by_search(net, x, y, norm, points=201)
        reachable = least.isfinite()
        starts = [FAB(steps=40, rivals=2), *[FAB(steps=40, rivals=2, start="uniform")] * 2]
        runs = [a(net, x, y, Threat(norm), seed).size.double() for seed, a in enumerate(starts)]
        found = torch.stack(runs).amin(0)[reachable]
        close = found <= 1.05 * least[reachable] + 0.005
        assert close.double().mean() >= 0.8, (found / least[reachable]).tolist()


@pytest.mark.parametrize("attack", [DeepFool(), SuperDeepFool(steps=300)], ids=lambda a: type(a).__name__)
def test_the_first_crossing_is_mostly_within_twice_the_least_size(attack: Runnable) -> None:
    net, x = cases.TinyNet(), cases.inputs((2,), b=20)
    y = cases.labels(net, x)
    least = cases.by_search(net, x, y, "l2", points=201)
    found = sizes(attack, net, x, y, "l2")
    met = found.isfinite()
    assert met.double().mean() >= 0.7
    assert (found[met].median() / least[met].median()) <= 2


class Curved(nn.Module):
    """Two classes, split by a sphere, which DeepFool meets at a slant."""

    def forward(self, x: Tensor) -> Tensor:
        z = ((x - 0.2) ** 2 * torch.tensor([1.0, 4.0, 0.25]).to(x)).sum(1) - 0.12
        return torch.stack([z, -z], 1)


def test_superdeepfool_is_nearer_than_deepfool() -> None:
    x = torch.tensor([[0.8, 0.5, 0.9], [0.6, 0.9, 0.4]])
    y = cases.labels(Curved(), x)
    once, again = (sizes(a, Curved(), x, y, "l2") for a in (DeepFool(), SuperDeepFool()))
    assert (again <= 1.0001 * once).all()
    assert again[0] < 0.99 * once[0]


def test_the_first_step_of_deepfool_is_that_of_the_paper() -> None:
    """f = -z, so r = |f| w / |w|^2 (l2) and |f| sign(w) / |w|_1 (linf), both 1.02 times."""
    net, x = cases.Planes((6,), 2), cases.inputs((6,), b=1)
    y = cases.labels(net, x)
    w = (net.weight[1] - net.weight[0]).detach() * (1 - 2 * y)
    f = (net(x)[0, 1 - y] - net(x)[0, y]).detach().double()
    steps = {"l2": w / w.norm() ** 2, "linf": w.sign() / w.abs().sum()}
    for norm, way in steps.items():
        r = DeepFool(steps=1)(net, x, y, Threat(norm))
        assert torch.allclose(r.x.double(), x + 1.02 * f.abs() * way, atol=1e-6)


def test_a_step_of_fab_costs_two_passes_and_its_search_one() -> None:
    net, x = cases.Planes((6,), 5), cases.inputs((6,))
    r = FAB(steps=7, search=3, rivals=1)(net, x, cases.labels(net, x), Threat("l2"))
    assert r.backwards.eq(7).all()
    assert r.forwards.eq(7 + 1 + 3 + 1).all()  # and one to verify


@pytest.mark.parametrize(
    "attack", [a for a, *_ in (*ATTACKS[:1], *ATTACKS[3:4], *ATTACKS[7:9], *NEAREST[3:4])], ids=_id
)
def test_a_model_without_slope_makes_no_nan(attack: Runnable) -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :3] + torch.tensor([1.0, 0.0, -1.0])

    norm = attack.norms[0]  # type: ignore[attr-defined]
    x = cases.inputs((6,))
    r = attack(Flat(), x, torch.zeros(4, dtype=torch.long), Threat(norm))
    assert not r.success.any()
    assert r.x.isfinite().all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("start", ["uniform", "sphere"])
def test_random_starts_of_fab_lead_to_the_same_plane(norm: str, start: str) -> None:
    net, x = cases.Planes((3, 6), 2), cases.inputs((3, 6))
    y = cases.labels(net, x)
    least = cases.least(net, x, y, norm)
    runs = [FAB(steps=100, start=start)(net, x, y, Threat(norm), seed) for seed in (0, 1)]
    assert not torch.equal(runs[0].x, runs[1].x)
    assert all((r.size <= 1.01 * least).all() for r in runs)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_any_box_is_the_unit_box_scaled(norm: str) -> None:
    """What is found in [-1, 3] is four times what is found in [0, 1]."""
    net, x = cases.Planes((8,), 3), cases.inputs((8,))
    y = cases.labels(net, x)
    wide = Model(lambda v: net((v + 1) / 4), box=(-1.0, 3.0))
    small, large = (sizes(FAB(steps=10), n, v, y, norm) for n, v in ((net, x), (wide, 4 * x - 1)))
    assert torch.allclose(large, 4 * small, rtol=1e-3)
