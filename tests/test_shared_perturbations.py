"""One perturbation, or one patch, for all samples: closed forms, what is shared, and how to use it on other samples."""

import pytest
import torch
from torch import Tensor, nn

from assay import attacks
from assay.attacks import Cascade, Patch, Restarts, SharedAttack, Universal
from assay.attacks.testing import Line, _small_net, check_attack
from assay.core.errors import AssayError, DataError, ThreatError
from assay.core.random import Draws
from assay.models import Model
from assay.threats import Box, Problem, Threat

ONES = torch.ones(8, dtype=torch.long)


def levels(lo: float, hi: float, shape: tuple[int, ...] = (1, 4, 4), b: int = 8) -> Tensor:
    """Return flat inputs whose distances to the plane of :class:`Line` are their values minus a half."""
    return torch.linspace(lo, hi, b).view(-1, *[1] * len(shape)).expand(b, *shape).clone()


# One perturbation.


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("batch", [64, 3])
def test_a_perturbation_fools_exactly_the_samples_that_are_near_enough(norm: str, batch: int) -> None:
    x, n = levels(0.52, 0.66), 16
    factor = {"linf": 1, "l2": n**0.5, "l1": n}[norm]
    attack = Universal(batch=batch, support=0.5, epochs=30)
    for reach, fall in ((0.015, 0), (0.05, 2), (0.11, 5), (0.165, 8)):
        r = attack(Line(), x, ONES, Threat(norm, reach * factor))
        assert int(r.success.sum()) == fall
        assert r.success[:fall].all(), "the nearest ones"


def test_with_two_groups_that_pull_apart_the_larger_one_falls() -> None:
    x = torch.cat([levels(0.52, 0.58, b=5), levels(0.42, 0.48, b=3)])
    y = torch.tensor([1] * 5 + [0] * 3)
    r = Universal(epochs=40)(Line(), x, y, Threat("linf", 0.1))
    assert r.success.tolist() == [True] * 5 + [False] * 3


def test_every_sample_gets_the_same_perturbation_but_for_the_box() -> None:
    net = _small_net((3, 6, 6))
    x = Draws.of(3, torch.arange(12)).uniform((3, 6, 6))
    y = net(x).argmax(1)
    for norm, eps in (("linf", 0.05), ("l2", 0.8), ("l1", 6.0)):
        attack, threat = Universal(epochs=10), Threat(norm, eps)
        r, v = attack(net, x, y, threat), attack.fit(net, x, y, threat)
        assert v.shape == x.shape[1:]
        assert torch.allclose(r.x, (x + v).clamp(0, 1), atol=1e-6)
        assert float(threat.norm.size(v[None].double())) <= eps * (1 + 1e-6)
        assert torch.equal(net((x + v).clamp(0, 1)).argmax(1) != y, r.success)


def test_the_perturbation_works_on_samples_that_it_was_not_made_for() -> None:
    v = Universal().fit(Line(), levels(0.55, 0.65), ONES, Threat("linf", 0.2))
    others = levels(0.52, 0.68, b=40)
    assert (Line()((others + v).clamp(0, 1)).argmax(1) == 0).all()


def test_a_wanted_class_is_reached_by_all() -> None:
    net = _small_net((3, 6, 6))
    x = 0.3 + 0.4 * Draws.of(3, torch.arange(12)).uniform((3, 6, 6))
    common = int(net(x).argmax(1).bincount(minlength=4).argmin())
    r = Universal(epochs=40)(net, x, torch.full((12,), common), Threat("linf", 0.25, targeted=True))
    assert int(r.success.sum()) >= 10
    assert (net(r.x).argmax(1)[r.success] == common).all()


def test_the_order_of_the_samples_does_not_matter() -> None:
    net = _small_net((3, 6, 6))
    x = Draws.of(3, torch.arange(12)).uniform((3, 6, 6))
    y, order = net(x).argmax(1), torch.arange(11, -1, -1)
    attack = Universal(epochs=4, batch=5)
    one = attack(net, x, y, "linf:0.02", indices=torch.arange(12))
    other = attack(net, x[order], y[order], "linf:0.02", indices=order)
    assert torch.allclose(one.x, other.x[order], atol=1e-5)


def test_other_boxes_scale_everything() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Line()((x + 10) / 20)

    x = levels(0.52, 0.66) * 20 - 10
    r = Universal()(Model(Wide(), Box(-10, 10)), x, ONES, Threat("linf", 0.11 * 20))
    assert int(r.success.sum()) == 5


# One patch.


@pytest.mark.parametrize("eps", [9, 15])
def test_a_patch_too_small_for_any_place_fools_nobody(eps: int) -> None:
    """Of values 0.6, a sixth must turn black before their mean is a half: 4 x 4 of 64 are enough, 3 x 3 are not."""
    x = torch.full((8, 1, 8, 8), 0.6)
    assert not Patch()(Line(), x, ONES, Threat("l0", eps)).success.any()
    r = Patch()(Line(), x, ONES, Threat("l0", 16))
    assert r.success.all()
    assert (r.size <= 16).all()


def test_patches_are_one_square_each_at_places_of_their_own() -> None:
    b, side = 64, 3
    x = 0.3 + 0.4 * Draws.of(3, torch.arange(b)).uniform((3, 9, 7))
    y = torch.ones(b, dtype=torch.long)
    attack, threat = Patch(epochs=2), Threat("l0", 3 * side**2 + 5)
    r, patch = attack(Line(), x, y, threat), attack.fit(Line(), x, y, threat)
    assert patch.shape == (3, side, side)
    tops, lefts = set(), set()
    for clean, point in zip(x, r.x, strict=True):
        rows, columns = (point != clean).any(0).nonzero().unbind(1)
        top, left = int(rows.min()), int(columns.min())
        assert torch.equal(point[:, top : top + side, left : left + side], patch)
        assert int((point != clean).any(0).sum()) == side**2
        tops.add(top)
        lefts.add(left)
    assert tops == set(range(9 - side + 1))
    assert lefts == set(range(7 - side + 1))


def test_a_patch_works_on_other_samples_at_other_places() -> None:
    """The class is the brightest of three channels: a patch of another colour decides it."""

    class Colour(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.amax((2, 3)) * 5 + x.mean((2, 3))

    x = 0.4 * Draws.of(3, torch.arange(16)).uniform((3, 8, 8))
    y = torch.full((16,), 2)
    patch = Patch().fit(Colour(), x, y, Threat("l0", 12, targeted=True))
    others = 0.4 * Draws.of(4, torch.arange(16)).uniform((3, 8, 8))
    for i, j in ((0, 0), (3, 5), (6, 6)):
        worn = others.clone()
        worn[:, :, i : i + 2, j : j + 2] = patch
        assert (Colour()(worn).argmax(1) == 2).all()


@pytest.mark.parametrize(("rotation", "scale"), [(45.0, 1.0), (0.0, 0.5), (180.0, 0.7)])
def test_a_turned_or_shrunk_patch_changes_no_more_values_than_allowed(rotation: float, scale: float) -> None:
    b = 40
    x = 0.3 + 0.4 * Draws.of(3, torch.arange(b)).uniform((1, 16, 16))
    attack, threat = Patch(epochs=2, rotation=rotation, scale=scale), Threat("l0", 36)
    r = attack(Line(), x, torch.ones(b, dtype=torch.long), threat)
    changed = (r.x != x).flatten(1).sum(1)
    assert (changed <= 36).all()
    assert (changed >= 0.8 * 36 * scale**2).all()
    assert len(set(changed.tolist())) > 1, "poses differ"


def test_a_turned_patch_is_turned() -> None:
    """By a half turn: the upper left pixel of the patch is seen at the lower right."""
    attack = Patch(rotation=180)
    x = torch.zeros(200, 1, 6, 6)
    rows = torch.arange(200)
    p = Problem.pose(x, rows, Threat("l0", 9, Box()), Draws.of(0, rows))
    v = torch.zeros(1, 1, 6, 6)
    v[0, 0, :3, :3] = torch.arange(1.0, 10).view(3, 3)
    seen = attack.place(p, v)
    inside = [{int(i) for i in s.unique()} - {0} for s in seen]
    assert all(s <= set(range(1, 10)) for s in inside)
    assert sum(5 in s for s in inside) == 200, "the middle of the patch stays in place"


# Both.


@pytest.mark.parametrize("attack", [Universal(epochs=8), Patch(epochs=8)], ids=lambda a: type(a).__name__)
def test_what_a_call_may_cost_bounds_the_epochs(attack: SharedAttack) -> None:
    net = _small_net((3, 6, 6))
    x = Draws.of(3, torch.arange(6)).uniform((3, 6, 6))
    y, threat = net(x).argmax(1), Threat("linf", 0.01) if isinstance(attack, Universal) else Threat("l0", 3)
    for limit in (1, 3, 4, 9, 100):
        r = attack(net, x, y, threat, max_passes=limit)
        assert (r.forwards + r.backwards <= limit).all()
    assert (r.forwards <= 17).all()
    assert (r.backwards <= 8).all()


def test_they_are_parts_of_combinations_like_any_other_attack() -> None:
    x = levels(0.52, 0.66)
    r = Cascade((Universal(epochs=5), Restarts(Universal(), 2)))(Line(), x, ONES, Threat("linf", 0.2))
    assert r.success.all()
    check_attack(Patch(epochs=4, rotation=30, scale=0.7), norms=("l0",), model=Line(), shape=(1, 6, 6))


def test_they_are_found_by_name() -> None:
    assert attacks.get("uap", epochs="3") == Universal(epochs=3)
    assert attacks.get("patch", rotation="20") == Patch(rotation=20.0)


@pytest.mark.parametrize(
    ("attack", "threat", "shape", "error", "says"),
    [
        (Universal(), "linf", (1, 4, 4), ThreatError, "an eps for Universal"),
        (Universal(), "l0:3", (1, 4, 4), ThreatError, "for Universal"),
        (Universal(epochs=0), "linf:0.1", (1, 4, 4), AssayError, "epochs and batch >= 1"),
        (Patch(), "l0", (1, 4, 4), ThreatError, "an eps for Patch"),
        (Patch(), "l2:1", (1, 4, 4), ThreatError, "l0 for Patch"),
        (Patch(), "l0:2", (3, 4, 4), ThreatError, "l0:3 or more"),
        (Patch(), "l0:4", (16,), DataError, "images"),
    ],
)
def test_what_they_are_not_made_for_is_refused(
    attack: SharedAttack, threat: str, shape: tuple[int, ...], error: type[AssayError], says: str
) -> None:
    with pytest.raises(error, match=says):
        attack(Line(), levels(0.52, 0.6, shape), ONES, threat)


@pytest.mark.parametrize("how", [{"scale": 0.0}, {"scale": 1.5}, {"rotation": -1.0}, {"rotation": 200.0}])
def test_poses_that_make_no_sense_are_refused(how: dict[str, float]) -> None:
    with pytest.raises(ThreatError, match="0 < scale <= 1"):
        Patch(**how)  # type: ignore[arg-type]
