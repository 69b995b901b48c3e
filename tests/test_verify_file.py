"""Property files about ONNX files, from the two files to the answer, as a library and on the command line."""

import json
import time
from importlib.util import find_spec

import numpy as np
import pytest
from typer.testing import CliRunner

import assay
from assay.certification.vnnlib import read, verify_file
from assay.cli.app import app

for package in ("onnx", "onnxruntime", "onnx2torch", "onnx2pytorch"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from assay.models.loaders.onnx import Runtime  # noqa: E402

node = helper.make_node
MANY, FEW = 16, 5
"""Inputs: for the first networks neurons are split, for the others boxes are halved."""


def save(path, nodes, weights, inputs, outputs):
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, outputs])
    values = [numpy_helper.from_array(np.asarray(v, np.float32), name) for name, v in weights.items()]
    graph = helper.make_graph(nodes, "graph", [given], [result], values)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


@pytest.fixture(params=[MANY, FEW], ids=["splitting", "halving"])
def hat(request, tmp_path):
    """The mean m of the inputs, up and down by ReLUs: y = (|m - 1/2|, m), so that 0 <= y_0 <= 1/2 on [0, 1]."""
    n = request.param
    mean = np.full((n, 1), 1 / n)
    weights = {"w": np.hstack([mean, -mean, mean]), "b": [-0.5, 0.5, 0.0], "v": [[1, 0], [1, 0], [0, 1]]}
    nodes = [
        node("Gemm", ["x", "w", "b"], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "v"], ["y"]),
    ]  # fmt: skip
    return save(tmp_path / "net.onnx", nodes, weights, n, 2), n


def ask(folder, n, what, low=0.0, high=1.0):
    names = [f"X_{i}" for i in range(n)]
    lines = [f"(declare-const {name} Real)" for name in [*names, "Y_0", "Y_1"]]
    lines += [f"(assert (>= {name} {low}))\n(assert (<= {name} {high}))" for name in names]
    path = folder / "p.vnnlib"
    path.write_text("\n".join([*lines, what]))
    return path


def test_what_cannot_happen_is_proven(hat, tmp_path):
    net, n = hat
    file = ask(tmp_path, n, "(assert (>= Y_0 0.51))")
    verdict = verify_file(net, file, 10)
    assert (verdict.answer, verdict.x, verdict.reason) == ("unsat", None, "")
    assert verdict.seconds < 10


def test_what_can_happen_is_shown(hat, tmp_path):
    net, n = hat
    file = ask(tmp_path, n, "(assert (>= Y_0 0.45))")
    verdict = verify_file(net, file, 10)
    assert verdict.answer == "sat"
    y = Runtime.open(net)(verdict.x.astype(np.float32)[None])[0]
    assert np.array_equal(y, verdict.y)
    assert read(file).violated(verdict.x, y)


def test_all_rows_of_a_conjunction_must_hold_at_once(hat, tmp_path):
    """Far up (y_0 >= 0.3) are both ends; the middle (0.4 <= y_1 <= 0.6) is not among them."""
    net, n = hat
    ends, middle = "(assert (>= Y_0 0.3))", "(assert (>= Y_1 0.4))(assert (<= Y_1 0.6))"
    assert verify_file(net, ask(tmp_path, n, ends), 5).answer == "sat"
    assert verify_file(net, ask(tmp_path, n, middle), 5).answer == "sat"
    assert verify_file(net, ask(tmp_path, n, ends + middle), 10).answer == "unsat"


def test_of_several_alternatives_one_is_enough(hat, tmp_path):
    net, n = hat
    never, often = "(and (>= Y_0 0.6))", "(and (<= Y_0 0.1) (>= Y_1 0.4))"
    assert verify_file(net, ask(tmp_path, n, f"(assert (or {never} {often}))"), 5).answer == "sat"
    assert verify_file(net, ask(tmp_path, n, f"(assert (or {never} (and (<= Y_1 -0.1))))"), 10).answer == "unsat"


def test_inputs_may_be_part_of_the_alternatives(hat, tmp_path):
    """Where the first input is small the mean still reaches 1/2; of all the others it is told to be large."""
    net, n = hat
    others = " ".join(f"(>= X_{i} 0.9)" for i in range(1, n))
    file = ask(tmp_path, n, f"(assert (or (and (<= X_0 0.1) {others} (<= Y_1 0.5)) (and (>= X_0 0.5) (>= Y_0 0.6))))")
    assert verify_file(net, file, 10).answer == "unsat"


def test_what_is_too_close_to_call_stays_unknown(hat, tmp_path):
    """In real numbers y_0 is never above 1/2; within the rounding of float32 nothing can be said."""
    net, n = hat
    start = time.monotonic()
    verdict = verify_file(net, ask(tmp_path, n, "(assert (>= Y_0 0.50000006))"), 1)
    assert verdict.answer == "unknown"
    assert time.monotonic() - start < 30


def test_outputs_of_a_softmax_are_never_taken_for_logits(tmp_path):
    """The logits are below 0.2 everywhere, the probabilities are not."""
    weights = {"w": np.full((FEW, 2), 0.1 / FEW)}
    net = save(
        tmp_path / "net.onnx",
        [node("MatMul", ["x", "w"], ["h"]), node("Softmax", ["h"], ["y"], axis=1)],
        weights,
        FEW,
        2,
    )
    assert verify_file(net, ask(tmp_path, FEW, "(assert (>= Y_0 0.4))"), 2).answer == "sat"
    assert verify_file(net, ask(tmp_path, FEW, "(assert (>= Y_0 0.6))"), 0.5).answer in ("unknown", "unsat")


def test_files_that_do_not_belong_together_are_refused(hat, tmp_path):
    net, n = hat
    with pytest.raises(assay.DataError, match=f"{n + 1} inputs"):
        verify_file(net, ask(tmp_path, n + 1, "(assert (>= Y_0 1))"), 1)


# On the command line


def certify(*args):
    done = CliRunner().invoke(app, ["certify", *map(str, args)], catch_exceptions=False)
    assert done.exit_code == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("least", "answer"), [(0.6, "unsat"), (0.45, "sat"), (0.50000006, "unknown")])
def test_the_answer_is_one_word(hat, tmp_path, least, answer):
    net, n = hat
    file = ask(tmp_path, n, f"(assert (>= Y_0 {least}))")
    assert certify(net, "--vnnlib", file, "--timeout", 1).strip() == answer
    found = json.loads(certify(net, "--vnnlib", file, "--timeout", 1, "--json"))
    assert (found["answer"], found["reason"]) == (answer, "")
    assert 0 < found["seconds"] < 30


def test_a_counterexample_is_written(hat, tmp_path):
    net, n = hat
    file, out = ask(tmp_path, n, "(assert (>= Y_0 0.45))"), tmp_path / "result.txt"
    certify(net, "--vnnlib", file, "--timeout", 5, "--out", out)
    first, *lines = out.read_text().splitlines()
    values = [float(line.strip("()").split()[1]) for line in lines]
    assert (first, len(values)) == ("sat", n + 2)
    x = np.array(values[:n])
    assert ((x >= 0) & (x <= 1)).all()
    assert Runtime.open(net)(x.astype(np.float32)[None])[0].tolist() == values[n:]
    assert values[n] >= 0.45


def test_nothing_is_written_without_one(hat, tmp_path):
    net, n = hat
    out = tmp_path / "result.txt"
    certify(net, "--vnnlib", ask(tmp_path, n, "(assert (>= Y_0 0.6))"), "--timeout", 5, "--out", out)
    assert not out.exists()
