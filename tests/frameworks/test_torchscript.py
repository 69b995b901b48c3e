"""TorchScript programs: loaded if they are trusted, with gradients; what they cannot take is named."""

import pytest
import torch
from torch import nn

import assay
from assay.models.fingerprint import fingerprint

X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


WAYS = {
    "scripted": torch.jit.script,
    "traced": lambda net: torch.jit.trace(net, X),
    "frozen": lambda net: torch.jit.freeze(torch.jit.script(net.eval())),
}


def save(net, path, way="scripted"):
    WAYS[way](net.eval()).save(str(path))
    return path


def refused(source, *words, **options):
    with pytest.raises(assay.ModelError) as e:
        assay.load_model(source, **options)
    for word in words:
        assert str(word) in str(e.value)


@pytest.mark.parametrize("suffix", [".torchscript", ".ts", ".pt", ".pth"])
@pytest.mark.parametrize("way", WAYS)
def test_a_trusted_program_is_the_network_with_its_gradients(tmp_path, net, way, suffix):
    path = save(net, tmp_path / f"a{suffix}", way)
    model = assay.load_model(path, trust_pickle=True)
    with model.frozen() as live:
        for _ in range(3):  # the interpreter optimises after the first calls
            a, b = X.clone().requires_grad_(), X.clone().requires_grad_()
            (g,) = torch.autograd.grad(live(a).square().sum(), a)
            (h,) = torch.autograd.grad(net(b).square().sum(), b)
            torch.testing.assert_close(g, h)
    assert "deprecated" in model.notes[0]


@pytest.mark.parametrize("suffix", [".torchscript", ".pt"])
def test_a_program_is_loaded_only_if_trusted(tmp_path, net, suffix):
    refused(save(net, tmp_path / f"a{suffix}"), "TorchScript archive", "read and write files", "--trust-pickle", ".pt2")


class Writes(nn.Module):
    """Writes a file while it is loaded: TorchScript runs ``__setstate__`` then."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.path)


def test_why_trust_is_asked_for(tmp_path):
    ran = tmp_path / "ran"
    torch.jit.script(Writes(str(ran))).save(str(tmp_path / "a.pt"))
    ran.unlink(missing_ok=True)
    refused(tmp_path / "a.pt", "--trust-pickle")
    assert not ran.exists()
    assay.load_model(tmp_path / "a.pt", trust_pickle=True)
    assert ran.exists()  # it would have


def test_inputs_that_a_program_cannot_take_are_named(tmp_path, net):
    traced = assay.load_model(save(net, tmp_path / "a.pt", "traced"), trust_pickle=True)
    with pytest.raises(assay.ModelError, match=r"bad-shape.*float32 of shape \(2, 1, 9, 9\)"):
        traced(torch.rand(2, 1, 9, 9))
    double = assay.load_model(save(net.double(), tmp_path / "b.pt", "frozen"), trust_pickle=True)
    with pytest.raises(assay.ModelError, match="double"):
        double(X)
    parameters = assay.load_model(save(net.double(), tmp_path / "c.pt", "scripted"), trust_pickle=True)
    torch.testing.assert_close(parameters(X), net(X.double()))


def test_damaged_programs(tmp_path, net):
    path = save(net, tmp_path / "a.torchscript")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(path, path, "anew", trust_pickle=True)


def test_the_fingerprint_is_that_of_the_file(tmp_path, net):
    class Negated(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return -self.net(x)

    paths = [save(net, tmp_path / "a.pt"), save(net, tmp_path / "a.pt"), save(Negated(net), tmp_path / "b.pt")]
    one, again, other = (fingerprint(assay.load_model(p, trust_pickle=True)) for p in paths)
    assert one == again != other


def test_the_verdict(tmp_path, net):
    model = assay.load_model(save(net, tmp_path / "a.pt"), trust_pickle=True)
    verdict = assay.evaluate(model, (X, net(X).argmax(1)), "linf:0.1", effort="quick", progress=False)
    assert (verdict.n, verdict.clean_accuracy) == (6, 1.0)
    assert any("TorchScript" in f.message for f in verdict.findings)
