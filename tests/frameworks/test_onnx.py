"""The same weights as PyTorch, as ONNX of both exporters and as a program of torch.export: one network, one verdict."""

import warnings

import pytest
import torch
from needs import framework
from torch import nn

import assay

for package in ("onnx", "onnxruntime", "onnx2torch", "onnx2pytorch", "onnxscript"):
    framework(package)


class Block(nn.Module):
    """A residual block: normalised twice, with a shortcut."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.one, self.two = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        h = self.two(self.second(torch.relu(self.one(self.first(x)))))
        return torch.relu(h + x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Sequential(Block(8), Block(8))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


class Transformer(nn.Module):
    """Patches, a class token, positions, one layer of attention: a vision transformer in small."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.token, self.places = nn.Parameter(torch.rand(1, 1, 16)), nn.Parameter(torch.rand(1, 17, 16))
        self.norm, self.attend = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.mix = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.places
        n = self.norm(h)
        h = h + self.attend(n, n, n, need_weights=False)[0]
        return self.head((h + self.mix(h))[:, 0])


def small(kind):
    torch.manual_seed(0)
    net = kind()
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(16, 3, 32, 32))  # statistics of batch norm that are not those of its start
    return net.eval()


def exported(net, x, path, *, dynamo, fixed=False):
    """Write a file by one of the two exporters of torch, with a free batch axis unless ``fixed``."""
    free = {} if fixed else {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    named = {"input_names": ["input"], "output_names": ["output"]}
    axes = {} if fixed else {"dynamic_axes": {"input": {0: "batch"}, "output": {0: "batch"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            torch.onnx.export(net, (x,), path, dynamo=True, verbose=False, **free)
        else:
            torch.onnx.export(net, (x,), path, dynamo=False, opset_version=17, **named, **axes)
    return path


@pytest.mark.parametrize(("kind", "fixed"), [(Residual, False), (Residual, True), (Transformer, False)])
@pytest.mark.parametrize("dynamo", [True, False])
def test_both_exporters_there_and_back_with_gradients(tmp_path, kind, dynamo, fixed):
    net, x = small(kind), torch.rand(8, 3, 32, 32)
    model = assay.load_model(exported(net, x, tmp_path / "a.onnx", dynamo=dynamo, fixed=fixed))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = model(a), net(b)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    (g,), (h,) = (torch.autograd.grad(z.square().sum(), v) for z, v in ((found, a), (wanted, b)))
    torch.testing.assert_close(g, h, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model.reference(x), wanted, atol=1e-4, rtol=1e-4)
    assert model.fit is not None
    assert (model.fit.height, model.fit.channels) == (32, 3)


def test_rows_that_an_exporter_fixed_inside_are_found(tmp_path):
    """The older exporter writes the number of rows of its example into the class token, and declares a free axis."""
    net, x = small(Transformer), torch.rand(4, 3, 32, 32)
    path = exported(net, torch.rand(4, 3, 32, 32), tmp_path / "a.onnx", dynamo=False)
    model, black = assay.load_model(path), assay.load_model(f"ort:{path}")
    assert (model.rows, model.fixed_rows) == (4, True)
    torch.testing.assert_close(black.net(x[:3]), net(x[:3]), atol=1e-4, rtol=1e-4)
    verdict = assay.evaluate(model, (x, net(x).argmax(1)), "linf:1/255", effort="quick", progress=False)
    assert verdict.n == 4


def test_one_network_in_five_forms_has_one_verdict(tmp_path):
    """Logits within 1e-4, and on 200 samples the same figures: clean, robust, and which samples fell."""
    native = assay.load_model("demo:mnist-plain")
    data = assay.load_data("demo:mnist", limit=200)
    x = data.batch(range(8))
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(native.net, (x,), dynamic_shapes=shapes), tmp_path / "a.pt2")
    torch.jit.trace(native.net, x).save(str(tmp_path / "a.torchscript"))
    files = [
        exported(native.net, x, tmp_path / "new.onnx", dynamo=True),
        exported(native.net, x, tmp_path / "old.onnx", dynamo=False),
        tmp_path / "a.pt2",
        tmp_path / "a.torchscript",
    ]
    verdict = assay.evaluate(native, data, "linf:0.06", effort="quick", progress=False)
    assert 0.1 < verdict.robust_accuracy < 0.9
    for file in files:
        model = assay.load_model(file, trust_pickle=file.suffix == ".torchscript")
        torch.testing.assert_close(model(x), native(x), atol=1e-4, rtol=0)
        other = assay.evaluate(model, data, "linf:0.06", effort="quick", progress=False)
        assert other.clean_accuracy == verdict.clean_accuracy
        assert other.samples["fooled"].to_pylist() == verdict.samples["fooled"].to_pylist()
