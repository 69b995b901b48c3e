"""The sheet of evidence: one page for those who must answer for a model, or who audit one."""

import hashlib
from pathlib import Path
from typing import Any, Final, Never

from markupsafe import Markup

from assay.core.errors import RunError
from assay.core.files import replacing
from assay.core.optional import need
from assay.reports.html import environment, template, write_page
from assay.reports.record import Record, Used, clip, record
from assay.runs import Run

# What a page of A4 has room for, whatever a run says of itself.
_NAME: Final = 36
_LINE: Final = 160
_COMMAND: Final = 400
_MOST: Final = 3


def write_evidence(run: Run, out: Path | None = None) -> Path:
    """Write the sheet of evidence of a run, and return where it is.

    Args:
        run: to be read, finished or not.
        out: the file: HTML, or PDF where its name ends in ``.pdf``; ``evidence.html`` in the run by default, or in
            the folder that is given.

    Raises:
        RunError: the run cannot be read, or the file cannot be written.
        MissingExtraError: a PDF is wanted, and weasyprint is not installed.
    """
    file = run.path / "evidence.html" if out is None else Path(out)
    if file.is_dir():
        file = file / "evidence.html"
    page = render(run)
    return _write_pdf(file, page) if file.suffix.lower() == ".pdf" else write_page(file, page, parents=True)


def render(run: Run) -> str:
    """Return the sheet as HTML that needs nothing else, and that prints on one page of A4."""
    r = record(run, _NAME)
    findings = [(n.code, n.severity, _begun(n.message)) for n in r.s.findings[:_MOST]]
    return (
        environment()
        .get_template("evidence.html.j2")
        .render(
            r=r,
            key=_key(r),
            used=[(clip(", ".join(u.names), 3 * _NAME), u) for u in r.used[:_MOST]],
            others=len(r.used[_MOST:]),
            shared=_shared(r),
            tagged=any(u.atlas or u.nist for u in r.used),
            findings=findings,
            more=len(r.s.findings) - len(findings),
            command=clip(r.command, _COMMAND),
            cut=len(r.command) > _COMMAND,
            style=Markup(template("evidence.css")),
        )
    )


def _begun(message: str) -> str:
    """Return as much of a sentence as there is room for."""
    return message if len(message) <= _LINE else f"{message[:_LINE].rpartition(' ')[0] or message[:_LINE]} …"


def _shared(r: Record) -> list[str]:
    """Return the techniques that attacks of all classes have, where there are several."""
    first, *others = r.used or (Used(()),)
    return [t for t in first.atlas if others and all(t in u.atlas for u in others)]


def _key(r: Record) -> int:
    """Return which figure matters most: the robust accuracy, else the certified one."""
    titles = [f.title for f in r.figures]
    return next((titles.index(t) for t in ("Robust accuracy", "Certified accuracy") if t in titles), -1)


def _write_pdf(file: Path, page: str) -> Path:
    """Write a page as PDF. The same page gives the same bytes, with the same fonts and weasyprint."""
    weasyprint = need("weasyprint", "pdf")
    document = weasyprint.HTML(string=page, url_fetcher=_nothing, media_type="print")
    mark = hashlib.sha256(page.encode()).digest()[:16]
    content = document.write_pdf(pdf_identifier=mark, pdf_tags=True)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as f:
            f.write(content)
    except OSError as e:
        raise RunError(f"a place that can be written for {file.name}", str(e), "Choose another --out.") from e
    return file


def _nothing(url: str, *_: Any, **__: Any) -> Never:
    raise ValueError(f"a sheet of evidence loads nothing: {url}")
