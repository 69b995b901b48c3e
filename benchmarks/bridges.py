"""The same weights in every form: the same logits, the same verdict, and what each form costs.

The networks are demo:mnist-plain and demo:mnist-robust, the samples those of demo:mnist. Each form runs in a process of
its own (Keras has one backend in a process), on one thread. Differences and ratios are to the PyTorch module itself.

    python benchmarks/bridges.py                       all forms (make .venv-frameworks has every framework)
    python benchmarks/bridges.py --forms onnx,keras    some
    python benchmarks/bridges.py --limit 200 --out benchmarks/bridges.md
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import numpy as np
import torch

import assay

CASES, EFFORT = (("demo:mnist-plain", "linf:0.1"), ("demo:mnist-robust", "linf:0.3")), "standard"
BATCH, ROUNDS = 128, 15
Make = Callable[[torch.nn.Module, Path], Any]
"""From a network and an empty folder to something that assay.evaluate takes as a model."""


def _example() -> torch.Tensor:
    return torch.zeros(2, 1, 28, 28)


def _exported(net: torch.nn.Module, folder: Path) -> str:
    path = folder / "net.pt2"
    free = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(net, (_example(),), dynamic_shapes=free), path)
    return str(path)


def _onnx_dynamo(net: torch.nn.Module, folder: Path) -> str:
    path = folder / "dynamo.onnx"
    free = ({0: torch.export.Dim("batch")},)
    how: dict[str, Any] = {"dynamo": True, "dynamic_shapes": free, "external_data": False, "verbose": False}
    torch.onnx.export(net, (_example(),), str(path), **how)
    return str(path)


def _onnx_torchscript(net: torch.nn.Module, folder: Path) -> str:
    path = folder / "torchscript.onnx"
    axes = {"input": {0: "batch"}, "output": {0: "batch"}}
    how: dict[str, Any] = {"dynamo": False, "opset_version": 17, "dynamic_axes": axes}
    torch.onnx.export(net, (_example(),), str(path), input_names=["input"], output_names=["output"], **how)
    return str(path)


def _onnx_scores(net: torch.nn.Module, folder: Path) -> str:
    return f"ort:{_onnx_torchscript(net, folder)}"


def _torchscript(net: torch.nn.Module, folder: Path) -> Any:
    path = folder / "net.torchscript"
    torch.jit.trace(net, _example()).save(str(path))
    return assay.load_model(str(path), trust_pickle=True)


def _keras_model(net: torch.nn.Module, _: Path) -> Any:
    """Rebuild the network in Keras, images with channels last, with the same weights."""
    import keras

    layers: list[Any] = [keras.Input((28, 28, 1))]
    weights: list[tuple[Any, torch.nn.Module]] = []
    parts = list(net.children())
    for part, then in zip(parts, [*parts[1:], None], strict=True):
        rising = "relu" if isinstance(then, torch.nn.ReLU) else None
        if isinstance(part, torch.nn.Conv2d):
            if any(part.padding):
                layers.append(keras.layers.ZeroPadding2D(part.padding))
            layers.append(keras.layers.Conv2D(part.out_channels, part.kernel_size, part.stride, activation=rising))
        elif isinstance(part, torch.nn.Flatten):
            layers += [keras.layers.Permute((3, 1, 2)), keras.layers.Flatten()]
        elif isinstance(part, torch.nn.Linear):
            layers.append(keras.layers.Dense(part.out_features, activation=rising))
        else:
            continue
        if not isinstance(part, torch.nn.Flatten):
            weights.append((layers[-1], part))
    model = keras.Sequential(layers)
    for layer, part in weights:
        axes = (2, 3, 1, 0) if part.weight.ndim == 4 else (1, 0)
        layer.set_weights([part.weight.detach().permute(axes).numpy(), part.bias.detach().numpy()])
    return model


def _keras_file(net: torch.nn.Module, folder: Path) -> str:
    path = folder / "net.keras"
    _keras_model(net, folder).save(path)
    return str(path)


def _tf_function(net: torch.nn.Module, folder: Path) -> Any:
    import tensorflow as tf

    model = _keras_model(net, folder)
    shape = tf.TensorSpec((None, 28, 28, 1), tf.float32)
    return tf.function(lambda x: model(x, training=False), input_signature=[shape])


def _saved_model(net: torch.nn.Module, folder: Path) -> str:
    path = folder / "saved"
    _keras_model(net, folder).export(str(path), verbose=False)
    return str(path)


def _jax_function(net: torch.nn.Module, _: Path) -> Any:
    import jax
    from jax import numpy as jnp

    parts = [(p, [jnp.asarray(v.detach().numpy()) for v in p.parameters()]) for p in net.children()]

    @jax.jit
    def answer(x: Any) -> Any:
        for part, values in parts:
            if isinstance(part, torch.nn.Conv2d):
                pads = [(p, p) for p in part.padding]
                x = jax.lax.conv_general_dilated(x, values[0], part.stride, pads) + values[1][:, None, None]
            elif isinstance(part, torch.nn.Linear):
                x = x @ values[0].T + values[1]
            elif isinstance(part, torch.nn.Flatten):
                x = x.reshape(len(x), -1)
            else:
                x = jax.nn.relu(x)
        return x

    return answer


FORMS: dict[str, tuple[str, Make, dict[str, str]]] = {
    "torch": ("PyTorch module", lambda net, _: net, {}),
    "pt2": ("torch.export, .pt2", _exported, {}),
    "torchscript": ("TorchScript", _torchscript, {}),
    "onnx": ("ONNX, torch's dynamo exporter, converted", _onnx_dynamo, {}),
    "onnx-torchscript": ("ONNX, TorchScript exporter, converted", _onnx_torchscript, {}),
    "ort": ("ONNX Runtime, by scores", _onnx_scores, {}),
    "keras-file": (".keras on the torch backend", _keras_file, {"KERAS_BACKEND": "torch"}),
    "keras": ("live Keras model, torch backend", _keras_model, {"KERAS_BACKEND": "torch"}),
    "keras-tf": ("live Keras model, TensorFlow backend", _keras_model, {"KERAS_BACKEND": "tensorflow"}),
    "keras-jax": ("live Keras model, JAX backend", _keras_model, {"KERAS_BACKEND": "jax"}),
    "tf-function": ("tf.function", _tf_function, {"KERAS_BACKEND": "tensorflow"}),
    "saved-model": ("SavedModel folder", _saved_model, {"KERAS_BACKEND": "tensorflow"}),
    "jax": ("jitted JAX function", _jax_function, {}),
}


def measure(form: str, limit: int) -> dict[str, Any]:
    """Measure one form in this process: verdicts on all networks, passes a second on the last."""
    data = assay.load_data("demo:mnist", limit=limit)
    x = data.batch(range(min(BATCH, limit)))
    gaps, fooled, robust = [], [], []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, (source, threat) in enumerate(CASES):
            net, place = assay.load_model(source).net, Path(folder) / str(k)
            place.mkdir()
            made = FORMS[form][1](net, place)
            model = assay.load_model(made) if isinstance(made, str) else made
            model = model if isinstance(model, assay.Model) else assay.Model(model)
            gaps.append(float((model(x) - net(x)).abs().max()))
            result = assay.evaluate(model, data, threat, EFFORT, progress=False)
            fooled.append(result.samples["fooled"].to_pylist())
            robust.append(result.robust_accuracy)
        differentiable = "no-gradient" not in {f.code for f in result.findings}
        return {
            "form": form,
            "gap": max(gaps),
            "robust": robust,
            "fooled": fooled,
            "forward": rate(lambda: model(x), len(x)),
            "gradient": rate(lambda: _gradient(model, x), len(x)) if differentiable else None,
        }


def _gradient(model: assay.Model, x: torch.Tensor) -> None:
    leaf = x.clone().requires_grad_()
    torch.autograd.grad(model(leaf).logsumexp(1).sum(), leaf)


def rate(work: Callable[[], object], rows: int) -> float:
    """Return samples a second of CPU time: the median of some rounds after a first one that may compile."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        work()
        seconds.append(time.process_time() - begun)
    return rows / statistics.median(seconds)


def table(rows: list[dict[str, Any]], limit: int) -> str:
    """Write a Markdown table; the first row is what the others are compared with."""
    base = rows[0]
    verdicts = "".join(f" | {source}, {threat} | other outcome" for source, threat in CASES)
    head = f"| form | largest difference of a logit{verdicts} | forwards | of native | gradients | of native |"
    about = (
        f"{limit} samples, effort {EFFORT}: robust accuracy, and samples with another outcome than natively. Forwards "
    )
    about += f"and gradients of samples a second of CPU time on one thread, in batches of {BATCH}."
    lines = [about, "", head, "|---" * head.count(" | ") + "|---|"]
    for r in rows:
        pairs = zip(r["robust"], r["fooled"], base["fooled"], strict=True)
        cells = "".join(f" | {a:.1%} | {int(np.sum(np.array(f) != np.array(g)))}" for a, f, g in pairs)
        grad = (f"{r['gradient']:,.0f}", f"{r['gradient'] / base['gradient']:.2f}") if r["gradient"] else ("none", "")
        speed = f"{r['forward']:,.0f} | {r['forward'] / base['forward']:.2f} | {grad[0]} | {grad[1]}"
        lines.append(f"| {FORMS[r['form']][0]} | {r['gap']:.1e}{cells} | {speed} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the forms that were asked for, the native one first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--out", type=Path, help="also write the table there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(measure(a.one, a.limit)))
        return
    rows = []
    for form in dict.fromkeys(["torch", *a.forms.split(",")]):
        command = [sys.executable, __file__, "--one", form, "--limit", str(a.limit)]
        done = subprocess.run(command, env=os.environ | FORMS[form][2], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{form}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}", file=sys.stderr, flush=True)
            continue
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(f"{form}: {rows[-1]['forward']:,.0f} forwards a second", file=sys.stderr, flush=True)
    text = table(rows, a.limit)
    print(text)
    if a.out:
        about = "# The same weights in every form\n\n`python benchmarks/bridges.py`: see its first lines. "
        about += (
            "Where an attack succeeds by a hair, the rounding of a form may decide: a sample or two of the hardened "
        )
        about += "network.\n\n"
        a.out.write_text(f"{about}{text}\n")


if __name__ == "__main__":
    main()
