"""Repairs of masked gradients: the values stay, a gradient appears, and verification never sees any of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import assay
from assay.attacks import PGD
from assay.attacks.losses import margin
from assay.core.random import Draws
from assay.evaluation.health import Bench
from assay.evaluation.ladder import mend
from assay.evaluation.preflight import check_model
from assay.models import Door, Model
from assay.models.model import Smoothing
from assay.models.repairs import Bridges, Float64, Plumber, Scout, StraightThrough, Tapped
from assay.threats import Box, Problem, Threat

W = Draws.of(3, torch.arange(3)).normal((2, 4))
X = 0.1 + 0.8 * Draws.of(1, torch.arange(6)).uniform((2, 4))


def head(h):
    return h.flatten(1).to(W.dtype) @ W.flatten(1).T


def search(net, *repairs, x=X, **options):
    """Return what a search sees: values, and the gradient of the first output; and the values of the network itself."""
    with Model(net, repairs=repairs, **options).frozen() as live:
        at = x.clone().requires_grad_()
        z = live.search(at)
        own = live(x).detach()
    return z.detach(), slope(z, at), own


def slope(z, x):
    """Return the gradient of the first output; None where there is none."""
    try:
        return torch.autograd.grad(z[:, 0].sum(), x, allow_unused=True)[0]
    except (RuntimeError, NotImplementedError):
        return None


IDENTITY = W[0].expand(6, 2, 4)
"""The gradient of the first output of ``head`` itself."""


def in_place(x):
    h = x * 4
    h.round_()
    return head(h / 4)


def overwritten(x):
    h = x * 1.0
    h[x > 0.5] = 1.0
    return head(h)


def filled(x):
    return head(torch.zeros_like(x).masked_fill(x > 0.5, 1.0))


STEPS = {
    "round": lambda x: head((x * 4).round() / 4),
    "torch.round": lambda x: head(torch.round(x, decimals=1)),
    "in place": in_place,
    "floor": lambda x: head((x * 8).floor() / 8),
    "floor division": lambda x: head((x // 0.25) * 0.25),
    "rounding mode": lambda x: head(torch.div(x, 0.25, rounding_mode="trunc") * 0.25),
    "remainder": lambda x: head(x - x % 0.25),
    "sign": lambda x: head(torch.sign(x - 0.5)),
    "heaviside": lambda x: head(torch.heaviside(x - 0.5, torch.ones(()))),
    "cast to 8 bits and back": lambda x: head((x * 255).to(torch.uint8).float() / 255),
    "cast to int and multiplied": lambda x: head((x * 8).int() * 0.125),
    "bits that are cut off": lambda x: head((((x * 255).to(torch.uint8) >> 4) << 4) / 255),
    "aten": lambda x: head(torch.ops.aten.round.default(x * 4) / 4),
}

THRESHOLDS = {
    "comparison": lambda x: head((x > 0.5).float()),
    "at least": lambda x: head((x >= 0.5).to(x.dtype)),
    "the other side": lambda x: head(1 - (x < 0.5).float()),
    "negated": lambda x: head((~(x < 0.5)).float()),
    "product": lambda x: head(x.detach() * (x > 0.5)),
    "where": lambda x: head(torch.where(x > 0.5, 1.0, 0.0)),
    "filled": filled,
    "overwritten": overwritten,
    "bits in a sum": lambda x: head((x[..., None] > torch.arange(4) / 4).sum(-1)),
    "both": lambda x: head(((x > 0.3) & (x > 0.6)).float()),
    "bucketize": lambda x: head(torch.bucketize(x, torch.linspace(0, 1, 5)).float()),
    "stacked": lambda x: head(torch.stack([x > 0.4, x > 0.6]).float().mean(0)),
}


@pytest.mark.parametrize("name", STEPS)
def test_rounding_keeps_its_values_and_passes_the_gradient(name):
    plain, nothing, _ = search(STEPS[name])
    assert nothing is None or not nothing.any()
    z, grad, own = search(STEPS[name], StraightThrough())
    assert torch.equal(z, own)
    assert torch.equal(z, plain)
    scale = grad / IDENTITY
    assert torch.allclose(scale, scale[0, 0, 0].expand_as(scale), rtol=1e-4)
    assert scale.min() > 0


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_get_the_slope_of_what_they_compare(name):
    z, grad, own = search(THRESHOLDS[name], StraightThrough())
    assert torch.equal(z, own)
    assert torch.equal(grad.sign(), IDENTITY.sign())


@pytest.mark.parametrize("curve", [torch.sigmoid, torch.tanh])
def test_a_curve_that_is_driven_to_its_ends_gets_the_slope_of_one_that_is_not(curve):
    z, grad, own = search(lambda x: head(curve(1e4 * (x - 0.5))), StraightThrough())
    assert torch.equal(z, own)
    size = (1e4 * (X - 0.5)).abs().flatten(1).mean(1).view(-1, 1, 1)
    at = X.clone().requires_grad_()
    assert torch.allclose(grad, slope(head(curve(2e4 * (at - 0.5) / size)), at), rtol=1e-4)


def test_and_one_that_is_not_keeps_its_own():
    at = X.clone().requires_grad_()
    _, grad, _ = search(lambda x: head(torch.sigmoid(2 * x)), StraightThrough())
    assert torch.allclose(grad, slope(head(torch.sigmoid(2 * at)), at), rtol=1e-5)


def test_a_vote_gets_the_gradient_of_the_scores_that_it_counts():
    net = lambda x: F.one_hot(head(x).argmax(1), 3).float()  # noqa: E731
    z, grad, own = search(net, StraightThrough())
    assert torch.equal(z, own)
    assert torch.allclose(grad, IDENTITY)


def test_a_sound_gradient_next_to_a_rounded_one_stays():
    net = lambda x: head(x) + head((x * 4).round())  # noqa: E731
    _, grad, _ = search(net, StraightThrough())
    assert torch.allclose(grad, 5 * IDENTITY, rtol=1e-5)


class Zeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


class Raises(Zeros):
    @staticmethod
    def backward(ctx, g):
        raise NotImplementedError("no way back")


def linear(h):
    return F.linear(h.flatten(1), W.flatten(1))


def without_grad(x):
    with torch.no_grad():
        h = 2 * x
    return linear(h)


def row_by_row(x):
    return linear(torch.stack([torch.from_numpy(np.round(v.detach().numpy(), 1)) for v in x]))


def all_without_grad(x):
    with torch.no_grad():
        return linear(x)


CUTS = {
    "no_grad": (without_grad, 2.0),
    "everything under no_grad": (all_without_grad, 1.0),
    "detach": (lambda x: linear(3 * x.detach()), 3.0),
    "data": (lambda x: linear(x.data), 1.0),
    "numpy": (lambda x: linear(torch.from_numpy(np.round(x.detach().numpy(), 1))), 1.0),
    "a loop over samples": (row_by_row, 1.0),
    "a new tensor": (lambda x: linear(torch.tensor(x.tolist())), 1.0),
    "an empty backward pass": (lambda x: linear(Zeros.apply(x)), 1.0),
    "a backward pass that raises": (lambda x: linear(Raises.apply(x)), 1.0),
    "another shape": (lambda x: linear(torch.from_numpy(x.detach().numpy().reshape(-1, 8))), 1.0),
    "behind a layer": (lambda x: linear(Zeros.apply(F.linear(x, 2 * torch.eye(4)))), 2.0),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_is_bridged_by_the_identity(name):
    net, factor = CUTS[name]
    scout = Scout()
    search(net, scout, x=X[:2])
    bridges = Bridges(tuple(scout.links))
    z, grad, own = search(net, bridges)  # more samples than it was found with
    assert torch.equal(z, own)
    assert torch.allclose(grad, factor * IDENTITY, rtol=1e-5)


class Reversed(Zeros):
    @staticmethod
    def backward(ctx, g):
        return -g


def hooked(x):
    h = 2 * x
    if h.requires_grad:
        h.register_hook(lambda g: g.flip(0))
    return linear(h)


LIES = {
    "a backward pass that says the opposite": (lambda x: linear(Reversed.apply(x)), 1.0),
    "and something behind it": (lambda x: linear(2 * Reversed.apply(x)), 1.0),
    "a hook on a gradient": (hooked, 2.0),
}


@pytest.mark.parametrize("name", LIES)
def test_a_backward_pass_that_a_network_brings_along_need_not_be_believed(name):
    net, factor = LIES[name]
    scout = Scout(trusting=False)
    search(net, scout, x=X[:2])
    z, grad, own = search(net, Bridges(tuple(scout.links)))
    assert torch.equal(z, own)
    assert torch.allclose(grad, factor * IDENTITY, rtol=1e-5)


def test_the_backward_pass_of_a_repair_is_believed():
    scout = Scout(trusting=False)
    search(lambda x: linear(x.round()), StraightThrough(), scout)
    assert scout.links == []


def test_images_of_another_size_are_bridged_too():
    """What was shrunk outside torch: the gradient is that of a bilinear resize."""
    conv = nn.Conv2d(1, 2, 2)
    net = lambda x: conv(torch.from_numpy(x.detach().numpy()[:, :, ::2, ::2].copy())).mean((2, 3))  # noqa: E731
    scout, x = Scout(), torch.rand(3, 1, 8, 8)
    search(net, scout, x=x)
    _, grad, _ = search(net, Bridges(tuple(scout.links)), x=x)
    assert grad is not None
    assert grad.abs().sum() > 0


def test_where_nothing_is_cut_nothing_is_bridged():
    scout = Scout()
    _, grad, _ = search(lambda x: linear(x.relu()), scout)
    assert scout.links == []
    assert torch.allclose(grad, IDENTITY)


def test_a_saturated_softmax_has_a_slope_in_float64():
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.Softmax(1))
    with torch.no_grad():
        net[1].weight.copy_(2000 * W.flatten(1))
    _, plain, _ = search(net, probabilities=True)
    z, grad, own = search(net, Float64(), probabilities=True)
    assert not plain.any(1).any()
    assert z.dtype == torch.float64
    assert torch.equal(z.argmax(1), own.argmax(1))
    assert (grad.flatten(1).abs().amax(1) > 1).any()
    assert net[1].weight.dtype == torch.float32


def test_slopes_too_small_for_float32_keep_their_direction():
    """Probabilities taken as logits: the gradient is about exp(-200), and yet it points somewhere."""
    net = lambda x: (100 * head(x)).softmax(1)  # noqa: E731
    with Model(net, repairs=(Float64(),)).frozen() as live:
        p = Problem.pose(X, live(X).argmax(1), Threat("linf", 0.1, Box()), Draws.of(0, torch.arange(6)))
        grad = Door(live, 6).gradient(X, p, margin).grad
    assert grad.dtype == torch.float32
    assert (grad.flatten(1).abs().amax(1) > 0).all()


def test_scores_behind_a_head_that_hides_them_are_tapped():
    net = lambda x: 0.5 + 0.1 * (200 * head(x)).softmax(1).round()  # noqa: E731
    plumber = Plumber()
    search(net, plumber)
    tapped = [search(net, t) for t in plumber.taps()]
    assert any(torch.allclose(z, head(X)) and torch.allclose(grad, IDENTITY) for z, grad, _ in tapped)
    assert all(torch.equal(own, net(X)) for _, _, own in tapped)


def test_where_tapped_scores_and_the_output_disagree_the_output_decides():
    swap = torch.tensor([True] + [False] * 5)
    net = lambda x: torch.where(swap[: len(x), None], -head(x), head(x)).sign()  # noqa: E731
    plumber = Plumber()
    search(net, plumber)
    call = next(c for c, scores in plumber.scores if torch.equal(scores.detach(), head(X)))
    z, grad, own = search(net, Tapped(call, plumber.scores[-1][0]))
    assert torch.equal(z.argmax(1), own.argmax(1))
    assert (head(X).argmax(1) != own.argmax(1)).any()
    assert torch.allclose(grad, IDENTITY)


def test_scores_that_pick_other_classes_are_not():
    plumber = Plumber()
    search(lambda x: -head(x), plumber)
    assert all(t.source != (1, 0) for t in plumber.taps())
    assert not plumber.taps()


def test_an_estimated_gradient_is_that_of_a_linear_network_and_counts_its_passes():
    with Model(head, smoothing=Smoothing(0.01, 300)).frozen() as live:
        p = Problem.pose(X, head(X).argmax(1), Threat("linf", 0.1, Box()), Draws.of(0, torch.arange(6)))
        door = Door(live, 6)
        e = door.gradient(X, p, margin)
        again = Door(live, 6).gradient(X[3:4], p.take(torch.tensor([3])), margin)
    with Model(head).frozen() as live:
        exact = Door(live, 6).gradient(X, p, margin)
    assert torch.equal(e.loss, exact.loss)
    assert F.cosine_similarity(e.grad.flatten(1), exact.grad.flatten(1)).min() > 0.9
    assert (door.forwards == 601).all()
    assert (door.backwards == 0).all()
    assert torch.allclose(again.grad[0], e.grad[3], atol=1e-5)  # directions belong to samples


def test_a_mean_of_gradients_sees_through_ripples():
    """Ripples of size 1e-4 have slopes of 5; over noise that is longer than they are, those vanish."""
    net = lambda x: head(x + 1e-4 * torch.sin(5e4 * x))  # noqa: E731
    y = net(X).argmax(1)

    def seen(net, **options):
        with Model(net, **options).frozen() as live:
            door = Door(live, 6)
            p = Problem.pose(X, y, Threat("linf", 0.1, Box()), Draws.of(0, torch.arange(6)))
            return door.gradient(X, p, margin).grad.flatten(1), door

    exact, _ = seen(head)
    rippled, _ = seen(net)
    smooth, door = seen(net, smoothing=Smoothing(0.01, 400, exact=True))
    assert F.cosine_similarity(exact, smooth).median() > 0.8 > F.cosine_similarity(exact, rippled).median()
    assert (door.forwards == 401).all()
    assert (door.backwards == 400).all()


@pytest.fixture(scope="module")
def plain():
    return assay.load_model("demo:mnist-plain").net


@pytest.fixture(scope="module")
def digits():
    return assay.load_data("demo:mnist", limit=32)


def codes(findings):
    return [f.code for f in findings]


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (lambda net, x: net((x > 0.25).float()), "repaired-straight-through"),
        (lambda net, x: net(Raises.apply(x)), "repaired-bpda"),
        (lambda net, x: net(torch.from_numpy(np.round(x.detach().numpy() * 8) / 8)), "repaired-bpda"),
        (lambda net, x: net(Reversed.apply(x)), "repaired-bpda"),
        (lambda net, x: net(torch.sigmoid(4000 * (x - 0.28))), "repaired-straight-through"),
        (lambda net, x: 9 * (50 * net(x)).softmax(1), "repaired-output"),
    ],
    ids=["threshold", "raises", "numpy", "reversed", "steep", "softmax"],
)
def test_the_ladder_finds_the_repair_and_the_attack_gets_through(plain, digits, step, code):
    net, threat = (lambda x: step(plain, x)), Threat("linf", 0.3, Box())
    checked = check_model(Model(net), digits, threat, None)
    assert code in codes(checked.findings)
    assert checked.blind == 0
    x, y = digits.batch(range(32)), digits.labels
    attack = PGD(steps=10, loss=margin, rel_step=1.0)
    after = attack(checked.model, x, y, threat)
    assert after.success.float().mean() > 0.9
    if step(plain, x.clone().requires_grad_()).requires_grad and code != "repaired-bpda":
        assert attack(net, x, y, threat).success.float().mean() < 0.2
    claimed = net(after.x[after.success])
    assert (claimed.argmax(1) != y[after.success]).all()


def test_a_sound_network_is_left_alone_for_ten_passes_a_sample(plain, digits):
    passes = 0

    def net(x):
        nonlocal passes
        passes += len(x)
        return plain(x)

    checked = check_model(Model(net), digits, Threat("linf", 0.1, Box()), None)
    assert (checked.findings, checked.model.repairs, checked.model.smoothing) == ((), (), None)
    assert passes <= 8 * 40  # forwards; batches are filled up to multiples of eight


def test_where_nothing_else_helps_differences_do(digits):
    """A black box without any gradient inside it."""
    plain = assay.load_model("demo:mnist-plain").net
    weights = [v.detach().numpy() for v in (plain[5].weight, plain[5].bias, plain[7].weight, plain[7].bias)]
    rng = np.random.default_rng(0)
    first = rng.standard_normal((784, 1568)).astype(np.float32) / 28

    def net(x):
        h = np.maximum(x.detach().numpy().reshape(len(x), -1) @ first, 0)
        return torch.from_numpy(np.maximum(h @ weights[0].T + weights[1], 0) @ weights[2].T + weights[3])

    x = digits.batch(range(16))
    bench = Bench(x, net(x).argmax(1), Threat("l2", 2.0, Box()), None)
    state, findings = mend(Model(net), bench.health(Model(net)), bench)
    assert codes(findings) == ["repaired-smoothing"]
    assert state.model.smoothing is not None
    assert state.health.blind == 0


def test_randomness_behind_a_mask_is_found(plain, digits):
    """The softmax is so saturated that every pass gives the same probabilities."""
    net = lambda x: (300 * plain(x + 0.02 * torch.randn_like(x))).softmax(1)  # noqa: E731
    checked = check_model(Model(net), digits, Threat("linf", 0.1, Box()), None)
    assert {"repaired-output", "randomized"} <= set(codes(checked.findings))
    assert checked.model.samples >= 10


def test_repairs_can_be_pickled_with_their_model(plain):
    import pickle

    model = Model(plain, repairs=(Float64(), StraightThrough(), Bridges((((0, 3), 0),)), Tapped((1, 2), (3, 4))))
    assert pickle.loads(pickle.dumps(model)).repairs == model.repairs
    assert replace(model, repairs=()).repairs == ()
