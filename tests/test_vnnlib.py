"""VNN-LIB: what a property says, what is refused, and that a counterexample is always a real one."""

import gzip
import itertools
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import assay
from assay.certification import vnnlib

SHARED = Path(__file__).parents[2] / "shared" / "data" / "vnncomp2021-mnistfc"


def declared(n=2, m=2):
    names = [f"X_{i}" for i in range(n)] + [f"Y_{i}" for i in range(m)]
    return "".join(f"(declare-const {name} Real)\n" for name in names)


BOX = "(assert (<= X_0 0.5))(assert (>= X_0 -1))(assert (<= X_1 2e-1))(assert (<= .1 X_1))"


def parsed(text, n=2, m=2):
    return vnnlib.parse(declared(n, m) + text)


def rows(conjunction):
    return [*zip(conjunction.a.tolist(), conjunction.b.tolist(), strict=True)]


# Reading


def test_a_box_and_one_conjunction():
    """Assertions hold together; a comparison becomes a row of A y <= b."""
    p = parsed(f"; remark (\n{BOX}\n(assert (<= Y_0 Y_1)) ; remark\n(assert (and (>= Y_0 -3) (<= 2 Y_1)))")
    (region,) = p.regions
    assert (p.inputs, p.outputs) == (2, 2)
    assert (region.lo.tolist(), region.hi.tolist()) == ([-1, 0.1], [0.5, 0.2])
    assert [rows(c) for c in region.unsafe] == [[([1, -1], 0), ([-1, 0], 3), ([0, -1], -2)]]


def test_alternatives_of_outputs_share_the_box():
    p = parsed(f"{BOX}(assert (or (and (>= Y_0 Y_1)) (and (<= Y_0 1) (>= Y_1 4))))")
    (region,) = p.regions
    assert [rows(c) for c in region.unsafe] == [[([-1, 1], 0)], [([1, 0], 1), ([0, -1], -4)]]


def test_alternatives_of_inputs_are_regions():
    """Alternatives that add nothing to the box stay together; boxes without a point are left out."""
    p = parsed(
        f"""{BOX}(assert (or
            (and (<= X_0 0) (<= Y_0 1))
            (and (>= X_0 0.25) (<= Y_0 1))
            (and (>= X_0 0.25) (<= Y_1 1))
            (and (>= X_0 0.75) (<= Y_1 1))))"""
    )
    assert [(r.lo[0], r.hi[0], len(r.unsafe)) for r in p.regions] == [(-1, 0, 1), (0.25, 0.5, 2)]


def test_nested_alternatives_multiply():
    p = parsed(f"{BOX}(assert (and (or (<= Y_0 1) (<= Y_0 Y_1)) (or (<= Y_1 2) (and (>= Y_1 3) (<= Y_0 0)))))")
    assert [len(c.b) for c in p.regions[0].unsafe] == [2, 3, 2, 3]


def test_linear_terms():
    p = parsed(f"{BOX}(assert (<= (+ (* 2 Y_0) (- Y_1) 1) (- (* Y_0 -1) 4 (- 2))))")
    assert rows(p.regions[0].unsafe[0]) == [([3, -1], -3)]


def test_files_may_be_packed(tmp_path):
    text = declared() + BOX + "(assert (<= Y_0 0))"
    (tmp_path / "a.vnnlib").write_text(text)
    (tmp_path / "a.vnnlib.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = vnnlib.read(tmp_path / "a.vnnlib"), vnnlib.read(str(tmp_path / "a.vnnlib.gz"))
    assert plain.regions[0].hi.tolist() == packed.regions[0].hi.tolist() == [0.5, 0.2]


numbers = st.floats(-100, 100)


@given(st.data(), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read(data, n, m):
    """Any boxes and conjunctions, written in the form of the competition, come back to the last bit."""
    boxes = st.lists(st.tuples(numbers, numbers).map(sorted), min_size=n, max_size=n)
    bounds = st.lists(st.tuples(st.integers(0, m - 1), st.booleans(), numbers), min_size=1, max_size=3)
    cases = data.draw(st.lists(st.tuples(boxes, bounds), min_size=1, max_size=3, unique_by=str))
    written = [
        [f"(>= X_{i} {lo!r}) (<= X_{i} {hi!r})" for i, (lo, hi) in enumerate(box)]
        + [f"({'<=' if below else '>='} Y_{i} {v!r})" for i, below, v in unsafe]
        for box, unsafe in cases
    ]
    p = parsed(f"(assert (or {' '.join(f'(and {chr(10).join(case)})' for case in written)}))", n, m)
    found = {(*map(tuple, np.stack([r.lo, r.hi], 1).tolist()), str(rows(c))) for r in p.regions for c in r.unsafe}
    signs = np.eye(m)
    wanted = set()
    for box, unsafe in cases:
        a = np.array([signs[i] if below else -signs[i] for i, below, _ in unsafe])
        b = np.array([v if below else -v for _, below, v in unsafe])
        wanted.add((*map(tuple, box), str(rows(vnnlib.Conjunction(a + 0.0, b + 0.0)))))
    assert found == wanted


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("(assert (<= X_0 1)", 5, "closing parenthesis"),
        ("\n(assert (<= Y_0 1)))", 6, "')'"),
        ("hello", 5, "'hello'"),
        ("(check-sat)", 5, "(check-sat ...)"),
        ("(assert (< Y_0 1))", 5, "(< Y_0 1 ...)"),
        ("(assert (not (<= Y_0 1)))", 5, "(not (...) ...)"),
        ("(assert (<= Y_0 1 2))", 5, "<="),
        ("(assert (and))", 5, "(and ...)"),
        ("(assert (<= Y_2 1))", 5, "'Y_2'"),
        ("(assert\n(or (<= Y_0 1)\n(<= Y_0 nan)))", 7, "'nan'"),
        ("(assert (<= Y_0 1e999))", 5, "'1e999'"),
        ("(assert (<= Y_0 __import__))", 5, "'__import__'"),
        ("(assert (<= (* Y_0 Y_1) 1))", 5, "(* Y_0 Y_1 ...)"),
        ("(assert (<= X_0 X_1))", 5, "X_0, X_1"),
        ("(assert (<= X_0 Y_1))", 5, "X_0, Y_1"),
        ("(assert (<= (* 2 X_0) 1))", 5, "X_0"),
        ("(assert (<= 0 1))", 5, "numbers only"),
        ("(declare-const X_3 Real)", 5, "X_2 or Y_2 is next"),
        ("(declare-const X_0 Real)", 5, "'X_0'"),
        ("(declare-const Z Real)", 5, "'Z'"),
        ("(declare-const X_2 Int)", 5, "Int"),
        ("(assert (>= X_0 0))", 1, "a lower bound of every input; found none of X_1"),
        ("(assert " + "(and " * 200 + ")" * 201, 5, "100 nested lists"),
        ("(assert (and " + "(or (<= Y_0 1) (<= Y_1 1))" * 40 + "))", 5, "written out"),
        ("(assert (or (<= Y_0 1) (<= Y_1 1)))" * 40, 1, "written out"),
    ],
)
def test_what_is_not_in_the_format_is_refused_with_its_line(text, line, word):
    with pytest.raises(assay.AssayError) as e:
        parsed(text)
    assert f"in line {line} of the text" in str(e.value)
    assert word in str(e.value)


def test_damaged_files_are_named(tmp_path):
    packed = gzip.compress((declared() + BOX).encode())
    for name, content in (
        ("a.vnnlib", b"\xff\xfe"),
        ("a.vnnlib.gz", b"not packed"),
        ("b.vnnlib.gz", packed[:-12]),
        ("c.vnnlib.gz", packed[:20] + bytes(20) + packed[40:]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(assay.AssayError, match=name):
            vnnlib.read(tmp_path / name)
    with pytest.raises(assay.AssayError, match="nothing"):
        vnnlib.read(tmp_path / "nothing.vnnlib")


def test_a_file_that_unpacks_to_more_than_is_allowed(tmp_path):
    blank = gzip.compress(b" " * (1 << 24))
    (tmp_path / "bomb.vnnlib.gz").write_bytes(blank * 17)
    with pytest.raises(assay.AssayError, match="at most"):
        vnnlib.read(tmp_path / "bomb.vnnlib.gz")


# Falsifying


def linear(weight, bias=0.0):
    """y = W x + bias, for which the reachable outputs are known."""
    net = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        net.weight.copy_(torch.tensor(weight))
        net.bias.fill_(bias)
    return net.eval()


IDENTITY = [[1.0, 0.0], [0.0, 1.0]]
UNIT = "(assert (<= X_0 1))(assert (>= X_0 0))(assert (<= X_1 1))(assert (>= X_1 0))"


def test_the_one_corner_that_is_unsafe_is_found():
    prop = parsed(f"{UNIT}(assert (>= Y_0 1))(assert (<= Y_1 0))")
    found = vnnlib.falsify(linear(IDENTITY), prop)
    assert found.x.tolist() == [1, 0]
    assert found.y.tolist() == [1, 0]


def test_what_is_just_out_of_reach_is_never_claimed():
    prop = parsed(f"{UNIT}(assert (>= Y_0 1.0000001))")
    assert vnnlib.falsify(linear(IDENTITY), prop, steps=10, restarts=20) is None


def test_each_alternative_and_each_region_is_searched():
    net = linear(IDENTITY)
    prop = parsed(f"{UNIT}(assert (or (<= Y_0 -1) (>= Y_1 5) (and (>= Y_0 0.9) (>= Y_1 0.9))))")
    assert (vnnlib.falsify(net, prop).x >= 0.9).all()
    prop = parsed(f"{UNIT}(assert (or (and (<= X_0 0.5) (>= Y_0 0.6)) (and (>= X_0 0.5) (>= Y_0 0.7))))")
    assert vnnlib.falsify(net, prop).x[0] >= 0.7


def test_without_a_condition_on_outputs_every_point_is_unsafe():
    assert vnnlib.falsify(linear(IDENTITY), parsed(UNIT)).x.tolist() == [0.5, 0.5]


def test_a_property_without_points_has_no_counterexample():
    prop = parsed(f"{UNIT}(assert (<= X_0 -1))")
    assert prop.regions == ()
    assert vnnlib.falsify(linear(IDENTITY), prop) is None


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(0, 1e-6)), min_size=2, max_size=2), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_a_counterexample_is_inside_its_box_and_unsafe_for_a_fresh_pass(box, seed):
    """Also in boxes so thin that float32 has few numbers in them, or none: 0.1 is not one."""
    net = linear([[1.0, -2.0], [3.0, 0.5]], bias=0.3)
    lo, hi = np.array([v for v, _ in box]), np.array([v + w for v, w in box])
    middle = net(torch.from_numpy((lo + hi) / 2).float()).tolist()
    bounds = "".join(
        f"(assert (>= X_{i} {a!r}))(assert (<= X_{i} {b!r}))"
        for i, (a, b) in enumerate(zip(lo.tolist(), hi.tolist(), strict=True))
    )
    prop = parsed(f"{bounds}(assert (<= Y_0 {middle[0]!r}))")
    found = vnnlib.falsify(net, prop, seed=seed, restarts=4, steps=10)
    if found is not None:
        assert ((lo <= found.x) & (found.x <= hi)).all()
        y = net(torch.from_numpy(found.x.astype(np.float32))[None])[0]
        assert torch.equal(y, torch.from_numpy(found.y))
        assert found.y[0] <= middle[0]


def test_points_are_float32_numbers_wherever_the_box_has_some():
    prop = parsed(
        "(assert (>= X_0 0.1))(assert (<= X_0 0.3))(assert (>= X_1 0.7))(assert (<= X_1 0.7))(assert (<= Y_0 Y_1))"
    )
    found = vnnlib.falsify(linear(IDENTITY), prop)
    assert found.x[0] == np.float32(found.x[0])
    assert found.x[1] == 0.7


def test_the_judge_decides():
    """A search on a slightly wrong network: what it finds counts only if the real one agrees."""
    prop = parsed(f"{UNIT}(assert (>= Y_0 1.05))")
    wrong = linear(IDENTITY, bias=0.1)
    assert vnnlib.falsify(wrong, prop).y[0] >= 1.05
    assert vnnlib.falsify(wrong, prop, judge=lambda x: x, steps=5, restarts=3) is None
    assert vnnlib.falsify(linear(IDENTITY), prop, judge=lambda x: x + np.float32(0.1), steps=5, restarts=3) is None


def test_the_same_seed_finds_the_same_point():
    prop = parsed(f"{UNIT}(assert (>= (+ Y_0 Y_1) 1.9))")
    one, again = (vnnlib.falsify(linear(IDENTITY), prop, seed=3) for _ in range(2))
    assert one.x.tolist() == again.x.tolist()


def test_models_of_fixed_rows_and_other_shapes():
    class Fixed(nn.Module):
        def forward(self, x):
            assert x.shape == (4, 1, 2)
            return x * 1.0

    prop = parsed(f"{UNIT}(assert (>= Y_1 0.9))")
    assert vnnlib.falsify(assay.Model(Fixed(), rows=4, fixed_rows=True), prop, shape=(1, 2)).x[1] >= 0.9


def test_a_network_of_another_size_is_refused():
    prop = parsed(UNIT + "(assert (<= Y_0 0))")
    with pytest.raises(assay.DataError, match="2 inputs"):
        vnnlib.falsify(linear(IDENTITY), prop, shape=(3,))
    with pytest.raises(assay.DataError, match="2 outputs"):
        vnnlib.falsify(linear([[1.0, 0.0]]), prop)


def test_a_deadline_ends_the_search():
    prop = parsed(f"{UNIT}(assert (>= Y_0 2))")
    start = time.monotonic()
    assert vnnlib.falsify(linear(IDENTITY), prop, restarts=1_000_000, deadline=start + 0.2) is None
    assert time.monotonic() - start < 30


# Verifying


def by_corners(lo, hi, a, b, deadline):
    """Prove a property of the identity by its corners, one row at a time (exact for linear functions)."""
    corners = np.array([*itertools.product(*zip(lo, hi, strict=True))])
    return bool(any((corners @ row > limit).all() for row, limit in zip(a, b, strict=True)))


def test_proven_falsified_and_open():
    net = linear(IDENTITY)
    proven = parsed(f"{UNIT}(assert (or (>= Y_0 1.5) (<= Y_1 -0.5)))")
    verdict = vnnlib.verify_property(net, proven, 2, by_corners)
    assert (verdict.answer, verdict.x, verdict.y) == ("unsat", None, None)
    unsafe = parsed(f"{UNIT}(assert (or (>= Y_0 1.5) (>= Y_1 0.5)))")
    verdict = vnnlib.verify_property(net, unsafe, 2, by_corners)
    assert verdict.answer == "sat"
    assert unsafe.violated(verdict.x, verdict.y)
    start = time.monotonic()
    assert vnnlib.verify_property(net, proven, 0.5, lambda *_: False).answer == "unknown"
    assert time.monotonic() - start < 30


def test_one_open_conjunction_leaves_the_property_open():
    prop = parsed(f"{UNIT}(assert (or (>= Y_0 1.5) (<= Y_1 -0.5)))")
    answers = {-1.5: True, -0.5: False}
    verdict = vnnlib.verify_property(linear(IDENTITY), prop, 0.5, lambda *case: answers[case[3][0]])
    assert verdict.answer == "unknown"


def test_what_a_prover_takes_for_a_counterexample_is_checked():
    """At a spike that no gradient leads to."""

    class Spike(nn.Module):
        def forward(self, x):
            return x * 0 + ((x == 0.625).all(1, keepdim=True)).float()

    prop = parsed(f"{UNIT}(assert (>= Y_0 1))")
    verdict = vnnlib.verify_property(Spike(), prop, 0.5, lambda *_: np.array([0.625, 0.625]))
    assert (verdict.answer, verdict.x.tolist(), verdict.y.tolist()) == ("sat", [0.625, 0.625], [1, 1])
    assert vnnlib.verify_property(Spike(), prop, 0.5, lambda *_: np.array([0.5, 0.625])).answer == "unknown"


# Writing


def test_a_result_file_has_the_form_of_the_competition(tmp_path):
    x, y = np.array([0.1, -1e-30]), np.array([3.0, 0.1], np.float32)
    vnnlib.write_counterexample(tmp_path / "result.txt", x, y)
    text = (tmp_path / "result.txt").read_text()
    assert text == "sat\n((X_0 0.1)\n(X_1 -1e-30)\n(Y_0 3.0)\n(Y_1 0.10000000149011612))\n"
    values = [float(line.strip("()").split()[1]) for line in text.splitlines()[1:]]
    assert values == [*x.tolist(), *y.tolist()]


# The competition's own suite, where it is at hand


def verdicts(wanted):
    path = SHARED / "verdicts.csv"
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return [name for name, verdict, *_ in (line.split(",") for line in lines) if verdict == wanted]


def network():
    if not all(map(find_spec, ("onnx", "onnxruntime", "onnx2torch", "onnx2pytorch"))):
        pytest.skip("assay[onnx] is not installed")
    from assay.models.loaders.onnx import Runtime

    path = SHARED / "mnist-net_256x2.onnx"
    return assay.load_model(path).net, Runtime.open(path)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")
def test_what_the_verifiers_falsified_is_falsified():
    net, judge = network()
    names = verdicts("sat")
    assert len(names) == 12
    for name in names:
        prop = vnnlib.read(SHARED / f"{name}.gz")
        found = vnnlib.falsify(net, prop, shape=judge.shape, judge=judge)
        assert found is not None, name
        assert prop.violated(found.x, judge(found.x.astype(np.float32).reshape(1, *judge.shape))[0])


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")
def test_what_the_verifiers_proved_is_not_falsified():
    net, judge = network()
    for name in verdicts("unsat"):
        assert vnnlib.falsify(net, vnnlib.read(SHARED / f"{name}.gz"), shape=judge.shape, judge=judge) is None, name
