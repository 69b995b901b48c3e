"""What users do wrong, and every other library lets through in silence: each ends in a named error or finding."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import assay
from assay.attacks import PGD, Restarts
from assay.core.errors import DataError, ModelError, ModelOutputError, NonFiniteError, ThreatError
from assay.core.registry import UsageError
from assay.data import load_data
from assay.evaluation.preflight import check_model


@pytest.fixture(scope="module")
def digits():
    return assay.load_data("demo:mnist", limit=32)


@pytest.fixture(scope="module")
def net():
    return assay.load_model("demo:mnist-plain").net


def evaluate(net, data, threat="linf:0.1", effort="quick", **options):
    return assay.evaluate(net, data, threat, effort, progress=False, **options)


def codes(result):
    return {f.code for f in result.findings}


def the(result, code):
    (found,) = [f for f in result.findings if f.code == code]
    return found


def arrays(data):
    return data.batch(range(len(data))), data.labels


def test_a_sound_model_raises_no_finding_but_what_its_adversarials_give(net, digits):
    assert codes(evaluate(net, digits)) <= {"lost-at-8-bit"}


def test_normalised_input_is_refused_with_the_way_out(net, digits):
    x, y = arrays(digits)
    with pytest.raises(DataError, match="--mean and --std") as e:
        evaluate(net, ((x - 0.13) / 0.31, y))
    assert (e.value.code, e.value.exit_code) == ("input-outside-box", 3)
    with pytest.raises(DataError, match="32 of 32 samples outside") as e:
        PGD()(net, (x - 0.13) / 0.31, y, assay.Threat("linf", 0.1))
    assert e.value.code == "input-outside-box"


def test_inputs_of_0_to_255_are_refused_with_the_way_out(net, digits):
    x, y = arrays(digits)
    with pytest.raises(DataError, match="divide them by 255") as e:
        evaluate(net, (x * 255, y))
    assert e.value.code == "input-outside-box"


def test_normalisation_inside_the_model_is_the_way_out(net, digits):
    scaled = nn.Sequential(net)
    plain = evaluate(net, digits)
    inside = evaluate(assay.Model(lambda x: scaled(x * 0.31 + 0.13), mean=[0.13], std=[0.31]), digits)
    assert inside.clean_accuracy == plain.clean_accuracy
    assert abs(inside.robust_accuracy - plain.robust_accuracy) <= 2 / 32


@pytest.mark.parametrize(
    ("threat", "code"),
    [("linf:8", "eps-looks-like-8-not-8/255"), ("linf:1.5", "eps-wider-than-box"), ("l2:40", "eps-wider-than-box")],
)
def test_an_eps_in_the_wrong_units_is_refused(net, digits, threat, code):
    with pytest.raises(ThreatError, match="box") as e:
        evaluate(net, digits, threat)
    assert (e.value.code, e.value.exit_code) == (code, 3)


@pytest.mark.parametrize(("threat", "found"), [("linf:8/255", True), ("l2:0.5", True), ("linf:8", False)])
def test_an_eps_of_less_than_a_grey_level_is_named(net, digits, threat, found):
    x, y = arrays(digits)
    model = assay.Model(lambda v: net(v / 255), box=(0, 255))
    checked = check_model(model, load_data((x * 255, y)), assay.Threat.parse(threat), None, repair=False)
    assert ("eps-below-a-grey-level" in {f.code for f in checked.findings}) is found


def test_a_normalisation_of_three_channels_is_not_stretched_over_one(digits):
    grey = assay.Model(
        nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2 * 784, 10)), mean=[0.5] * 3, std=[0.2] * 3
    )
    with pytest.raises(ModelError, match="1 channels"):
        evaluate(grey, digits)
    with pytest.raises(ModelError, match="finite mean"):
        assay.Model(nn.Identity(), mean=[float("nan")], std=[1.0])


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (PGD(rel_step=-1), "rel_step"),
        (PGD(momentum=float("nan")), "momentum"),
        (PGD(steps=0), "steps"),
        (PGD(steps=2.5), "steps"),
        (Restarts(PGD(rel_step=-1), 2), "rel_step"),
    ],
)
def test_parameters_that_no_attack_can_have_are_refused(net, digits, attack, said):
    x, y = arrays(digits)
    with pytest.raises(UsageError, match=said):
        attack(net, x, y, "linf:0.1")


@pytest.mark.parametrize("wrong", [{"norm": "l3"}, {"access": "grad"}, {"kind": "min"}])
def test_attacks_of_a_kind_that_there_is_not_are_no_empty_list(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong.values()))):
        assay.attacks.names(**wrong)


def test_zero_gradients_are_found_and_scores_take_over(net, digits):
    """Rounded inputs: the gradient is zero everywhere, and PGD alone would call the model perfectly robust."""

    def masked(x):
        return net((x * 4).round() / 4)

    result = evaluate(masked, digits, "linf:0.3", "standard")
    finding = the(result, "zero-gradient")
    assert finding.severity == "warning"
    assert finding.evidence["share_margin"] == 1.0
    assert "rounding" in finding.remedy
    by_gradient = PGD()(masked, *arrays(digits), assay.Threat("linf", 0.3), seed=0)
    assert by_gradient.success.float().mean() < 0.2
    assert result.robust_accuracy < 0.3


def test_a_model_without_gradient_is_found_and_attacked_all_the_same(net, digits):
    """Answers that come from elsewhere, here from another copy of torch's numbers: nothing to differentiate."""

    def foreign(x):
        scores = net(torch.from_numpy(x.detach().numpy().copy()))
        return torch.from_numpy(scores.detach().numpy().copy())

    result = evaluate(foreign, digits.head(12), "linf:0.3", "quick")
    assert the(result, "no-gradient").remedy
    assert result.robust_accuracy < 0.3


def test_nan_logits_are_an_error_of_the_model(net, digits):
    with pytest.raises(NonFiniteError, match="NaN or infinity for 32 of 32") as e:
        evaluate(lambda x: net(x) * float("nan"), digits)
    assert (e.value.code, e.value.exit_code) == ("bad-logits", 4)


@pytest.mark.parametrize(
    ("wrap", "found"),
    [
        (lambda z: z[:, :1], r"\(32, 1\)"),
        (lambda z: z[:, 0], r"\(32,\)"),
        (lambda z: z.T, r"\(10, 32\)"),
        (lambda z: [z], "list"),
    ],
    ids=["one class", "flat", "transposed", "list"],
)
def test_outputs_that_are_no_logits_are_an_error_of_the_model(net, digits, wrap, found):
    with pytest.raises(ModelOutputError, match=found) as e:
        evaluate(lambda x: wrap(net(x)), digits)
    assert (e.value.code, e.value.exit_code) == ("bad-logits", 4)


def test_labels_out_of_range_are_refused(net, digits):
    x, y = arrays(digits)
    for wrong in (10, -1):
        with pytest.raises(DataError, match=f"{wrong} at sample 3") as e:
            evaluate(net, (x, y.index_fill(0, torch.tensor([3]), wrong)))
        assert (e.value.code, e.value.exit_code) == ("bad-logits", 3)


class WithDropout(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.drop = net, nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(10)
        self.norm.running_mean.fill_(0.1)

    def forward(self, x):
        return self.norm(self.drop(self.net(x)))


def test_training_mode_is_found_and_the_model_is_handed_back_as_it_was(net, digits):
    model = WithDropout(net).train()
    model.norm.eval()  # frozen on purpose: must not come back in training mode
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    result = evaluate(model, digits)
    assert the(result, "train-mode").evidence["modules"] == 1
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert evaluate(model.eval(), digits).samples.equals(result.samples)


@pytest.mark.parametrize("classes", [2, 3, 5, 8, 9])
def test_any_number_of_classes_from_two(classes):
    torch.manual_seed(classes)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, classes))
    x = torch.rand(20, 1, 4, 4)
    with torch.no_grad():
        net[3].bias -= net(x).mean(0)  # so that every class has its share
    result = evaluate(net, (x, net(x).argmax(1)), "linf:0.1", "standard")
    assert result.clean_accuracy == 1
    assert result.robust_accuracy < 0.7


def test_probabilities_are_found_and_their_logarithm_is_attacked(net, digits):
    """A saturated softmax: its gradients vanish in float32, the margin of the log-probabilities does not."""
    result = evaluate(lambda x: (net(x) * 3).softmax(1), digits, "linf:0.1")
    assert "logarithm" in the(result, "probabilities-not-logits").message
    plain = evaluate(net, digits, "linf:0.1")
    assert abs(result.robust_accuracy - plain.robust_accuracy) <= 2 / 32


def test_randomness_is_found_and_averaged(net, digits):
    result = evaluate(lambda x: net(x + 0.1 * torch.randn_like(x)), digits.head(16))
    finding = the(result, "randomized")
    assert 10 <= finding.evidence["samples"] <= 100
    assert min(result.samples["forwards"].to_pylist()) >= 50  # nothing is decided by fewer passes


def test_dependence_on_the_batch_is_found(net, digits):
    result = evaluate(lambda x: net(x - x.mean(0)), digits.head(16))
    assert the(result, "batch-dependent").evidence["max_difference"] > 0


def test_accuracy_at_chance_is_found(net, digits):
    x, y = arrays(digits)
    result = evaluate(net, (x, (y + 1) % 10))
    assert "class order" in the(result, "low-clean-accuracy").remedy


def test_duplicates_are_found(net, digits):
    x, y = arrays(digits)
    result = evaluate(net, (torch.cat([x, x[:3]]), torch.cat([y, y[:3]])))
    assert the(result, "duplicate-samples").evidence["duplicates"] == 3


def test_adversarials_that_eight_bits_undo_are_counted():
    """Perturbations below half a grey level: all fool as floats, none survives an image file."""
    levels = torch.randint(0, 80, (1, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    x = (levels + 10 * torch.arange(12).view(-1, 1, 1, 1)) / 255  # means that cannot be taken for each other
    middle = x.flatten(1).mean(1)

    def line(z):  # the boundary lies 0.3 grey levels above each image's own mean
        gap = z.flatten(1).mean(1)[:, None] * 255
        nearest = (gap - middle * 255).abs().argmin(1)
        over = gap[:, 0] - middle[nearest] * 255 - 0.3
        return torch.stack([-over, over], 1)

    result = evaluate(line, (x, torch.zeros(12, dtype=torch.long)), assay.Threat("linf", 0.4 / 255))
    assert result.robust_accuracy == 0
    assert the(result, "lost-at-8-bit").evidence == {"fooled": 12, "survive": 0}


def test_nan_pixels_and_no_samples_are_refused(net, digits):
    x, y = arrays(digits)
    with pytest.raises(DataError, match="first: sample 5") as e:
        evaluate(net, (x.index_fill(0, torch.tensor([5]), float("nan")), y))
    assert e.value.code == "non-finite-input"
    with pytest.raises(DataError) as e:
        evaluate(net, (x[:0], y[:0]))
    assert e.value.code == "empty-data"


def test_eight_bit_images_follow_the_box(net, digits):
    """A model that wants 0..255 gets 0..255 from image files and 8-bit arrays, and eps is in those units."""
    x, y = arrays(digits)
    eight = (x * 255).round().to(torch.uint8)
    grey = assay.Model(lambda z: net(z / 255), box=(0, 255))
    result = assay.evaluate(grey, (eight, y), assay.Threat("linf", 0.1 * 255), "quick", progress=False)
    plain = evaluate(net, (eight, y), "linf:0.1")
    assert result.clean_accuracy == plain.clean_accuracy
    assert abs(result.robust_accuracy - plain.robust_accuracy) <= 2 / 32


def test_a_class_masked_by_a_huge_logit_hides_nothing(net, digits):
    class Masked(nn.Module):
        def forward(self, x):
            z = net(x)
            return torch.cat([z, torch.full_like(z[:, :1], -1e9)], 1)

    assert evaluate(Masked(), digits, "linf:0.3").robust_accuracy == evaluate(net, digits, "linf:0.3").robust_accuracy
    noisy = evaluate(lambda x: Masked()(x + 0.1 * torch.randn_like(x)), digits.head(8))
    assert "randomized" in codes(noisy)


def test_a_gradient_that_the_model_shuts_off_is_said_and_opened(net, digits):
    def closed(x):
        with torch.no_grad():
            return net(x)

    shut = evaluate(closed, digits.head(8), "linf:0.3")
    assert {"no-gradient", "repaired-bpda"} <= codes(shut)
    assert shut.robust_accuracy == evaluate(net, digits.head(8), "linf:0.3").robust_accuracy


def test_where_no_attack_can_see_a_model_the_finding_says_that_the_figure_means_nothing(net, digits):
    """Scores from outside of torch, in a norm that no search by scores is here for."""
    weights = [p.detach().numpy() for p in nn.Linear(784, 10).parameters()]

    def foreign(x):
        return torch.from_numpy(np.round(x.detach().numpy().reshape(len(x), -1) @ weights[0].T + weights[1], 1))

    finding = the(evaluate(foreign, digits.head(8), "l1:1"), "no-gradient")
    assert finding.severity in {"error", "warning"}
    assert finding.remedy


def test_a_backward_pass_that_raises_is_said_and_passed_by(net, digits):
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise NotImplementedError("no way back")

    result = evaluate(lambda x: net(OneWay.apply(x)), digits.head(8), "linf:0.3")
    assert {"no-gradient", "repaired-bpda"} <= codes(result)
    assert result.robust_accuracy == evaluate(net, digits.head(8), "linf:0.3").robust_accuracy


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 14, 14), (784,)], ids=str)
def test_a_model_that_does_not_fit_the_data_is_an_error_with_the_shapes(net, shape):
    with pytest.raises(ModelError, match="Check image size") as e:
        evaluate(net, (torch.rand(8, *shape), torch.zeros(8, dtype=torch.long)))
    assert e.value.exit_code == 3
    assert str(shape[-1]) in str(e.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_precisions_are_asked_in_theirs(net, digits, dtype):
    other = copy.deepcopy(net).to(dtype)
    result = evaluate(other, digits)
    assert abs(result.robust_accuracy - evaluate(net, digits).robust_accuracy) <= 4 / 32
    assert next(other.parameters()).dtype == dtype


# Wrapped as the network was not trained: each way is found by undoing it


class Undone(nn.Module):
    """Takes what the first layers did to the input back: a network that expects it in another form."""

    def __init__(self, net, expects):
        super().__init__()
        self.net, self.expects = net, expects

    def forward(self, x):
        return self.net(self.expects(x))


@pytest.fixture(scope="module")
def many():
    return assay.load_data("demo:mnist", limit=200)


def wrapping(model, data):
    """Return the one finding of severity error, if there is one."""
    model = model if isinstance(model, assay.Model) else assay.Model(model)
    threat = assay.Threat("linf", 0.01).within(model.domain, 784)
    found = [f for f in check_model(model, assay.load_data(data), threat, "cpu").findings if f.severity == "error"]
    return found[0] if found else None


@pytest.mark.parametrize(
    ("expects", "settings", "code"),
    [
        (lambda x: x, {}, None),
        (lambda x: x, {"mean": 0.5, "std": 0.5}, "normalised-twice"),
        (lambda z: z * 0.31 + 0.13, {}, "not-normalised"),
        (lambda z: z / 255, {}, "wrong-scale"),
        (lambda z: (z + 1) / 2, {}, "wrong-scale"),
        (lambda z: z.transpose(2, 3), {}, "axes-swapped"),
        (lambda z: 1 - z, {}, "inverted"),
    ],
)
def test_inputs_that_are_not_what_the_network_was_trained_on_are_named(net, many, expects, settings, code):
    found = wrapping(assay.Model(Undone(net, expects), **settings), arrays(many))
    assert (found and found.code) == code
    if found:
        assert found.evidence["right_without"] > 190
        assert f"{found.evidence['right'] / 200:.0%}" in found.message


@pytest.mark.parametrize(
    ("labels", "code", "said"),
    [
        (lambda y: (y + 1) % 10, "labels-shifted", "1 below"),
        (lambda y: (y - 1) % 10, "labels-shifted", "1 above"),
        (lambda y: torch.tensor([3, 1, 0, 2, 9, 8, 4, 5, 7, 6])[y], "labels-permuted", "another order"),
    ],
)
def test_labels_in_another_order_are_named(net, many, labels, code, said):
    x, y = arrays(many)
    found = wrapping(net, (x, labels(y)))
    assert found.code == code
    assert said in found.message


@pytest.fixture(scope="module")
def colours():
    """Noisy pictures of ten random templates in red and blue, and the network that tells them apart by correlation."""
    some = torch.Generator().manual_seed(0)
    templates = torch.rand(10, 3, 8, 8, generator=some)
    templates[:, 1] = 0.5
    y = torch.arange(200) % 10
    x = (templates[y] + 0.1 * torch.randn(200, 3, 8, 8, generator=some)).clamp(0, 1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    net[1].weight.data = (templates - templates.mean(0)).flatten(1)
    net[1].bias.data = -(templates - templates.mean(0)).flatten(1).mul(templates.mean(0).flatten()).sum(1)
    net[1].bias.data -= 0.5 * (templates - templates.mean(0)).flatten(1).square().sum(1)
    return net, x, y


def test_a_network_whose_images_are_in_order_has_no_such_finding(colours):
    net, x, y = colours
    assert wrapping(net, (x, y)) is None


def test_images_read_in_the_wrong_order_of_axes_are_named(colours):
    net, x, y = colours
    kept_last = x.permute(0, 2, 3, 1).reshape(x.shape)
    assert wrapping(net, (kept_last, y)).code == "channels-last"
    takes_last = Undone(net, lambda z: z.reshape(-1, 8, 8, 3).permute(0, 3, 1, 2))
    assert wrapping(takes_last, (x, y)).code == "channels-last"


def test_colours_in_the_other_order_are_named(colours):
    net, x, y = colours
    assert wrapping(net, (x.flip(1), y)).code == "channels-reversed"


def test_class_names_in_another_order_are_named_before_any_sample_is_asked(net, many):
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    data = many.head(100)
    data.class_names = names
    model = assay.Model(net, class_names=tuple(sorted(names)))
    found = wrapping(model, data)
    assert found.code == "labels-permuted"
    assert "'eight' to the model" in found.message


def test_a_network_that_is_only_bad_is_not_accused(many):
    """Untrained: its answers go with the classes in some order, as those of any function do, but not by far enough."""
    torch.manual_seed(0)
    assert wrapping(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), arrays(many)) is None


def test_notes_of_a_bridge_are_shown(net, digits):
    found = evaluate(assay.Model(net, notes=("The softmax was removed.",)), digits)
    assert the(found, "adapted").message == "The softmax was removed."


def test_a_converted_network_is_compared_with_its_original_on_the_users_samples(net, digits):
    agree = evaluate(assay.Model(net, reference=lambda x: net(x) * (1 + 1e-6)), digits)
    assert the(agree, "converted").evidence["same_predictions"] == 32
    with pytest.raises(ModelError, match="ort:FILE") as e:
        evaluate(assay.Model(net, reference=lambda x: net(x.flip(3))), digits)
    assert e.value.code == "conversion-differs"
