"""Write those pages of the documentation that only list others: the index of findings, and a page for each benchmark.

The pages of findings are written by hand; the index takes code, severity and first paragraph from them. The tables of
the benchmarks lie beside their scripts; in the site they stand in the place of a page that leads to them
(docs/conf.py). A test fails where this script has not been run.

    python scripts/docs_pages.py            # write
    python scripts/docs_pages.py --check    # only say which files would change
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TITLES = {"README": "Benchmarks", "harden": "Tables of harden.py"}
"""Titles of benchmarks whose page has none, or one that says too little."""

HEAD = """# Findings

What `assay evaluate` says beside the figures. Each has a code that stays, for programs; a severity; the figures behind
it (*evidence*); and what to do. An `error` means that the figures are not about what you think; a `warning` that they
may be too good, or need a word beside them; `info` that something was done which you may want to know. The whole story
is in [diagnostics](../diagnostics.md); what ends a run instead, in [errors](errors.md)."""

BEFORE = "before any attack, "
GROUPS = {
    "Data and model": (f"{BEFORE}on all", f"{BEFORE}on the modules", f"{BEFORE}on up to 64", "after the clean pass"),
    "Wrong wrappings": (f"{BEFORE}on up to 256",),
    "Repairs": (f"{BEFORE}while",),
    "Attacks that must agree": ("beside the race",),
    "The race and its claims": ("after the race", "at the end"),
}
"""Groups of findings, by how the line begins that says when one is looked for."""


def codes() -> list[str]:
    """Return the codes that have a page."""
    return sorted(p.stem for p in (DOCS / "findings").glob("*.md") if p.stem not in ("index", "errors"))


def entry(code: str) -> tuple[str, str]:
    """Return when a finding is looked for, and its row of the table."""
    _, what, table, *_ = (DOCS / "findings" / f"{code}.md").read_text(encoding="utf-8").split("\n\n")
    severity, when = (row.split("|")[2].strip() for row in table.splitlines()[2:4])
    return when, f"| [`{code}`]({code}.md) | {severity.split(';')[0]} | {' '.join(what.split())} |"


def findings() -> str:
    """Return the index of findings."""
    known = {code: entry(code) for code in codes()}
    blocks = [HEAD]
    for title, begins in GROUPS.items():
        rows = [row for when, row in known.values() if when.startswith(begins)]
        blocks += [f"## {title}", "\n".join(["| code | severity | |", "|---|---|---|", *rows])]
    return "\n\n".join(blocks) + "\n"


def benchmark(page: Path) -> str:
    """Return what stands for the page of a benchmark where only Markdown is read."""
    first = page.read_text(encoding="utf-8").partition("\n")[0]
    title = TITLES.get(page.stem, first.removeprefix("# "))
    return f"# {title}\n\nIt lies beside the scripts that make it: [{page.name}](../../benchmarks/{page.name}).\n"


def pages() -> dict[Path, str]:
    """Return every page that is written here."""
    found = {DOCS / "benchmarks" / p.name: benchmark(p) for p in sorted((ROOT / "benchmarks").glob("*.md"))}
    return {DOCS / "findings" / "index.md": findings()} | found


def stale() -> list[Path]:
    """Return the files that are not as they would be written, and pages of benchmarks that are gone."""
    wanted = pages()
    changed = [p for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    return changed + [p for p in sorted((DOCS / "benchmarks").glob("*.md")) if p not in wanted]


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or say which would change."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something would change")
    check = parser.parse_args(arguments).check
    wanted, found = pages(), stale()
    for path in found:
        print(path.relative_to(ROOT))
        if check:
            continue
        if path in wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        else:
            path.unlink()
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
