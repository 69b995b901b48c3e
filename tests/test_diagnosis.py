"""Signs of masked gradients: each is raised by a network that is made to show it, and by none of the sound ones."""

import pytest
import torch

import assay
from assay.evaluation.diagnosis import BLACK_BOX, RACE_GAP, judge, probe
from assay.evaluation.health import Bench
from assay.evaluation.preflight import check_gradients, check_model
from assay.evaluation.rescue import examine
from assay.models import Model
from assay.models.door import metered
from assay.threats import Box, Threat


@pytest.fixture(scope="module")
def digits():
    return assay.load_data("demo:mnist", limit=64)


@pytest.fixture(scope="module")
def plain():
    return assay.load_model("demo:mnist-plain").net


@pytest.fixture(scope="module")
def robust():
    return assay.load_model("demo:mnist-robust").net


def codes(findings):
    return [f.code for f in findings]


def threat(text):
    return Threat(Threat.parse(text).norm, Threat.parse(text).eps, Box())


THREATS = ["linf:0.02", "linf:0.1", "linf:0.3", "l2:0.5", "l2:2", "l1:10", "l0:20", "linf", "l2"]


@pytest.mark.parametrize("text", THREATS)
@pytest.mark.parametrize("name", ["demo:mnist-plain", "demo:mnist-robust"])
def test_sound_networks_raise_no_alarm_for_about_a_hundred_passes(digits, name, text):
    model = assay.load_model(name)
    checked = check_model(model, digits, threat(text), None)
    assert checked.findings == ()
    assert checked.blind == 0
    with metered() as passes:
        found = probe(checked.model, digits, threat(text))
    assert found.findings == ()
    assert 32 < passes.forwards + passes.backwards <= 32 * 110


def test_the_probe_does_not_depend_on_the_moment(digits, robust):
    assert probe(Model(robust), digits, threat("linf:0.3"), 1) == probe(Model(robust), digits, threat("linf:0.3"), 1)


def test_a_network_that_is_always_wrong_has_nothing_to_probe(digits):
    y = digits.labels
    wrong = Model(lambda x: torch.eye(10)[(y[0] + 1).expand(len(x))] + 0 * x.flatten(1)[:, :10])
    assert probe(wrong, digits.head(1), threat("linf:0.1")).findings == ()


def found_by(net, digits, text="linf:0.1"):
    """Return the findings of both: the look at gradients, without repairs, and the attacks that must agree."""
    x, y = digits.batch(range(32)), digits.labels[:32]
    health = Bench(x, y, threat(text), None).health(Model(net))
    gradients = check_gradients(health, health, threat(text), random=False)
    return {f.code: f for f in (*gradients, *probe(Model(net), digits, threat(text)).findings)}


def test_large_logits_silence_cross_entropy_but_not_the_margin(digits, plain):
    found = found_by(lambda x: 100 * plain(x), digits)
    assert found["zero-gradient"].evidence["share_ce"] > 0.9
    assert found["zero-gradient"].evidence["share_margin"] == 0
    assert found["loss-disagreement"].evidence["margin"] > 20
    assert found.keys() == {"zero-gradient", "loss-disagreement"}


def test_a_network_without_gradient_stands_against_everything(digits, plain):
    found = found_by(lambda x: plain(x.detach()), digits, "linf:0.3")
    assert "no-gradient" in found
    assert found["unbounded-attack-fails"].evidence["unreached"] > 20


class Inverted(torch.autograd.Function):
    """The identity with a gradient of the wrong sign."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


def test_a_gradient_that_lies_does_not_keep_its_promise(digits, plain):
    found = found_by(lambda x: plain(Inverted.apply(x)), digits, "linf:0.05")
    assert found["shattered-gradient"].evidence["linearity"] < 0
    assert found["flat-in-eps"].evidence["promised"] > 20
    assert found["unbounded-attack-fails"].severity == "warning"


def test_noise_that_breaks_what_gradients_leave_is_told(digits, plain):
    """In every direction but that of its gradient this network is weak."""
    found = found_by(lambda x: plain(Inverted.apply(x)), digits, "linf:0.5")
    assert found["noise-as-strong"].evidence["noise_more"] > 1


def test_sizes_of_gradients_that_differ_wildly_are_told(digits, plain):
    found = found_by(lambda x: plain(x) * torch.exp(100 * x.flatten(1).mean(1, keepdim=True)), digits)
    assert found["exploding-gradient"].evidence["largest_over_median"] > 50


def test_a_ripple_over_the_inputs_shatters_the_gradient(digits, plain):
    """Values change by a hundredth, slopes by far more."""
    found = found_by(lambda x: plain(x + 0.01 * torch.sin(1000 * x)), digits)
    assert "shattered-gradient" in found


def stage(kind, entered, broken, name="round"):
    return {"name": name, "kind": kind, "entered": entered, "broken": broken, "forwards": 0, "backwards": 0}


def test_a_race_without_surprises_raises_nothing():
    race = [stage("ce", 500, 60), stage("margin", 440, 9), stage("restart", 431, 2), stage("scores", 429, 0)]
    assert judge(race, 500) == ()
    assert judge([], 500) == ()
    assert judge([stage("outside", 10, 3)], 10) == ()


@pytest.mark.parametrize(("broken", "told"), [(int(RACE_GAP * 500), False), (int(RACE_GAP * 500) + 1, True)])
def test_a_margin_that_breaks_what_cross_entropy_left(broken, told):
    found = judge([stage("ce", 500, 40), stage("margin", 460, broken)], 500)
    assert codes(found) == ["loss-disagreement"] * told


def test_a_margin_round_that_comes_first_says_nothing():
    assert judge([stage("margin", 500, 100), stage("ce", 400, 3)], 500) == ()


def test_a_margin_round_on_other_samples_says_nothing():
    assert judge([stage("ce", 40, 10), stage("margin", 460, 100)], 500) == ()


@pytest.mark.parametrize(("broken", "told"), [(1, False), (21, False), (22, True)])
def test_a_restart_that_still_finds(broken, told):
    race = [stage("restart", 480, 50), stage("restart", 430, broken, "last")]
    found = judge(race, 500)
    assert codes(found) == ["restart-yield"] * told
    assert all("last" in f.message for f in found)


@pytest.mark.parametrize(("broken", "severity"), [(1, "info"), (int(BLACK_BOX * 500) + 1, "warning")])
def test_a_search_by_scores_that_finds_what_gradients_left(broken, severity):
    (found,) = judge([stage("margin", 500, 100), stage("scores", 400, broken)], 500)
    assert (found.code, found.severity) == ("black-box-gain", severity)
    assert found.evidence == {"broken": broken, "entered": 400, "n": 500}


def test_a_search_by_scores_in_between_says_nothing():
    assert judge([stage("scores", 500, 9), stage("margin", 491, 4)], 500) == ()


def test_logits_with_an_offset_that_rounding_eats_are_named(digits, plain):
    checked = check_model(Model(lambda x: plain(x) + 1e6), digits, threat("linf:0.1"), None)
    assert codes(checked.findings) == ["coarse-logits"]
    assert checked.findings[0].evidence["share"] > 0.05


def test_where_attacks_get_stuck_repairs_are_judged_by_what_attacks_break(digits, plain):
    """Scores that turn flat where an input looks attacked: sound at the clean inputs, and nowhere else."""

    def net(x):
        grey = torch.minimum(x, 1 - x).flatten(1).mean(1, keepdim=True)
        return torch.where(grey > 0.055, 0.0, plain(x))

    checked = check_model(Model(net), digits, threat("linf:0.1"), None)
    assert (checked.findings, checked.model.repairs) == ((), ())
    stuck = probe(checked.model, digits, threat("linf:0.1")).counts
    examined = examine(checked, digits, threat("linf:0.1"))
    assert codes(examined.findings) == ["flat-in-eps", "unbounded-attack-fails", "repaired-output"]
    freed = probe(examined.model, digits, threat("linf:0.1")).counts
    assert freed.ce + freed.margin >= stuck.ce + stuck.margin + 16


def test_a_sound_network_has_no_need_of_a_second_chance(digits, robust):
    checked = check_model(Model(robust), digits, threat("linf:0.3"), None)
    assert examine(checked, digits, threat("linf:0.3")) == checked


def test_a_network_that_jumps_keeps_its_promises_unevenly(digits, plain, robust):
    """Values that depend on the last bits of the input: the median step may gain what was promised, few others do."""

    def net(x):
        return plain(x) + 5 * (1e6 * x.detach().sum((2, 3)) * torch.arange(10)).sin()

    found = check_model(Model(net), digits, threat("linf:0.1"), None, repair=False).findings
    assert found[0].code == "shattered-gradient"
    bench = Bench(digits.batch(range(64)), digits.labels, threat("l2:2"), None)
    health = [bench.health(Model(m)) for m in (net, robust)]
    assert [h.even for h in health] == [False, True]
