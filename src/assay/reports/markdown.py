"""A judgement in Markdown, for the summary of a job or a comment on a pull request."""

import re
from collections.abc import Iterator
from typing import Any, Final

from assay.core.plain import plain
from assay.reports.gates import about, command, listed
from assay.reports.table import sentence
from assay.runs import Run
from assay.runs.policy import Judgement

_MARKS: Final = re.compile(r"[\\`*_\[\]<>&|~$]")
_LINKS: Final = re.compile(r"(?<!&)#(?=\w)|@|:(?=//)|(?i:\bwww)(?=\.)|(?i:\bgh)(?=-)")


def markdown(judgement: Judgement, run: Run) -> str:
    """Return the text: the verdict, the checks as a table, and why those that did not hold failed."""
    return "\n".join(_lines(judgement, run)) + "\n"


def escape(said: Any) -> str:
    """Return a text that is only text in Markdown: no markup, HTML, link, mention or reference.

    Example:
        >>> escape("a|b <i>")
        'a&#124;b &#60;i&#62;'
    """
    marked = _MARKS.sub(lambda found: f"&#{ord(found[0])};", plain(said))
    # Links are looked for after entities are read: only a character in between, of no width, helps.
    return _LINKS.sub(lambda found: f"{found[0]}\u200b", marked)


def _lines(judgement: Judgement, run: Run) -> Iterator[str]:
    s = about(run)
    yield f"## assay gate: {'held' if judgement.held else 'failed'}\n"
    yield f"{escape(judgement.verdict)} {escape(sentence(s, run.samples()))}\n"
    yield "| check | result | wanted | found |"
    yield "|---|---|---|---|"
    for check in judgement.checks:
        result = "held" if check.held else "**failed**"
        yield f"| {escape(check.name)} | {result} | {escape(check.wanted)} | {escape(check.found)} |"
    for check in judgement.failed:
        yield from ("", f"**{escape(check.name)}**: {escape(check.why)}", "")
        yield from (f"- {escape(line)}" for line in listed(check, s))
    if judgement.failed and (told := command(run)):
        fence = "`" * (max(map(len, re.findall("`+", told)), default=0) + 3)
        yield from ("", "The run was made by:", "", fence + "sh", told, fence)
    yield ""
