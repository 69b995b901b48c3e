"""The documentation says what the code does: pages are as the generator writes them, links lead on."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from assay import attacks
from assay.attacks import names

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
OURS = ("inward",)
"""Attacks that no paper describes."""


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("attack_pages")


def test_every_page_is_what_the_generator_writes(generator: ModuleType) -> None:
    """Otherwise run ``python scripts/attack_pages.py``; a new attack also needs a row in the README's table."""
    assert [str(p.relative_to(ROOT)) for p in generator.stale()] == []


def test_the_check_says_that_a_docstring_has_changed(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(generator.README.read_text(encoding="utf-8"), encoding="utf-8")
    for name, value in {"ROOT": tmp_path, "PAGES": tmp_path / "docs", "README": readme}.items():
        monkeypatch.setattr(generator, name, value)
    assert generator.main(["--check"]) == 1
    assert generator.main([]) == 0
    (tmp_path / "docs" / "gone.md").write_text("an attack that is no more", encoding="utf-8")
    (tmp_path / "docs" / "pgd.md").write_text("changed by hand", encoding="utf-8")
    capsys.readouterr()
    assert generator.main([]) == 0
    assert sorted(capsys.readouterr().out.split()) == ["docs/gone.md", "docs/pgd.md"]
    assert generator.main(["--check"]) == 0


def test_an_attack_without_a_row_in_the_readme_is_named(generator: ModuleType) -> None:
    readme = generator.README.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no row for pgd"):
        generator.filled(re.sub(r"(?m)^\| \[`pgd`\].*\n", "", readme))


@pytest.mark.parametrize("name", names())
def test_every_attack_has_a_page_with_its_parameters_and_a_paper(name: str, generator: ModuleType) -> None:
    page = generator.page(name)
    for parameter, default in generator.defaults(attacks.ATTACKS[name]).items():
        assert f"| `{parameter}` | {default} | " in page
        assert f"| `{parameter}` | {default} | |" not in page, f"{parameter} is not described"
    assert "arxiv.org/abs/" in page or name in OURS
    assert "| taxonomy | MITRE ATLAS [AML.T0043." in page
    assert "*Sees*" not in page
    assert "``" not in page.replace("```", "")


def test_every_paper_of_a_page_is_in_the_references() -> None:
    known = set(re.findall(r"eprint = \{([^}]+)\}", (ROOT / "references.bib").read_text(encoding="utf-8")))
    cited = {n for p in PAGES for n in re.findall(r"arxiv\.org/abs/([\d.]+\d)", p.read_text(encoding="utf-8"))}
    assert cited - known == set()


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", ROOT / "benchmarks/README.md", *PAGES], ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_relative_link_leads_to_a_file_and_to_a_heading_of_it(path: Path) -> None:
    text = re.sub(r"(?ms)^```.*?^```$", "", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert not heading or heading in anchors(found), target


def anchors(path: Path) -> set[str]:
    """Return the anchors that headings get: small letters, no punctuation, hyphens for spaces."""
    headings = re.findall(r"(?m)^#+ (.*)$", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_attack_that_how_to_choose_names_is_there() -> None:
    linked = re.findall(r"\[`([a-z-]+)`\]\(attacks/", (ROOT / "docs" / "how-to-choose.md").read_text(encoding="utf-8"))
    assert set(linked) <= set(names())
