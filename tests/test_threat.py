"""Threats are plain data: parsed, printed, compared, and checked against the box."""

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.core.errors import ThreatError
from assay.threats import NORMS, Box, Threat

UNIT = Box()


@pytest.mark.parametrize(
    ("text", "norm", "eps"),
    [
        ("linf:8/255", "linf", 8 / 255),
        ("linf:.03", "linf", 0.03),
        ("l2:0.5", "l2", 0.5),
        ("l2: 1e-3", "l2", 1e-3),
        (" linf : 8 / 255 ", "linf", 8 / 255),
        ("linf:1.5/255", "linf", 1.5 / 255),
        ("l1:12", "l1", 12.0),
        ("l0:20", "l0", 20.0),
        ("l0", "l0", None),
        ("linf", "linf", None),
    ],
)
def test_text_is_read(text: str, norm: str, eps: float | None) -> None:
    t = Threat.parse(text)
    assert (t.norm.name, t.eps, t.box, t.targeted) == (norm, eps, None, False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "l3:1",
        "linf:",
        "linf:x",
        "linf:-1",
        "linf:0",
        "linf:0/255",
        "linf:1/0",
        "linf:8//255",
        "linf:8/255/2",
        "linf:nan",
        "linf:inf",
        "linf:1e999",
        "l2:1e999/1e999",
        "l0:2.5",
        "linf:8/",
        "linf:/255",
        "LINF 8",
        "linf:8 255",
    ],
)
def test_bad_text_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ThreatError, match=r"Write for example l"):
        Threat.parse(text)


@pytest.mark.parametrize("norm", [None, 2, float("inf"), ["l2"], {}])
def test_what_is_no_norm_at_all_is_refused_likewise(norm: Any) -> None:
    with pytest.raises(ThreatError, match="a norm out of linf"):
        Threat(norm)


@given(st.floats(1e-6, 1e3), st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([1, 255, 3]))
def test_what_is_printed_reads_back_as_the_same_threat(eps: float, norm: str, parts: int) -> None:
    t = Threat(norm, eps / parts)
    assert Threat.parse(str(t)) == t


@pytest.mark.parametrize(
    "text", ["linf:8/255", "linf:1/255", "linf:0.3", "l2:0.5", "l1:12", "l0:20", "l0", "linf:1.25/255"]
)
def test_usual_threats_print_as_they_are_written(text: str) -> None:
    assert str(Threat.parse(text)) == text


def test_threats_are_values() -> None:
    t = Threat("linf", 8 / 255, box=(0, 1))
    assert t == Threat(NORMS["linf"], 8 / 255, Box(0.0, 1.0))
    assert len({t, Threat("linf", 8 / 255, (0.0, 1.0)), Threat("linf", 8 / 255)}) == 2
    assert pickle.loads(pickle.dumps(t)) == t
    assert t.to_json() == {"norm": "linf", "eps": 8 / 255, "box": [0, 1], "targeted": False, "text": "linf:8/255"}


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf")])
def test_eps_is_positive_and_finite(eps: float) -> None:
    with pytest.raises(ThreatError, match="eps > 0"):
        Threat("l2", eps)


def test_l0_counts_whole_coordinates() -> None:
    with pytest.raises(ThreatError, match="whole number"):
        Threat("l0", 2.5)


@pytest.mark.parametrize("box", [(1, 0), (0, 0), (0, float("inf")), (float("nan"), 1)])
def test_a_box_has_a_finite_width(box: tuple[float, float]) -> None:
    with pytest.raises(ThreatError, match="lo < hi"):
        Box(*box)


@pytest.mark.parametrize(("norm", "most"), [("linf", 1.0), ("l2", 10.0), ("l1", 100.0), ("l0", 100.0)])
def test_eps_up_to_the_diameter_of_the_box_is_taken_and_more_is_refused(norm: str, most: float) -> None:
    assert Threat(norm, most).within(UNIT, 100) == Threat(norm, most, UNIT)
    with pytest.raises(ThreatError) as caught:
        Threat(norm, round(most * 300)).within(UNIT, 100)
    assert caught.value.code == "eps-wider-than-box"


def test_eps_in_grey_levels_is_recognised_with_what_to_write() -> None:
    with pytest.raises(ThreatError, match="linf:8/255") as caught:
        Threat("linf", 8).within(UNIT, 100)
    assert caught.value.code == "eps-looks-like-8-not-8/255"
    assert Threat("linf", 8).within(Box(0, 255), 100).eps == 8


def test_the_box_is_the_models_and_a_second_one_is_refused() -> None:
    assert Threat("linf", 0.1).within(Box(-1, 1), 4).box == Box(-1, 1)
    assert Threat("linf", 0.1, Box(-1, 1), targeted=True).within(Box(-1, 1), 4).targeted
    with pytest.raises(ThreatError, match="Give the box once"):
        Threat("linf", 0.1, Box(0, 1)).within(Box(-1, 1), 4)
