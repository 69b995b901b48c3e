"""ONNX files become networks with gradients that compute what ONNX Runtime computes; what cannot is refused by name."""

import json
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import assay
from assay.cli.app import app
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


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Mean", {}),
        ("Mod", {"fmod": 1}),
        ("Round", {}),
        ("LRN", {"size": 3, "alpha": 0.1, "beta": 0.75, "bias": 1.0}),
        ("DepthToSpace", {"blocksize": 2}),
    ],
)
def test_operators_that_are_less_common(tmp_path, kind, settings):
    given = ["x", "half"] if kind in ("Mean", "Mod") else ["x"]
    path = save(
        tmp_path / "a.onnx", [node(kind, given, ["y"], **settings)], {"half": np.float32([0.3])}, ["b", 4, 3, 3]
    )
    x = torch.rand(5, 4, 3, 3) * 3
    model = assay.load_model(path)
    torch.testing.assert_close(model.net(x), model.reference(x))


@pytest.mark.parametrize("kind", ["And", "Or"])
@pytest.mark.parametrize("compare", ["GreaterOrEqual", "LessOrEqual"])
def test_operators_on_truth_values(tmp_path, kind, compare):
    nodes = [
        node(compare, ["x", "a"], ["p"]),
        node("Less", ["x", "b"], ["q"]),
        node(kind, ["p", "q"], ["r"]),
        node("Where", ["r", "x", "a"], ["y"]),
    ]
    path = save(tmp_path / "a.onnx", nodes, {"a": np.float32([0.3]), "b": np.float32([0.6])}, ["b", 9])
    x = torch.rand(5, 9)
    model = assay.load_model(path)
    torch.testing.assert_close(model.net(x), model.reference(x))


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


def test_channels_last_as_other_frameworks_export_them(tmp_path):
    """Images are (c, h, w) here; the file takes (h, w, c), and gets it."""
    nodes = [node("ReduceMean", ["x"], ["m"], axes=[1, 2], keepdims=0), node("MatMul", ["m", "w"], ["y"])]
    path = save(tmp_path / "a.onnx", nodes, {"w": normal(3, 4)}, ["b", 5, 6, 3])
    x = torch.rand(2, 3, 5, 6)
    for source in (path, f"ort:{path}"):
        torch.testing.assert_close(assay.load_model(source)(x), x.mean((2, 3)) @ torch.from_numpy(normal(3, 4)))


# ONNX Runtime


def test_the_runtime_is_the_reference_of_a_converted_network(tmp_path, net):
    model = assay.load_model(export(net, tmp_path / "a.onnx"))
    torch.testing.assert_close(model.reference(X), net(X), atol=1e-5, rtol=1e-5)
    assert not model.reference(X).requires_grad
    assert "onnx2torch" in model.notes[0]
    assert float(model.notes[0].split("at most ")[1].split()[0]) < TOLERANCE


@pytest.mark.parametrize("rows", [1, 2])
def test_without_gradients_any_network_runs_through_the_runtime(tmp_path, net, rows):
    model = assay.load_model(f"ort:{export(net, tmp_path / 'small.onnx', batch=rows)}", mean=0.5, std=0.25)
    assert (model.name, model.rows, model.reference) == ("small", None, None)
    z = assay.Model(model.net)(X.clone().requires_grad_())
    torch.testing.assert_close(z, net(X), atol=1e-5, rtol=1e-5)
    assert not z.requires_grad
    assert "ONNX Runtime" in model.notes[0]


def test_a_live_session_is_a_model(tmp_path, net):
    import onnxruntime

    path = export(net, tmp_path / "small.onnx")
    by_path, by_bytes = (onnxruntime.InferenceSession(s) for s in (str(path), path.read_bytes()))
    models = *(assay.Model(s, box=(0, 1)) for s in (by_path, by_bytes)), assay.load_model(f"ort:{path}")
    for model in models:
        torch.testing.assert_close(model(X), net(X), atol=1e-5, rtol=1e-5)
    assert len({fingerprint(m) for m in models}) == 1
    assert models[0].name == "small"


def test_scores_are_attacked_where_there_are_no_gradients(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()
    model = assay.load_model(f"ort:{export(net, tmp_path / 'a.onnx')}")
    verdict = assay.evaluate(model, (X, net(X).argmax(1)), "linf:0.5", effort="quick", progress=False)
    assert (verdict.clean_accuracy, verdict.robust_accuracy) == (1.0, 0.0)
    assert {"no-gradient", "adapted"} <= {f.code for f in verdict.findings}


def test_the_command_line_takes_a_file_and_a_folder_of_images(tmp_path, net):
    """No Python from the user: the network and its size are in the file, the images and the classes in the folder."""
    export(net, tmp_path / "small.onnx")
    images = (np.random.default_rng(0).random((6, 10, 9)) * 255).astype(np.uint8)
    for i, image in enumerate(images):
        folder = tmp_path / "data" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[: 10 - i % 2]).save(folder / f"{i}.png")  # of two sizes, neither that of the network
    settings = ["--threat", "linf:0.1", "--effort", "quick", "--json", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "small.onnx"), str(tmp_path / "data"), *settings])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["n"] == 6
    said = " ".join(f["message"] for f in result["findings"])
    assert "onnx2torch" in said
    assert "images of 8 x 8" in said


def test_weights_in_a_file_beside_it_are_part_of_the_model(tmp_path):
    prints = []
    for seed in (0, 1, 0):
        path = save(
            tmp_path / "a.onnx", [node("MatMul", ["x", "w"], ["y"])], {"w": normal(4, 300, seed=seed)}, ["b", 4]
        )
        onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location="a.weights", size_threshold=0)
        prints.append([fingerprint(assay.load_model(s)) for s in (path, f"ort:{path}")])
        (tmp_path / "a.weights").rename(tmp_path / "old")
    assert prints[0] == prints[2]
    assert prints[0][0] != prints[1][0]
    assert prints[0][1] != prints[1][1]


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
    path = save(tmp_path / "a.onnx", [node(name, ["x"], ["y"])], {}, ["b", 4])
    refused(path, name, path, f"ort:{path}", ".pt2")


def test_an_operator_that_no_converter_can_do_is_found_among_others(tmp_path):
    """It is on the list of operators, but not with these settings; the file is read by ONNX Runtime all the same."""
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Neg", ["a"], ["b"]),
        node(
            "Resize", ["b", "", "", "sizes"], ["c"], mode="cubic", coordinate_transformation_mode="tf_crop_and_resize"
        ),
        node("Abs", ["c"], ["d"]),
        node("Flatten", ["d"], ["y"]),
    ]
    path = save(tmp_path / "a.onnx", nodes, {"sizes": np.array([1, 1, 9, 9])}, [1, 1, 4, 4])
    refused(path, "at the operator Resize", f"ort:{path}")


def test_some_operators_may_stand_on_constants_only(tmp_path):
    """As tables of relative positions, which are looked up once; on the input they cannot be converted."""
    table, index = normal(5, 3), np.array([[0], [4], [2]])
    nodes = [node("GatherND", ["table", "index"], ["w"]), node("MatMul", ["x", "w"], ["y"])]
    x = torch.rand(4, 3)
    model = assay.load_model(save(tmp_path / "a.onnx", nodes, {"table": table, "index": index}, ["b", 3]))
    torch.testing.assert_close(model(x), x @ torch.from_numpy(table[[0, 4, 2]]))
    nodes = [node("GatherND", ["x", "index"], ["y"])]
    refused(save(tmp_path / "b.onnx", nodes, {"index": index}, [5, 3]), "found GatherND in")


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
