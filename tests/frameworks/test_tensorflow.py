"""TensorFlow functions, modules and SavedModel folders, beside torch in one process."""

import os
import shutil

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "torch")

import pytest
import torch
from needs import framework
from torch import nn
from torch.nn import functional as F

import assay
from assay.core.errors import ModelError, ModelOutputError
from assay.models.fingerprint import fingerprint

tf = framework("tensorflow")
saved_model = framework("assay.models.loaders.saved_model")


def weights():
    """The weights of a small network of 8 x 8 images, in the order (c, h, w)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


class Net(tf.Module):
    """The same in TensorFlow, from (b, 8, 8, 1) to logits, or to probabilities."""

    def __init__(self, net, *, softmax=False):
        super().__init__()
        conv, _, _, linear = net
        self.kernel = tf.Variable(conv.weight.detach().permute(2, 3, 1, 0).numpy())
        self.bias = tf.Variable(conv.bias.detach().numpy())
        flat = linear.weight.detach().reshape(3, 4, 6, 6).permute(0, 2, 3, 1).flatten(1)
        self.dense, self.shift = tf.Variable(flat.T.numpy()), tf.Variable(linear.bias.detach().numpy())
        self.softmax, self.traced = softmax, 0

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 1])])
    def __call__(self, x):
        h = tf.nn.relu(tf.nn.conv2d(x, self.kernel, 1, "VALID") + self.bias)
        z = tf.reshape(h, [-1, 144]) @ self.dense + self.shift
        return tf.nn.softmax(z) if self.softmax else z


@pytest.fixture
def images():
    return torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def slope(net, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(x), torch.arange(len(x)) % 3, reduction="sum"), x)[0]


def test_the_same_weights_give_the_same_logits_and_gradients(images):
    net = weights()
    m = assay.Model(Net(net))
    torch.testing.assert_close(m(images), net(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(slope(m, images), slope(net, images), atol=1e-5, rtol=0)
    assert any("TensorFlow computes this model" in n for n in m.notes)
    assert any("channels last" in n for n in m.notes)


def test_the_verdict_is_the_same_sample_by_sample(images):
    net = weights()
    data = images, net(images).argmax(1)
    runs = [assay.evaluate(n, data, "linf:0.05", effort="quick", progress=False) for n in (net, Net(net))]
    a, b = (r.samples.select(["prediction", "fooled"]).to_pylist() for r in runs)
    assert a == b
    assert 0 < runs[0].robust_accuracy < 1


def test_a_function_is_traced_once_whatever_the_number_of_rows(images):
    traced = []

    @tf.function
    def fn(x):
        traced.append(x.shape)
        return tf.reduce_sum(x, [2, 3])[:, :1] * tf.constant([[1.0, -1.0]])

    m = assay.Model(fn)
    for rows in (1, 2, 3, 5, 8, 24):
        assert m(images[:rows]).shape == (rows, 2)
    assert len(traced) == 1


def test_memory_is_shared_as_it_lies_and_never_written_to():
    same = tf.function(lambda x: x)
    x = torch.rand(8, 3)
    before = x.clone()
    z = assay.Model(same)(x[1:])  # rows that start anywhere in memory
    torch.testing.assert_close(z, x[1:], atol=0, rtol=0)
    z.zero_()
    assert (x == before).all()


def test_a_gradient_can_be_asked_for_again_and_is_absent_where_there_is_none(images):
    m = assay.Model(Net(weights()))
    x = images.requires_grad_()
    z = m(x)
    first = torch.autograd.grad(z[:, 0].sum(), x, retain_graph=True)[0]
    assert (torch.autograd.grad(z[:, 0].sum(), x)[0] == first).all()
    steps = assay.Model(tf.function(lambda x: tf.one_hot(tf.argmax(x, 1), 3)))
    x = torch.rand(4, 3, requires_grad=True)
    assert torch.autograd.grad(steps(x).sum(), x, allow_unused=True)[0] is None


def test_second_derivatives_are_refused_by_name(images):
    x = images.requires_grad_()
    z = assay.Model(Net(weights()))(x)
    with pytest.raises(ModelError, match="differentiate twice"):
        torch.autograd.grad(z[:, 0].sum(), x, create_graph=True)


def test_types_of_the_signature_are_kept_and_whole_numbers_refused():
    wide = tf.function(
        lambda x: tf.stack([x[:, 0], -x[:, 0]], 1), input_signature=[tf.TensorSpec([None, 2], tf.float64)]
    )
    m = assay.Model(wide)
    assert m(torch.rand(3, 2)).dtype == torch.float64
    assert slope(lambda x: m(torch.cat([x, x], 1)[:, :2]), torch.rand(2, 1)).dtype == torch.float32
    half = tf.function(lambda x: tf.cast(tf.stack([x[:, 0], -x[:, 0]], 1), tf.float16))
    assert assay.Model(half)(torch.rand(3, 2)).dtype == torch.float32
    pixels = tf.function(lambda x: tf.cast(x, tf.float32), input_signature=[tf.TensorSpec([None, 2], tf.uint8)])
    with pytest.raises(ModelError, match=r"uint8 \(\?, 2\)"):
        assay.Model(pixels)


def test_other_than_one_output_is_named():
    m = assay.Model(tf.function(lambda x: {"logits": x, "features": x}))
    with pytest.raises(ModelOutputError, match="logits, features"):
        m(torch.rand(2, 3))
    assert assay.Model(tf.function(lambda x: {"logits": x}))(torch.rand(2, 3)).shape == (2, 3)


def test_the_fingerprint_is_that_of_the_weights():
    net = weights()
    a = Net(net)
    m = assay.Model(a)
    same = fingerprint(m)
    m(torch.rand(2, 1, 8, 8))
    assert fingerprint(m) == same == fingerprint(assay.Model(Net(net)))
    a.shift.assign_add([1.0, 0.0, 0.0])
    assert fingerprint(m) != same


# SavedModel folders


def save(module, folder, *signature):
    tf.saved_model.save(module, str(folder), *signature)
    return folder


@pytest.mark.parametrize("softmax", [False, True])
def test_a_folder_is_the_model_and_a_softmax_at_its_end_is_left_out(tmp_path, images, softmax):
    net = weights()
    module = Net(net, softmax=softmax)
    m = assay.load_model(save(module, tmp_path / "net", module.__call__.get_concrete_function()))
    torch.testing.assert_close(m(images), net(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(slope(m, images), slope(net, images), atol=1e-5, rtol=0)
    assert any("softmax at its end is left out" in n for n in m.notes) == softmax
    assert any("serving_default" in n for n in m.notes)
    assert m.name == "net"


def test_a_loaded_saved_model_is_a_live_model(tmp_path, images):
    net = weights()
    module = Net(net)
    live = tf.saved_model.load(str(save(module, tmp_path / "net", module.__call__.get_concrete_function())))
    torch.testing.assert_close(assay.Model(live)(images), net(images), atol=1e-5, rtol=0)


def test_a_fixed_batch_is_kept(tmp_path, images):
    module = Net(net := weights())
    fixed = tf.function(module, input_signature=[tf.TensorSpec([4, 8, 8, 1])])
    m = assay.load_model(save(module, tmp_path / "net", {"serving_default": fixed}))
    assert (m.rows, m.fixed_rows) == (4, True)
    data = images[:10], net(images[:10]).argmax(1)
    assert assay.evaluate(m, data, "linf:0.01", effort="quick", progress=False).clean_accuracy == 1


def test_several_signatures_without_a_default_are_refused(tmp_path):
    module = Net(weights())
    call = module.__call__.get_concrete_function()
    with pytest.raises(ModelError, match="one, two"):
        assay.load_model(save(module, tmp_path / "net", {"one": call, "two": call}))


@pytest.mark.parametrize("operation", ["ReadFile", "WriteFile", "EagerPyFunc", "PrintV2"])
def test_operations_that_reach_out_are_refused_by_name(tmp_path, operation):
    def write(x):
        tf.io.write_file(str(tmp_path / "written"), "x")
        return x

    harm = {
        "ReadFile": lambda x: x + tf.cast(tf.strings.length(tf.io.read_file("/etc/hostname")), tf.float32),
        "WriteFile": write,
        "EagerPyFunc": lambda x: tf.ensure_shape(tf.py_function(lambda v: v, [x], tf.float32), [None, 2]),
        "PrintV2": lambda x: (tf.print("x", output_stream=f"file://{tmp_path}/printed"), x)[1],
    }[operation]
    module = tf.Module()
    module.fn = tf.function(harm, input_signature=[tf.TensorSpec([None, 2])])
    folder = save(module, tmp_path / "net", module.fn)
    with pytest.raises(ModelError, match=operation):
        assay.load_model(folder)
    assert not (tmp_path / "written").exists()
    assert assay.load_model(folder, trust_pickle=True).notes


def test_the_functions_that_keep_weights_may_not_be_called_by_the_model(tmp_path):
    """SaveV2 writes a file of any name: it is let through in TensorFlow's own function alone."""
    module = tf.Module()
    module.v = tf.Variable([1.0, 2.0])

    @tf.function(input_signature=[tf.TensorSpec([None, 2])])
    def fn(x):
        tf.raw_ops.SaveV2(
            prefix=str(tmp_path / "stolen"), tensor_names=["v"], shape_and_slices=[""], tensors=[module.v.read_value()]
        )
        return x * module.v

    module.fn = fn
    with pytest.raises(ModelError, match="SaveV2"):
        assay.load_model(save(module, tmp_path / "net", fn))


def test_other_folders_are_refused_with_a_hint(tmp_path):
    (tmp_path / "cats").mkdir()
    with pytest.raises(ModelError, match="data, and comes second"):
        assay.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="hf:"):
        assay.load_model(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"\xff nonsense")
    with pytest.raises(ModelError, match="can load"):
        assay.load_model(tmp_path)


def test_the_fingerprint_of_a_folder_does_not_depend_on_where_it_lies(tmp_path):
    module = Net(weights())
    folder = save(module, tmp_path / "net", module.__call__.get_concrete_function())
    shutil.copytree(folder, tmp_path / "other")
    a, b = (fingerprint(assay.load_model(f)) for f in (folder, tmp_path / "other"))
    assert a == b
