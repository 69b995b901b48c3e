"""The totals of a run: one count of its table and its tallies, and the statistics they rest on."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binomtest

from assay.runs import SAMPLES, Curve, exact_interval, totals

STATES = ["robust", "fooled", "misclassified", "robust", "fooled", "robust"]
LABELS = [0, 0, 1, 1, 7, 7]


def table(states=STATES, labels=LABELS, certified=None):
    n = len(states)
    columns = {
        "index": [*range(n)],
        "label": labels,
        "prediction": labels,
        "margin": [1.0] * n,
        "fooled": [s == "fooled" for s in states],
        "adversarial_prediction": [None] * n,
        "size": [{"robust": np.inf, "fooled": 0.2, "misclassified": 0.0}[s] for s in states],
        "broken_by": [None] * n,
        "certified": certified or [None] * n,
        "lower": [0.0] * n,
        "upper": [np.inf] * n,
        "forwards": [3] * n,
        "backwards": [2] * n,
        "status": states,
    }
    return pa.table(columns, schema=SAMPLES)


def stage(name, entered, broken):
    return {"name": name, "entered": entered, "broken": broken, "forwards": 5, "backwards": 4, "seconds": 0.25}


def last(entered, broken):
    return {"entered": entered, "broken": broken}


TALLIES = [
    {
        "stages": [stage("clean", 3, 1) | {"kind": "clean"}],
        "claimed": 0,
        "rejected": 0,
        "survive_8bit": 0,
        "seconds": 0.25,
    },
    {
        "stages": [stage("clean", 3, 0), stage("pgd", 3, 2) | {"kind": "ce", "last": last(1, 0)}],
        "claimed": 3,
        "rejected": 1,
        "survive_8bit": 2,
        "seconds": 0.5,
    },
]


def count(*args, eps=0.3, class_names=("ant", "bee"), **options):
    found = totals(*args, eps=eps, class_names=class_names, **options)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_the_totals_are_the_counts_of_the_table_and_the_sums_of_the_tallies():
    assert count(table(), TALLIES) == {
        "n": 6,
        "clean_accuracy": 5 / 6,
        "robust_accuracy": 0.5,
        "certified_accuracy": None,
        "interval": {"confidence": 0.95, "clean": [*exact_interval(5, 6)], "robust": [*exact_interval(3, 6)]},
        "passes": {"forwards": 18, "backwards": 12},
        "seconds": 0.75,
        "claimed": 3,
        "rejected": 1,
        "survive_8bit": 2,
        "per_class": [
            {"class": 0, "name": "ant", "n": 2, "clean": 1.0, "robust": 0.5},
            {"class": 1, "name": "bee", "n": 2, "clean": 0.5, "robust": 0.5},
            {"class": 7, "name": "7", "n": 2, "clean": 1.0, "robust": 0.5},
        ],
        "stages": [
            stage("clean", 6, 1)
            | {"kind": "clean", "forwards": 10, "backwards": 8, "seconds": 0.5, "last": last(6, 1)},
            stage("pgd", 3, 2) | {"kind": "ce", "last": last(1, 0)},
        ],
    }


def test_without_an_eps_nothing_is_robust_nor_not():
    found = count(table(), TALLIES, eps=None, class_names=None)
    assert found["robust_accuracy"] is None
    assert found["interval"].keys() == {"confidence", "clean"}
    assert [(c["name"], c["robust"]) for c in found["per_class"]] == [("0", None), ("1", None), ("7", None)]


def test_what_is_proven_counts_where_proofs_were_asked_for():
    found = count(table(certified=[True, False, False, False, None, False]), TALLIES)
    assert found["certified_accuracy"] == 1 / 6
    assert found["interval"]["certified"] == [*exact_interval(1, 6)]


def test_no_samples_are_no_error():
    found = count(table([], []), [])
    assert (found["n"], found["clean_accuracy"], found["robust_accuracy"]) == (0, 0.0, None)
    assert found["interval"] == {"confidence": 0.95, "clean": [0.0, 1.0], "robust": [0.0, 1.0]}
    assert (found["seconds"], found["claimed"], found["per_class"], found["stages"]) == (0, 0, [], [])


def test_what_no_tally_tells_is_not_known():
    found = count(table(), [{}, None, {"claimed": 2, "rejected": "none", "stages": [{"name": "pgd"}, 3]}])
    assert (found["claimed"], found["rejected"], found["seconds"]) == (2, None, None)
    nothing = dict.fromkeys(("entered", "broken", "forwards", "backwards", "seconds"))
    assert found["stages"] == [{"name": "pgd", "kind": None, "last": last(None, None)} | nothing]


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_interval_is_that_of_clopper_and_pearson(confidence):
    cases = [(0, 10), (3, 10), (10, 10), (435, 500), (1, 100_000)]
    for k, n in cases:
        known = binomtest(k, n).proportion_ci(confidence, "exact")
        assert exact_interval(k, n, confidence) == pytest.approx((known.low, known.high), abs=1e-9)
    low, high = exact_interval(np.arange(11), 10, confidence)
    assert [*zip(low, high, strict=True)] == [exact_interval(k, 10, confidence) for k in range(11)]
    assert exact_interval(0, 0) == (0.0, 1.0)


def test_the_curve_falls_at_the_sizes():
    curve = Curve.of([0.0, 0.2, 0.1, np.inf], 0.3)
    assert [curve(e) for e in (0, 0.05, 0.1, 0.15, 0.2, 0.3)] == [0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert Curve.of([np.inf], None)(1e9) == 1.0
    assert Curve.of([], None)(0) == 1.0


def test_a_size_that_float32_rounded_up_is_within_the_limit():
    assert float(np.float32(0.3)) > 0.3
    assert Curve.of([float(np.float32(0.3)), np.inf], 0.3)(0.3) == 0.5


@pytest.mark.parametrize("eps", [-1, -1e-12, float("nan"), 0.31, float("inf")])
def test_the_curve_is_asked_only_where_it_is_known(eps):
    with pytest.raises(ValueError, match=r"at least 0|known up to"):
        Curve.of([0.0, 0.2], 0.3)(eps)


def test_runs_are_read_without_torch_and_scipy():
    code = "import sys, assay.runs; sys.exit(any(m in sys.modules for m in ('torch', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
