"""Certificates, radii and brackets: what is certified is never fooled, and wrong requests are refused early."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import assay
from assay.attacks import PGD, Inward
from assay.certification import METHODS, Bracket, Proof
from assay.certification.prover import Prover
from assay.certification.radius import bisect
from assay.core.errors import AssayError, ContradictionError, DataError, ModelError, ThreatError

FEW = 8


@pytest.fixture(scope="module")
def digits():
    """A hardened network, and some images that it gets right."""
    [(x, y)] = assay.load_data("demo:mnist", limit=FEW)
    return assay.load_model("demo:mnist-robust"), x, y


@pytest.fixture(scope="module")
def line():
    """Two classes split by a line; for such a network bounds are exact."""
    torch.manual_seed(0)
    net = nn.Linear(6, 2, bias=False)
    with torch.no_grad():
        net.weight[1] = -net.weight[0]
    x = 0.5 + 0.2 * torch.randn(20, 6).clamp(-2, 2)
    return net, x, net(x).argmax(1)


def distance(net: nn.Linear, x: Tensor, norm: str) -> Tensor:
    """How far the line is, in the norm, where the box is no obstacle."""
    w = net.weight[0].detach().double()
    dual = {"linf": w.abs().sum(), "l2": w.norm(), "l1": w.abs().max()}[norm]
    return (x.double() @ w).abs() / dual


# certificates


@pytest.mark.parametrize(("method", "threat"), [("ibp", "linf:0.005"), ("crown", "linf:0.1")])
def test_what_is_certified_is_not_fooled(digits, method, threat):
    model, x, y = digits
    c = assay.certify(model, x, y, threat, method)
    assert c.certified.any()
    attack = PGD(steps=60, rel_step=0.1)(model, x[c.certified], y[c.certified], threat, seed=1)
    assert not attack.success.any()
    # Nor does any margin that an attack sees get below the bound.
    z = model(attack.x)
    seen = z.gather(1, y[c.certified][:, None]) - z
    assert (seen + 1e-9 >= c.margins[c.certified].where(c.margins[c.certified].isfinite(), -math.inf)).all()


def test_a_stronger_method_proves_no_less(digits):
    model, x, y = digits
    found = [assay.certify(model, x, y, "linf:0.15", m).margins for m in ("ibp", "crown-ibp", "crown")]
    assert all((b >= a).all() for a, b in itertools.pairwise(found))
    assert (found[0].amin(1) > 0).sum() < (found[2].amin(1) > 0).sum()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_of_a_linear_network_all_is_certified_that_is_true(line, norm):
    net, x, y = line
    d = distance(net, x, norm)
    eps = float(d.median()) * 1.001
    c = assay.certify(assay.Model(net, box=(-9, 9)), x, y, assay.Threat(norm, eps))
    assert c.certified.tolist() == (d > eps).tolist()
    assert c.accuracy == float((d > eps).double().mean())
    assert c.margins.isposinf().sum(1).tolist() == [1] * len(x)  # the label against itself


def test_what_is_wrong_as_it_is_is_not_certified(line):
    net, x, y = line
    wrong = y.clone()
    wrong[::2] = 1 - y[::2]
    c = assay.certify(assay.Model(net, box=(-9, 9)), x, wrong, "linf:0.0001")
    assert not c.certified[::2].any()
    assert c.certified[1::2].any()
    assert c.margins[::2].isneginf().all()
    assert c.prediction.equal(y)


def test_arrays_and_networks_and_any_batch_size_will_do(digits):
    model, x, y = digits
    whole = assay.certify(model, x, y, "linf:0.1")
    told = []
    parts = assay.certify(model, x.numpy(), y.numpy(), "linf:0.1", batch_size=5, progress=told.append)
    assert parts.certified.equal(whole.certified)
    torch.testing.assert_close(parts.margins, whole.margins, rtol=1e-9, atol=1e-9)
    assert (told[-1].done, told[-1].right, told[-1].proven) == (FEW, FEW, int(whole.certified.sum()))
    assert all(a.done <= b.done for a, b in itertools.pairwise(told))


def test_coarser_arithmetic_proves_less(digits):
    model, x, y = digits
    real, single, tensor = (
        assay.certify(model, x[:4], y[:4], "linf:0.05", arithmetic=a).margins for a in ("real", "float32", "tf32")
    )
    other = real.isfinite()
    assert (real > single)[other].all()
    assert (single > tensor)[other].all()


def test_a_bound_above_what_is_seen_is_a_contradiction(digits, monkeypatch):
    """No margin over the ball is above that at its middle."""
    model, x, y = digits
    honest = Prover.margins
    monkeypatch.setattr(Prover, "margins", lambda *a, **k: honest(*a, **k) + 100)
    with pytest.raises(ContradictionError, match="where nothing is changed") as caught:
        assay.certify(model, x[:2], y[:2], "linf:0.1")
    assert {"index", "x", "margins", "clean_logits"} <= caught.value.evidence.keys()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"threat": "linf"}, ThreatError, "certified_radius"),
        ({"threat": "linf:8"}, ThreatError, "8/255"),
        ({"threat": assay.Threat("linf", 0.1, targeted=True)}, ThreatError, "untargeted"),
        ({"method": "crwn"}, AssayError, "Did you mean 'crown'"),
        ({"arithmetic": "float8"}, AssayError, "an arithmetic"),
        ({"seconds": 0.0}, AssayError, "seconds above 0"),
        ({"batch_size": 0}, AssayError, "batch_size"),
        ({"x": torch.full((2, 1, 28, 28), 1.5)}, DataError, "input-outside-box"),
        ({"y": torch.tensor([3, 10])}, DataError, "class"),
        ({"y": torch.tensor([3])}, DataError, "label"),
        ({"model": lambda x: torch.fft.fft(x.flatten(1)).real[:, :10]}, ModelError, "fft"),
        ({"model": lambda x: x.flatten(1)[:, :10] * float("nan")}, AssayError, "NaN"),
    ],
)
def test_wrong_requests_are_refused(digits, change, error, says):
    model, x, y = digits
    given = {"model": model, "x": x[:2], "y": y[:2], "threat": "linf:0.1"} | change
    with pytest.raises(error, match=says):
        assay.certify(**given)


def test_a_softmax_at_the_end_changes_no_proof(digits):
    model, x, y = digits
    soft = nn.Sequential(model.net, nn.Softmax(1))
    plain, same = (assay.certify(m, x, y, "linf:0.01") for m in (model, soft))
    assert plain.certified.any()
    assert torch.equal(plain.certified, same.certified)


def test_a_norm_without_bounds_is_refused_by_name(digits):
    class Odd:
        name, is_box = "l3", False

        def __getattr__(self, name):
            return getattr(assay.Threat("l2").norm, name)

    model, x, y = digits
    with pytest.raises(ThreatError, match="'l3'"):
        assay.certify(model, x, y, assay.Threat(Odd(), 0.1))


def test_a_proof_is_a_value_that_says_what_comes_before_search():
    assert [Proof(m).cheap for m in METHODS] == ["ibp", "crown-ibp", "crown", "alpha", "alpha"]
    assert Proof().to_json() == {"method": "crown", "seconds": 30.0, "arithmetic": "float32"}


# radii


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_radius_of_a_linear_network_is_its_distance(line, norm):
    net, x, y = line
    d = distance(net, x, norm)
    model = assay.Model(net, box=(-9, 9))
    r = assay.certified_radius(model, x, y, norm, upper=float(d.max()) * 1.1, steps=14)
    assert (r <= d).all()
    assert (r >= d - float(d.max()) * 1.1 / 2**14 - 1e-6).all()


def test_a_radius_in_l0_is_a_whole_number():
    """Of four values three must be set to zero before the sum falls below 0.9."""
    net = lambda x: torch.stack([x.sum(1), 0.9 + 0 * x.sum(1)], 1)  # noqa: E731
    r = assay.certified_radius(net, torch.full((1, 4), 0.5), torch.tensor([0]), "l0")
    assert r.tolist() == [2.0]


def test_bisection_keeps_the_largest_that_held():
    true = torch.tensor([0.0, 0.3, 0.7, 2.0], dtype=torch.float64)
    asked = []

    def holds(rows, radius, step):
        asked.append((step, len(rows)))
        return radius <= true[rows]

    found = bisect(holds, torch.ones(4, dtype=torch.float64), 10)
    assert (found <= true).all()
    assert (true.clamp_max(1) - found <= 2**-10).all()
    assert asked == [(k, 4) for k in range(10)]


def test_bisection_goes_on_from_what_is_known():
    true = torch.tensor([0.3, 0.7], dtype=torch.float64)
    known = torch.tensor([0.25, 0.7], dtype=torch.float64)
    found = bisect(lambda rows, radius, _: radius <= true[rows], torch.ones(2, dtype=torch.float64), 10, known)
    assert (known <= found).all()
    assert (found <= true).all()
    assert (true - found <= 2**-10).all()


def test_whole_radii_end_when_there_is_nothing_between():
    true = torch.tensor([0.0, 3.0, 9.0], dtype=torch.float64)
    found = bisect(lambda rows, radius, _: radius <= true[rows], torch.full((3,), 9.0).double(), 20, whole=True)
    assert found.tolist() == [0.0, 3.0, 9.0]


def test_a_radius_is_zero_where_the_model_is_wrong(line):
    net, x, y = line
    r = assay.certified_radius(assay.Model(net, box=(-9, 9)), x, 1 - y, upper=0.1, steps=3)
    assert r.tolist() == [0.0] * len(x)


@pytest.fixture(scope="module")
def crooked():
    """A small random network, of more inputs than are halved, for which lines are loose."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    x = torch.rand(2, 16)
    return net, x, net(x).argmax(1)


def test_a_search_goes_on_from_where_lines_end_and_in_its_time(crooked):
    most, seconds = 0.5, 1.5  # far beyond what can be proven: every step would take all the time it is given
    begin = time.monotonic()
    crown = assay.certified_radius(*crooked, method="crown", upper=most)
    between = time.monotonic()
    complete = assay.certified_radius(*crooked, method="complete", upper=most, seconds=seconds)
    end = time.monotonic()
    assert (complete >= crown).all()
    assert (complete > crown).any()
    assert end - between < 2 * (between - begin) + 4 * seconds * len(crown)  # and not seven times


# brackets


def test_a_bracket_holds_the_truth(line):
    net, x, y = line
    b = assay.bracket(assay.Model(net, box=(-9, 9)), x, y, "linf", steps=12)
    assert isinstance(b, Bracket)
    d = distance(net, x, "linf")
    assert (b.lower <= d).all()
    assert (b.upper >= d * (1 - 1e-5)).all()
    assert (b.lower > 0.99 * d).all()
    assert (b.upper < 1.02 * d).all()


def test_a_bracket_of_a_network(digits):
    model, x, y = digits
    wrong = y[:6].clone()
    wrong[0] = (y[0] + 1) % 10
    lower, upper = assay.bracket(model, x[:6], wrong, steps=4)
    assert (lower[0], upper[0]) == (0, 0)
    assert (lower[1:] > 0.05).all()
    assert (lower[1:] < upper[1:]).all()
    assert (upper[1:] < 0.5).all()
    r = Inward()(model, x[1:6], y[1:6], assay.Threat("linf", float(lower[1:].min())), seed=3)
    assert not r.success.any()


def test_a_proof_of_everything_is_found_out(digits, monkeypatch):
    model, x, y = digits
    monkeypatch.setattr(Prover, "margins", everything)
    with pytest.raises(ContradictionError, match="sample 0, proven in linf up to") as caught:
        assay.bracket(model, x[:2], y[:2])
    evidence = caught.value.evidence
    assert evidence["proven"] >= evidence["size"] > 0
    assert evidence["index"] == 0
    seen = torch.from_numpy(np.asarray(evidence["adversarial"]))
    assert model(seen[None]).argmax(1) != y[0]


def everything(self, x, y, radius, norm, tell=None):
    """The margins of a prover that proves whatever it is asked."""
    return torch.ones(len(x), self.exact.classes, dtype=torch.float64)


def test_an_attack_for_another_norm_is_refused(digits):
    model, x, y = digits
    with pytest.raises(AssayError):
        assay.bracket(model, x[:1], y[:1], "linf", attack="ddn")
    with pytest.raises(AssayError, match="eps"):
        assay.bracket(model, x[:1], y[:1], "linf", attack="pgd")
