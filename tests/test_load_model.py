"""Which forms of models are understood, and that no file runs code unless it is trusted."""

import copy
import functools
import io
import json
import os
import pickle
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import assay
from assay.models import BPDA, Model
from assay.models.fingerprint import fingerprint


class Net(nn.Module):
    """Something of everything: convolution, batch norm, a buffer, a branch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.relu(self.norm(self.conv(x)))
        return self.head(h.flatten(2).amax(2) + h.mean((2, 3)))


def linear():
    return nn.Linear(4, 3)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module into the current directory, as users have it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    return write


class MakesAFolder:
    """A pickle that runs code when it is loaded: it makes the folder ``path``."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


X = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def same(model, net):
    """The model gives what the net gives, and the same gradient."""
    with model.frozen() as live:
        x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
        (g,) = torch.autograd.grad(live(x).square().sum(), x)
        (h,) = torch.autograd.grad(net.eval()(z).square().sum(), z)
        torch.testing.assert_close(live(X), net(X))
    torch.testing.assert_close(g, h)
    return True


def refused(source, *words, **options):
    with pytest.raises(assay.ModelError) as e:
        assay.load_model(source, **options)
    assert e.value.exit_code == 3
    for word in words:
        assert str(word) in str(e.value)


# Weights


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".ckpt", ".safetensors"])
def test_weights_fill_an_architecture(tmp_path, net, suffix):
    path = tmp_path / f"small{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(net.state_dict(), path)
    model = assay.load_model(path, arch=Net, box=(-1, 1))
    assert same(model, net)
    assert (model.name, model.domain.lo, model.rows) == ("small", -1, None)


def test_the_old_format_of_torch_save(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert same(assay.load_model(tmp_path / "a.pth", arch=Net), net)


@pytest.mark.parametrize("container", [None, "state_dict", "model", "model_state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_containers_and_prefixes_are_taken_off(tmp_path, net, container, prefix):
    state = {prefix + k: v for k, v in net.state_dict().items()}
    torch.save({container: state, "epoch": 3, "lr": 0.1} if container else state, tmp_path / "a.ckpt")
    assert same(assay.load_model(tmp_path / "a.ckpt", arch=Net), net)


def test_a_prefix_that_the_architecture_has_stays(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = linear()

    torch.save(Wrapped().state_dict(), tmp_path / "a.pth")
    assert assay.load_model(tmp_path / "a.pth", arch=Wrapped).net.model.weight.shape == (3, 4)


def test_weights_of_another_architecture_are_refused_with_the_differences(tmp_path, net):
    path = tmp_path / "a.pth"
    torch.save(net.state_dict(), path)
    refused(path, path, "2 missing (weight, bias)", "8 unexpected (conv.weight, conv.bias", "--arch", arch=linear)
    torch.save(nn.Linear(4, 5).state_dict(), path)
    refused(path, "2 of another shape (weight is (5, 4), not (3, 4)", "--arch", arch=linear)
    torch.save({"weight": 3, "bias": None}, path)
    refused(path, "weight is a int, not (3, 4)", arch=linear)
    torch.save([1, 2], path)
    refused(path, "list", "state_dict", arch=linear)


def test_an_architecture_is_needed_and_has_to_build_a_network(tmp_path, user_module):
    path = tmp_path / "a.safetensors"
    save_file(linear().state_dict(), path)
    user_module("archs", "from torch import nn\ndef small(): return nn.Linear(4, 3)\ndef bad(): 1 / 0\nsize = 3")
    user_module("needy", "import a_missing_package")
    assert assay.load_model(path, arch="archs:small").net.weight.shape == (3, 4)
    refused(path, path, "--arch module:callable")
    refused(path, "no such name", "Did you mean 'small'?", arch="archs:smal")
    refused(path, "int", arch="archs:size")
    refused(path, "ZeroDivisionError: division by zero", arch="archs:bad")
    refused(path, "ModuleNotFoundError: No module named 'a_missing_package'", arch="needy:small")
    refused(path, "module:callable", arch="archs")
    refused(path, "torch.nn.Module", "int", arch=lambda: 3)
    refused(path, "8 missing (0.weight", arch="demo:mnist-plain")


# Pickles


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_does_not_run(tmp_path, zipped):
    path, ran = tmp_path / "a.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps(MakesAFolder(ran)))
    refused(path, path, "run code", "--trust-pickle", arch=linear)
    torch.save({"weight": MakesAFolder(ran)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, path, "run code", ".mkdir", "--trust-pickle", arch=linear)
    assert not ran.exists()
    refused(path, "missing (bias)", arch=linear, trust_pickle=True)
    assert ran.exists()  # it would have


def test_a_whole_network_is_loaded_only_if_trusted(tmp_path, net):
    torch.save(net, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", f"{Net.__module__}.Net", "run code", "state_dict()", "--trust-pickle")
    assert same(assay.load_model(tmp_path / "a.pth", trust_pickle=True), net)
    torch.save({"model": net, "epoch": 3}, tmp_path / "a.pth")
    assert same(assay.load_model(tmp_path / "a.pth", trust_pickle=True), net)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt2"])
def test_damaged_files_are_named(tmp_path, net, suffix, capfd):
    path = tmp_path / f"a{suffix}"
    refused(path, "no file", path)
    path.write_bytes(b"")
    refused(path, path, "0 bytes")
    path.write_bytes(b"neither this nor that " * 5)
    refused(path, path, "anew", arch=Net)
    if suffix == ".pt2":
        torch.export.save(torch.export.export(net, (X,)), path)
    else:
        (save_file if suffix == ".safetensors" else torch.save)(net.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(path, path, "anew", arch=Net)
    assert not capfd.readouterr().err


# Exported programs


def test_an_exported_program_with_a_fixed_batch(tmp_path, net):
    torch.export.save(torch.export.export(net, (X,)), tmp_path / "a.pt2")
    model = assay.load_model(tmp_path / "a.pt2")
    assert (model.rows, model.fixed_rows) == (8, True)
    assert same(model, net)


@pytest.mark.parametrize(("most", "rows", "fixed"), [(None, None, False), (60, 56, False), (5, 5, True)])
def test_an_exported_program_with_a_free_batch(tmp_path, net, most, rows, fixed):
    shapes = ({0: torch.export.Dim("batch", max=most)},)
    torch.export.save(torch.export.export(net, (X[:5],), dynamic_shapes=shapes), tmp_path / "a.pt2")
    model = assay.load_model(tmp_path / "a.pt2")
    assert (model.rows, model.fixed_rows) == (rows, fixed)
    torch.testing.assert_close(model(X[:5]), net(X[:5]))


def test_an_exported_program_of_two_inputs_is_refused(tmp_path):
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    torch.export.save(torch.export.export(Two(), (X, X)), tmp_path / "a.pt2")
    refused(tmp_path / "a.pt2", "one tensor", "2 inputs", "forward takes the samples only")


def rewrite(source, target, change):
    """Copy an archive member by member; ``change`` gets name and content and returns the content."""
    reader, writer = torch._C.PyTorchFileReader(str(source)), torch._C.PyTorchFileWriter(str(target))
    for name in reader.get_all_records():
        if name not in ("byteorder", ".data/version", ".data/serialization_id"):
            content = change(name, reader.get_record(name))
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return target


def in_program(old, new):
    """Replace text in the JSON of the program."""

    def change(name, content):
        if name != "models/model.json":
            return content
        assert old in content.decode()
        return content.decode().replace(old, new).encode()

    return change


def in_weights(change_entry):
    def change(name, content):
        if not name.endswith("weights_config.json"):
            return content
        config = json.loads(content)
        change_entry(next(iter(config["config"].values())))
        return json.dumps(config).encode()

    return change


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "good.pt2"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(Net().eval(), (X,), dynamic_shapes=shapes), path)
    return path


def attacks_on(ran):
    """Each way that torch would run code from a program, and a word of the refusal."""
    pickled = io.BytesIO()
    torch.save(((MakesAFolder(ran),), {}), pickled)
    evil = pickled.getvalue()
    marked_as_pickle = in_weights(lambda entry: entry.update(use_pickle=True))
    code = f"__import__('pathlib').Path({str(ran)!r}).touch()"
    size = "Symbol('s77', positive=True, integer=True)"
    return {
        "example inputs": (lambda n, c: evil if n.startswith("data/sample_inputs") else c, "sample_inputs"),
        "pickled weights": (
            lambda n, c: evil if n == "data/weights/weight_0" else marked_as_pickle(n, c),
            "data/weights/weight_0",
        ),
        "objects": (in_weights(lambda e: e.update(path_name="opaque_obj_0")), "opaque_obj_0"),
        "sizes": (in_program(size, code), "expr_str"),
        "names": (in_program('"relu"', f'"relu = {code} or relu"'), "name"),
        "operators": (in_program("torch.ops.aten.relu.default", "torch.os.system"), "torch.os.system"),
        "files": (in_program("torch.ops.aten.relu.default", "torch.ops.aten.from_file.default"), "from_file"),
        "trees": (in_program("builtins.tuple", "collections.defaultdict"), "defaultdict"),
    }


@pytest.mark.parametrize("way", attacks_on("x"))
def test_an_exported_program_that_runs_code_does_not_run(tmp_path, program, way):
    if (
        way == "sizes"
        and "s77" not in torch._C.PyTorchFileReader(str(program)).get_record("models/model.json").decode()
    ):
        pytest.fail("the symbol has another name in this version of torch: adjust the test")
    ran = tmp_path / "ran"
    change, word = attacks_on(ran)[way]
    refused(rewrite(program, tmp_path / "evil.pt2", change), "evil.pt2", word, "code", "--trust-pickle")
    assert not ran.exists()


def test_guards_of_an_exported_program_are_never_run(tmp_path, program):
    ran = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(ran)!r}).touch()"

    def change(name, content):
        if name != "models/model.json":
            return content
        return json.dumps(json.loads(content) | {"guards_code": [code]}).encode()

    model = assay.load_model(rewrite(program, tmp_path / "evil.pt2", change))
    assert model(X).shape == (8, 3)
    assert not ran.exists()


def test_machine_code_and_old_programs_are_refused(tmp_path, program):
    def with_member(name):
        path = tmp_path / "evil.pt2"
        path.write_bytes(program.read_bytes())
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, "8.1")
        return path

    refused(with_member("good/data/aotinductor/model/a.so"), "machine code", "--trust-pickle")
    refused(with_member("version"), "before torch 2.8", "--trust-pickle")


# Names


def test_py_names_a_function_that_returns_a_network_or_a_model(user_module):
    user_module(
        "nets_of_mine",
        "import assay\nfrom torch import nn\ndef net(): return nn.Linear(4, 3)\n"
        "def model(): return assay.Model(net(), box=(-1, 1), mean=0.5, std=2.0)\n"
        "def plain(): return lambda x: x\ndef bad(): raise OSError('no weights')\ndef none(): pass",
    )
    model = assay.load_model("py:nets_of_mine:net", mean=0.5, std=0.5)
    assert (model.name, model.std) == ("net", 0.5)
    assert assay.load_model("py:nets_of_mine:model").domain.lo == -1
    assert callable(assay.load_model("py:nets_of_mine:plain").net)
    refused("py:nets_of_mine:model", "box, mean and std given once", mean=0.5, std=0.5)
    refused("py:nets_of_mine:bad", "OSError: no weights")
    refused("py:nets_of_mine:none", "NoneType")
    refused("py:nets_of_nobody:net", "No module named 'nets_of_nobody'")


@pytest.mark.parametrize("name", ["mnist-plain", "mnist-robust", "mnist-certified"])
def test_demo_models_are_good_at_demo_data(name):
    model = assay.load_model(f"demo:{name}")
    x, y = next(iter(assay.load_data("demo:mnist", limit=200)))
    assert (model(x).argmax(1) == y).float().mean() > 0.95
    assert (model.name, model.domain.lo, model.domain.hi) == (name, 0, 1)


def test_an_unknown_demo_model():
    refused("demo:mnist-robst", "Did you mean 'mnist-robust'?")


@pytest.mark.parametrize(
    ("source", "package", "extra"),
    [
        ("timm:resnet18", "timm", "timm"),
        ("torchvision:resnet18", "torchvision", "torchvision"),
        ("hf:some/name", "transformers", "huggingface"),
        ("ort:a.onnx", "onnxruntime", "onnx"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(source, package, extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.onnx").write_bytes(b"1")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(assay.MissingExtraError, match=rf"{package}.*assay\[{extra}\]"):
        assay.load_model(source)
    if source[:4] != "ort:":
        save_file(linear().state_dict(), tmp_path / "a.safetensors")
        with pytest.raises(assay.MissingExtraError, match=rf"assay\[{extra}\]"):
            assay.load_model(tmp_path / "a.safetensors", arch=source)


def test_other_files_and_folders_are_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"1")
    refused(tmp_path / "a.zip", "file", ".pt2")
    refused("ort:nowhere.onnx", "nowhere.onnx", "No such file")
    refused("nowhere://bucket/a.pth", "no file")


# Fingerprints


def test_equal_models_have_equal_fingerprints(net, tmp_path):
    other = Net()
    other.load_state_dict(net.state_dict())
    assert fingerprint(Model(net)) == fingerprint(Model(other.train()))
    before = fingerprint(Model(net))
    with Model(net).frozen() as live:
        live(X)
    assert fingerprint(Model(net)) == before
    assert fingerprint(Model(net, mean=[0.5], std=[1])) == fingerprint(Model(net, mean=torch.tensor([0.5]), std=[1.0]))
    torch.export.save(torch.export.export(net, (X,)), tmp_path / "a.pt2")
    first, second = (assay.load_model(tmp_path / "a.pt2") for _ in range(2))
    assert fingerprint(first) == fingerprint(second)


def test_whatever_changes_an_answer_changes_the_fingerprint(net):
    class Other(Net):
        def forward(self, x):
            return -super().forward(x)

    def changed(name):
        other = Net()
        other.load_state_dict(net.state_dict())
        other.state_dict()[name].add_(1)
        return Model(other)

    other = Other()
    other.load_state_dict(net.state_dict())
    nets = [
        net,
        other,
        nn.Linear(2, 2),
        nn.Sequential(nn.ReLU()),
        nn.Sequential(nn.Tanh()),
        net.forward,
        other.forward,
        lambda x: -net(x),
        lambda x: -other(x),
        lambda x: 2 * net(x),
        torch.relu,
        torch.tanh,
        functools.partial(torch.mul, other=2),
        functools.partial(torch.mul, other=3),
        BPDA(lambda x: (x * 4).round() / 4),
        BPDA(lambda x: (x * 8).round() / 8),
        nn.Sequential(BPDA(lambda x: x.round(), lambda x: 2 * x), net),
        nn.Sequential(BPDA(lambda x: x.round(), lambda x: 3 * x), net),
    ]
    settings = [
        {"box": (0, 2)},
        {"mean": 0.5, "std": 1},
        {"mean": 0.5, "std": 2},
        {"samples": 3},
        {"probabilities": True},
    ]
    models = [Model(n) for n in nets] + [Model(net, **s) for s in settings]
    models += [changed("head.bias"), changed("norm.running_mean")]
    assert len({fingerprint(m) for m in models}) == len(models)


def test_a_counter_in_a_callable_does_not_change_its_fingerprint(net):
    calls = []

    class Counting:
        count = 0

        def __init__(self):
            self.net = net

        def __call__(self, x):
            self.count += 1
            return self.net(x)

    def counting(x):
        calls.append(len(x))
        return net(x)

    for model in (Model(Counting()), Model(counting)):
        before = fingerprint(model)
        model(X)
        assert fingerprint(model) == before


class Tempered(nn.Module):
    def __init__(self, k: float) -> None:
        super().__init__()
        self.inner, self.k = nn.Linear(4, 2), k

    def scale(self) -> float:
        return self.k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale()


def test_plain_attributes_and_helper_methods_are_part_of_a_model() -> None:
    torch.manual_seed(0)
    one, two = Tempered(1.0), Tempered(-7.0)
    two.load_state_dict(one.state_dict())
    assert fingerprint(Model(one)) != fingerprint(Model(two))

    class Tempered2(Tempered):
        def scale(self) -> float:
            return -self.k

    Tempered2.__qualname__, Tempered2.__module__ = Tempered.__qualname__, Tempered.__module__
    three = Tempered2(1.0)
    three.load_state_dict(one.state_dict())
    assert fingerprint(Model(one)) != fingerprint(Model(three))
    assert fingerprint(Model(one)) == fingerprint(Model(copy.deepcopy(one)))
