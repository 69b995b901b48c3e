"""ONNX files become networks with gradients that compute what ONNX Runtime computes; what cannot is refused by name."""

import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import assay
from assay.models.fingerprint import fingerprint
from assay.models.loaders.onnx import TOLERANCE, Runtime, _gap

for package in ("onnx", "onnxruntime", "onnx2torch", "onnx2pytorch"):
    if find_spec(package) is None:  # not imported here: the converters need care (see the loader)
        pytest.skip(f"{package} is not installed", allow_module_level=True)

import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared" / "data"


class Convolutional(nn.Module):
    """Batch norm, pooling, a slice, padding, a reshape, and one bias twice: what exporters write in several ways."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(4 * 6 * 6, 5)

    def forward(self, x):
        h = self.pool(torch.relu(self.norm(self.conv(x))))
        h = nn.functional.pad(h[:, :, 1:], (1, 1, 2, 1)) + 0.1
        return self.head(h.reshape(h.shape[0], -1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Convolutional().eval()


X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def export(net, path, *, opset=17, batch=2):
    """Export with the TorchScript exporter, with a free batch axis unless ``batch`` is 1."""
    axes = {"input": {0: "batch"}, "output": {0: "batch"}} if batch != 1 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["input"], "output_names": ["output"]}
        torch.onnx.export(net, (X[:batch],), path, dynamo=False, opset_version=opset, dynamic_axes=axes, **names)
    return path


def save(path, nodes, weights, shape, *, inputs=("x",), kind=TensorProto.FLOAT, opset=17, out="y"):
    """Write a graph of these nodes, from its inputs of one shape to the output y."""
    given = [helper.make_tensor_value_info(name, kind, shape) for name in inputs]
    result = [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)]
    values = [numpy_helper.from_array(np.asarray(v), name) for name, v in weights.items()]
    graph = helper.make_graph(nodes, "graph", given, result, values)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    return path


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


node = helper.make_node


def same(model, net, x=X):
    """The model gives what the net gives, and the same gradient."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = model(a), net(b)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    (g,), (h,) = (torch.autograd.grad(z.square().sum(), v) for z, v in ((found, a), (wanted, b)))
    torch.testing.assert_close(g, h, atol=1e-5, rtol=1e-5)
    return True


def exports(net, x):
    """Certification can follow the network: ``torch.export`` gives a program for any number of rows."""
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.testing.assert_close(program.module()(x[:3]), net(x[:3]))
    return True


def refused(source, *words):
    with pytest.raises(assay.ModelError) as e:
        assay.load_model(source)
    for word in words:
        assert str(word) in str(e.value)


# What is loaded


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_an_exported_network_is_the_network_with_its_gradients(tmp_path, net, opset):
    model = assay.load_model(export(net, tmp_path / "small.onnx", opset=opset), mean=0.5, std=0.25)
    assert (model.name, model.rows, model.mean) == ("small", None, 0.5)
    assert same(assay.Model(model.net), net)
    if opset == 17:
        assert exports(model.net, X)


def test_the_newer_exporter(tmp_path, net):
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            net, (X,), tmp_path / "a.onnx", dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
        )
    model = assay.load_model(tmp_path / "a.onnx")
    assert same(model, net)
    assert exports(model.net, X)


def test_operators_of_newer_opsets_that_differ_in_form_only(tmp_path):
    nodes = [
        node("ReduceMean", ["x", "axes"], ["m"], keepdims=0),
        node("Reshape", ["m", "to"], ["r"], allowzero=1),
        node("MatMul", ["r", "w"], ["y"]),
    ]
    weights = {"axes": np.array([2, 3]), "to": np.array([-1, 2]), "w": normal(2, 3)}
    path = save(tmp_path / "a.onnx", nodes, weights, ["b", 2, 3, 3], opset=18)
    x = torch.rand(4, 2, 3, 3)
    model = assay.load_model(path)
    torch.testing.assert_close(model(x), x.mean((2, 3)) @ torch.from_numpy(weights["w"]))
    assert exports(model.net, x)


def test_weights_shared_through_identity(tmp_path):
    nodes = [
        node("Identity", ["b"], ["c"]),
        node("Constant", [], ["w"], value=numpy_helper.from_array(normal(4, 3))),
        node("Gemm", ["x", "w", "c"], ["y"]),
    ]
    model = assay.load_model(save(tmp_path / "a.onnx", nodes, {"b": normal(3)}, ["b", 4]))
    x = torch.rand(5, 4)
    torch.testing.assert_close(model(x), x @ torch.from_numpy(normal(4, 3)) + torch.from_numpy(normal(3)))


def test_an_old_file_that_lists_its_weights_among_its_inputs(tmp_path):
    """As the collision-avoidance networks of the verification competition: normalised inside, one row."""
    path = tmp_path / "a.onnx"
    nodes = [
        node("Sub", ["x", "mean"], ["a"]),
        node("Div", ["a", "std"], ["d"]),
        node("Flatten", ["d"], ["f"]),
        node("MatMul", ["f", "w"], ["m"]),
        node("Add", ["m", "b"], ["y"]),
    ]
    w = {"mean": normal(5), "std": np.float32([2]), "w": normal(5, 3), "b": normal(3)}
    save(path, nodes, w, [1, 1, 1, 5], opset=8)
    old = onnx.load(str(path))
    old.ir_version = 3
    old.graph.input.extend(helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in w.items())
    onnx.save(old, str(path))
    x, (mean, std, weight, bias) = torch.rand(4, 1, 1, 5), map(torch.from_numpy, w.values())
    model = assay.load_model(path)
    torch.testing.assert_close(model(x), ((x - mean) / std).flatten(1) @ weight + bias)
    assert exports(model.net, x)


# The batch axis


def fully_connected(path, shape, to):
    """A network of the verification competition: one row, reshaped by constant sizes."""
    nodes = [
        node("Reshape", ["x", "to"], ["f"]),
        node("MatMul", ["f", "w"], ["p"]),
        node("Add", ["p", "b"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("Gemm", ["r", "v", "c"], ["y"], transB=1),
    ]
    weights = {"to": np.array(to), "w": normal(6, 8), "b": normal(8), "v": normal(3, 8), "c": normal(3)}
    return save(path, nodes, weights, shape, opset=9), weights


@pytest.mark.parametrize(("shape", "to"), [([1, 6, 1], [1, 6]), ([1, 1, 2, 3], [1, -1]), ([1, 6], [-1, 6])])
def test_one_row_baked_in_is_opened_for_batches(tmp_path, shape, to):
    path, w = fully_connected(tmp_path / "a.onnx", shape, to)
    model = assay.load_model(path)
    assert (model.rows, model.fixed_rows) == (None, False)
    x = torch.rand(5, *shape[1:])
    hidden = torch.relu(x.flatten(1) @ torch.from_numpy(w["w"]) + torch.from_numpy(w["b"]))
    torch.testing.assert_close(model(x), hidden @ torch.from_numpy(w["v"]).T + torch.from_numpy(w["c"]))
    assert exports(model.net, x)


def test_a_network_that_works_for_one_row_only_says_so(tmp_path):
    nodes = [
        node("Squeeze", ["x", "axis"], ["s"]),
        node("MatMul", ["s", "w"], ["m"]),
        node("Unsqueeze", ["m", "axis"], ["y"]),
    ]
    path = save(tmp_path / "a.onnx", nodes, {"axis": np.array([0]), "w": normal(4, 3)}, [1, 4])
    model = assay.load_model(path)
    assert (model.rows, model.fixed_rows) == (1, True)
    x = torch.rand(1, 4)
    torch.testing.assert_close(model(x), x @ torch.from_numpy(normal(4, 3)))
    three = assay.evaluate(
        model, (torch.rand(3, 4), torch.zeros(3).long()), "linf:0.01", effort="quick", progress=False
    )
    assert three.n == 3


def test_a_network_without_a_batch_axis(tmp_path):
    path = save(tmp_path / "a.onnx", [node("MatMul", ["x", "w"], ["y"])], {"w": normal(4, 3)}, [4])
    x = torch.rand(5, 4)
    torch.testing.assert_close(assay.load_model(path)(x), x @ torch.from_numpy(normal(4, 3)))
    torch.testing.assert_close(torch.from_numpy(Runtime.open(path)(x.numpy())), x @ torch.from_numpy(normal(4, 3)))


def test_the_runtime_takes_any_number_of_rows(tmp_path, net):
    free, four = export(net, tmp_path / "a.onnx"), tmp_path / "b.onnx"
    save(four, [node("MatMul", ["x", "w"], ["y"])], {"w": normal(3, 2)}, [4, 3])
    assert (Runtime.open(free).rows, Runtime.open(four).rows, Runtime.open(four).shape) == (None, 4, (3,))
    torch.testing.assert_close(torch.from_numpy(Runtime.open(free)(X.numpy())), net(X), atol=1e-5, rtol=1e-5)
    x = normal(6, 3)
    np.testing.assert_allclose(Runtime.open(four)(x), x @ normal(3, 2), rtol=1e-5, atol=1e-6)


# What is refused


def test_damaged_files(tmp_path, net):
    path = export(net, tmp_path / "a.onnx")
    content = path.read_bytes()
    for damaged in (b"neither this nor that " * 5, content[: len(content) // 2], bytes(100)):
        path.write_bytes(damaged)
        refused(path, path, "anew")
    path.write_bytes(b"")
    refused(path, "0 bytes")


@pytest.mark.parametrize("name", ["NonMaxSuppression", "Loop", "Load", "RandomNormalLike"])
def test_an_operator_that_cannot_be_converted_is_named(tmp_path, name):
    refused(save(tmp_path / "a.onnx", [node(name, ["x"], ["y"])], {}, ["b", 4]), name, "a.onnx", ".pt2")


def test_an_operator_of_another_domain_is_named(tmp_path):
    refused(save(tmp_path / "a.onnx", [node("Relu", ["x"], ["y"], domain="mine")], {}, ["b", 4]), "mine.Relu")


def test_other_inputs_are_refused(tmp_path):
    add = [node("Add", ["x", "z"], ["y"])]
    refused(save(tmp_path / "a.onnx", add, {}, ["b", 4], inputs=("x", "z")), "one float32 input", "x tensor(float)")
    cast = [node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    refused(save(tmp_path / "b.onnx", cast, {}, ["b", 4], kind=TensorProto.DOUBLE), "tensor(double)")
    refused(save(tmp_path / "c.onnx", [node("Relu", ["x"], ["y"])], {}, ["b", "n"]), "all known but b")


def test_names_in_a_file_never_run(tmp_path):
    """Traced networks are Python source, in which an operator's or a weight's name would stand."""
    ran = tmp_path / "ran"
    evil = f'"), __import__("pathlib").Path({str(ran)!r}).touch(), ("'
    nodes = [node("MatMul", ["x", evil], [evil + "1"], name=evil), node("Relu", [evil + "1"], ["y"], name=evil + "2")]
    path = save(tmp_path / "a.onnx", nodes, {evil: normal(4, 3)}, ["b", 4])
    x = torch.rand(2, 4)
    torch.testing.assert_close(assay.load_model(path)(x), torch.relu(x @ torch.from_numpy(normal(4, 3))))
    assert not ran.exists()


def test_a_network_that_computes_something_else_is_not_taken_for_the_file(tmp_path, net):
    reference = Runtime.open(export(net, tmp_path / "a.onnx"))
    assert _gap(net, reference, (3,)) < TOLERANCE
    with torch.no_grad():
        net.head.bias[2] += 0.01
    assert _gap(net, reference, (3,)) > TOLERANCE
    with torch.no_grad():
        net.head.bias[2] = float("nan")
    assert not _gap(net, reference, (3,)) <= TOLERANCE


def test_outputs_that_are_nothing_but_rounding_are_refused_with_the_difference(tmp_path):
    """The same sum in two orders, and the difference enlarged: no two programs agree about it."""
    order = np.random.default_rng(0).permutation(3000)
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Gather", ["x", "order"], ["s"], axis=1),
        node("MatMul", ["s", "v"], ["b"]),
        node("Sub", ["a", "b"], ["d"]),
        node("Mul", ["d", "large"], ["y"]),
    ]
    w = normal(3000, 3)
    weights = {"w": w, "v": w[order], "order": order, "large": np.float32(1e9)}
    refused(save(tmp_path / "a.onnx", nodes, weights, ["b", 3000]), "differ from those of ONNX Runtime by", "of their")


def test_without_the_packages_the_extra_is_named(tmp_path, net):
    path = export(net, tmp_path / "a.onnx")
    script = f"import sys, assay; sys.modules['onnx2torch'] = None; assay.load_model({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "MissingExtraError" in done.stderr
    assert "assay[onnx]" in done.stderr


# Fingerprints


def test_the_fingerprint_covers_how_layers_are_connected(tmp_path):
    def sub(name, first, second):
        return save(tmp_path / name, [node("Sub", [first, second], ["y"])], {"w": normal(4)}, ["b", 4])

    paths = [sub("a.onnx", "x", "w"), sub("b.onnx", "w", "x"), sub("c.onnx", "x", "w")]
    one, other, again = (fingerprint(assay.load_model(p)) for p in paths)
    assert one == again
    assert one != other


# Public networks, where they are at hand


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mnist-pgd-eps0.3", (1, 28, 28)),
        ("cifar10-resnet20", (3, 32, 32)),
        ("vnncomp2021-mnistfc/mnist-net_256x2", (784, 1)),
    ],
)
def test_public_networks(name, shape):
    path = SHARED / f"{name}.onnx"
    model = assay.load_model(path)
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    wanted = torch.from_numpy(Runtime.open(path)(x.numpy()))
    torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)
    assert (model.rows, Runtime.open(path).shape) == (None, shape)
    assert exports(model.net, x)
