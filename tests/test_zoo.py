"""The masked zoo: every network that masks its gradients is flagged, and no sound one is."""

from functools import cache

import pytest
import torch

import assay
import zoo
from assay.evaluation.diagnosis import probe
from assay.evaluation.finding import Finding
from assay.evaluation.preflight import check_model
from assay.models import Model
from assay.threats import Box, Threat

pytestmark = pytest.mark.slow

MORE_THREATS = ("linf:0.02", "linf:0.05", "linf:0.1", "linf:0.3", "l2:0.5", "l2:2", "l1:10", "l0:20", "linf", "l2")


@cache
def digits():
    return assay.load_data("demo:mnist", limit=100)


def findings(animal: zoo.Animal, threat: str) -> dict[str, Finding]:
    """Return what a user is told before the race."""
    settled = Threat.parse(threat).within(Box(), 784)
    checked = check_model(Model(animal.build()), digits(), settled, None)
    return {f.code: f for f in (*checked.findings, *probe(checked.model, digits(), settled).findings)}


@pytest.mark.parametrize("animal", zoo.MASKED, ids=lambda a: a.name)
def test_a_masked_network_is_right_on_clean_images_and_flagged(animal):
    net, x, y = animal.build(), digits().batch(range(100)), digits().labels
    with torch.no_grad():
        assert (net(x).argmax(1) == y).float().mean() > 0.85
    found = findings(animal, animal.threat)
    assert any(f.severity == "warning" and f.remedy for f in found.values())
    assert all(f.evidence for f in found.values() if f.code != "probabilities-not-logits")


@pytest.mark.parametrize("threat", MORE_THREATS)
@pytest.mark.parametrize("animal", zoo.CONTROLS, ids=lambda a: a.name)
def test_a_sound_network_is_not(animal, threat):
    assert findings(animal, threat) == {}


@pytest.mark.parametrize("animal", zoo.MASKED, ids=lambda a: a.name)
def test_a_masked_network_ends_near_its_true_robust_accuracy(animal):
    """At most two points above what an attack that sees through the mask leaves of the first hundred images."""
    e = assay.evaluate(animal.build(), digits(), animal.threat, progress=False)
    assert e.robust_accuracy <= animal.bound + 0.02
