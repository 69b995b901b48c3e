"""``assay report``: a page from a run."""

from pathlib import Path
from typing import Annotated

import typer

from assay.cli import options as o


@o.told
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    out: Annotated[Path | None, typer.Option(help="The page to write (default: report.html in the run).")] = None,
    as_json: o.Json = False,
) -> None:
    """Write one self-contained HTML page from a run, also from one that was interrupted."""
    from assay.reports import write_report
    from assay.runs import Run

    page = write_report(Run.read(run), out)
    if as_json:
        o.emit({"report": str(page)})
    else:
        typer.echo(str(page))
