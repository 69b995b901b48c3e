"""``assay report``: a page from a run, a section of a model card, or a sheet of evidence."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli import options as o
from assay.core.registry import one_of

if TYPE_CHECKING:
    from assay.runs import Run

Form = Annotated[
    str, typer.Option("--as", metavar="html|card|evidence", help="A page, a model card's section, one page for audits.")
]
OutFile = Annotated[
    Path | None,
    typer.Option(help="What to write (default: report.html, README.md or evidence.html in the run)."),
]


@o.told
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    form: Form = "html",
    out: OutFile = None,
    as_json: o.Json = False,
) -> None:
    """Write from a run, also from one that was interrupted: a self-contained HTML page, or what has to be on record.

    A card that exists keeps all that is not about this run; evidence is a PDF where the file ends in .pdf.

    assay report runs/mine
    assay report runs/mine --as card --out README.md
    assay report runs/mine --as evidence --out evidence.pdf
    """
    from assay.runs import Run

    one_of("--as", form, _FORMS)
    page = _writer(form)(Run.read(run), out)
    if as_json:
        o.emit({"report": str(page)})
    else:
        typer.echo(str(page))


_FORMS = ("html", "card", "evidence")


def _writer(form: str) -> "Callable[[Run, Path | None], Path]":
    from assay.reports import write_report
    from assay.reports.card import write_card
    from assay.reports.evidence import write_evidence

    return {"html": write_report, "card": write_card, "evidence": write_evidence}[form]
