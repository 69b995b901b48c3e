"""Score attacks: closed forms on functions whose optimum is known, estimated gradients, masked models, counts."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
import pytest
import scipy.fft
import scipy.optimize
import torch
from torch import Tensor, nn

import assay
from assay.attacks import APGD, DDN, PGD, CarliniWagner, Chain, Runnable, Square, Transformed
from assay.attacks.loop import GradientAttack, ScoreAttack, StepAttack
from assay.attacks.losses import margin
from assay.attacks.score.bandits import Bandits
from assay.attacks.score.estimated import Estimated, nes, spsa
from assay.attacks.score.one_pixel import OnePixel
from assay.attacks.score.simba import SimBA
from assay.attacks.score.sparse_rs import SparseRS
from assay.attacks.score.sparse_rs_patch import SparseRSPatch
from assay.attacks.score.zoo import ZOO
from assay.attacks.testing import Line
from assay.attacks.transforms import Diversity, Momentum
from assay.core.errors import AssayError, ThreatError
from assay.core.random import Draws
from assay.core.types import Inputs
from assay.models import Door, Gradient, Model, Score
from assay.threats import Problem, Threat
from assay.threats.problem import exact_size
from zoo import MASKED


class Rise(nn.Module):
    """Two classes whose margin is a function of the input: f(x), where the label is 0."""

    def __init__(self, f: Any) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        value = self.f(x)
        return torch.stack([torch.zeros_like(value), value], 1)


def linear(w: Tensor, low: float = -100.0) -> Rise:
    """Return a model whose margin is <w, x> + low: by default it is never fooled, so that attacks take all steps."""
    return Rise(lambda x: (x * w.to(x)).flatten(1).sum(1) + low)


def inputs(shape: tuple[int, ...], b: int = 4, low: float = 0.3, high: float = 0.7) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return low + (high - low) * torch.rand(b, *shape, generator=g)


def posed(x: Tensor, threat: Threat, net: nn.Module | None = None) -> Problem:
    rows = torch.arange(len(x))
    threat = threat.within(Model(net or Line()).domain, x[0].numel())
    return Problem.pose(x, torch.zeros_like(rows), threat, Draws.of(0, rows))


def demo(name: str, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a demo network and the first images that it gets right."""
    net = assay.load_model(f"demo:{name}").net
    x, y = next(iter(assay.load_data("demo:mnist", limit=n)))
    right = net(x).argmax(1) == y
    return net, x[right], y[right]


def ascended(attack: Runnable, net: nn.Module, x: Tensor, threat: Threat) -> Tensor:
    """Return the strongest point that an attack finds where there is nothing to be fooled."""
    return attack(net, x, torch.zeros(len(x), dtype=torch.long), threat, full=True).x


# Each one breaks what noise of the same size does not break.


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Noise(ScoreAttack[Any]):
    """Asks about points of the ball at random."""

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    steps: int = 500
    loss: Any = margin

    class State(NamedTuple):
        x: Inputs

    def init(self, p: Problem) -> Any:
        return self.State(p.start("uniform"))

    def update(self, p: Problem, s: Any, e: Score, k: int) -> Any:
        return self.State(p.stage(k).start("uniform"))


BREAKS: list[tuple[Runnable, str]] = [
    (Square(steps=400), "l1:20"),
    (SparseRS(steps=400), "l0:25"),
    (spsa(steps=6), "linf:0.15"),
    (nes(steps=8), "l2:3"),
    (SimBA(steps=400), "l2:2"),
    (SimBA(steps=400, basis="pixel"), "l2:3"),
    (ZOO(steps=400), "l2:2.5"),
    (ZOO(steps=400, solver="newton", rel_step=0.3), "l2:2.5"),
    (Bandits(steps=400), "linf:0.15"),
    (Bandits(steps=400), "l2:2.5"),
    (OnePixel(steps=400), "l0:60"),
]


def named(v: Any) -> str:
    if isinstance(v, Estimated):
        return v.by
    return v if isinstance(v, str) else type(v).__name__


@pytest.mark.parametrize(("attack", "threat"), BREAKS, ids=named)
def test_what_noise_leaves_standing_falls(attack: Runnable, threat: str) -> None:
    net, x, y = demo("mnist-plain", 12)
    found, noise = attack(net, x, y, threat), Noise(steps=400)(net, x, y, threat)
    assert noise.success.float().mean() <= 0.25
    assert found.success.sum() >= noise.success.sum() + 4
    assert (found.backwards == 0).all()


@pytest.mark.parametrize(("attack", "threat"), BREAKS, ids=named)
def test_a_wanted_class_is_reached(attack: Runnable, threat: str) -> None:
    net, x, y = demo("mnist-plain", 8)
    wanted = net(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    norm, eps = threat.split(":")
    wide = Threat(norm, float(eps) * (1 if norm == "l0" else 1.5), targeted=True)
    r = attack(net, x, wanted, wide)
    assert r.success.sum() >= 3
    assert torch.equal(net(r.x).argmax(1) == wanted, r.success)


@pytest.mark.parametrize(("attack", "threat"), BREAKS, ids=named)
def test_every_question_is_one_forward_pass(attack: StepAttack[Any, Any], threat: str) -> None:
    """With all steps taken; where it succeeds, one more to verify."""
    net, x, y = demo("mnist-plain", 3)
    r = attack(net, x, y, threat, full=True)
    assert (r.forwards == attack.questions + 1 + r.success.long()).all()
    assert (attack(net, x, y, threat, max_passes=30).forwards <= 30).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 5), (2, 24), (40,)], ids=["colour", "grey", "sequence", "vector"])
@pytest.mark.parametrize(("attack", "threat"), BREAKS, ids=named)
def test_inputs_of_any_shape_are_attacked(attack: Runnable, threat: str, shape: tuple[int, ...]) -> None:
    x, norm = inputs(shape, low=0.52, high=0.56), Threat.parse(threat).norm
    features = x[0].numel()
    eps = {"linf": 0.2, "l2": 0.2 * features**0.5, "l1": 0.2 * features, "l0": features // 2}[norm.name]
    r = attack(Line(), x, torch.ones(len(x), dtype=torch.long), Threat(norm, eps))
    assert r.success.all()
    assert (exact_size(norm, r.x, x) <= eps).all()


# Estimated gradients.


class Seen(NamedTuple):
    x: Inputs
    grad: Inputs


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Look(GradientAttack[Seen]):
    """Stays where it is, and remembers the gradient."""

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    steps: int = 1
    loss: Any = margin

    def init(self, p: Problem) -> Seen:
        return Seen(p.x0, torch.zeros_like(p.x0))

    def update(self, p: Problem, s: Seen, e: Gradient, k: int) -> Seen:
        return s._replace(grad=e.grad)


def estimate(attack: Estimated, net: nn.Module, x: Tensor) -> Tensor:
    """Return the gradient that one step of an attack is given."""
    with Model(net).frozen() as live:
        door, p = Door(live, len(x)), posed(x, Threat("linf", 0.1))
        s = attack.init(p)
        for k in range(attack.questions):
            s = attack.update(p, s, door.score(s.x, p, attack.loss), k)
        assert (door.forwards == attack.questions).all()
        assert (door.backwards == 0).all()
    return s.inner.grad


@pytest.mark.parametrize("by", ["spsa", "nes"])
def test_the_mean_of_estimates_is_the_gradient_also_at_the_ends_of_the_box(by: str) -> None:
    """Each estimate of one of n slopes of a linear model has a variance of the sum of squares of the others or so."""
    n, draws, sigma = 30, 400, 0.1
    w = inputs((n,), b=1, low=-1.0, high=1.0)[0].double()
    x = inputs((n,), b=50).double()
    x[:, :8], x[:, 8:16], x[:, 16:20] = 0.0, 1.0, 0.04  # at both ends, and less than one step away from one
    found = estimate(Estimated(Look(), by, draws, sigma), linear(w), x)
    spread = 2 * w.norm() * 2 / math.sqrt(draws * len(x))  # the box at most doubles a slope, and what is around it
    assert ((found.mean(0) - w).abs() < 4 * spread).all()
    assert found.std(0).min() > 0, "samples have directions of their own"


def test_estimates_agree_with_the_gradient_of_a_network() -> None:
    net, x, _ = demo("mnist-plain", 3)
    x = x.clamp(0.1, 0.9)
    few, many = (estimate(Estimated(Look(), "spsa", n, 0.005), net, x) for n in (10, 1000))
    with Model(net).frozen() as live:
        true = Door(live, len(x)).gradient(x, posed(x, Threat("linf", 0.1)), margin).grad
    alike = [torch.cosine_similarity(g.flatten(1), true.flatten(1)) for g in (few, many)]
    assert (alike[1] > 0.65).all()  # sqrt(1000 / (1000 + 784)) = 0.75 of a linear model
    assert (alike[1] > alike[0]).all()


def test_pairs_lie_on_both_sides_of_the_point() -> None:
    p, attack = posed(inputs((2, 5)), Threat("linf", 0.2)), Estimated(PGD(start="clean"), draws=2, sigma=0.01)
    s, asked = attack.init(p), []
    for k in range(5):
        asked.append(s.x)
        s = attack.update(p, s, Score(p.full(0.0) > 0, p.full(1.0), torch.zeros(4, 2)), k)
    for one, other in (asked[1:3], asked[3:5]):
        assert torch.allclose((one + other) / 2, asked[0], atol=1e-6)
        assert torch.allclose((one - asked[0]).abs(), torch.tensor(0.01), atol=1e-6)
    assert not torch.equal(asked[1], asked[3])
    assert torch.equal(asked[0], p.x0)


@pytest.mark.parametrize(("inner", "norm"), [(APGD(steps=12), "linf"), (PGD(steps=12, rel_step=0.3), "l2")])
def test_any_gradient_attack_becomes_a_score_attack(inner: GradientAttack[Any], norm: str) -> None:
    """On a plane it finds what it would find with the gradient, within a factor."""
    x = inputs((1, 4, 4), low=0.55, high=0.6)
    distance = float((x.flatten(1).mean(1) - 0.5).max()) * (1 if norm == "linf" else 4)
    y, attack = torch.ones(4, dtype=torch.long), Estimated(inner, draws=16)
    assert attack(Line(), x, y, Threat(norm, 1.3 * distance)).success.all()
    assert not attack(Line(), x, y, Threat(norm, 0.4 * distance)).success.any()


def test_an_attack_for_the_smallest_perturbation_finds_one_from_scores() -> None:
    x, y = inputs((1, 4, 4), low=0.55, high=0.6), torch.ones(4, dtype=torch.long)
    r = Estimated(CarliniWagner(steps=6, rounds=6), draws=8)(Line(), x, y, "l2")
    least = 4 * (x.flatten(1).mean(1) - 0.5)
    assert r.success.all()
    assert (r.size >= least).all()
    assert (r.size < 1.5 * least).all()
    assert (r.backwards == 0).all()


def test_gradients_that_are_looked_at_only_may_be_transformed() -> None:
    Estimated(Transformed(PGD(), (Momentum(),)))
    for inner in (Transformed(PGD(), (Diversity(),)), DDN()):
        with pytest.raises(AssayError, match="one gradient at every query"):
            Estimated(inner)  # type: ignore[arg-type]


# Models that hide their gradient.


@pytest.mark.parametrize("name", ["four-levels", "logits-x100"])
def test_random_search_and_estimates_see_through_a_mask(name: str) -> None:
    animal = next(a for a in MASKED if a.name == name)
    net = animal.build()
    x, y = next(iter(assay.load_data("demo:mnist", limit=20)))
    right = int((net(x).argmax(1) == y).sum())

    def standing(attack: Runnable) -> int:
        return right - int(attack(net, x, y, animal.threat).success.sum())

    assert standing(PGD(steps=40)) >= 0.8 * right
    assert standing(Square(steps=1000)) <= 0.4 * right
    assert standing(spsa(steps=40, sigma=0.1)) <= 0.6 * right


# Square: l1, and where it starts.


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 9, 14), (2, 40), (64,), (3, 2, 2), (1, 7, 1)])
def test_l1_squares_keep_to_the_ball_and_use_all_of_it(shape: tuple[int, ...]) -> None:
    p, attack = posed(inputs(shape), Threat("l1", 0.25)), Square(steps=1000)
    s = attack.init(p)
    for k in range(20):
        assert p.allows(s.x).all()
        assert (p.size(s.x) > 0.99 * p.radius).all()
        s = attack.update(p, s, Score(p.full(0.0) > 0, p.full(float(k)), torch.zeros(4, 2)), k)
        assert not torch.equal(s.x, s.kept)


def test_l1_mass_moves_from_window_to_window_and_nothing_else_changes() -> None:
    p, attack = posed(inputs((3, 24, 24)), Threat("l1", 2.0)), Square(steps=10_000)
    s = attack.init(p)
    for k in range(210, 220):
        s = attack.update(p, s, Score(p.full(0.0) > 0, p.full(float(k)), torch.zeros(4, 2)), k)
        touched = ((s.x - s.kept).abs() > 1e-6).any(1).flatten(1).sum(1)
        side = round((attack.share(k) * 24 * 24) ** 0.5)
        assert (touched <= 2 * (side + 1) ** 2).all()
        assert (touched > 0).all()


def test_l1_squares_find_the_plane_and_nothing_in_front_of_it() -> None:
    x, y = inputs((1, 8, 8), low=0.55, high=0.6), torch.ones(4, dtype=torch.long)
    least = 64 * (x.flatten(1).mean(1) - 0.5)
    assert Square(steps=300)(Line(), x, y, Threat("l1", 1.5 * float(least.max()))).success.all()
    assert not Square(steps=300)(Line(), x, y, Threat("l1", 0.999 * float(least.min()))).success.any()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 1.0), ("l1", 5.0)])
def test_squares_start_where_they_are_told(norm: str, eps: float) -> None:
    p = posed(inputs((1, 12, 12)), Threat(norm, eps))
    assert torch.equal(Square(start="clean").init(p).x, p.x0)
    assert torch.equal(Square(start="sphere").init(p).x, p.start("sphere"))
    pattern, warm = Square().init(p).x, p.starting(p.x0 + 0.01)
    assert not torch.equal(pattern, p.start("uniform"))
    assert torch.equal(Square().init(warm).x, warm.warm)
    with pytest.raises(AssayError, match="pattern"):
        Square(start="pater")


def test_a_search_goes_on_from_where_ascent_stopped() -> None:
    net, x, y = demo("mnist-robust", 20)
    ascent, threat = PGD(steps=3, rel_step=0.3, start="clean"), Threat("linf", 0.3)
    first = ascent(net, x, y, threat, full=True).x
    both = Chain((ascent, Square(steps=100, p=0.05)))(net, x, y, threat, full=True).x
    gaps = [margin(net(v), assay.threats.Goal(y)) for v in (first, both)]
    assert (gaps[1] >= gaps[0] - 1e-4).all()
    assert (gaps[1] > gaps[0] + 1e-3).float().mean() > 0.8


# Sparse ones: of a linear function, the best pixels are known.


def best_gains(x: Tensor, w: Tensor) -> Tensor:
    """Return what each pixel of x (b, c, h, w) can add to <w, x>: (b, h * w)."""
    return torch.maximum(w * (1 - x), -w * x).sum(1).flatten(1)


def test_sparse_random_search_finds_the_best_pixels_in_corner_colours() -> None:
    x = inputs((3, 8, 8))
    w = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)) ** 3
    r = ascended(SparseRS(steps=2000), linear(w), x, Threat("l0", 17))  # five pixels, and two values more
    changed = r != x
    assert (changed.any(1).flatten(1).sum(1) <= 5).all()
    assert ((r == 0) | (r == 1))[changed].all()
    gain, best = ((r - x) * w).flatten(1).sum(1), best_gains(x, w).topk(5, 1).values.sum(1)
    assert (gain > 0.85 * best).all()


def test_swaps_shrink_as_published_and_a_worse_candidate_is_forgotten() -> None:
    attack = SparseRS(steps=10_000)
    shares = [round(0.3 / attack.share(k)) for k in (0, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001, 9999)]
    assert shares == [1, 1, 2, 4, 5, 6, 8, 10, 12, 15, 15]
    p = posed(inputs((1, 20, 20)), Threat("l0", 100))
    first = attack.init(p)
    answers = [Score(p.full(0.0) > 0, p.full(v), torch.zeros(4, 2)) for v in (1.0, 1.0, 2.0)]
    second = attack.update(p, first, answers[0], 0)
    swapped = (second.changed > first.changed).sum(1)
    assert ((swapped > 15) & (swapped <= 30)).all()  # a few were swapped for themselves
    assert (second.changed.sum(1) == 100).all()
    third = attack.update(p, second, answers[1], 1)
    assert torch.equal(third.kept, first.x)
    assert torch.equal(attack.update(p, third, answers[2], 2).kept, third.x)


def bright_block(side: int) -> Tensor:
    """Return weights (1, 12, 12) that are 1 in a block, and smaller elsewhere."""
    w = torch.full((1, 12, 12), 0.1)
    w[:, 7 : 7 + side, 2 : 2 + side] = 1.0
    return w


def test_a_patch_goes_where_it_counts_and_gets_the_best_colours() -> None:
    x, w = inputs((1, 12, 12), low=0.4, high=0.6), bright_block(3)
    r = ascended(SparseRSPatch(steps=400), linear(w), x, Threat("l0", 15))  # a side of 3, and six values more
    expected = torch.where(w == 1, 1.0, x)
    assert (r == expected).flatten(1).all(1).float().mean() >= 0.75
    changed = (r != x).flatten(1).sum(1)
    assert (changed <= 9).all()


def test_a_patch_keeps_its_shape_on_its_way() -> None:
    p, attack = posed(inputs((3, 9, 7)), Threat("l0", 3 * 4)), SparseRSPatch(steps=50, period=2)
    s, places = attack.init(p), set()
    for k in range(30):
        changed = (s.x != p.x0).any(1)
        assert (changed.flatten(1).sum(1) == 4).all()
        assert (changed.any(2).sum(1) == 2).all()
        assert (changed.any(1).sum(1) == 2).all()
        assert p.allows(s.x).all()
        places |= {tuple(v) for v in s.drawing.corner.tolist()}
        s = attack.update(p, s, Score(p.full(0.0) > 0, p.full(float(k)), torch.zeros(4, 2)), k)
    assert len(places) > 10


def test_a_frame_is_as_wide_as_eps_pays_for_and_leaves_the_middle() -> None:
    x = inputs((1, 10, 8), low=0.4, high=0.6)
    w = torch.randn(1, 10, 8, generator=torch.Generator().manual_seed(0))
    inner = torch.zeros(10, 8, dtype=torch.bool)
    inner[2:-2, 2:-2] = True
    r = ascended(SparseRSPatch(steps=1500, region="frame"), linear(w), x, Threat("l0", 80 - 24 + 5))
    assert torch.equal((r != x).all(1), (~inner).expand(4, -1, -1))
    gain = ((r - x) * w).flatten(1).sum(1)
    assert (gain > 0.8 * best_gains(x, w)[:, ~inner.flatten()].sum(1)).all()
    with pytest.raises(ThreatError, match="l0:32"):
        ascended(SparseRSPatch(region="frame"), linear(w), x, Threat("l0", 31))


def test_one_pixel_does_as_well_as_scipy() -> None:
    """A smooth map with several hills, where any population may gather on a wrong one: in the mean over many images."""
    x, at = inputs((1, 9, 9), b=60), torch.linspace(-1, 1, 9)
    w = torch.exp(-4 * ((at[:, None] - 0.3) ** 2 + (at + 0.5) ** 2))[None] - 0.2
    best, theirs = best_gains(x, w).amax(1), []
    ours = ascended(OnePixel(steps=599, population=20), linear(w), x, Threat("l0", 1))
    gains = ((ours - x) * w).flatten(1).sum(1)
    for i, one in enumerate(x.numpy()):

        def lost(v: np.ndarray, one: np.ndarray = one) -> float:
            row, column = (min(int(u * 9), 8) for u in v[:2])
            return -float(w[0, row, column] * (v[2] - one[0, row, column]))

        found = scipy.optimize.differential_evolution(
            lost, [(0, 1)] * 3, strategy="best1bin", mutation=0.5, recombination=0.7, maxiter=29, tol=0, polish=False,
            init=np.random.default_rng(i).random((20, 3)), rng=i,
        )  # fmt: skip
        theirs.append(-found.fun)
    assert (gains > 0.999 * best).float().mean() > 0.5
    shares = (gains / best).mean(), (torch.tensor(theirs) / best).mean()
    assert shares[0] > shares[1] - 0.1, "two standard errors of 60 images"


def test_pixels_that_eps_cannot_pay_for_are_refused() -> None:
    x, y = inputs((3, 6, 6)), torch.ones(4, dtype=torch.long)
    for attack in (SparseRS(), OnePixel()):
        with pytest.raises(ThreatError, match="l0:3"):
            attack(Line(), x, y, "l0:2")


# Coordinates and waves.


def test_simba_takes_every_direction_the_right_way() -> None:
    """On a linear function with room around: two questions for each value are enough to move it along sign(w)."""
    x, w = inputs((2, 5)), torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    attack = SimBA(steps=20, basis="pixel", rel_step=0.1)
    moved = (ascended(attack, linear(w), x, Threat("l2", 1.0)) - x) / 0.1 * w.sign()
    assert torch.allclose(moved, moved.round(), atol=1e-5)
    assert ((moved > 0.9) & (moved < 2.1)).all()  # those found with one question leave time for a second round


def test_simba_waves_are_those_of_scipy_the_slow_ones() -> None:
    p, attack = posed(inputs((2, 6, 8), b=1), Threat("l2", 1.0)), SimBA(share=0.5)
    number = torch.arange(2 * 3 * 4)
    waves = torch.cat([attack.direction(p, n[None]) for n in number])
    assert torch.allclose(waves.flatten(1) @ waves.flatten(1).T, torch.eye(24), atol=1e-5)
    spectrum = scipy.fft.dctn(waves.numpy(), axes=(2, 3), norm="ortho")
    assert np.allclose(spectrum[:, :, :3, :4].reshape(24, 24), np.eye(24), atol=1e-5)
    s = attack.init(p)
    assert torch.equal(s.order.sort(1).values[0], number)


def test_zoo_with_newton_jumps_to_the_top_of_a_parabola() -> None:
    """f = -sum h (x - t)^2 / 2, with curvatures of its own: one step on all coordinates arrives."""
    x = inputs((1, 3, 4), low=0.4, high=0.6).double()
    g = torch.Generator().manual_seed(0)
    top, h = 0.3 + 0.4 * torch.rand(1, 3, 4, generator=g).double(), 1 + torch.rand(1, 3, 4, generator=g).double()
    net = Rise(lambda v: -(h * (v - top).square()).flatten(1).sum(1) / 2 - 1)
    attack = ZOO(steps=25, coordinates=12, solver="newton", rel_step=1.0, share=1.0)
    assert torch.allclose(ascended(attack, net, x, Threat("l2", 3.0)), top.expand_as(x), atol=1e-6)


def test_zoo_with_adam_first_moves_all_coordinates_alike() -> None:
    x, w = inputs((1, 3, 4)), torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    attack = ZOO(steps=25, coordinates=12, rel_step=0.1, share=1.0)
    assert torch.allclose(ascended(attack, linear(w), x, Threat("l2", 1.0)), x + 0.1 * w.sign(), atol=1e-4)


def test_zoo_on_a_smaller_image_moves_it_smoothly() -> None:
    x = inputs((1, 8, 8))
    attack = ZOO(steps=3, coordinates=1, share=0.25)
    moved = ascended(attack, linear(torch.ones(1, 8, 8)), x, Threat("l2", 1.0)) - x
    assert ((moved > 1e-6).flatten(1).sum(1) >= 9).all()  # one of four numbers, blown up


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_guess_of_bandits_turns_to_the_gradient(norm: str) -> None:
    w = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    fine = w.repeat_interleave(2, 2).repeat_interleave(2, 3)
    net, x, alike = linear(fine[0]), inputs((1, 8, 8)), []
    attack, y = Bandits(steps=300, share=0.5, rate=0.2), torch.zeros(4, dtype=torch.long)
    with Model(net).frozen() as live:
        door, p = Door(live, 4), posed(x, Threat(norm, 0.3))
        s = attack.init(p)
        for k in range(300):
            s = attack.update(p, s, door.score(s.x, p, margin), k)
            alike.append(float(torch.cosine_similarity(s.guess.flatten(1), w.flatten(1)).mean()))
    assert alike[20] < alike[-1]
    assert alike[-1] > 0.75
    assert attack(net, x, y, Threat(norm, 0.3)).success.sum() == 0


def test_bandits_look_at_the_point_where_a_side_of_it_meets_the_goal() -> None:
    x, y = inputs((1, 6, 6), low=0.52, high=0.54), torch.ones(4, dtype=torch.long)
    r = Bandits(steps=200, sigma=0.001)(Line(), x, y, "linf:0.1")
    assert r.success.all()
    assert (r.forwards < 100).all()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: SimBA(basis="dtc"),
        lambda: ZOO(solver="adma"),
        lambda: ZOO(coordinates=0),
        lambda: OnePixel(population=3),
        lambda: OnePixel(strategy="first"),
        lambda: SparseRSPatch(region="ring"),
        lambda: Estimated(PGD(), by="spas"),
        lambda: Estimated(PGD(), draws=0),
    ],
)
def test_wrong_parameters_are_refused(wrong: Any) -> None:
    with pytest.raises(AssayError, match="expected"):
        wrong()
