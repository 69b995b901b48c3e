"""Every command and every line of Python on a page of the documentation runs, in the order of the page."""

from pathlib import Path

import pytest
from blocks import ROOT, blocks, commands, pages
from needs import framework
from running import BlockError, run, small
from workshop import EXEMPT, NEEDS, Exempt, Workshop

FRAMEWORKS = "captum|fastai|fastcore|imgaug|jax|keras|lightning|matplotlib|onnx|tensorflow|torch|transformers"
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:::({FRAMEWORKS})"),  # what they say of themselves, in their own files
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec:FutureWarning"
    ),  # torch of its exported programs, where one is copied
]

PAGES = {str(path.relative_to(ROOT)): path for path in pages()}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_the_page_runs(page: str, shop: Workshop) -> None:
    for name in NEEDS.get(page, ()):
        framework(name)
    run(page, PAGES[page].read_text(encoding="utf-8"), shop, EXEMPT)


@pytest.mark.parametrize("exempt", EXEMPT, ids=lambda e: f"{e.page}: {e.line}")
def test_every_exception_is_on_its_page_and_is_needed(exempt: Exempt) -> None:
    found = blocks(PAGES[exempt.page].read_text(encoding="utf-8"))
    lines = [row for b in found for row in b.code.splitlines()]
    lines += [str(c) for b in found if b.runs and not b.is_python for c in commands(b.code, b.line)]
    assert exempt.line in lines
    assert exempt.needed(), "take it out: it can be run now"


@pytest.mark.parametrize(
    ("page", "right", "wrong", "told"),
    [
        ("docs/choosing-a-recipe.md", "--recipe list", "--recipes list", "No such option: --recipes"),
        ("docs/choosing-a-recipe.md", "assay harden", "assay hearden", "No such command 'hearden'"),
        ("docs/choosing-a-recipe.md", "assay harden", "asay harden", "no rule"),
        ("docs/threat-models.md", "Threat.parse(", "Threat.parsed(", "has no attribute 'parsed'"),
        ("docs/threat-models.md", "```python", "```pyton", "no rule"),
        ("CONTRIBUTING.md", "make test ", "make tests ", r"no target in the Makefile: \['tests'\]"),
    ],
)
def test_a_defect_that_is_planted_in_a_copy_of_a_page_is_found(
    page: str, right: str, wrong: str, told: str, shop: Workshop
) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    assert right in text
    with pytest.raises(BlockError, match=told) as e:
        run(page, text.replace(right, wrong), shop)
    assert str(e.value).startswith(f"{page}:")


def test_commands_are_read_over_backslashes_and_without_comments() -> None:
    text = "```\nA=1 bin/assay x \\\n  --y 'a b'  # it's so\n\nmake z\n```\n```\nonly output\n```\n"
    first, second = blocks(text)
    assert [str(c) for c in commands(first.code, first.line)] == ["assay x --y 'a b'", "make z"]
    assert [c.line for c in commands(first.code, first.line)] == [3, 5]
    assert (first.runs, second.runs) == (True, False)


def test_sizes_are_small_and_nothing_else_of_a_command_is_changed() -> None:
    words = ["evaluate", "net.onnx", "images/", "--threat", "linf:0.1", "--limit", "500"]
    assert small(words) == [*words[:-1], "6", "--effort", "quick"]
    assert small(["compare", "a", "b"]) == ["compare", "a", "b"]


def test_no_page_is_without_its_blocks() -> None:
    """A fence that is not closed would hide what is below it."""
    for path in [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), Path(ROOT / "benchmarks" / "README.md")]:
        text = path.read_text(encoding="utf-8")
        fences = [row for row in text.splitlines() if row.lstrip().startswith("```")]
        assert len(fences) == 2 * len(blocks(text)), path
