"""Attacks that see labels only: exact distances of linear models, the demo networks, and what they never see."""

import math

import pytest
import scipy.fft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import assay
import minimal_cases as cases
from assay import Model, Threat, attacks
from assay.attacks import (
    CGBA,
    FMN,
    Boundary,
    GeoDA,
    HopSkipJump,
    Pointwise,
    Pool,
    RayS,
    Runnable,
    SignOPT,
    SurFree,
)
from assay.attacks.decision.probes import Tally, directions, from_waves
from assay.attacks.decision.start import STARTS
from assay.attacks.decision.walk import Bracket, toward
from assay.attacks.testing import Line
from assay.core.errors import DataError
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.threats.problem import Problem, exact_size

ALL: list[tuple[Runnable, str]] = [
    (RayS(steps=300), "linf"),
    (HopSkipJump(steps=600), "linf"),
    (HopSkipJump(steps=600), "l2"),
    (GeoDA(steps=600), "linf"),
    (GeoDA(steps=600), "l2"),
    (GeoDA(steps=600), "l1"),
    (SurFree(steps=600), "l2"),
    (CGBA(steps=600), "l2"),
    (SignOPT(steps=600), "l2"),
    (Boundary(steps=600), "l2"),
    (Pointwise(steps=300), "l0"),
]


def _id(v: object) -> str:
    return v if isinstance(v, str) else type(v).__name__


def posed(x: Tensor, y: Tensor, norm: str, *, targeted: bool = False, seed: int = 0) -> Problem:
    threat = Threat(norm, targeted=targeted).within(Model(Line()).domain, x[0].numel())
    return Problem.pose(x, y, threat, Draws.of(seed, torch.arange(len(x))))


# Linear models, whose least perturbations are known.

LINEAR: list[tuple[Runnable, str, float]] = [
    (RayS(steps=600), "linf", 1.15),
    (HopSkipJump(steps=600), "linf", 1.3),
    (HopSkipJump(steps=600), "l2", 1.2),
    (GeoDA(steps=600), "linf", 1.2),
    (GeoDA(steps=600), "l2", 1.1),
    (GeoDA(steps=600), "l1", 1.5),
    (SurFree(steps=600), "l2", 1.1),
    (CGBA(steps=600), "l2", 1.1),
    (SignOPT(steps=600), "l2", 1.1),
    (Boundary(steps=600), "l2", 1.2),
    (Pointwise(steps=300), "l0", 2.0),
]
"""With the multiple of the least size that each must stay below."""


@pytest.mark.parametrize(("attack", "norm", "slack"), LINEAR, ids=_id)
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_of_two_linear_classes_the_nearest_point_is_approached(
    attack: Runnable, norm: str, slack: float, targeted: bool
) -> None:
    net, x = cases.Planes((20,), 2), cases.inputs((20,), b=8)
    y = cases.labels(net, x)
    least = cases.least(net, x, y, norm)
    r = attack(net, x, 1 - y if targeted else y, Threat(norm, targeted=targeted))
    ratio = r.size.double() / least
    assert (ratio >= 0.9999).all()
    assert (ratio <= slack).all(), ratio.tolist()


def test_with_more_queries_the_distance_does_not_grow_and_the_goal_of_many_classes_is_met() -> None:
    net, x = cases.Planes((3, 4, 4), 5), cases.inputs((3, 4, 4), b=6)
    y = cases.labels(net, x)
    for few, more, norm in (
        (RayS(steps=100), RayS(steps=500), "linf"),
        (SurFree(steps=100), SurFree(steps=500), "l2"),
        (HopSkipJump(steps=150), HopSkipJump(steps=600), "l2"),
    ):
        least = cases.least(net, x, y, norm)
        first, last = (a(net, x, y, Threat(norm)).size.double() for a in (few, more))
        assert (last <= first).all()
        assert (last >= 0.9999 * least).all()
        assert last.mean() < 0.9 * first.mean()


# The demo networks, beside attacks that see the gradient.


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    ((x, y),) = assay.load_data("demo:mnist", limit=8)
    return x, y


DEMO: list[tuple[Runnable, str, float]] = [
    (RayS(steps=400), "linf", 1.7),
    (HopSkipJump(steps=400), "linf", 5.0),
    (HopSkipJump(steps=400), "l2", 4.5),
    (GeoDA(steps=400), "linf", 4.0),
    (GeoDA(steps=400), "l2", 4.5),
    (SurFree(steps=400), "l2", 4.0),
    (CGBA(steps=400), "l2", 3.0),
    (SignOPT(steps=400), "l2", 4.5),
    (Boundary(steps=400), "l2", 6.0),
    (Pointwise(steps=400), "l0", 3.0),
]
"""With the multiple of the median size of FMN, a gradient attack, that each must stay below after 400 queries."""


@pytest.mark.parametrize(("attack", "norm", "multiple"), DEMO, ids=_id)
def test_sizes_on_digits_are_not_far_above_those_of_a_gradient_attack(
    attack: Runnable, norm: str, multiple: float, digits: tuple[Tensor, Tensor]
) -> None:
    model, (x, y) = assay.load_model("demo:mnist-plain"), digits
    r, white = attack(model, x, y, Threat(norm)), FMN(steps=60)(model, x, y, Threat(norm))
    assert r.success.all()
    assert r.size.median() <= multiple * white.size.median(), (r.size.median(), white.size.median())


# What they see, and what it costs.


class Labels(nn.Module):
    """A network that says nothing but its label: one logit is 1, the others are 0."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return F.one_hot(z.argmax(1), z.shape[1]).to(x.dtype)


@pytest.mark.parametrize(("attack", "norm"), ALL, ids=_id)
def test_a_model_that_shows_its_label_only_gives_the_same_result(attack: Runnable, norm: str) -> None:
    net, x = cases.Planes((1, 4, 5), 4), cases.inputs((1, 4, 5))
    y = cases.labels(net, x)
    shown, hidden = (attack(v, x, y, Threat(norm)) for v in (net, Labels(net)))
    assert torch.equal(shown.x, hidden.x)
    assert torch.equal(shown.forwards, hidden.forwards)
    assert not shown.backwards.any()


@pytest.mark.parametrize(("attack", "norm"), ALL[:-1], ids=_id)
def test_every_query_is_counted_and_a_budget_is_spent_to_the_last(attack: Runnable, norm: str) -> None:
    net, x = cases.Planes((12,), 3), cases.inputs((12,))
    y = cases.labels(net, x)
    for limit in (2, 50, 97):
        r = attack(net, x, y, Threat(norm), max_passes=limit)
        assert r.forwards.tolist() == [limit] * len(x) or (not r.success.all() and (r.forwards >= limit - 1).all())
    assert attack(net, x, y, Threat(norm)).forwards.tolist() == [attack.steps + 2] * len(x)  # with the verification


def test_a_sample_that_is_wrong_already_costs_no_walk() -> None:
    net, x = cases.Planes((12,), 3), cases.inputs((12,))
    r = SurFree()(net, x, (cases.labels(net, x) + 1) % 3, Threat("l2"))
    assert r.success.all()
    assert torch.equal(r.x, x)
    assert (r.forwards <= 3).all()


def test_where_no_start_is_found_the_attack_gives_up() -> None:
    class Stubborn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([1 + 0 * x.flatten(1)[:, 0], 0 * x.flatten(1)[:, 0]], 1)

    x, y = cases.inputs((2, 8)), torch.zeros(4, dtype=torch.long)
    for attack, norm in ALL:
        r = attack(Stubborn(), x, y, Threat(norm))
        assert not r.success.any()
        assert torch.equal(r.x, x)
        assert (r.forwards <= 203).all()


# A model whose label is wrong at random: what is returned is the best point seen, not the last.


MONOTONE = (RayS, SurFree, Boundary, SignOPT, Pointwise)
"""Attacks that go on from their best point only, so that their last success is the best one, or close to it."""


class Noisy(nn.Module):
    """Says another class for a tenth of all inputs but the clean ones, always the same for the same input."""

    def __init__(self, net: nn.Module, clean: Tensor) -> None:
        super().__init__()
        self.net, self.clean, self.asked = net, clean, []

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        bits = x.flatten(1).view(torch.int32).long()
        flips = Draws.of(0, (bits * torch.arange(1, bits.shape[1] + 1)).sum(1)).uniform() < 0.1
        known = (x[:, None] == self.clean[None]).flatten(2).all(2).any(1)
        z = torch.where((flips & ~known)[:, None], z.roll(1, 1), z)
        own = torch.cat([torch.ones(1, dtype=torch.bool), (x[1:] != x[:1]).flatten(1).any(1)])
        self.asked += zip(x[own], z.argmax(1)[own], strict=True)
        return z


@pytest.mark.parametrize(("attack", "norm"), ALL, ids=_id)
def test_of_a_noisy_model_the_best_point_seen_is_returned_not_the_last(attack: Runnable, norm: str) -> None:
    last = []
    for seed in range(1 if isinstance(attack, MONOTONE) else 4):
        net, x = cases.Planes((16,), 2), cases.inputs((16,), b=1, seed=seed)
        y = cases.labels(net, x)
        noisy = Noisy(net, x)
        r = attack(noisy, x, y, Threat(norm), seed=seed)
        points, said = (torch.stack(v) for v in zip(*noisy.asked, strict=True))
        seen = exact_size(Threat(norm).norm, points, x.expand_as(points))[said != y]
        assert r.success.all()
        assert torch.isclose(r.size.double(), seen.min(), atol=1e-6)
        last.append(float(seen[-2] / seen.min()))  # before the verification
    assert isinstance(attack, MONOTONE) or max(last) > 1.001, "the last success is another one"


# Starts.


def test_a_targeted_attack_starts_at_the_nearest_sample_of_the_wanted_class(digits: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = assay.load_model("demo:mnist-plain"), digits
    parts = list(assay.load_data("demo:mnist", limit=200))
    others, names = (torch.cat(v) for v in zip(*parts, strict=True))
    wanted = (y + 1) % 10
    p = posed(x, wanted, "l2", targeted=True)
    first = Pool(others, names)(p, 0)
    away = torch.cdist(x.flatten(1), others.flatten(1)).masked_fill(names[None] != wanted[:, None], torch.inf)
    assert torch.equal(first, others[away.argmin(1)])
    for attack, norm in ((CGBA(steps=150), "l2"), (RayS(steps=150), "linf"), (Pointwise(steps=150), "l0")):
        pooled = type(attack)(steps=150, start=Pool(others, names))
        threat = Threat(norm, targeted=True)
        r, noise = pooled(model, x, wanted, threat), attack(model, x, wanted, threat)
        assert r.success.all()
        assert not noise.success.all(), "noise is of few classes"
        assert (r.size <= p.norm.size(first - x) + 1e-5).all() or norm != "l2"


def test_a_pool_without_labels_asks_about_its_nearest_samples_one_after_the_other() -> None:
    x, y = cases.inputs((6,), b=3), torch.zeros(3, dtype=torch.long)
    pool, p = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)), posed(x, y, "l2")
    asked = torch.stack([Pool(pool)(p, i) for i in range(5)], 1)
    away = torch.linalg.vector_norm(asked - x[:, None], dim=2)
    assert (away.diff(dim=1) >= 0).all()
    assert all(torch.equal(asked[i].sort(0).values, pool.sort(0).values) for i in range(3))
    later = Pool(pool)(p, 5)
    assert not (later[:, None] == pool[None]).all(2).any(), "then noise"
    some = Pool(pool, torch.tensor([0, 1, 0, 0, 1]))
    assert all((some(p, i)[:, None] == pool[[1, 4]][None]).all(2).any(1).all() for i in range(2))


def test_a_given_point_is_a_start_and_wrong_pools_and_names_are_refused() -> None:
    net, x = cases.Planes((12,), 2), cases.inputs((12,))
    y = cases.labels(net, x)
    given = (x - torch.sign(net.weight[y] - net.weight[1 - y]).float() * 0.3).clamp(0, 1)
    assert (net(given).argmax(1) != y).all()
    r = SurFree(steps=3, start=lambda p, _: given[p.rows])(net, x, y, Threat("l2"))
    assert (r.size < (given - x).norm(dim=1)).all()
    warm = posed(x, y, "l2").starting(given)
    assert torch.allclose(SurFree().candidate(warm, 0), given, atol=1e-6), "an earlier attack's point is tried first"
    with pytest.raises(UsageError, match="Did you mean 'smooth'"):
        SurFree(start="smoth")(net, x, y, Threat("l2"))
    with pytest.raises(DataError, match="as many labels"):
        Pool(x, y[:2])
    with pytest.raises(DataError, match="of the attacked ones' shape"):
        SurFree(start=Pool(torch.rand(3, 5)))(net, x, y, Threat("l2"))


def test_attacks_with_a_pool_are_written_as_plain_data() -> None:
    pool = Pool(torch.zeros(3, 2))
    one, other = (attacks.describe_attack(RayS(start=v))["start"] for v in (pool, Pool(torch.ones(3, 2))))
    assert one.startswith("pool of 3, SHA-256 ")
    assert one != other
    assert attacks.get("rays", steps="7", start="smooth") == RayS(steps=7, start="smooth")
    names = {"boundary", "cgba", "geoda", "hop-skip-jump", "pointwise", "rays", "sign-opt", "surfree"}
    assert names <= set(attacks.names(access="decision", kind="minimal"))


@pytest.mark.parametrize("name", STARTS)
def test_starts_are_inside_the_box_and_belong_to_the_sample(name: str) -> None:
    x = cases.inputs((3, 8, 8), b=3)
    p = posed(x, torch.zeros(3, dtype=torch.long), "l2")
    for i in range(3):
        points = STARTS[name](p, i)
        assert points.shape == x.shape
        assert ((points >= 0) & (points <= 1)).all()
        assert torch.equal(STARTS[name](p.take(torch.tensor([2])), i)[0], points[2])


# The parts.


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_a_share_of_the_way_is_that_share_of_its_size(norm: str) -> None:
    x = cases.inputs((3, 4, 4))
    p = posed(x, torch.zeros(4, dtype=torch.long), norm)
    end = p.draws.uniform(x.shape[1:])
    whole = p.size(end)
    for share in (0.0, 0.25, 0.5, 1.0):
        point = toward(p, end, p.full(share))
        assert torch.allclose(p.size(point), share * whole, atol=1e-5)
    assert torch.allclose(toward(p, end, p.full(1.0)), end, atol=1e-6)


def test_bisection_closes_in_on_the_boundary_from_either_side() -> None:
    for low, high in ((0.0, 1.0), (1.0, 0.0)):
        on = Bracket(torch.tensor([low]), torch.tensor([high]))
        for _ in range(20):
            met = (on.middle() > 0.3) == (high > low)
            on = on.narrowed(met)
        assert torch.isclose(on.met, torch.tensor(0.3), atol=1e-5)
        assert on.closed(1e-4).all()


def waves_of(x: Tensor) -> Tensor:
    """Return all cosine coefficients of images."""
    return torch.from_numpy(scipy.fft.dctn(x.double().numpy(), axes=(2, 3), norm="ortho"))


def test_cosine_waves_are_those_of_scipy() -> None:
    x = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(from_waves(waves_of(x), x.shape[2:]), x)


def test_directions_are_of_length_one_and_of_low_frequencies() -> None:
    x = cases.inputs((3, 8, 8))
    p = posed(x, torch.zeros(4, dtype=torch.long), "l2")
    low, every = directions(p, 0.5), directions(p)
    assert torch.allclose(low.flatten(1).norm(dim=1), torch.ones(4))
    waves = waves_of(low).abs()
    assert waves[:, :, 4:].max() < 1e-6
    assert waves[:, :, :, 4:].max() < 1e-6
    assert (waves[:, :, :4, :4] > 1e-4).double().mean() > 0.9
    assert (waves_of(every).abs() > 1e-4).double().mean() > 0.9


@pytest.mark.parametrize("shift", [-0.5, 0.0, 0.5], ids=["mostly missed", "even", "mostly met"])
def test_votes_of_probes_point_along_the_normal(shift: float) -> None:
    """With n probes in d dimensions, the cosine to the normal is near sqrt(2 n / (2 n + pi d)) on the boundary."""
    d, n = 30, 400
    p = posed(torch.full((16, d), 0.5), torch.zeros(16, dtype=torch.long), "l2")
    normal, tally = p.draws.fold(1).normal((d,)), Tally.empty(p)
    normal = normal / normal.norm(dim=1, keepdim=True)
    for i in range(n):
        u = directions(p.stage(i))
        tally = tally.seen(u, (u * normal).sum(1) + shift / math.sqrt(d) > 0)
    cosine = (tally.normal() * normal).sum(1)
    wanted = math.sqrt(2 * n / (2 * n + math.pi * d))
    assert abs(float(cosine.mean()) - wanted) < 0.05
    assert cosine.min() > wanted - 0.1
    alike = Tally.empty(p).seen(normal, torch.ones(16, dtype=torch.bool))
    assert torch.allclose(alike.normal(), normal, atol=1e-6)


def test_the_semicircle_with_the_true_normal_meets_a_plane_at_its_nearest_point() -> None:
    from assay.attacks.decision.arc import Arc

    x, n = torch.full((4, 6), 0.5, dtype=torch.float64), 6
    p = posed(x, torch.zeros(4, dtype=torch.long), "l2")
    normal = p.draws.normal((n,), torch.float64)
    normal = normal / normal.norm(dim=1, keepdim=True)
    tangent = p.draws.fold(1).normal((n,), torch.float64)
    tangent = tangent - (tangent * normal).sum(1, keepdim=True) * normal
    point = x + 0.1 * normal + 0.1 * tangent / tangent.norm(dim=1, keepdim=True)
    arc = Arc.through(p, point, normal)
    assert torch.allclose(arc.at(p, p.full(0.0)), point)
    for angle in (0.2, 0.7, 1.5):
        away = (arc.at(p, p.full(angle)) - x).norm(dim=1)
        assert torch.allclose(away, arc.reach * math.cos(angle))
    nearest = arc.at(p, torch.acos(0.1 / arc.reach))
    assert torch.allclose(nearest, x + 0.1 * normal)


def test_rays_flips_every_block_of_a_level_once() -> None:
    from assay.attacks.decision.rays import RaySState, _flipped, _next

    x = cases.inputs((13,), b=1)
    p = posed(x, torch.zeros(1, dtype=torch.long), "linf")
    one, no = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.bool)
    s = RaySState(torch.ones_like(x), p.full(1.0), one, one, no, Bracket(p.full(0.0), p.full(1.0)), p.full(0.1))
    flips: dict[int, Tensor] = {}
    lengths: dict[int, list[int]] = {}
    for _ in range(1 + 2 + 4 + 7 + 13):
        changed = (_flipped(p, s) != s.corner)[0].long()
        level = int(s.level)
        flips[level] = flips.get(level, torch.zeros(13, dtype=torch.long)) + changed
        lengths.setdefault(level, []).append(int(changed.sum()))
        level_, block = _next(p, s)
        s = s._replace(level=level_, block=block)
    assert all((f == 1).all() for f in flips.values())
    assert lengths == {0: [13], 1: [7, 6], 2: [4, 4, 4, 1], 3: [2, 2, 2, 2, 2, 2, 1], 4: [1] * 13}
    assert (int(s.level), int(s.block)) == (4, 0), "single values are tried again"


def test_pointwise_ends_where_no_single_value_can_go_back(digits: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = assay.load_model("demo:mnist-plain"), digits
    r = Pointwise(steps=2000)(model, x, y, Threat("l0"))
    assert (r.forwards < 2000).all(), "they end by themselves"
    for i in range(len(x)):
        changed = (r.x[i] != x[i]).flatten().nonzero()[:, 0]
        back = r.x[i].flatten().repeat(len(changed), 1)
        back[torch.arange(len(changed)), changed] = x[i].flatten()[changed]
        with torch.no_grad():
            assert (model.net(back.view(-1, *x.shape[1:])).argmax(1) == y[i]).all()
