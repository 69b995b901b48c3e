"""Keras 3 models, live and from files, on the backend that ``KERAS_BACKEND`` says (torch, if it says none)."""

import os
import subprocess
import sys
import zipfile

os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
import pytest
import torch
from needs import framework
from torch import nn
from torch.nn import functional as F

import assay
from assay.core.errors import DataError, ModelError, ThreatError
from assay.core.registry import UsageError
from assay.models.fingerprint import fingerprint

keras = framework("keras")
AdversarialModel = framework("assay.integrations.keras").AdversarialModel

L = keras.layers
BACKEND = keras.backend.backend()
ON_TORCH = pytest.mark.skipif(BACKEND != "torch", reason=f"Keras runs on {BACKEND}: this is about the torch backend")


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


def digits(n):
    """The first n digits that ship: images (n, 1, 28, 28) in [0, 1], labels (n,)."""
    data = assay.load_data("demo:mnist", limit=n)
    return data.batch(torch.arange(n)), data.labels


def small(*last, shape=(28, 28, 1)):
    """A small convolutional network that ends in the layers ``last``."""
    first = [keras.Input(shape), L.Conv2D(4, 3, 2, activation="relu"), L.BatchNormalization(), L.Flatten()]
    return keras.Sequential([*first, L.Dropout(0.5), *last])


def functional(last):
    inputs = keras.Input((28, 28, 1))
    return keras.Model(inputs, last(L.Dense(10)(L.Flatten()(inputs))))


def predicted(model, x):
    return torch.tensor(model.predict(x.permute(0, 2, 3, 1).numpy(), verbose=0))


# The end of a network


def softmax(z):
    """A function of the user's own that happens to have that name is found by it, as tf.nn.softmax is."""
    return keras.ops.softmax(z)


HEADS = {
    "an activation": lambda: small(L.Dense(10, activation="softmax")),
    "a function": lambda: small(L.Dense(10, activation=softmax)),
    "a layer": lambda: small(L.Dense(10), L.Softmax()),
    "an activation layer": lambda: small(L.Dense(10), L.Activation("softmax")),
    "an operation": lambda: functional(keras.ops.softmax),
    "inside another model": lambda: small(keras.Sequential([L.Dense(8), L.Dense(10, activation="softmax")])),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_softmax_at_the_end_is_left_out_and_the_model_stays_as_it_is(head):
    model, (x, _) = HEADS[head](), digits(8)
    before = predicted(model, x)
    m = assay.Model(model)
    z = m(x)
    assert "The softmax at the end of the Keras model is left out: the network returns logits." in m.notes
    assert (z.sum(1) - 1).abs().max() > 0.01  # these are no probabilities
    torch.testing.assert_close(z.detach().softmax(1), before, atol=1e-6, rtol=0)
    torch.testing.assert_close(predicted(model, x), before, atol=0, rtol=0)


def test_logits_stay_logits():
    model, (x, _) = small(L.Dense(10)), digits(8)
    m = assay.Model(model)
    assert not any("left out" in n for n in m.notes)
    torch.testing.assert_close(m(x).detach(), predicted(model, x), atol=1e-6, rtol=0)


def test_one_output_becomes_two_classes():
    model, (x, _) = small(L.Dense(1, activation="sigmoid")), digits(8)
    m = assay.Model(model)
    z = m(x).detach()
    assert z.shape == (8, 2)
    assert (z[:, 0] == 0).all()
    torch.testing.assert_close(z.softmax(1)[:, 1:], predicted(model, x), atol=1e-6, rtol=0)
    assert any("two logits, (0, z)" in n for n in m.notes)


# Shapes


@pytest.mark.parametrize("shape", [(28, 28, 1), (28, 28), (784,), (None, None, 1)])
def test_grey_images_are_handed_over_as_the_model_takes_them(shape):
    inputs = keras.Input(shape)
    pooled = L.GlobalAveragePooling2D()(inputs) if None in shape else L.Flatten()(inputs)
    model, (x, _) = keras.Model(inputs, L.Dense(10)(pooled)), digits(8)
    taken = x.permute(0, 2, 3, 1).reshape(8, *(28 if n is None else n for n in shape))
    wanted = torch.tensor(model.predict(taken.numpy(), verbose=0))
    torch.testing.assert_close(assay.Model(model)(x).detach(), wanted, atol=1e-6, rtol=0)


def test_what_could_be_both_follows_the_data_format():
    x = torch.rand(2, 3, 3, 3)
    inputs = keras.Input((3, 3, 3))
    model = keras.Model(inputs, L.Flatten()(L.Conv2D(2, 3)(inputs)))
    m = assay.Model(model)
    torch.testing.assert_close(m(x).detach(), predicted(model, x), atol=1e-6, rtol=0)
    assert any("channels last" in n for n in m.notes)


@pytest.mark.parametrize(
    ("declared", "found", "remedy"), [((32, 32, 3), (1, 28, 28), "size"), ((3072,), (3, 32, 32), "Flatten")]
)
def test_samples_that_do_not_fit_are_refused_by_both_shapes(declared, found, remedy):
    model = keras.Sequential([keras.Input(declared), L.Flatten(), L.Dense(10)])
    with pytest.raises(ModelError, match=r"bad-shape") as e:
        assay.Model(model)(torch.zeros(2, *found))
    assert str(declared) in str(e.value)
    assert str(found) in str(e.value)
    assert remedy in str(e.value)


@pytest.mark.parametrize("what", ["two inputs", "whole numbers", "not built"])
def test_models_that_are_no_classifiers_of_images_are_refused(what):
    a, b = keras.Input((4,)), keras.Input((4,))
    model = {
        "two inputs": lambda: keras.Model([a, b], L.Dense(2)(L.Add()([a, b]))),
        "whole numbers": lambda: keras.Sequential([keras.Input((4,), dtype="int32"), L.Embedding(9, 2), L.Flatten()]),
        "not built": lambda: keras.Sequential([L.Dense(3)]),
    }[what]()
    with pytest.raises(ModelError):
        assay.Model(model)


def test_a_subclass_is_taken_as_it_is_with_its_shape_from_its_first_call():
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.flat, self.out = L.Flatten(), L.Dense(10)
            self.activation = keras.activations.sigmoid  # not at the end, so it stays

        def call(self, x):
            return self.out(self.activation(self.flat(x)))

    model, (x, _) = Mine(), digits(8)
    model(np.zeros((1, 28, 28, 1), np.float32))
    torch.testing.assert_close(assay.Model(model)(x).detach(), predicted(model, x), atol=1e-6, rtol=0)


def test_what_surprises_is_said():
    half = keras.Sequential([keras.Input((4,)), L.Dense(2, dtype="mixed_bfloat16")])
    assert any("bfloat16" in n for n in assay.Model(half).notes)
    scaled = keras.Sequential([keras.Input((4,)), L.Rescaling(1 / 255), L.Dense(2)])
    assert any("Rescaling" in n for n in assay.Model(scaled).notes)


# Gradients, identity, verdict


def test_the_input_gradient_is_that_of_finite_differences():
    m, (x, _) = assay.Model(small(L.Dense(10, activation="softmax"))), digits(1)
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(m(x)[0, 3], x)
    u = g / g.norm()
    with torch.no_grad():
        rise = (m(x + 0.002 * u) - m(x - 0.002 * u))[0, 3] / 0.004
    assert rise == pytest.approx(float(g.norm()), rel=0.05)


def test_the_fingerprint_is_that_of_weights_and_layers_not_of_names():
    a, b = (small(L.Dense(10, activation="softmax")) for _ in range(2))
    b.set_weights(a.get_weights())
    same = fingerprint(assay.Model(a))
    assert fingerprint(assay.Model(b)) == same
    b.layers[0].activation = keras.activations.tanh
    assert fingerprint(assay.Model(b)) != same
    kept = assay.Model(a)
    a.set_weights([w + 1 for w in a.get_weights()])
    assert fingerprint(kept) != same  # the model is live


def twin():
    """The demo network of torch, and its weights in Keras, where flattened features stand in the order (h, w, c)."""
    net = assay.load_model("demo:mnist-plain").net
    layers, weights, shape, flattened = [keras.Input((28, 28, 1))], [], (1, 28, 28), None
    for m in net:
        if isinstance(m, nn.Conv2d):
            layers += [L.ZeroPadding2D(m.padding[0]), L.Conv2D(m.out_channels, m.kernel_size, m.stride)]
            weights += [m.weight.permute(2, 3, 1, 0), m.bias]
        elif isinstance(m, nn.Linear):
            w = m.weight
            if flattened:
                w, flattened = w.reshape(-1, *flattened).permute(0, 2, 3, 1).flatten(1), None
            layers.append(L.Dense(m.out_features))
            weights += [w.T, m.bias]
        elif isinstance(m, nn.Flatten):
            layers.append(L.Flatten())
            flattened = shape
        else:
            layers.append({nn.ReLU: L.ReLU}[type(m)]())
        shape = tuple(m(torch.zeros(1, *shape)).shape[1:])
    model = keras.Sequential([*layers, L.Softmax()])
    model.set_weights([w.detach().numpy() for w in weights])
    return net, model


def test_the_same_weights_in_torch_and_keras_get_the_same_logits_and_the_same_verdict():
    net, model = twin()
    x, _ = digits(64)
    m = assay.Model(model)
    assert (m(x) - net(x)).abs().max() < 1e-4
    runs = [assay.evaluate(n, "demo:mnist", "linf:0.05", limit=24, effort="quick", progress=False) for n in (net, m)]
    a, b = (r.samples.select(["label", "prediction", "fooled"]).to_pylist() for r in runs)
    assert a == b
    assert 0 < runs[0].robust_accuracy < 1


@ON_TORCH
def test_the_same_weights_get_the_same_proofs():
    net, model = twin()
    x, y = digits(4)
    a, b = (assay.certify(assay.Model(n), x, y, assay.Threat("linf", 0.01), method="crown") for n in (net, model))
    assert a.certified.any()
    assert (a.certified == b.certified).all()
    torch.testing.assert_close(a.margins, b.margins, atol=1e-2, rtol=0)


# Files


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_file_is_the_model(tmp_path, suffix):
    model, (x, _) = small(L.Dense(10, activation="softmax")), digits(8)
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.save(tmp_path / f"net{suffix}")
    m = assay.load_model(tmp_path / f"net{suffix}")
    torch.testing.assert_close(m(x).detach(), assay.Model(model)(x).detach(), atol=1e-6, rtol=0)
    assert m.name == "net"


@ON_TORCH
def test_a_file_becomes_a_network_with_parameters(tmp_path):
    model = small(L.Dense(10))
    model.save(tmp_path / "net.keras")
    net = assay.load_model(tmp_path / "net.keras").net
    assert sorted(p.shape for p in net.parameters()) == sorted(torch.Size(w.shape) for w in model.weights)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_file_with_code_is_refused_unless_it_is_trusted(tmp_path, suffix):
    model = keras.Sequential([keras.Input((4,)), L.Lambda(lambda x: x * 2), L.Dense(2)])
    model.save(tmp_path / f"net{suffix}")
    with pytest.raises(ModelError, match="Lambda"):
        assay.load_model(tmp_path / f"net{suffix}")
    assert assay.load_model(tmp_path / f"net{suffix}", trust_pickle=True)(torch.ones(1, 4)).shape == (1, 2)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"module": "keras.layers", "class_name": "Dense"', '"module": "os", "class_name": "system"', "os"),
        ('"class_name": "Dense"', '"class_name": "TorchModuleWrapper"', "TorchModuleWrapper"),
        ('"class_name": "Dense"', '"class_name": "TFSMLayer"', "TFSMLayer"),
        (
            '"module": "keras.layers", "class_name": "Dense"',
            '"module": "keras.utils", "class_name": "get_file"',
            "utils",
        ),
    ],
)
def test_a_description_that_names_other_code_is_refused(tmp_path, old, new, said):
    keras.Sequential([keras.Input((4,)), L.Dense(2)]).save(tmp_path / "a.keras")
    with zipfile.ZipFile(tmp_path / "a.keras") as a, zipfile.ZipFile(tmp_path / "b.keras", "w") as b:
        for name in a.namelist():
            data = a.read(name)
            b.writestr(name, data.replace(old.encode(), new.encode()) if name == "config.json" else data)
    with pytest.raises(ModelError, match=said):
        assay.load_model(tmp_path / "b.keras")


def test_weights_in_another_file_are_refused(tmp_path):
    import h5py

    model = keras.Sequential([keras.Input((4,)), L.Dense(2)])
    model.save(tmp_path / "net.h5")
    with h5py.File(tmp_path / "net.h5", "a") as f:
        f["model_weights"]["more"] = h5py.ExternalLink("other.h5", "/x")
    with pytest.raises(ModelError, match="elsewhere"):
        assay.load_model(tmp_path / "net.h5")


def test_other_files_are_refused_by_what_they_are(tmp_path):
    model = keras.Sequential([keras.Input((4,)), L.Dense(2)])
    model.save_weights(tmp_path / "a.weights.h5")
    (tmp_path / "b.keras").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="weights only"):
        assay.load_model(tmp_path / "a.weights.h5")
    with pytest.raises(ModelError, match="Keras wrote"):
        assay.load_model(tmp_path / "b.keras")


@pytest.mark.skipif(BACKEND != "tensorflow", reason=f"Keras runs on {BACKEND}, which exports no SavedModel")
def test_an_exported_saved_model_is_the_model(tmp_path):
    model, (x, _) = small(L.Dense(10, activation="softmax")), digits(8)
    model.export(tmp_path / "net", verbose=False)
    m = assay.load_model(tmp_path / "net")
    assert any("softmax at its end is left out" in n for n in m.notes)
    torch.testing.assert_close(m(x).detach(), assay.Model(model)(x).detach(), atol=1e-5, rtol=0)


# Training


def blobs(n=256):
    """Grey images (n, 8, 8, 1) of two classes, told apart by their darker side, and by a faint chequered pattern.

    To a change of 0.145 by pixel the side survives (0.15 from the mean), the pattern does not (0.1).
    """
    y = np.arange(n) % 2
    side = np.where(np.arange(8) < 4, -0.15, 0.15)[None, None]
    pattern = 0.1 * (-1.0) ** np.add.outer(np.arange(8), np.arange(8))[None]
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (n, 8, 8))
    x = 0.5 + noise + (2 * y - 1)[:, None, None] * (side + pattern)
    return x.clip(0, 1)[..., None].astype("float32"), y


def little(head=2, activation="softmax"):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            L.Conv2D(4, 3),
            L.BatchNormalization(momentum=0.7),
            L.ReLU(),
            L.Flatten(),
            L.Dense(head, activation=activation),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def test_one_step_is_fgsm():
    x, y = blobs(16)
    model = little()
    hard = AdversarialModel(model, "linf:0.1").perturbed(*map(keras.ops.convert_to_tensor, (x, y)))
    t = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(assay.Model(model)(t), torch.tensor(y)), t)
    wanted = (t + 0.1 * g.sign()).clamp(0, 1).detach().permute(0, 2, 3, 1).numpy()
    off = np.abs(keras.ops.convert_to_numpy(hard) - wanted)
    assert (off < 1e-5).mean() > 0.99  # where a gradient is next to 0, its sign is a matter of rounding


@pytest.mark.parametrize("threat", ["linf:0.1", "l2:0.5"])
def test_points_lie_in_ball_and_box(threat):
    x, y = blobs(16)
    hard = AdversarialModel(little(), threat, steps=3).perturbed(*map(keras.ops.convert_to_tensor, (x, y)))
    d = (keras.ops.convert_to_numpy(hard) - x).reshape(16, -1)
    size = np.abs(d).max(1) if threat.startswith("linf") else np.linalg.norm(d, axis=1)
    eps = float(threat.partition(":")[2])
    assert size.max() <= eps * 1.0001
    assert size.min() > eps / 10
    assert 0 <= float(keras.ops.min(hard)) <= float(keras.ops.max(hard)) <= 1


def test_fit_hardens_the_model_in_place():
    x, y = blobs()
    data = (torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(y))
    robust = []
    for train in (lambda m: m, lambda m: AdversarialModel(m, "linf:0.145", steps=3)):
        keras.utils.set_random_seed(1)
        model = little()
        history = train(model).fit(x, y, epochs=6, batch_size=64, verbose=0).history
        assert history["loss"][-1] < history["loss"][0]
        robust.append(
            assay.evaluate(model, data, "linf:0.145", limit=64, effort="quick", progress=False).robust_accuracy
        )
    assert robust[1] > robust[0] + 0.05


@pytest.mark.parametrize("labels", ["sparse", "column", "one-hot", "binary"])
def test_labels_as_keras_takes_them(labels):
    x, y = blobs(64)
    model = little(1, "sigmoid") if labels == "binary" else little()
    wanted = {"sparse": y, "column": y[:, None], "one-hot": np.eye(2, dtype="float32")[y], "binary": y}[labels]
    loss = {"one-hot": "categorical_crossentropy", "binary": "binary_crossentropy"}
    hardened = AdversarialModel(model, "linf:0.05", clean=0.3)
    hardened.compile("sgd", loss.get(labels, "sparse_categorical_crossentropy"))
    before = model.get_weights()
    hardened.fit(x, wanted, epochs=1, batch_size=32, verbose=0)
    assert any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))


def test_a_model_that_fit_has_yet_to_build_can_be_hardened():
    x, y = blobs(64)
    model = keras.Sequential([L.Flatten(), L.Dense(2, activation="softmax")])
    hardened = AdversarialModel(model, "linf:0.05")
    hardened.compile("sgd", "sparse_categorical_crossentropy")
    hardened.fit(x, y, batch_size=32, verbose=0)
    assert assay.Model(model)(torch.zeros(3, 1, 8, 8)).shape == (3, 2)


def test_the_search_leaves_the_statistics_of_batch_normalisation_alone():
    x, y = map(keras.ops.convert_to_tensor, blobs(16))
    model = little()
    hardened = AdversarialModel(model, "linf:0.1", steps=2)
    hardened(x)
    before = model.get_weights()
    hardened.perturbed(x, y)
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))


def test_evaluating_the_wrapper_evaluates_the_model():
    model = little()
    assert fingerprint(assay.Model(AdversarialModel(model, "linf:0.1"))) == fingerprint(assay.Model(model))


def test_mistakes_are_named():
    x, y = blobs(16)
    with pytest.raises(ThreatError, match="8/255"):
        AdversarialModel(little(), "linf:8")
    with pytest.raises(ThreatError, match="linf or l2"):
        AdversarialModel(little(), "l1:3")
    with pytest.raises(UsageError, match="steps"):
        AdversarialModel(little(), "linf:0.1", steps=0)
    with pytest.raises(DataError, match="divide them by 255"):
        AdversarialModel(little(), "linf:0.1").fit(x * 255, y, verbose=0)


# Other backends


@pytest.mark.parametrize("backend", ["jax", "tensorflow", "torch"])
@pytest.mark.slow
def test_all_of_this_holds_on_the_other_backends(backend):
    if backend == BACKEND:
        pytest.skip("that is this very run")
    framework(backend)
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-p", "no:cacheprovider", "-m", "not slow"],
        env=os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stdout[-3000:]
