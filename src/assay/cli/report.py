"""``assay report``: a page from a run, a section of a model card, or a sheet of evidence."""

from pathlib import Path
from typing import Annotated

import typer

from assay.cli import options as o
from assay.core.registry import one_of

Form = Annotated[
    str, typer.Option("--as", metavar="html|card|evidence", help="A page, a model card's section, one page for audits.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing: the page is all.", rich_help_panel="Output")]
OutFile = Annotated[
    Path | None,
    typer.Option(help="What to write (default: report.html, README.md or evidence.html in the run)."),
]


@o.told
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or of an attack (html only).")],
    form: Form = "html",
    out: OutFile = None,
    as_json: o.Json = False,
    quiet: Quiet = False,
) -> None:
    """Write from a run, also from one that was interrupted: a self-contained HTML page, or what has to be on record.

    A card that exists keeps all that is not about this run; evidence is a PDF where the file ends in .pdf.

    assay report runs/mine
    assay report runs/mine --as card --out README.md
    assay report runs/mine --as evidence --out evidence.pdf
    """
    one_of("--as", form, _FORMS)
    o.spare(out)
    page = _written(form, run, out)
    if as_json:
        o.emit({"report": str(page)})
    elif not quiet:
        typer.echo(str(page))


_FORMS = ("html", "card", "evidence")


def _written(form: str, folder: Path, out: Path | None) -> Path:
    from assay.reports import write_report
    from assay.reports.card import write_card
    from assay.reports.evidence import write_evidence
    from assay.runs import Run
    from assay.runs.source import opened

    if form == "html":
        return write_report(opened(folder), out)
    return {"card": write_card, "evidence": write_evidence}[form](Run.read(folder), out)
