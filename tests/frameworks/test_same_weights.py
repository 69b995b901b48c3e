"""The same weights give the same logits and the same verdict in Keras, TensorFlow, JAX and through ONNX Runtime.

That is benchmarks/bridges.py at a small size. The forms of files that torch writes are in test_onnx.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import framework

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bridges.py"
BACKENDS = {"keras-tf": "tensorflow", "tf-function": "tensorflow", "saved-model": "tensorflow", "keras-jax": "jax"}


def measured(form):
    how = os.environ | {"KERAS_BACKEND": BACKENDS.get(form, "torch")}
    command = [sys.executable, str(BENCHMARK), "--one", form, "--limit", "24"]
    done = subprocess.run(command, env=how, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def native():
    return measured("torch")


@pytest.mark.parametrize(
    ("form", "needed"),
    [
        ("keras-file", ("keras",)),
        ("keras", ("keras",)),
        ("keras-tf", ("keras", "tensorflow")),
        ("tf-function", ("keras", "tensorflow")),
        ("saved-model", ("keras", "tensorflow")),
        ("keras-jax", ("keras", "jax")),
        ("jax", ("jax",)),
    ],
)
def test_a_form_answers_as_the_module_that_it_was_made_of(form, needed, native):
    for name in needed:
        framework(name)
    found = measured(form)
    assert found["gap"] < 1e-4
    assert found["fooled"] == native["fooled"]
    assert found["gradient"] is not None


def test_scores_alone_end_in_nearly_the_same_verdict(native):
    """ONNX Runtime has no gradient; what searches by scores may miss a sample, and must not find more."""
    framework("onnxruntime")
    found = measured("ort")
    assert found["gap"] < 1e-4
    assert found["gradient"] is None
    assert native["robust"] <= found["robust"] <= native["robust"] + 2 / 24
