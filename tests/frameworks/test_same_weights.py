"""The same weights give the same logits and the same verdict in Keras, TensorFlow and JAX.

That is benchmarks/bridges.py at a small size. The forms of files that torch writes are in test_onnx.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
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
    plain, hardened = (np.array(f) != np.array(n) for f, n in zip(found["fooled"], native["fooled"], strict=True))
    assert not plain.any()
    assert hardened.sum() <= 1  # where an attack ends by chance, roundings may decide
    assert found["gradient"] is not None
