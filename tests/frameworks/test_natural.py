# ruff: noqa: NPY002, the global generator is what must stay as it is
"""Natural robustness: common corruptions at five severities, beside the verdict under attack."""

import numpy as np
import pytest
import torch
from needs import framework

import assay
from assay.data.corruptions import corrupted
from assay.runs.natural import GROUPS, SEVERITIES, corruptions, kept

framework("imagecorruptions")

EVERY = corruptions("all")


def pictures(n: int = 3, c: int = 3, side: int = 40) -> np.ndarray:
    """Smooth 8-bit images, unlike each other."""
    at = np.linspace(0, 3, side)
    waves = [np.sin(at[:, None] * (i + 1)) * np.cos(at[None] * (i + 2)) for i in range(n * c)]
    return (np.stack(waves).reshape(n, c, side, side) * 100 + 128).astype(np.uint8)


@pytest.mark.parametrize("name", EVERY)
def test_a_corruption_belongs_to_the_sample_and_not_to_its_batch_or_to_what_was_drawn_before(name: str) -> None:
    x = pictures()
    np.random.seed(5)
    before = np.random.get_state()[1].tolist()
    together = corrupted(x, [0, 1, 2], name, 3, seed=0)
    assert np.random.get_state()[1].tolist() == before
    assert together.shape == x.shape
    assert together.dtype == np.uint8
    np.random.rand(7)
    assert np.array_equal(corrupted(x[1:2], [1], name, 3, seed=0)[0], together[1])


@pytest.mark.parametrize("name", EVERY)
def test_a_higher_severity_changes_more(name: str) -> None:
    x = pictures()
    mild, hard = (np.abs(corrupted(x, [0, 1, 2], name, s, 0).astype(float) - x).mean() for s in (1, 5))
    assert 0 < mild < hard


def test_other_seeds_samples_and_severities_draw_other_noise() -> None:
    x = pictures(1)
    asked = [([0], 1, 0), ([1], 1, 0), ([0], 2, 0), ([0], 1, 1)]
    drawn = [corrupted(x, at, "gaussian_noise", severity, seed) for at, severity, seed in asked]
    assert len({d.tobytes() for d in drawn}) == len(asked)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 28, 40), (3, 9, 33)])
def test_images_smaller_than_the_package_takes_are_corrupted_as_well(shape: tuple[int, ...]) -> None:
    x = np.full((1, *shape), 128, dtype=np.uint8)
    assert corrupted(x, [0], "fog", 1, seed=0).shape == x.shape
    assert np.array_equal(corrupted(x, [0], "zoom_blur", 3, seed=0), x)  # what is even stays so


class Bright(torch.nn.Module):
    """Calls an image 1 where its mean is above one half; counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        above = x.flatten(1).mean(1) - 0.5
        return torch.stack([-above, above], 1) * 20


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    dark, light = torch.full((3, 1, 32, 32), 0.25), torch.full((3, 1, 32, 32), 0.75)
    return torch.cat([dark, light]), torch.tensor([0, 0, 0, 1, 1, 1])


def look(tmp_path, net=None, batch_size=None, natural="brightness,contrast"):
    return assay.evaluate(
        net or Bright(), samples(), "linf:0.1", "quick", out=tmp_path, natural=natural, batch_size=batch_size,
        progress=False,
    )  # fmt: skip


def test_the_run_holds_what_corruptions_did_and_the_report_shows_it(tmp_path) -> None:
    e = look(tmp_path / "run")
    told = {row["name"]: row for row in e.run.manifest["natural"]}
    assert list(told) == ["brightness", "contrast"]
    assert told["brightness"]["severities"] == [*SEVERITIES]
    assert told["brightness"]["accuracy"][0] == 1.0
    assert told["brightness"]["accuracy"][4] == 0.5  # a quarter of the range is more than half now
    assert told["contrast"]["accuracy"] == [1.0] * 5  # the mean stays
    assert told["brightness"]["group"] in GROUPS
    page = e.report().read_text(encoding="utf-8")
    assert "Natural robustness" in page
    assert "worst is brightness" in page


def test_the_table_is_the_same_whatever_the_batch(tmp_path) -> None:
    tables = [kept(look(tmp_path / str(b), batch_size=b, natural="noise").run) for b in (1, 4, 6)]
    assert tables[0] == tables[1] == tables[2]
    assert set(tables[0]) == set(GROUPS["noise"])


def test_what_is_stored_is_not_done_again(tmp_path) -> None:
    look(tmp_path)
    (tmp_path / "natural" / "contrast.parquet").unlink()
    again, none = Bright(), Bright()
    look(tmp_path, again)
    look(tmp_path, none)
    assert again.asked - none.asked == len(SEVERITIES)
    later = look(tmp_path, natural=None)
    assert [row["name"] for row in later.run.manifest["natural"]] == ["brightness", "contrast"]


def test_samples_that_are_no_images_are_refused_before_anything_is_asked(tmp_path) -> None:
    net = Bright()
    with pytest.raises(assay.DataError, match=r"images of shape \(1, h, w\) or \(3, h, w\)"):
        assay.evaluate(net, (torch.rand(4, 7), torch.zeros(4, dtype=torch.int64)), "linf:0.1", natural="fog")
    assert net.asked == 0
