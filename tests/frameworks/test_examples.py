"""The scripts of docs/examples run, in small; those of fastai, Lightning and Hugging Face have tests of their own."""

import importlib.util
import os
import re
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import pytest
from needs import framework

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def printed(name, arguments, capsys):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(arguments.split())
    return capsys.readouterr().out


def shares(text):
    return [float(v) / 100 for v in re.findall(r"([\d.]+)%", text)]


@pytest.mark.slow
def test_the_tutorial_of_keras_and_mnist(capsys):
    keras = framework("keras")
    if keras.backend.backend() == "openvino":
        pytest.skip("Keras runs on a backend that cannot train")
    out = printed("keras_mnist", "--train 1500 --test 300 --judged 8 --epochs 1", capsys)
    assert "softmax at the end of the Keras model is left out" in out
    rows = [shares(line) for line in out.splitlines() if "clean" in line]
    assert len(rows) == 4
    for clean, fgsm, verdict in rows:
        assert clean > 0.5
        assert fgsm < clean
        assert verdict <= clean
    assert rows[2][1] > rows[0][1]  # hardened by PGD


def test_the_example_of_tensorflow(capsys):
    framework("tensorflow")
    out = printed("tensorflow_mnist", "--train 640 --judged 4 --epochs 1", capsys)
    live, folder, *_ = out.splitlines()
    assert live == folder
    assert "serving_default" in out
    assert float(out.split()[-1]) < 1e-4


def test_the_example_of_jax(capsys):
    framework("jax")
    assert "robust_accuracy=0." in printed("jax_mnist", "--train 640 --judged 8 --epochs 2", capsys)


def test_the_example_of_scikit_learn(capsys):
    framework("sklearn")
    out = printed("sklearn_mnist", "--train 300 --judged 8 --queries 50", capsys)
    clean, left = shares(out)
    assert left < clean


def test_the_example_of_onnx(capsys):
    framework("onnxscript")
    out = printed("onnx_mnist", "--judged 8 --judged-by-scores 2", capsys)
    new, old, scores = [shares(line)[:2] for line in out.splitlines()]
    assert new == old
    assert "8 predictions agree" in out
    assert scores[0] == 1.0


def test_the_example_of_timm(capsys):
    framework("timm")
    clean, robust, *_ = shares(printed("timm_mnist", "--train 1280 --judged 8 --epochs 1", capsys))
    assert robust <= clean
