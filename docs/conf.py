"""The site of the documentation: `make docs`. The same pages are read as plain Markdown in the repository."""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import assay

ROOT = Path(__file__).parents[1]

project = "assay"
author = project_copyright = "The assay authors"
version = release = assay.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["examples"]
default_role = "code"
highlight_language = "text"

myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_use_admonition_for_references = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"assay {release}"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

SHELVES = ("attacks/index", "benchmarks/README", "findings/index")
"""Pages that list all the others of their folder; to the navigation they say so here, and nowhere in their text."""

ALL = "\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"
ELSEWHERE = re.compile(r"(\]\((?:\.\./)*)\.\./(benchmarks/[\w.-]+\.md)")
"""A link out of the documentation, to a page that the site has inside: see `published`."""

PLAIN = re.compile(r"(``.+?``|:\w+:`.+?`)|\||\*(?=\w+[),])")
"""Code and roles, or what is mathematics in our docstrings and markup to Sphinx: bars, and the * of a shape (b, *f)."""


LOADS = re.compile(
    r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^"']+|url\(["']?(?:https?:)?//[^)]+"""
)
"""What makes a browser load something from elsewhere; a link to go there does not."""


def published(app: Sphinx, name: str, source: list[str]) -> None:
    """Let pages of the benchmarks, which lie beside their scripts, stand in the site, and links lead to them there."""
    page = ROOT / f"{name}.md"
    text = ELSEWHERE.sub(r"\1\2", source[0])
    if name.startswith("benchmarks/") and page.exists():
        app.env.note_dependency(str(page))
        text = raised(page.read_text(encoding="utf-8").replace("](../docs/", "](../"), text.partition("\n")[0])
    source[0] = text + ALL if name in SHELVES else text


def raised(text: str, title: str) -> str:
    """Return a page that has a title, and no gap between its headings."""
    text = text if text.startswith("# ") else f"{title}\n\n{text}"
    return text if re.search("(?m)^## ", text) else re.sub("(?m)^#(?=##+ )", "", text)


def escaped(*told: Any) -> None:
    """Keep the plain mathematics of a docstring, whose lines come last, from being read as markup."""
    lines = told[-1]
    lines[:] = [line if line.lstrip().startswith(">>>") else PLAIN.sub(literal, line) for line in lines]


def literal(found: re.Match[str]) -> str:
    """Return code as it is, and anything else as that very character."""
    return found[1] or f"\\{found[0]}"


def contained(app: Sphinx, exception: Exception | None) -> None:
    """Refuse a site whose pages load anything from elsewhere."""
    files = [*app.outdir.rglob("*.html"), *app.outdir.rglob("*.css")] if exception is None else []
    for path in files:
        if found := LOADS.search(path.read_text(encoding="utf-8")):
            raise ExtensionError(f"{path} loads from elsewhere: {found[0]}")


def setup(app: Sphinx) -> None:
    """Connect what this file adds to Sphinx."""
    app.connect("source-read", published)
    app.connect("autodoc-process-docstring", escaped, priority=100)  # before Args: and the like are read
    app.connect("build-finished", contained)
