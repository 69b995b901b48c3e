"""Fingerprints stay what they are: runs and pictures of models are found again by them."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from assay.models import Model
from assay.models.bridges.function import digest, from_function
from assay.models.fingerprint import fingerprint

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def linear(inputs, outputs):
    """A layer of known weights."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(inputs * outputs).view(outputs, inputs) / 8)
        layer.bias.copy_(torch.arange(outputs) - 1.0)
    return layer


def held(*values):
    """A callable without code of ours that holds values."""
    return functools.partial(nn.Identity(), *values)


shared = linear(3, 3)
RECORDED = {
    "a network": (
        Model(nn.Sequential(nn.Flatten(), linear(4, 3), nn.ReLU(), linear(3, 2))),
        "5bd750e457170e162327c069e5b1e7c27fd21167c32c0fd3090b87dcf09b5684",
    ),
    "with a box and a normalisation": (
        Model(nn.Sequential(nn.Flatten(), linear(4, 3)), box=(-1, 1), mean=[0.5], std=[0.25]),
        "7b1955afbc45516882fbbbfa1c3a51d4ae2fe6cbc2314e06162c603b62610fa0",
    ),
    "a layer that is there twice": (
        Model(nn.Sequential(shared, nn.ReLU(), shared)),
        "a17ea7fe476fd026bd8764cf89c3b0784466677baa8afd47fd07a96394ddea03",
    ),
    "a callable that holds arrays, numbers and texts": (
        Model(held(torch.ones(2), ARRAY, ARRAY, "a", "a", 2.5, 3, None)),
        "3535d45a4a51d85af3c9098c1ecfd2295d9b86f9b974b6f22438824043213afd",
    ),
}
"""Models without code, which is another in each version of Python, and their fingerprints by the version 0.1."""

DIGESTS = [
    ([ARRAY, "a", 3, 2.5, None, b"raw", True], "c9ebaab4b8aac9875bb3a127ae9acc52d5b60ca4bc115b5895471c2169b5e3c6"),
    (
        [{"a": [ARRAY, (torch.ones(2), ARRAY)], "b": {}}, np, int],
        "bb2ef06ee1c282cdd03eae072146deef1908ee5a7823a9bb768fd8086c530233",
    ),
]


@pytest.mark.parametrize("name", RECORDED)
def test_the_fingerprint_of_a_model_is_that_of_earlier_versions(name):
    model, recorded = RECORDED[name]
    assert fingerprint(model) == recorded


@pytest.mark.parametrize(("values", "recorded"), DIGESTS)
def test_the_digest_of_what_another_framework_holds_is_that_of_earlier_versions(values, recorded):
    assert digest(values) == recorded


def test_what_is_met_again_adds_nothing_so_that_a_value_may_hold_itself():
    loop = [ARRAY]
    loop.append(loop)
    assert digest([loop]) == digest([[ARRAY]]) != digest([[ARRAY, ARRAY.copy()]])


@pytest.mark.parametrize(
    ("weight", "other"),
    [
        (torch.ones(2), torch.zeros(2)),
        (np.ones(2), np.zeros(2)),
        ([1.0], [2.0]),
        ({"w": np.ones(2)}, {"v": np.ones(2)}),
    ],
)
def test_a_black_box_is_told_from_one_that_holds_something_else(weight, other):
    def mark(held):
        return fingerprint(Model(from_function(lambda x: (x, held)[0], 2)))

    assert mark(weight) == mark(weight)
    assert mark(weight) != mark(other)


def test_a_callable_is_told_from_one_whose_list_holds_something_else():
    one, same, other = (fingerprint(Model(held([t]))) for t in (torch.ones(2), torch.ones(2), torch.zeros(2)))
    assert one == same != other
