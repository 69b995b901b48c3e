"""Walks to the decision boundary: distances that are known, ways that are straight, pictures that can be read."""

import base64
import hashlib
import html as markup
import json
import re

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from assay import DataError, Model, RunError, ThreatError
from assay.attacks import FMN
from assay.cli.study_pictures import walk as walk_command
from assay.core.registry import UsageError
from assay.data import load_data
from assay.models.loaders import load_model
from assay.reports.walk import render_walk, write_gif
from assay.study.walk import distances, walk

WEIGHT = torch.tensor([[2.0, 0.0, 0.0, 1.0], [-1.0, 2.0, 0.0, 0.0], [0.0, -1.0, 2.0, 0.5]])
BIAS = torch.tensor([0.3, 0.0, -0.2])
X = torch.tensor([0.6, 0.2, 0.1, 0.1])
DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}


class Linear(nn.Module):
    """Three logits W x + b."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(WEIGHT.clone()), nn.Parameter(BIAS.clone())

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


def line(box=(-5.0, 5.0)):
    return Model(Linear(), box=box, name="line")


def exact(x, target, norm):
    """How far x is from the half-space where the target's logit is ahead of that of the class x is in."""
    z = WEIGHT @ x + BIAS
    own = int(z.argmax())
    return float((z[own] - z[target]) / (WEIGHT[own] - WEIGHT[target]).norm(p=DUAL[norm]))


def reached_there(x, target):
    """Whether the nearest point of that half-space, in l2, is of the target's class: no third class is in the way."""
    z = WEIGHT @ x + BIAS
    own = int(z.argmax())
    w = WEIGHT[target] - WEIGHT[own]
    near = x + w * (z[own] - z[target]) / w.square().sum()
    there = WEIGHT @ near + BIAS
    return bool(there[target] >= there.max() - 1e-5)


# sizes


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_sizes_of_a_linear_model_are_its_distances_to_the_planes_between_classes(norm):
    found = walk(line(), X, 0, norm, slice_steps=0, ascent=False)
    assert found.prediction == 0
    assert [w.target for w in found.ways] == sorted([1, 2], key=lambda t: exact(X, t, norm))
    for way in found.ways:
        assert reached_there(X, way.target)
        assert exact(X, way.target, norm) <= way.size <= exact(X, way.target, norm) * 1.01
    assert found.nearest is found.ways[0]


def test_an_end_is_of_its_class_and_as_far_away_as_it_is_said_to_be():
    net = line()
    for way in walk(net, X, 0, slice_steps=0, ascent=False).ways:
        end = torch.from_numpy(way.end)
        assert int(net(end[None]).argmax()) == way.target
        assert float((end.double() - X.double()).norm()) == pytest.approx(way.size, rel=1e-6)


def test_any_minimal_attack_can_walk():
    by_name = walk(line(), X, 0, "l2", "deepfool", steps=20, slice_steps=0, ascent=False)
    as_value = walk(line(), X, 0, "l2", FMN(steps=50), slice_steps=0, ascent=False)
    assert by_name.ways[0].size == pytest.approx(as_value.ways[0].size, rel=0.03)
    assert (by_name.attack, as_value.attack) == ("deepfool", "FMN")


def test_where_the_model_is_wrong_the_label_is_one_of_the_classes_to_reach():
    found = walk(line(), X, 2, slice_steps=0, ascent=False)
    assert found.prediction == 0
    assert {w.target for w in found.ways} == {1, 2}
    assert "the model is wrong on the sample as it is" in words(render_walk(found))


def test_a_class_that_the_box_puts_out_of_reach_is_not_found():
    """Nothing between 0 and 1 gives the third class its lead: its bias is too low."""
    net = Linear()
    net.bias.data[2] = -50.0
    found = walk(net, X, 0)
    assert [(w.target, w.found) for w in found.ways] == [(1, True), (2, False)]
    assert found.to_json()["ways"][1] == {"target": 2, "size": None}
    assert found.plane is None
    assert "none found" in words(render_walk(found))


def test_nothing_is_claimed_where_nothing_was_found():
    stuck = Model(lambda x: torch.stack([x[:, 0] + 9, x[:, 0]], 1), name="stuck")
    found = walk(stuck, torch.tensor([0.5, 0.5]), 0, steps=20)
    assert found.nearest is None
    assert found.ascent is None
    assert "No change of sample 0 was found after which stuck no longer says 0." in words(render_walk(found))
    with pytest.raises(UsageError, match="ascent"):
        found.gif("nothing.gif")


def test_what_cannot_be_walked_is_refused():
    with pytest.raises(UsageError, match="other than 0"):
        walk(line(), X, 0, target=0)
    with pytest.raises(UsageError, match="attack"):
        walk(line(), X, 0, attack="fnm")
    with pytest.raises(ThreatError, match="DeepFool"):
        walk(line(), X, 0, "l1", "deepfool")
    with pytest.raises(DataError, match="inside the box"):
        walk(line((0.0, 0.5)), X, 0)


# the way, the slice and the ascent


def test_the_way_is_straight_and_the_boundary_is_at_its_end():
    way = walk(line(), X, 0, slice_steps=0, ascent=False).ways[0]
    at = list(way.shown).index(40)
    assert way.shares[40] == 1
    assert np.array_equal(way.frames[0], X.numpy())
    assert np.array_equal(way.frames[at], way.end)
    steps = np.diff(way.shares[list(way.shown)])[:, None]
    assert np.diff(way.frames, axis=0) == pytest.approx(steps * (way.end - X.numpy()), abs=1e-6)
    said = way.confidences.argmax(1)
    assert (said[:39] == 0).all()
    assert (said[41:] == way.target).all()
    assert way.confidences.sum(1) == pytest.approx(1, abs=1e-5)
    assert way.confidences[40, 0] == pytest.approx(way.confidences[40, way.target], abs=0.02)


def test_the_slice_of_a_linear_model_is_coloured_by_its_half_planes():
    net = line()
    found = walk(net, X, 0, ascent=False, slice_steps=21)
    plane = found.plane
    assert plane is not None
    ends = [torch.from_numpy(w.end) - X for w in found.ways]
    u = ends[0] / ends[0].norm()
    v = ends[1] - (ends[1] @ u) * u
    v /= v.norm()
    for i in (0, 7, 20):
        for j in (0, 11, 20):
            z = net((X + float(plane.first[j]) * u + float(plane.second[i]) * v)[None]).detach()
            assert int(z.argmax()) == plane.predictions[i, j]
            assert float(z.softmax(1).max()) == pytest.approx(plane.confidences[i, j], abs=1e-4)
    assert [m[0] for m in plane.marks] == ["sample", *(f"to {w.target}" for w in found.ways)]
    assert set(np.unique(plane.predictions)) == {0, 1, 2}


def test_the_ascent_climbs_to_the_class_that_is_asked_for():
    found = walk(line(), X, 0, target=2, slice_steps=0)
    climb = found.ascent
    assert climb is not None
    assert climb.target == 2
    assert np.array_equal(climb.frames[0], X.numpy())
    assert (np.diff(climb.confidences[:, 2]) > 0).all()
    assert climb.confidences[-1, 2] >= 0.95
    assert climb.reached is not None
    assert climb.confidences[climb.reached].argmax() == 2
    assert climb.confidences[climb.reached - 1].argmax() == 0
    assert np.abs(np.diff(climb.frames, axis=0)).max() == pytest.approx(0.01 * 10, rel=1e-5)  # of a box 10 wide


# distances between classes


def test_the_distances_of_a_linear_model_are_the_medians_in_closed_form():
    x = torch.tensor([[0.3, 0.6, 0.5, 0.9], [0.5, 0.6, 0.3, 0.4], [0.0, 0.2, 0.3, 0.5], [0.0, 0.9, 0.9, 0.0],
                      [0.2, 1.0, 0.8, 0.1], [0.9, 0.1, 0.1, 0.1]])  # fmt: skip
    y = torch.tensor([0, 0, 0, 1, 1, 2])  # the last one is wrong
    found = distances(line(), load_data((x, y)), "l2", steps=100)
    right = (x @ WEIGHT.T + BIAS).argmax(1) == y
    assert right.tolist() == [True] * 5 + [False]
    assert found.counts.tolist() == [3, 2, 0]
    for own in (0, 1):
        assert found.median[own, own] == 0
        for target in {0, 1, 2} - {own}:
            rows = [v for v, label in zip(x[:5], y[:5].tolist(), strict=True) if label == own]
            assert all(reached_there(v, target) for v in rows)
            wanted = np.median([exact(v, target, "l2") for v in rows])
            assert found.median[own, target] == pytest.approx(wanted, rel=0.01)
    assert np.isnan(found.median[2]).all()
    assert found.found == 1
    said = found.to_json()
    assert said["median"][2] == [None] * 3
    assert said["passes"]["forwards"] > 6


def test_the_batch_does_not_matter_to_the_distances():
    x = torch.rand(12, 4, generator=torch.Generator().manual_seed(1))
    y = (x @ WEIGHT.T + BIAS).argmax(1)
    one, all_ = (distances(line(), load_data((x, y)), steps=10, batch_size=b).median for b in (5, 12))
    assert one == pytest.approx(all_, rel=1e-5, nan_ok=True)
    few = distances(line(), load_data((x, y)), limit=4, steps=10)
    assert few.counts.sum() == 4


# pictures


def test_the_animation_has_a_frame_a_step(tmp_path):
    frames = np.stack([np.full((1, 8, 8), v) for v in (0.0, 0.25, 0.5, 1.0)])
    with Image.open(write_gif(tmp_path / "a.gif", frames, 0.0, 1.0)) as film:
        assert film.n_frames == 4
        assert film.size == (224, 224)
        film.seek(1)
        assert film.convert("L").getpixel((100, 100)) == 64
        assert film.info["duration"] == 120
    colours = np.random.default_rng(0).random((3, 3, 300, 260))
    with Image.open(write_gif(tmp_path / "b.gif", colours, 0.0, 1.0)) as film:
        assert (film.n_frames, film.size) == (3, (260, 300))


def test_what_is_no_image_is_not_animated(tmp_path):
    with pytest.raises(DataError, match="images"):
        write_gif(tmp_path / "a.gif", np.zeros((3, 4)), 0.0, 1.0)
    with pytest.raises(RunError, match="can be written"):
        write_gif(tmp_path / "not" / "there.gif", np.zeros((2, 1, 8, 8)), 0.0, 1.0)


def words(page):
    """What is to be read on a page."""
    body = re.sub(r"<(style|script)>.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", markup.unescape(re.sub(r"<[^>]+>", "", body)))


@pytest.fixture(scope="module")
def images():
    """A walk of a shipped network from an image."""
    data = load_data("demo:mnist", limit=4)
    return walk(load_model("demo:mnist-plain"), data.batch([3])[0], int(data.labels[3]), index=3, steps=40)


def test_an_image_is_shown_on_its_way_to_every_class(images, tmp_path):
    """Nine ways of seven pictures and a change, the ascent, the slice and the sample, and a script that is allowed."""
    names = [f"<{k}>" for k in range(10)]
    page = images.report(tmp_path / "page.html", names, command="assay study walk ...").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 9 * 8 + len(images.ascent.frames) + 1 + 1
    assert "<9>" not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    assert f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in page
    nearest = images.nearest
    assert f"A change of {nearest.size:.3g} (l2) is enough for it to say <{nearest.target}>." in words(page)
    with Image.open(images.gif(tmp_path / "a.gif")) as film:
        assert film.n_frames == len(images.ascent.frames)


def test_the_distances_are_on_the_page_too(images):
    data = load_data("demo:mnist", limit=4)
    table = distances(load_model("demo:mnist-plain"), data, "l2", steps=10)
    page = words(render_walk(images, None, table))
    assert "How far the classes are from each other" in page
    assert "Medians over 4 samples that the model has right, l2, the least that fmn found" in page


def test_samples_that_are_no_images_are_drawn_as_lines():
    page = render_walk(walk(line(), X, 0))
    assert "data:image/png" in page  # the slice
    assert page.count('preserveAspectRatio="none" role="img" aria-label="100% of the way') == 2


# the command


@pytest.fixture
def run():
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(walk_command)
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])


def test_the_command_says_sizes_and_writes_page_and_animation(run, tmp_path):
    page, film = tmp_path / "new" / "page.html", tmp_path / "a.gif"
    common = ["demo:mnist-plain", "demo:mnist", "--index", 3, "--steps", 10]
    done = run(*common, "--target", 7, "--matrix", 2, "--out", page, "--gif", film, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert len(said["ways"]) == 9
    assert said["ascent"]["target"] == 7
    assert sum(said["distances"]["counts"]) == 2
    assert page.exists()
    assert film.exists()
    told = run(*common).stdout
    assert re.search(r"mnist-plain says 0 to sample 3. A change of [\d.]+ \(l2\) is enough", told)


def test_the_command_says_what_is_wrong(run):
    common = ["demo:mnist-plain", "demo:mnist", "--steps", 2]
    assert run(*common, "--index", 10_000).exit_code == 2
    assert run(*common, "--target", "cat").exit_code == 2
    assert run(*common, "--norm", "l3").exit_code == 3
