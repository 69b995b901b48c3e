"""Attributions: known where the model is known, counted like every question, compared before and after an attack."""

import html as markup
import json
import re
import sys

import numpy as np
import pytest
import torch
import typer
from needs import framework
from torch import nn
from typer.testing import CliRunner

from assay import DataError, MissingExtraError, Model, ModelError, NonFiniteError, RunError, ThreatError
from assay.attacks import PGD
from assay.cli.study_pictures import attribution as attribution_command
from assay.core.registry import UsageError
from assay.data import load_data
from assay.models.loaders import load_model
from assay.reports.attribution import per_pixel, render_attribution
from assay.study.attribution import attribute, attribution, common, compared, rank_correlation, shuffled, top_pixels
from assay.study.curvature import pose_one
from assay.threats import Threat

framework("captum")

WEIGHT = torch.tensor([[2.0, -1.0, 0.5, 0.0], [-1.0, 2.0, 0.0, 0.25], [0.0, -0.5, 1.0, 3.0]])
X = torch.tensor([0.9, 0.2, 0.6, 0.4])


class Linear(nn.Module):
    """Three logits W x."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def smooth_net(features=12, classes=3, seed=3):
    """A small network without kinks, over features in any shape."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, classes)).requires_grad_(False)


SAMPLE = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))


def gradient(net, x, target):
    """The gradient of one logit, by autograd."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x[None])[0, target], x)[0]


# one map


@pytest.mark.parametrize("baseline", [None, 0.25, torch.tensor([0.1, 0.9, 0.0, 0.4])])
@pytest.mark.parametrize("target", [0, 2])
def test_integrated_gradients_of_a_linear_model_are_its_weights_times_the_way_from_the_baseline(baseline, target):
    found = attribute(Linear(), X, target, baseline=baseline, steps=3)
    assert found == pytest.approx((WEIGHT[target] * (X - (0.0 if baseline is None else baseline))).numpy(), abs=1e-6)


def test_without_a_baseline_they_start_at_the_least_value_of_the_box():
    found = attribute(Model(Linear(), box=(-2, 2)), X, 1)
    assert found == pytest.approx((WEIGHT[1] * (X + 2)).numpy(), abs=1e-5)


def test_the_normalisation_is_a_part_of_the_model():
    """So attributions are those of inputs as they are, and neither mean nor std has to be undone."""
    found = attribute(Model(Linear(), mean=0.5, std=0.25), X, 0, steps=5)
    assert found == pytest.approx((WEIGHT[0] / 0.25 * X).numpy(), abs=1e-5)


def test_integrated_gradients_add_up_to_the_rise_of_the_logit():
    net = smooth_net()
    for target in range(3):
        rise = float(net(SAMPLE[None])[0, target] - net(torch.zeros_like(SAMPLE)[None])[0, target])
        assert float(attribute(net, SAMPLE, target).sum()) == pytest.approx(rise, abs=1e-5)


def test_they_are_the_mean_gradient_on_the_way_times_the_way():
    """By another rule than the library's: ten thousand midpoints."""
    net, start = smooth_net(), torch.full_like(SAMPLE, 0.5)
    at = ((torch.arange(10_000) + 0.5) / 10_000).view(-1, 1, 1)
    points = (start + at * (SAMPLE - start)).requires_grad_()
    mean = torch.autograd.grad(net(points)[:, 2].sum(), points)[0].mean(0)
    assert attribute(net, SAMPLE, 2, baseline=0.5) == pytest.approx((mean * (SAMPLE - start)).numpy(), abs=1e-5)


def test_saliency_is_the_absolute_gradient():
    net = smooth_net()
    found = attribute(net, SAMPLE, 1, "saliency")
    assert found == pytest.approx(gradient(net, SAMPLE, 1).abs().numpy(), abs=1e-6)
    assert found.shape == SAMPLE.shape


@pytest.mark.parametrize("method", ["integrated-gradients", "saliency"])
def test_what_the_answer_ignores_has_no_attribution(method):
    net = smooth_net(6)
    found = attribute(lambda x: net(x.flatten(1)[:, :6]), SAMPLE, 0, method)
    assert not found.reshape(-1)[6:].any()
    assert found.reshape(-1)[:6].all()


def test_a_model_in_training_is_asked_in_eval_mode_and_left_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 3)).train()
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    first, again = (attribute(net, SAMPLE, 0) for _ in range(2))
    assert np.array_equal(first, again)
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())


def test_a_model_without_a_gradient_is_refused():
    steps = Model(lambda x: torch.stack([x.detach().sum(1), -x.detach().sum(1)], 1))
    for method in ("integrated-gradients", "saliency"):
        with pytest.raises(ModelError, match="gradient"):
            attribute(steps, X, 0, method)


def test_an_answer_that_is_not_finite_is_an_error_that_names_the_sample():
    with pytest.raises(NonFiniteError, match="sample 7"):
        attribute(lambda x: x[:, :2] / 0.0 * 0.0, X, 0, index=7)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match="saliency"):
        attribute(Linear(), X, 0, "salience")
    with pytest.raises(UsageError, match="steps"):
        attribute(Linear(), X, 0, steps=0)
    with pytest.raises(DataError, match="baseline inside the box"):
        attribute(Linear(), X, 0, baseline=-1.0)
    with pytest.raises(DataError, match="baseline of one value"):
        attribute(Linear(), X, 0, baseline=torch.zeros(3))
    with pytest.raises(DataError, match="inside the box"):
        attribute(Linear(), X + 1, 0)
    with pytest.raises(DataError, match="classes"):
        attribute(Linear(), X, 3)


def test_without_the_library_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(MissingExtraError, match=r"assay\[attribution\]"):
        attribute(Linear(), X, 0)
    with pytest.raises(MissingExtraError, match=r"assay\[attribution\]"):
        attribution(Linear(), (X[None], torch.tensor([0])), "linf:0.1")


# numbers


def test_top_pixels_are_the_largest_by_absolute_value_and_never_those_of_zero():
    assert top_pixels(np.array([0.1, -3.0, 2.0, 0.0]), 2).tolist() == [False, True, True, False]
    assert top_pixels(np.array([0.0, 0.0, 2.0, 0.0]), 2).tolist() == [False, False, True, False]


def test_two_maps_have_in_common_what_is_in_both():
    first, second = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert common(first, first) == 1
    assert common(first, second) == 0.5
    assert common(first, ~first) == 0
    assert np.isnan(common(first & ~first, first & ~first))


def test_the_rank_correlation_sees_order_only():
    rising = np.array([1.0, 2.0, 3.0, 10.0])
    assert rank_correlation(rising, rising**3) == pytest.approx(1)
    assert rank_correlation(rising, -rising) == pytest.approx(-1)
    assert np.isnan(rank_correlation(rising, np.ones(4)))


def test_a_perturbation_lies_where_the_attribution_is_by_its_share_of_absolute_change():
    """Five pixels, the top one of each map; a change of 1, 3 and 0 there."""
    map_ = np.eye(5)
    maps = np.stack([map_[[0, 1, 0]], map_[[2, 1, 1]]])
    found = compared(maps, np.array([-1.0, 3.0, 0.0, 4.0, 0.0]), np.full((2, 2), 1.5), k=1)
    assert found.share == pytest.approx(np.array([[1 / 8, 3 / 8], [0, 3 / 8]]))
    assert found.overlap.tolist() == [[0, 1], [0, 0]]
    assert found.rank == pytest.approx(np.array([[-0.25, 1], [-0.25, -0.25]]))
    assert found.total == pytest.approx(np.ones((2, 2)))
    assert found.gap == pytest.approx(np.full((2, 2), 0.5))


def test_the_channels_of_an_image_make_one_pixel():
    x = np.arange(48.0).reshape(3, 4, 4)
    assert per_pixel(x) == pytest.approx(x.sum(0).reshape(-1))
    assert per_pixel(np.moveaxis(x, 0, -1)) == pytest.approx(x.sum(0).reshape(-1))
    assert per_pixel(x.reshape(-1)) == pytest.approx(x.reshape(-1))


# clean and attacked


def right_for(net, n=12, features=4, seed=1):
    """Inputs with the labels that a network gives them."""
    x = torch.rand(n, features, generator=torch.Generator().manual_seed(seed))
    return x, net(x).argmax(1).detach()


def test_an_attack_on_a_linear_model_turns_no_gradient():
    """Its saliency is the same everywhere; integrated gradients differ by the weights times the perturbation."""
    found = attribution(Linear(), right_for(Linear()), "linf:0.3", PGD(steps=5), top=0.5, shown=12)
    assert any(s.fooled for s in found.samples)
    for s in found.samples:
        assert s.by["saliency"].rank == pytest.approx(1)
        assert s.by["saliency"].overlap == pytest.approx(1)
        moved = s.by["integrated-gradients"].maps[:, 1] - s.by["integrated-gradients"].maps[:, 0]
        wanted = WEIGHT[[s.label, s.rival]].numpy() * (s.attacked - s.x)
        assert moved == pytest.approx(wanted, abs=1e-5)
        assert s.by["integrated-gradients"].gap.max() < 1e-5
        assert np.isnan(s.by["saliency"].gap).all()


def test_the_rival_is_what_a_fooled_model_says_and_the_strongest_other_class_where_it_held():
    net = Linear()
    found = attribution(net, right_for(net), "linf:0.1", PGD(steps=10), shown=12)
    assert {s.fooled for s in found.samples} == {True, False}
    for s in found.samples:
        z = net(torch.from_numpy(s.attacked)[None])[0]
        order = [int(c) for c in z.argsort(descending=True) if int(c) != s.label]
        assert s.rival == order[0]
        assert s.fooled == (int(z.argmax()) != s.label)
        assert s.size == pytest.approx(float(np.abs(s.attacked - s.x).max()), abs=1e-6)
        assert s.sure[0, 0] == pytest.approx(net(torch.from_numpy(s.x)[None])[0].softmax(0)[s.label].item(), abs=1e-5)


def test_samples_that_are_wrong_already_are_counted_but_not_attacked():
    x, y = right_for(Linear())
    y[3:] = (y[3:] + 1) % 3
    found = attribution(Linear(), (x, y), "linf:0.1", PGD(steps=2))
    assert (found.seen, [s.index for s in found.samples]) == (12, [0, 1, 2])
    nothing = attribution(Linear(), (x[3:], y[3:]), "linf:0.1")
    assert nothing.samples == ()
    assert "wrong on all of 9 samples: nothing was attacked" in words(render_attribution(nothing))
    assert nothing.to_json()["summary"]["fooled"]["saliency"]["rank"]["label, attacked"] is None


def test_every_question_is_counted():
    """Each sample: whether it is right; the attack; four points for the logits; and six maps of each method."""
    x, y = right_for(Linear(), 5)
    attack = PGD(steps=4).__call__(Linear(), x, y, "linf:0.3", full=True)
    found = attribution(Linear(), (x, y), "linf:0.3", PGD(steps=4), steps=7)
    assert found.forwards == int(attack.forwards.sum()) + 5 * (1 + 4 + 6 * 7 + 6)
    assert found.backwards == int(attack.backwards.sum()) + 5 * (6 * 7 + 6)


def test_the_passes_are_those_that_the_network_saw():
    """A network that counts its rows, fillers included, sees no fewer than were counted, and few more."""
    seen = []

    def net(x):
        seen.append(len(x))
        return x @ WEIGHT.T

    x, y = right_for(Linear(), 8)
    found = attribution(net, (x, y), "linf:0.3", PGD(steps=4), steps=8)
    assert found.forwards <= sum(seen) <= found.forwards + 8 * len(seen)


def test_the_batch_and_the_seed_matter_as_they_should():
    net = smooth_net(4)
    x, y = right_for(net)
    one, other = (attribution(net, (x, y), "linf:0.2", PGD(steps=5), batch_size=b).to_json() for b in (5, 12))
    for a, b in zip(one["samples"], other["samples"], strict=True):
        assert a["methods"]["saliency"]["rank"] == b["methods"]["saliency"]["rank"]
        assert a["size"] == pytest.approx(b["size"], abs=1e-6)
    first, second = (attribution(net, (x, y), "linf:0.2", PGD(steps=1), seed=s) for s in (0, 1))
    assert not np.array_equal(first.samples[0].attacked, second.samples[0].attacked)


def test_quantiles_are_over_the_group_that_is_asked_for():
    found = attribution(Linear(), right_for(Linear(), 30), "linf:0.1", PGD(steps=10), methods=["integrated-gradients"])
    for name, fooled in (("fooled", True), ("held", False)):
        values = [s.by["integrated-gradients"].share[1, 0] for s in found.samples if s.fooled is fooled]
        assert 0 < len(values) < len(found.samples)
        known = found.quantiles("integrated-gradients", "share", (1, 0), fooled=fooled)
        assert known == pytest.approx(np.quantile(values, (0.1, 0.5, 0.9)))
        assert found.to_json()["summary"][name]["integrated-gradients"]["share"]["rival, clean"] == known


def test_a_minimal_attack_needs_no_eps():
    found = attribution(Linear(), right_for(Linear(), 4), "l2", "fmn", methods=["saliency"])
    assert all(s.fooled for s in found.samples)
    assert "Integrated gradients" not in render_attribution(found)


def test_what_cannot_be_compared_is_refused():
    x, y = right_for(Linear())
    with pytest.raises(ThreatError, match="without targets"):
        attribution(Linear(), (x, y), Threat("linf", 0.1, targeted=True))
    with pytest.raises(ThreatError, match="eps"):
        attribution(Linear(), (x, y), "linf")
    with pytest.raises(UsageError, match="top"):
        attribution(Linear(), (x, y), "linf:0.1", top=0.0)
    with pytest.raises(UsageError, match="saliency"):
        attribution(Linear(), (x, y), "linf:0.1", methods=["gradcam"])
    with pytest.raises(UsageError, match="saliency"):
        attribution(Linear(), (x, y), "linf:0.1", methods=[])
    with pytest.raises(DataError, match="inside the box"):
        attribution(Linear(), (x + 1, y), "linf:0.1")
    with pytest.raises(DataError, match="classes"):
        attribution(Linear(), (x, y + 3), "linf:0.1")


def test_the_random_change_has_the_sizes_of_the_attack_at_other_places_and_stays_inside_the_box():
    with Model(Linear(), box=(0, 2)).frozen() as live:
        x = torch.tensor([0.0, 2.0, 1.0, 0.4])
        attacked = torch.tensor([0.5, 1.9, 1.0, 0.1])
        seen = set()
        for index in range(40):
            changed = shuffled(pose_one(live, x, 0, Threat("linf"), 0, index), attacked)
            assert (changed - x).abs().sort().values == pytest.approx((attacked - x).abs().sort().values, abs=1e-6)
            assert changed.min() >= 0
            assert changed.max() <= 2
            seen.add(tuple((changed - x).round(decimals=2).tolist()))
        again = shuffled(pose_one(live, x, 0, Threat("linf"), 0, 39), attacked)
    assert torch.equal(changed, again)
    assert len(seen) > 20


# the page


def words(page):
    """What is to be read on a page."""
    body = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", markup.unescape(re.sub(r"<[^>]+>", "", body)))


@pytest.fixture(scope="module")
def images():
    """A shipped network on three images."""
    data = load_data("demo:mnist", limit=3)
    return attribution(load_model("demo:mnist-plain"), data, "linf:0.1", PGD(steps=10), steps=20, shown=2)


def test_the_maps_of_an_image_are_shown_beside_it(images, tmp_path):
    """Two samples of three pictures and eight maps; of the third only the numbers."""
    fooled = sum(s.fooled for s in images.samples)
    page = images.report(tmp_path / "page.html", "assay study attribution ...").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 2 * (3 + 8)
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    text = words(page)
    for said in (
        f"The attack fools mnist-plain on {fooled} of 3 samples that it has right.",
        "Attributions are fragile",
        "start at 0 everywhere, the least value of the box, and take 20 steps",
        "of 78; by chance 9.9 %",
        "leaves 3 of 3 answers right",
    ):
        assert said in text
    assert text.count("fooled the model") == 2 * bool(fooled)  # a table for each method
    assert text.count("that held") == 2 * (fooled < 3)
    assert [s.x is None for s in images.samples] == [False, False, True]


def test_everything_that_was_measured_is_saved(images, tmp_path):
    folder = images.save(tmp_path / "run")
    said = json.loads((folder / "attribution.json").read_text(encoding="utf-8"))
    assert said == images.to_json()
    assert (said["k"], said["pixels"], said["seen"], len(said["samples"])) == (78, 784, 3, 3)
    with np.load(folder / "attribution.npz") as arrays:
        index = images.samples[0].index
        assert np.array_equal(arrays[f"{index}/saliency"], images.samples[0].by["saliency"].maps)
        assert arrays[f"{index}/saliency"].shape == (2, 2, 1, 28, 28)
        assert {name.partition("/")[0] for name in arrays} == {str(s.index) for s in images.samples[:2]}
    assert "What the answers go back to" in (folder / "attribution.html").read_text(encoding="utf-8")
    with pytest.raises(RunError, match="folder"):
        images.save(folder / "attribution.json" / "below")


def test_samples_that_are_no_images_are_drawn_as_lines_and_names_are_safe():
    x, y = right_for(Linear(), 2)
    data = load_data((x, y))
    data.class_names = ("<b>cat</b>", "dog", "cow")
    page = render_attribution(attribution(Model(Linear(), name="<i>net</i>"), data, "linf:0.3", PGD(steps=5)))
    assert "data:image/png" not in page
    assert page.count("<svg") == 2 * (3 + 8)
    assert "<b>cat" not in page
    assert "<i>net" not in page


def test_an_image_of_colours_is_mapped_by_pixel():
    net = smooth_net(48)
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = attribution(net, (x, net(x).argmax(1)), "linf:0.3", PGD(steps=5), steps=5)
    assert found.pixels == 16
    assert found.k == 2
    assert found.samples[0].by["saliency"].maps.shape == (2, 2, 3, 4, 4)
    assert render_attribution(found).count("data:image/png") == 2 * (3 + 8)


# the command


@pytest.fixture
def run():
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(attribution_command)
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])


def test_the_command_writes_the_page_and_says_the_numbers(run, tmp_path):
    common = ["demo:mnist-plain", "demo:mnist", "--threat", "linf:0.1", "--set", "steps=5", "--limit", 2, "--steps", 10]
    done = run(*common, "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["page"] == str(tmp_path / "run" / "attribution.html")
    assert said["attack"]["steps"] == 5
    assert len(said["samples"]) == said["seen"] == 2
    assert (tmp_path / "run" / "attribution.html").exists()
    told = run(*common, "--method", "saliency", "--out", tmp_path / "run")
    assert "The attack fools mnist-plain on" in told.stdout
    assert "saliency" in told.stdout
    assert "integrated-gradients" not in told.stdout


def test_the_command_says_what_is_wrong(run):
    common = ["demo:mnist-plain", "demo:mnist", "--limit", 1]
    assert run(*common, "--threat", "linf:0.1", "--method", "gradcam").exit_code == 2
    assert run(*common, "--threat", "linf:0.1", "--attack", "pdg").exit_code == 2
    assert run(*common, "--threat", "linf").exit_code == 3
    assert run(*common, "--threat", "linf:0.1", "--baseline", 2).exit_code == 3
