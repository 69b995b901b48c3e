"""A folder with all that the pages speak of, made from the demo model, and the names that their Python lines use."""

import json
import os
import random
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import assay
from assay.nets import mnist_small

# ----------------------------------------------------------------------------------------------------- what is smaller

SIZES: Mapping[str, str] = {
    "--limit": "6",
    "--test-limit": "6",
    "--epochs": "1",
    "--n": "64",
    "--timeout": "20",
    "--seconds": "5",
    "--prove-seconds": "5",
    "--port": "0",
    "--device": "cpu",
}
"""Values that options get in the place of those of a page."""

ADDED: Mapping[str, Mapping[str, str | None]] = {
    "evaluate": {"--limit": "6", "--effort": "quick"},
    "attack": {"--limit": "6", "--max-passes": "200"},
    "certify": {"--limit": "6"},
    "harden": {"--test-limit": "6", "--epochs": "1", "--effort": "quick"},
    "sparseness": {"--limit": "6"},
    "attribution": {"--limit": "6"},
    "demo": {"--limit": "6"},
    "serve": {"--no-browser": None},
}
"""Options, and their values, that a command gets where a page does not give them."""

ENDPOINT: Mapping[str, str] = {"--limit": "2", "--max-passes": "60"}
"""The same, given or not, for a command that asks an endpoint."""

TRAINING: Mapping[str, str] = {"--limit": "280"}
"""What a training needs at least: a batch."""

KEYWORDS: Mapping[str, int] = {"limit": 6, "n": 64}
"""The most that a number in a Python call may be."""

FIRST: Mapping[str, int] = {"Resize": 32}
"""The most that the first argument of a Python call may be."""

# ---------------------------------------------------------------------------------------------------- what is needed

NEEDS: Mapping[str, tuple[str, ...]] = {
    "README.md": ("captum", "lightning_fabric", "onnxscript", "onnx2torch"),
    "benchmarks/README.md": ("lightning_fabric",),
    "docs/attribution.md": ("captum",),
    "docs/choosing-a-recipe.md": ("lightning_fabric",),
    "docs/endpoints.md": ("urllib3",),
    "docs/fastai.md": ("accelerate", "fastai.vision.all", "lightning", "transformers"),
    "docs/hardening.md": ("lightning_fabric",),
    "docs/keras.md": ("jax", "keras", "tensorflow"),
    "docs/natural.md": ("imagecorruptions",),
    "docs/records.md": ("weasyprint",),
    "docs/scale.md": ("ray",),
    "docs/serve.md": ("dash",),
    "docs/trackers.md": ("lightning_fabric", "mlflow", "tensorboard", "wandb"),
}
"""The optional packages without which a page cannot run."""


@dataclass(frozen=True, slots=True)
class Exempt:
    """A command, or a line of a block of Python, that is not run: why, and what says that this is still so.

    Of the block, what it imports is imported.
    """

    page: str
    line: str
    why: str
    needed: Callable[[], bool]


EXEMPT: tuple[Exempt, ...] = (
    Exempt(
        "docs/scale.md",
        "from assay.distributed import Processes, RayExecutor",
        "it asks for four GPUs, and then for a cluster",
        lambda: torch.cuda.device_count() < 4,
    ),
)


# ---------------------------------------------------------------------------------------------------------- the things


@dataclass(frozen=True, slots=True)
class Workshop:
    """A folder, the address of a server of scores, and what has been made so far."""

    folder: Path
    address: str
    names: dict[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Return a thing of :data:`THINGS`, made where it is not there."""
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the frameworks that write it
                THINGS[name](self, path)
        return path


COLOURS = '''"""A network for digits in colour."""

import torch
from torch import nn

import assay
from assay.nets import mnist_small


def build():
    return nn.Sequential(nn.Conv2d(3, 1, 1), mnist_small())


resnet = build


def dataset():
    data = assay.load_data("demo:mnist", limit=6)
    return torch.utils.data.TensorDataset(data.batch(range(6)).expand(-1, 3, -1, -1), data.labels)
'''
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def coloured(mean: tuple[float, ...] = (0.0, 0.0, 0.0), std: tuple[float, ...] = (1.0, 1.0, 1.0)) -> nn.Sequential:
    """Return the demo network for three channels, which sees their mean once they are normalised."""
    grey = nn.Conv2d(3, 1, 1)
    with torch.no_grad():
        grey.weight.copy_(torch.tensor(std).reshape(1, 3, 1, 1) / 3)
        assert grey.bias is not None
        grey.bias.fill_(sum(mean) / 3)
    return nn.Sequential(grey, digits()).eval().requires_grad_(False)


def digits() -> nn.Sequential:
    """Return the demo network."""
    net = mnist_small()
    net.load_state_dict(assay.load_model("demo:mnist-plain").net.state_dict())
    return net.eval()


def grey(n: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (n, 1, 28, 28) and labels."""
    data = assay.load_data("demo:mnist", limit=start + n)
    return data.batch(range(start, start + n)), data.labels[start : start + n]


def _images(each: int, labels: int = 10) -> Callable[[Workshop, Path], None]:
    def make(shop: Workshop, path: Path) -> None:
        data = assay.load_data("demo:mnist", limit=400)
        for label in range(labels):
            (path / str(label)).mkdir(parents=True)
            for i in torch.nonzero(data.labels == label).flatten().tolist()[:each]:
                pixels = (data.batch([i])[0, 0] * 255).round().byte().numpy()
                Image.fromarray(pixels).convert("RGB").save(path / str(label) / f"{i:03}.png")

    return make


def _npz(n: int, start: int) -> Callable[[Workshop, Path], None]:
    def make(shop: Workshop, path: Path) -> None:
        x, y = grey(n, start)
        np.savez(path, x=x.numpy(), y=y.numpy())

    return make


def _pth(shop: Workshop, path: Path) -> None:
    torch.save(coloured(MEAN, STD).state_dict(), path)


def _safetensors(shop: Workshop, path: Path) -> None:
    save_file(coloured(MEAN, STD).state_dict(), path)


def _pt2(shop: Workshop, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.export.save(torch.export.export(coloured(), (torch.zeros(2, 3, 28, 28),), dynamic_shapes=({0: batch},)), path)


def _onnx(shop: Workshop, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.onnx.export(
        coloured(), (torch.zeros(2, 3, 28, 28),), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False,
        external_data=False,
    )  # fmt: skip


def _vnnlib(shop: Workshop, path: Path) -> None:
    """Write that a black image, within 0.001, may be given the class that it is not."""
    z = coloured()(torch.zeros(1, 3, 28, 28))[0]
    first, last = int(z.argmax()), int(z.argmin())
    inputs = [f"(declare-const X_{i} Real)\n(assert (>= X_{i} 0))\n(assert (<= X_{i} 0.001))" for i in range(3 * 784)]
    outputs = [f"(declare-const Y_{i} Real)" for i in range(10)]
    path.write_text("\n".join([*inputs, *outputs, f"(assert (>= Y_{last} Y_{first}))\n"]))


def _keras(shop: Workshop, path: Path) -> None:
    keras_model().save(path)


def _saved_model(shop: Workshop, path: Path) -> None:
    import tensorflow as tf

    module = tf.Module()
    module.w = tf.Variable(tf.random.stateless_normal((3 * 784, 10), (0, 0), stddev=0.04))
    kind = [tf.TensorSpec((None, 28, 28, 3))]
    call = tf.function(lambda v: tf.reshape(v, (-1, 3 * 784)) @ module.w, input_signature=kind)
    module.call = call
    tf.saved_model.save(module, str(path), call.get_concrete_function())


def _learner(shop: Workshop, path: Path) -> None:
    from fastai.vision import all as vision

    normal = vision.Normalize.from_stats(MEAN, STD, cuda=False)
    dls = vision.ImageDataLoaders.from_folder(shop.path("val/"), valid_pct=0.2, bs=4, batch_tfms=normal)
    net = coloured(MEAN, STD).requires_grad_()
    vision.Learner(dls, net, loss_func=vision.CrossEntropyLossFlat()).export(path)


def _run(model: str) -> Callable[[Workshop, Path], None]:
    def make(shop: Workshop, path: Path) -> None:
        how: dict[str, Any] = {"effort": "quick", "limit": 6, "progress": False}
        assay.evaluate(f"demo:{model}", "demo:mnist", "linf:0.1", out=path, **how)

    return make


def _folder(shop: Workshop, path: Path) -> None:
    _run("mnist-plain")(shop, path / "plain")


def _module(shop: Workshop, path: Path) -> None:
    path.write_text(COLOURS)


THINGS: Mapping[str, Callable[[Workshop, Path], None]] = {
    "images/": _images(15),
    "val/": _images(2),
    "few/": _images(25, labels=4),
    "train.npz": _npz(280, 1000),
    "test.npz": _npz(20, 0),
    "mymodule.py": _module,
    "nets.py": _module,
    "my.py": _module,
    "net.pth": _pth,
    "net.pt2": _pt2,
    "net.onnx": _onnx,
    "weights.safetensors": _safetensors,
    "property.vnnlib": _vnnlib,
    "net.keras": _keras,
    "saved_model/": _saved_model,
    "export.pkl": _learner,
    "runs": _folder,
    "elsewhere": _folder,
    "runs/before": _run("mnist-plain"),
    "runs/after": _run("mnist-certified"),
    "runs/gate": _run("mnist-robust"),
}
"""What the pages name, and how it is made; images and networks are of digits in colour."""


def mentioned(code: str) -> list[str]:
    """Return the things that the blocks of a page name and do not make."""
    found = []
    for name in THINGS:
        stem, _, kind = name.rpartition(".")
        word = rf"py:{stem}:|[ =]{stem}:" if kind == "py" else rf"(?<![\w./-]){re.escape(name)}(?![\w.-])"
        made = rf"out(?: |=\"){re.escape(name)}|^# {re.escape(name)}$|save_file\(.*\"{re.escape(name)}\""
        if re.search(word, code) and not re.search(made, code, re.M):
            found.append(name)
    return found


# ----------------------------------------------------------------------------------------------------------- the names


def keras_model() -> Any:
    """Return a compiled Keras model of grey digits."""
    import keras

    keras.utils.set_random_seed(0)
    ends = [keras.layers.Flatten(), keras.layers.Dense(10, activation="softmax")]
    model = keras.Sequential([keras.Input((28, 28, 1)), *ends])
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def _tf_function(shop: Workshop) -> Any:
    import tensorflow as tf

    w = tf.Variable(tf.random.stateless_normal((784, 10), (0, 0), stddev=0.04))
    return tf.function(lambda v: tf.reshape(v, (-1, 784)) @ w / 255, input_signature=[tf.TensorSpec((None, 28, 28, 1))])


def _jax_function(shop: Workshop) -> Any:
    import jax

    w = jax.random.normal(jax.random.key(0), (784, 10)) * 0.04
    return lambda x: x.reshape(len(x), -1) @ w


def _channels_last(i: int, n: int = 12) -> Callable[[Workshop], Any]:
    return lambda _: (grey(n)[0].permute(0, 2, 3, 1).numpy(), grey(n)[1].numpy())[i]


def _service(shop: Workshop) -> Any:
    w = np.random.default_rng(0).random((784, 10))

    def scores(x: Any) -> Any:
        z = np.exp(np.reshape(x, (len(x), -1)) @ w / 100)
        return (z / z.sum(1, keepdims=True)).astype(np.float32)

    return SimpleNamespace(scores=scores)


def _evaluation(shop: Workshop) -> Any:
    return assay.evaluate("demo:mnist-plain", "demo:mnist", "linf:0.1", effort="quick", limit=6, progress=False)


def _hugging_face(part: str) -> Callable[[Workshop], Any]:
    def make(shop: Workshop) -> Any:
        import transformers

        if part == "processor":
            return transformers.ViTImageProcessor(image_mean=[0.5], image_std=[0.5], do_resize=False)
        if part == "args":
            return transformers.TrainingArguments(str(shop.folder / "trained"), report_to="none", use_cpu=True)
        config = transformers.ResNetConfig(
            num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=10, layer_type="basic"
        )
        return transformers.AutoModelForImageClassification.from_config(config)

    return make


def _rows(shop: Workshop) -> Any:
    x, y = grey(8)
    return [{"pixel_values": (v - 0.5) / 0.5, "labels": int(label)} for v, label in zip(x, y, strict=True)]


def _trainer(shop: Workshop) -> Any:
    from lightning import Trainer

    return Trainer


def _pretrained(shop: Workshop) -> Any:
    """Put weights, drawn at random, where those of a pretrained ResNet-18 are kept once they are downloaded."""
    from torchvision import models

    kept = shop.folder / "torch" / "hub" / "checkpoints" / models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    kept.parent.mkdir(parents=True)
    torch.save(models.resnet18().state_dict(), kept)
    return models.resnet18


NAMES: Mapping[str, Callable[[Workshop], Any]] = {
    "model": lambda _: assay.load_model("demo:mnist-plain"),
    "net": lambda _: digits(),
    "data": lambda _: assay.load_data("demo:mnist", limit=6),
    "train": lambda _: assay.load_data("demo:mnist", limit=40),
    "x": lambda _: grey(6)[0],
    "y": lambda _: grey(6)[1],
    "e": _evaluation,
}
"""What Python lines of pages may use without saying where it is from."""

OWN: Mapping[str, Mapping[str, Callable[[Workshop], Any]]] = {
    "README.md": {
        "net": lambda _: coloured(MEAN, STD),
        "x": lambda _: grey(6)[0].expand(-1, 3, -1, -1),
    },
    "docs/fastai.md": {
        "resnet18": _pretrained,
        "path": lambda shop: shop.path("few/"),
        "img": lambda shop: next((shop.path("few/") / "0").iterdir()),
        "hyperparameters": lambda _: {"steps": 2},
        "Trainer": _trainer,
        "mean": lambda _: [0.5],
        "std": lambda _: [0.5],
        "model": _hugging_face("model"),
        "args": _hugging_face("args"),
        "processor": _hugging_face("processor"),
        "train": _rows,
    },
    "docs/keras.md": {
        "model": lambda _: keras_model(),
        "keras_model": lambda _: keras_model(),
        "tf_function": _tf_function,
        "f": _jax_function,
        "service": _service,
        "x_train": _channels_last(0),
        "y_train": _channels_last(1),
        "x_valid": _channels_last(0),
        "y_valid": _channels_last(1),
        "x_test": lambda _: grey(6)[0],
        "y_test": lambda _: grey(6)[1],
    },
}
"""What a name is on one page, whose text says so."""


# -------------------------------------------------------------------------------------------------------- the endpoint


@contextmanager
def served() -> Iterator[str]:
    """Serve the scores of the network for digits in colour on a free port of this machine, and yield its address."""
    net = coloured()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
            with torch.no_grad():
                body = json.dumps({"scores": net(torch.tensor(rows, dtype=torch.float32)).tolist()}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def seeded() -> None:
    """Set the global random numbers, which some frameworks draw from."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (what they use)
    torch.manual_seed(0)


def forgotten(folder: Path) -> None:
    """Forget the modules that were imported from a folder."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
