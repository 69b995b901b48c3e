"""On another device, as on a GPU: no tensor is made, indexed or read in the wrong place (see ``elsewhere.py``)."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import assay
from assay import attacks
from assay.core.random import Draws
from assay.data import Data
from assay.hardening.inner import around
from assay.hardening.objective import OBJECTIVES, Step
from elsewhere import ELSEWHERE, Away, moved, second_device
from test_attacks import SHORT
from test_objectives import CASES, EPS, batch, learn, mlp, objective


@pytest.fixture
def away() -> Iterator[None]:
    with second_device():
        yield


@pytest.fixture(scope="module")
def data() -> Data:
    return assay.load_data("demo:mnist", limit=4)


def model(name: str = "mnist-robust") -> assay.Model:
    there = assay.load_model(f"demo:{name}")
    return replace(there, net=moved(copy.deepcopy(there.net)))


# That the tool finds what it is for


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.where(x > 0, x, torch.zeros(3)),
        lambda x: torch.zeros(3)[x > 0],
        nn.Linear(3, 2),
        lambda x: x.index_put((torch.tensor([0]),), torch.ones(1)),
        lambda x: x.numpy(),
        lambda x: torch.cat([x, torch.zeros(1)]),
    ],
)
def test_what_fails_on_a_gpu_fails(away: None, mistake: Callable[[Tensor], object]) -> None:
    x = torch.rand(3).to(ELSEWHERE)
    with pytest.raises((RuntimeError, TypeError), match=r"two devices|no array"):
        mistake(x)


def test_what_works_on_a_gpu_works(away: None) -> None:
    x = torch.rand(3, 2).to(ELSEWHERE).requires_grad_()
    y = (2 * x + torch.tensor(1.0))[torch.tensor([0, 2])] + x.new_tensor([1.0, 2.0])
    (slope,) = torch.autograd.grad((y * torch.as_tensor([1.0, 3.0], device=ELSEWHERE)).sum(), x)
    assert isinstance(slope, Away)
    assert slope.cpu().tolist() == [[2, 6], [0, 0], [2, 6]]
    assert torch.equal(y.detach().cpu(), 2 * x.detach().cpu()[[0, 2]] + torch.tensor([2.0, 3.0]))


# The package


def slow(*values: object) -> list[object]:
    return [pytest.param(v, marks=pytest.mark.slow) for v in values]


@pytest.mark.parametrize("threat", ["linf:0.3", *slow("l2:2", "l1:8", "l0:20")])
def test_an_evaluation(away: None, data: Data, threat: str) -> None:
    found = assay.evaluate(model("mnist-plain"), data, threat, "quick", device=ELSEWHERE, progress=False)
    assert found.robust_accuracy <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["standard", "thorough", "reference"])
def test_an_evaluation_of_any_effort(away: None, data: Data, effort: str) -> None:
    how = {"device": ELSEWHERE, "progress": False, "max_passes": 2000}
    assert assay.evaluate(model(), data, "linf:0.3", effort, **how).robust_accuracy >= 0.5


def test_a_proof_and_a_repair(away: None, data: Data) -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model("mnist-plain").net

        def forward(self, x: Tensor) -> Tensor:
            return self.net((4 * x).round() / 4)

    how = {"device": ELSEWHERE, "progress": False}
    proven = assay.evaluate(model(), data, "linf:0.1", "quick", prove="alpha", **how)
    assert proven.certified_accuracy > 0.5
    masked = assay.evaluate(Rounded(), data, "linf:0.3", "quick", **how)
    assert "repaired-straight-through" in {f.code for f in masked.findings}
    assert masked.robust_accuracy == 0


@pytest.mark.parametrize("norm", ["linf", *slow("l2", "l1", "l0")])
@pytest.mark.parametrize("method", ["ibp", "crown", *slow("complete")])
def test_a_certificate(away: None, data: Data, method: str, norm: str) -> None:
    threat = assay.Threat(norm, {"linf": 0.2, "l2": 1.0, "l1": 3.0, "l0": 2.0}[norm])
    x, y = data.batch([0, 1]), data.labels[:2]
    found = assay.certify(model(), x, y, threat, method, seconds=1, device=ELSEWHERE)
    assert found.certified.device.type == "cpu"


@pytest.mark.parametrize("how", [{"noise": "gaussian", "sigma": 0.3}, {"noise": "ablation", "kept": 300}])
def test_a_certificate_by_smoothing(away: None, data: Data, how: dict[str, object]) -> None:
    smoothed = assay.Smoothed(model(), **how)
    found = smoothed.certify(data.batch([0, 1]), data.labels[:2], n0=10, n=40, device=ELSEWHERE)
    assert found.hits.tolist() == smoothed.certify(data.batch([0, 1]), data.labels[:2], n0=10, n=40).hits.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_every_attack(away: None, data: Data, name: str) -> None:
    attack, net = attacks.get(name, **SHORT[name]), model("mnist-plain")
    x, y = data.batch(range(4)), data.labels[:4]
    for norm in attacks.ATTACKS.traits(name)["norm"]:
        sizes = [] if getattr(attack, "sizeless", False) else [{"linf": 0.3, "l2": 2.0, "l1": 10.0, "l0": 20.0}[norm]]
        for size in (*sizes, *([None] if getattr(attack, "any_size", False) or not sizes else [])):
            found = attack(net, x.to(ELSEWHERE), y.to(ELSEWHERE), assay.Threat(norm, size))
            assert isinstance(found.x, Away)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_every_objective(away: None, name: str, norm: str) -> None:
    assert name in OBJECTIVES.names()
    o, net, (x, y) = objective(name), moved(mlp()), (t.to(ELSEWHERE) for t in batch())
    helpers = tuple(moved(mlp(seed=i + 1).eval().requires_grad_(False)) for i, _ in enumerate(o.helpers))
    draws = Draws.of(0, torch.arange(len(x), device=ELSEWHERE))
    learn(o, Step(net, x, y, around(x, y, assay.Threat(norm, EPS[norm], box=(0, 1)), 1.0, draws), helpers=helpers))
    assert all(isinstance(p.grad, Away) for p in net.parameters())
