"""Intervals as values: sound wherever they go, equal to what assay proves, and good to train on."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import assay
from assay.certification.bounds import REAL, Bounds
from assay.certification.prover import differences
from assay.certification.region import Region
from assay.core.errors import ModelError
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.hardening import intervals
from assay.hardening.ibp_init import ibp_init
from assay.hardening.inner import around
from assay.hardening.intervals import RULES, Interval
from assay.hardening.intervals_linear import ancestors, least, worst_logits
from assay.hardening.objective import OBJECTIVES, Objective, Step
from assay.hardening.objectives.certified import IBP, MTLIBP, SABR, CrownIBP, spread_and_balance
from assay.hardening.objectives.plain import Plain
from assay.threats import Threat
from bound_cases import draw, recorded, seeded

EPS = 0.1
MAPS = (2, 6, 6)


def box(x: Tensor, eps: float = EPS) -> Interval:
    return Interval(x, (x - eps).clamp_min(0), (x + eps).clamp_max(1))


def inputs(shape: tuple[int, ...], n: int = 3) -> Tensor:
    return torch.rand(n, *shape, generator=seeded(1))


class Function(nn.Module):
    """A function between two linear layers, or convolutions."""

    def __init__(self, f: Callable[[Tensor], Tensor], maps: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1) if maps else nn.Linear(6, 8)
        self.f, self.last = f, nn.LazyLinear(3)
        self(torch.zeros(2, *(MAPS if maps else (6,))))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.f(self.first(2 * x - 1)).flatten(1))


class Residual(nn.Module):
    """Normalised inputs, convolutions with BatchNorm, two shortcuts, averages."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.6]).view(1, 2, 1, 1))
        self.register_buffer("std", torch.tensor([0.3, 0.2]).view(1, 2, 1, 1))
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.again = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.down, self.short = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1, 2)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first((x - self.mean) / self.std)), inplace=True)
        x = F.relu(x + self.again(self.second(x)))
        x = F.relu(self.down(x) - self.short(x))
        return self.last(x.mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 2),
        nn.ReLU(),
        nn.AvgPool2d(2, 1, 1),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.BatchNorm1d(8, affine=False),
        nn.ReLU(),
        nn.Linear(8, 5),
        nn.Linear(5, 3),
    )


def on_line(x: Tensor) -> Tensor:
    """(b, 4, 36), by all that goes along one axis."""
    x = F.conv_transpose1d(x, torch.linspace(-1, 1, 24).view(4, 2, 3))
    x = F.max_pool1d(x, 3, 2) + F.avg_pool1d(x, 3, 2) + F.dropout1d(x, 0.3, training=False)[:, :, 1:37:2]
    return F.adaptive_avg_pool1d(x, 4) + F.adaptive_max_pool1d(x, 4)


def on_solid(x: Tensor) -> Tensor:
    """(b, 1, 4, 6, 6), by all that goes along three axes."""
    x = F.conv_transpose3d(x, torch.linspace(-1, 1, 16).view(1, 2, 2, 2, 2))
    x = F.max_pool3d(x, 3, 2) + F.avg_pool3d(x, 3, 2) + F.dropout3d(x, 0.3, training=False)[:, :, :2, :3, :3]
    return F.adaptive_avg_pool3d(x, 2) + F.adaptive_max_pool3d(x, 2)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{n: getattr(F, n) for n in ("relu", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish")},
    **{n: getattr(F, n) for n in ("hardsigmoid", "softplus", "softsign", "logsigmoid")},
    **{n: getattr(torch, n) for n in ("sigmoid", "tanh")},
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "limits": lambda x: F.hardtanh(x, -0.3, 0.4) + F.relu6(4 * x) + x.clamp(min=0.1) + torch.clip(x, -0.2, 0.2),
    "one limit": lambda x: torch.clamp_min(x, -0.2) - x.clamp_max(0.3),
    "constants": lambda x: (1 - x) * torch.linspace(-1, 1, 8) / -0.7 + torch.ones(8) - (-x) * 0.1,
    "constants first": lambda x: torch.ones(8) - torch.linspace(-1, 1, 8) * (2 + x),
    "differences": lambda x: (x - F.relu(x)) + x - 2 * x,
    "aliases": lambda x: x.subtract(0.1).multiply(-3).divide(-0.2).true_divide(-7).negative() + x.add(1).sub(x.mul(-2)),
    "quotients": lambda x: torch.neg(x).div(torch.linspace(-2, -1, 8)),
    "product": lambda x: x @ torch.linspace(-1, 1, 24).view(8, 3),
    "parts": lambda x: torch.cat([x[:, 1::2], torch.ones(len(x), 2), -x.narrow(1, 0, 3)], 1),
    "pad": lambda x: F.pad(x, (1, 2), value=-2.0),
    "copies": lambda x: torch.concat([x.clone().float().to(torch.float32).roll(1, 1), x.select(1, 0).unsqueeze(1)], 1),
}
ON_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1) + F.adaptive_max_pool2d(x, 3),
    "avg_pool": lambda x: F.avg_pool2d(x, 2, 1) + F.adaptive_avg_pool2d(x, 5),
    "axes": lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1, 4).transpose(1, 2).mean(1, keepdim=True),
    "views": lambda x: x.contiguous().view(x.shape[0], 2, -1).unsqueeze(1).squeeze(1).flip(2),
    "more views": lambda x: (
        x.movedim(1, 3).swapaxes(1, 3).contiguous().unflatten(1, (2, 2)).view_as(torch.zeros(len(x), 4, 36)).sum(1)
    ),
    "shuffled": lambda x: F.channel_shuffle(F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), 2),
    "lines": lambda x: on_line(x.flatten(2)),
    "solids": lambda x: on_solid(x.unsqueeze(1)),
    "conv_transpose": lambda x: F.conv_transpose2d(x, torch.linspace(-1, 1, 48).view(4, 3, 2, 2), stride=2),
    "conv1d": lambda x: F.conv1d(x.flatten(2), torch.linspace(-1, 1, 24).view(2, 4, 3), torch.ones(2), dilation=2),
    "conv3d": lambda x: F.conv3d(x.unsqueeze(1), torch.linspace(-1, 1, 8).view(1, 1, 2, 2, 2)),
}
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "cnn": (cnn, MAPS),
    "residual": (Residual, MAPS),
    **{n: (lambda f=f: Function(f), (6,)) for n, f in FUNCTIONS.items()},
    **{n: (lambda f=f: Function(f, maps=True), MAPS) for n, f in ON_MAPS.items()},
    "dropout": (lambda: Function(nn.Dropout(0.4)), (6,)),
    "dropout2d": (lambda: Function(nn.Dropout2d(0.4), maps=True), MAPS),
}


def built(name: str, training: bool = False) -> tuple[nn.Module, Tensor]:
    make, shape = NETS[name]
    return draw(make(), 0).train(training), inputs(shape)


# ------------------------------------------------------------------------------------------------------ soundness


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETS)
def test_no_value_on_the_way_leaves_its_bounds(name: str, training: bool) -> None:
    """An interval without width is a point, seen with the statistics and the dropout of the batch it came with."""
    net, x = built(name, training)
    g = seeded(2)
    around_x = box(x)

    def steps(z: Interval) -> list[Interval]:
        torch.manual_seed(0)  # of dropout
        return ancestors(copy.deepcopy(net)(z))

    bounds = steps(around_x)
    for k in range(20):
        share = torch.rand(x.shape, generator=g) if k % 2 else (torch.rand(x.shape, generator=g) < 0.5).float()
        z = around_x.lower + share * (around_x.upper - around_x.lower)
        for bound, value in zip(bounds, steps(Interval(x, z, z)), strict=True):
            rounding = 1e-5 * (1 + value.lower.abs())
            assert (value.lower >= bound.lower - rounding).all()
            assert (value.upper <= bound.upper + rounding).all()
            assert (value.upper - value.lower <= rounding).all()
        if not training:
            assert torch.allclose(value.lower, net(z), atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_the_point_is_treated_as_if_it_were_alone(name: str) -> None:
    net, x = built(name, training=True)
    alone = copy.deepcopy(net)
    torch.manual_seed(0)
    z = net(box(x))
    torch.manual_seed(0)
    assert torch.equal(z.point, alone(x))
    for ours, theirs in zip(net.buffers(), alone.buffers(), strict=True):
        assert torch.equal(ours, theirs), "running statistics are moved once, by the point"


def test_bounds_in_training_mode_use_the_statistics_of_the_point() -> None:
    net = draw(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=1.0), nn.Linear(4, 3)), 0).train()
    x = inputs((6,), n=8)
    trained = net(box(x))
    net[1].running_var.mul_(7 / 8)  # BatchNorm divides by n, but keeps the unbiased variance
    judged = net.eval()(box(x))
    assert torch.allclose(trained.lower, judged.lower, atol=1e-5)
    assert torch.allclose(trained.upper, judged.upper, atol=1e-5)


# --------------------------------------------------------------------------------------------- what assay proves


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual"])
@pytest.mark.parametrize("backward", [0, 1], ids=["ibp", "crown-ibp"])
def test_bounds_of_differences_are_those_of_certification(name: str, backward: int) -> None:
    net, x = built(name)
    y, program = torch.tensor([0, 1, 2]), recorded(net, x.shape[1:])
    for eps in (0.01, 0.1, 0.3):
        region = Region.ball(x, torch.full((3,), eps), "linf", 0.0, 1.0)
        proven = Bounds.by_intervals(program.graph(), region, REAL)
        margins = proven.lower(proven.graph.out, differences(y, 3), since=0 if backward else proven.graph.out)
        ours = worst_logits(net, box(x, eps), y, backward)
        assert torch.allclose(-ours.worst.double(), margins, atol=1e-4 * float(margins.abs().amax()))
        assert torch.equal(ours.logits.point, net(x))


def test_lines_are_tighter_than_intervals_and_mixtures_lie_between() -> None:
    net, x = built("mlp")
    y = torch.tensor([0, 1, 2])
    loose, between, tight = (worst_logits(net, box(x, 0.05), y, share).worst for share in (0, 0.25, 1))
    assert (tight <= loose + 1e-6).all()
    assert (tight < loose - 1e-3).any()
    assert torch.allclose(between, 0.75 * loose + 0.25 * tight, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NETS if n not in {*FUNCTIONS, "max_pool", "lines", "solids"}])
def test_lines_are_sound_in_training_mode_too(name: str) -> None:
    """Dropout and BatchNorm are affine for a given batch; random coefficients of both signs."""
    net, x = built(name, training=True)
    a = torch.randn(3, 5, 3, generator=seeded(3))

    def at(x_or_box: Interval) -> Interval:
        torch.manual_seed(0)
        return net(x_or_box)

    with torch.no_grad():
        low = least(at(box(x)), a, through=True)
        for _ in range(20):
            z = x + EPS * torch.randn(x.shape, generator=seeded(4)).sign()
            value = at(Interval(x, z.clamp(0, 1), z.clamp(0, 1))).lower
            assert ((a @ value[..., None]).squeeze(2) >= low - 1e-4).all()


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("backward", [0, 0.5, 1])
def test_gradients_are_those_of_finite_differences(backward: float) -> None:
    net, x = built("residual", training=True)
    net, x, y = net.double(), x.double(), torch.tensor([0, 1, 2])

    def value() -> Tensor:
        return worst_logits(net, box(x), y, backward).worst.square().sum()

    params = list(net.parameters())
    grads = torch.autograd.grad(value(), params)
    g, h = seeded(5), 1e-6
    moves = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in params]
    slope = sum(float((d * m).sum()) for d, m in zip(grads, moves, strict=True))
    ends = []
    with torch.no_grad():
        for step in (h, -2 * h):
            for p, m in zip(params, moves, strict=True):
                p.add_(m, alpha=step)
            ends.append(float(value()))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-4)


@pytest.mark.parametrize("backward", [0, 1])
def test_gradients_are_finite_where_nothing_moves(backward: int) -> None:
    """Neither a box without width nor neurons at the kink give NaN."""
    net, x = built("mlp")
    with torch.no_grad():
        net[0].bias.zero_()
    worst_logits(net, box(torch.zeros_like(x), 0.0), torch.tensor([0, 1, 2]), backward).worst.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda x: F.softmax(x, 1), "softmax"),
        (lambda x: x * x, "mul"),
        (lambda x: torch.ones(6) / x, "div"),
        (lambda x: 1 / x, "truediv"),
        (lambda x: x**2, "pow"),
        (lambda x: x @ x, "matmul"),
        (lambda x: x.abs(), "abs"),
        (lambda x: x.relu_(), "relu_"),
        (lambda x: x.T, "T"),
        (lambda x: F.layer_norm(x, (6,)), "layer_norm"),
        (lambda x: F.prelu(x, torch.tensor([-0.1])), "prelu"),
        (lambda x: F.leaky_relu(x, -0.5), "leaky_relu"),
        (lambda x: F.elu(x, -1.0), "elu"),
        (lambda x: F.linear(torch.ones(1, 6), x), "linear"),
        (lambda x: x.mean(0), "mean"),
        (lambda x: x.view(-1), "view"),
        (lambda x: torch.maximum(x, torch.zeros(6)), "maximum"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(f: Callable[[Interval], Interval], name: str) -> None:
    with pytest.raises(ModelError, match=rf"found {name}\b") as error:
        f(box(inputs((6,))))
    assert error.value.code == "no-interval"


def test_lines_refuse_by_name_what_only_intervals_pass() -> None:
    net, x = built("tanh")
    with pytest.raises(ModelError, match=r"tanh.*train by ibp"):
        worst_logits(net, box(x), torch.tensor([0, 1, 2]), backward=1)


@pytest.mark.parametrize("net", [lambda x: (x, x), lambda x: x.unsqueeze(1), lambda x: x.point])
def test_a_network_has_to_return_one_interval_of_logits(net: Callable[[Interval], object]) -> None:
    with pytest.raises(ModelError, match="logits"):
        worst_logits(net, box(inputs((6,))), torch.tensor([0, 1, 2]))


def test_every_rule_is_used_above(monkeypatch: pytest.MonkeyPatch) -> None:
    used, honest = set(), intervals.apply

    def noting(f: Callable[..., object], *args: object, **kwargs: object) -> Interval:
        used.add(f.__name__)
        return honest(f, *args, **kwargs)

    monkeypatch.setattr(intervals, "apply", noting)
    for name in NETS:
        net, x = built(name, training=True)
        net(box(x))
    assert used == {*RULES}


# ------------------------------------------------------------------------------------------- initial weights, warm-up


def test_initial_weights_depend_on_the_seed_alone() -> None:
    nets = [cnn(), cnn(), cnn()]
    for net, seed in zip(nets, (3, 3, 4), strict=True):
        torch.rand(5)  # torch's own generator plays no part
        ibp_init(net, seed)
    same, again, other = (net[7].weight.detach() for net in nets)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert float(same.std()) == pytest.approx((2 * torch.pi) ** 0.5 / 36, rel=0.1)
    assert all(float(p.detach().abs().sum()) == 0 for n, p in nets[0].named_parameters() if n in ("0.bias", "7.bias"))


def test_initial_weights_keep_the_width_of_intervals() -> None:
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(256, 256), nn.ReLU())))
    ibp_init(net)
    with torch.no_grad():
        widths = [float(v.radius.mean()) for v in ancestors(net(box(torch.rand(8, 256, generator=seeded(0)))))[1::2]]
    assert widths[-1] == pytest.approx(widths[0], rel=0.3)


@pytest.mark.parametrize(("weight", "bias", "expected"), [(1.0, 2.0, 0.0), (4.0, 0.0, 2.5), (1.0, 0.5, 2.0)])
def test_the_regulariser_of_two_neurons(weight: float, bias: float, expected: float) -> None:
    """Bounds -1..1 through ``w x + b`` and ``w x - b``: balanced; four times as wide; all of unknown sign."""
    x = Interval(torch.zeros(1, 1), -torch.ones(1, 1), torch.ones(1, 1))
    z = F.relu(F.linear(x, torch.full((2, 1), weight), torch.tensor([bias, -bias])))
    assert float(spread_and_balance(z)) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------- training


@cache
def patterns(n: int = 192, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three noisy patterns of 8 x 8 pixels."""
    means = 0.2 + 0.6 * torch.rand(3, 1, 8, 8, generator=seeded(0))
    y = torch.arange(n) % 3
    return (means[y] + 0.08 * torch.randn(n, 1, 8, 8, generator=seeded(seed))).clamp(0, 1), y


def step(net: nn.Module, ramp: float, k: int = 0, soft: Tensor | None = None) -> Step:
    x, y = patterns()
    problem = around(x, y, Threat("linf", EPS, box=(0, 1)), ramp, Draws.of(k, torch.arange(len(x))))
    return Step(net, x, y, problem, soft=soft, share=ramp, ramp=ramp)


def trained(objective: Objective, steps: int = 60) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 3)
    )
    adam = torch.optim.Adam(net.parameters(), lr=5e-3)
    for k in range(steps):
        s = step(net, min(1.0, 2 * k / steps), k)
        loss = objective.loss(s, objective.find(s)).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    return net.eval()


@cache
def proven(objective: Objective) -> float:
    x, y = patterns(60, seed=1)
    return assay.certify(trained(objective), x, y, f"linf:{EPS}", method="ibp").accuracy


@pytest.mark.parametrize(
    "objective", [IBP(), CrownIBP(), SABR(steps=3), MTLIBP(steps=3)], ids=lambda o: type(o).__name__
)
def test_training_on_bounds_raises_the_share_that_is_proven(objective: Objective) -> None:
    assert proven(objective) > proven(Plain()) + 0.3


@pytest.mark.parametrize("name", ["ibp", "crown-ibp", "sabr", "mtl-ibp"])
@pytest.mark.parametrize("ramp", [0.01, 0.5, 1.0])
def test_losses_of_two_classes_and_soft_labels_are_finite(name: str, ramp: float) -> None:
    objective = OBJECTIVES[name]()
    assert objective.norms == ("linf",)
    net = draw(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), 0).train()
    s = step(net, ramp, soft=F.one_hot(patterns()[1], 3) * 0.8 + 0.2 / 3)
    terms = objective.loss(s, objective.find(s))
    terms.loss.backward()
    assert terms.logits.shape == (192, 3)
    assert not terms.logits.requires_grad
    assert ("reg" in terms.parts) == (ramp < 1)
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("objective", "share", "backward"),
    [(IBP(kappa=0.6), 0.15, 0.0), (CrownIBP(kappa=0.8, beta=0.2), 0.2, 0.8), (MTLIBP(alpha=0.3), 0.3, 0.0)],
)
def test_shares_follow_the_growth_of_eps(objective: Objective, share: float, backward: float) -> None:
    net = draw(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)), 0)
    s = step(net, 0.25)
    with torch.no_grad():
        ball = Interval(s.x, s.problem.lower, s.problem.upper)
        out, worst = worst_logits(net, ball, s.y, backward)
        warm = 0.75 * 0.5 * spread_and_balance(out)
        expected = (1 - share) * s.cross_entropy(net(s.x)) + share * s.cross_entropy(worst) + warm
        assert torch.allclose(objective.loss(s, s.x).loss, expected.mean(), rtol=1e-5)


def test_sabr_propagates_a_small_box_inside_the_ball() -> None:
    net, seen = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    s, objective = step(net, 1.0), SABR(lam=0.25)
    x = objective.find(s)
    objective.loss(s, x)
    small = seen[-1]
    assert float((x - s.x).abs().max()) == pytest.approx(0.75 * EPS, rel=1e-4)
    assert float((small.upper - small.lower).max()) == pytest.approx(0.5 * EPS, rel=1e-4)
    assert (small.lower >= s.problem.lower).all()
    assert (small.upper <= s.problem.upper).all()
    assert torch.equal(small.point, s.x), "statistics of batches stay those of clean samples"


def test_sabr_with_the_whole_ball_is_ibp_on_bounds_alone() -> None:
    net = draw(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)), 0)
    s = step(net, 1.0)
    whole, ibp = SABR(lam=1.0), IBP(kappa=1.0)
    with torch.no_grad():
        expected = ibp.loss(s, s.x).loss
    assert torch.allclose(whole.loss(s, whole.find(s)).loss, expected)


@pytest.mark.parametrize(
    "make", [lambda: IBP(kappa=1.5), lambda: CrownIBP(beta=-0.1), lambda: SABR(lam=2), lambda: MTLIBP(alpha=3)]
)
def test_shares_outside_0_to_1_are_refused(make: Callable[[], Objective]) -> None:
    with pytest.raises(UsageError, match=">= 0 and <= 1"):
        make()
