"""Noise baselines: closed forms of linear models, sizes that fill the ball, and what is asked."""

import math

import pytest
import scipy.ndimage
import torch
from torch import Tensor, nn

import assay
import minimal_cases as cases
from assay import Model, Threat, attacks
from assay.attacks import Blur, Contrast, Gaussian, Noise, SaltPepper, Uniform
from assay.attacks.noise.strength import Kind, strongest
from assay.core.random import Draws
from assay.core.registry import UsageError
from assay.threats.problem import Problem, exact_size

KINDS: list[tuple[Kind, str, float]] = [
    (Gaussian(), "l2", 2.0),
    (Gaussian(grain=3), "l2", 2.0),
    (Uniform(), "linf", 0.2),
    (SaltPepper(), "l0", 17.0),
    (Contrast(), "l2", 1.0),
    (Contrast(), "linf", 0.1),
    (Contrast(), "l1", 9.0),
    (Blur(), "l2", 1.0),
    (Blur(), "linf", 0.1),
    (Blur(), "l1", 9.0),
]


class Half(nn.Module):
    """A plane through the middle of the box, at right angles to the weights."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ self.weight.to(x) - self.bias
        return torch.stack([-z, z], 1)


class Deaf(nn.Module):
    """A network that says the same of everything."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]).expand(len(x), 2) + 0 * x.flatten(1)[:, :1]


def images(b: int = 6, shape: tuple[int, ...] = (3, 9, 9)) -> Tensor:
    return Draws.of(1, torch.arange(b)).uniform(shape)


def posed(x: Tensor, norm: str, eps: float) -> Problem:
    threat = Threat(norm, eps).within(Model(Deaf()).domain, x[0].numel())
    return Problem.pose(x, torch.zeros(len(x), dtype=torch.long), threat, Draws.of(0, torch.arange(len(x))))


@pytest.mark.parametrize(("kind", "norm", "eps"), KINDS, ids=str)
def test_noise_fills_the_ball_also_where_the_box_clips_it(kind: Kind, norm: str, eps: float) -> None:
    x = images()
    p = posed(x, norm, eps)
    point = strongest(p, kind.way(p, 0))
    size = exact_size(p.norm, point, x)
    assert (point >= 0).all()
    assert (point <= 1).all()
    assert (size <= eps).all()
    assert (size >= 0.999 * eps).all(), size.tolist()


@pytest.mark.parametrize(("kind", "norm", "eps"), KINDS, ids=str)
def test_sizes_grow_with_the_strength(kind: Kind, norm: str, eps: float) -> None:
    p = posed(images(), norm, eps)
    way = kind.way(p, 0)
    sizes = torch.stack([p.size(way(p.full(t))) for t in torch.linspace(0, 1, 40).tolist()])
    assert (sizes[0] == 0).all()
    ripples = 0.02 if isinstance(kind, Blur) and norm == "linf" else 1e-5  # a single value may swing back
    assert (sizes.diff(dim=0) >= -ripples).all()


def test_a_ball_larger_than_all_noise_gets_the_strongest() -> None:
    x = images()
    p = posed(x, "l2", float(x[0].numel()) ** 0.5)
    assert torch.allclose(strongest(p, Contrast().way(p, 0)), x.mean((2, 3), keepdim=True).expand_as(x), atol=1e-5)
    p = posed(x, "l0", float(x[0].numel()))
    assert set(strongest(p, SaltPepper().way(p, 0)).unique().tolist()) == {0.0, 1.0}


# Closed forms.


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_contrast_is_lost_up_to_the_plane(norm: str) -> None:
    """Of the plane x_0 = 0.7, the way from x to grey g passes at the share (x_0 - 0.7) / (x_0 - g)."""
    x = 0.1 + 0.4 * Draws.of(2, torch.arange(5)).uniform((12,))
    x[:, 0] = torch.linspace(0.75, 0.95, 5)
    y, first = torch.ones(5, dtype=torch.long), Half(torch.eye(12)[0], 0.7)
    for draws, grey in ((1, x.mean(1, keepdim=True)), (2, torch.full((5, 1), 0.5))):
        share = (x[:, :1] - 0.7) / (x[:, :1] - grey)
        least = exact_size(Threat(norm).norm, x + share * (grey - x), x)
        r = attacks.get("contrast", draws=draws, rounds=30)(first, x, y, norm)
        assert r.success.all()
        if draws == 1:
            assert torch.allclose(r.size.double(), least, rtol=1e-3)
        else:  # the smaller of both ways
            assert (r.size.double() <= least * 1.001).all()


@pytest.mark.parametrize(("name", "norm"), [("gaussian-noise", "l2"), ("uniform-noise", "linf")])
def test_noise_crosses_a_plane_as_often_as_expected(name: str, norm: str) -> None:
    """Of noise of l2 size r in d dimensions the part along a normal is nearly normal, of deviation r / sqrt(d)."""
    d, b, distance = 400, 1000, 0.05
    x, y = torch.full((b, d), 0.5), torch.zeros(b, dtype=torch.long)
    w = Draws.of(4, torch.zeros(1, dtype=torch.long)).normal((d,))[0]
    net = Half(w / w.norm(), 0.5 * float(w.sum() / w.norm()) + distance)
    eps = {"l2": 1.0, "linf": math.sqrt(3 / d)}[norm]  # uniform numbers in [-e, e] have variance e^2 / 3
    found = attacks.get(name, draws=1)(net, x, y, Threat(norm, eps)).success.float().mean().item()
    wanted = 0.5 * math.erfc(distance * math.sqrt(d) / math.sqrt(2))  # of deviation 1 / sqrt(d) in both cases
    assert found == pytest.approx(wanted, abs=3.5 * math.sqrt(wanted * (1 - wanted) / b))


def test_blur_is_the_convolution_that_scipy_does() -> None:
    x = images(3, (2, 12, 17))
    p = posed(x, "l2", 1.0)
    for sigma in (1.5, 3.0):
        blurred = Blur().way(p, 0)(p.full(sigma / 17))
        other = scipy.ndimage.gaussian_filter(x.double().numpy(), (0, 0, sigma, sigma), mode="reflect", truncate=12)
        assert torch.allclose(blurred.double(), torch.from_numpy(other), atol=1e-4)
    assert torch.allclose(blurred.mean((2, 3)), x.mean((2, 3)), atol=1e-6)


# What is asked.


def test_of_each_size_every_draw_is_asked_about_once() -> None:
    x, y = images(4, (1, 6, 6)), torch.zeros(4, dtype=torch.long)
    for draws in (1, 2, 7):
        noise = Noise(Gaussian(), draws=draws, rounds=5)
        r = noise(Deaf(), x, y, "l2:0.5")
        assert not r.success.any()
        assert r.forwards.tolist() == [draws] * 4
        assert r.backwards.tolist() == [0] * 4
        assert noise(Deaf(), x, y, "l2").forwards.tolist() == [5 * draws] * 4
    assert Noise(Contrast(), draws=1)(Deaf(), x, y, "l2:0.5", max_passes=1).forwards.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("name", "norm"),
    [("gaussian-noise", "l2"), ("uniform-noise", "linf"), ("salt-and-pepper", "l0"), ("contrast", "l1")],
)
def test_with_more_rounds_sizes_fall_and_never_below_the_least(name: str, norm: str) -> None:
    net, x = cases.Planes((30,), 4), cases.inputs((30,), b=10)
    y = cases.labels(net, x)
    sizes = [attacks.get(name, rounds=n)(net, x, y, norm).size.double() for n in (4, 8, 16)]
    assert (sizes[1] <= sizes[0]).all()
    assert (sizes[2] <= sizes[1]).all()
    assert (sizes[2] >= 0.9999 * cases.least(net, x, y, norm)).all()
    assert sizes[2].isfinite().any()
    if norm != "l0":
        assert (sizes[2] < sizes[0]).any()


def test_blur_honours_eps_and_finds_less_where_none_is_given() -> None:
    ((x, y),) = assay.load_data("demo:mnist", limit=24)
    plain, weakest = assay.load_model("demo:mnist-plain"), attacks.get("blur")
    smallest = weakest(plain, x, y, "l2")
    assert smallest.success.float().mean() > 0.5
    eps = float(smallest.size.median())
    within = weakest(plain, x, y, Threat("l2", eps))
    assert 0 < within.success.sum() < 24
    assert (within.size[within.success] <= eps).all()
    assert within.forwards.tolist() == (1 + within.success.long()).tolist()


def test_coarse_noise_has_grains() -> None:
    p = posed(torch.full((2, 1, 6, 6), 0.5), "l2", 0.5)
    d = strongest(p, Gaussian(grain=3).way(p, 0)) - 0.5
    for rows in (slice(0, 3), slice(3, 6)):
        assert d[:, :, rows, :3].flatten(1).std(dim=1).max() < 1e-6
    assert d.flatten(1).std(dim=1).min() > 0.01


def test_more_draws_find_no_less() -> None:
    ((x, y),) = assay.load_data("demo:mnist", limit=40)
    plain = assay.load_model("demo:mnist-plain")
    few, many = (attacks.get("salt-and-pepper", draws=n)(plain, x, y, "l0:60").success for n in (1, 20))
    assert (many | ~few).all()
    assert many.sum() > few.sum()


def test_numbers_that_make_no_sense_are_refused() -> None:
    for name, params in (
        ("gaussian-noise", {"draws": 0}),
        ("uniform-noise", {"grain": 0}),
        ("contrast", {"draws": 5}),
        ("blur", {"draws": 2}),
    ):
        with pytest.raises(UsageError):
            attacks.get(name, **params)
