"""``assay compare``: two runs on the same samples, with tests, intervals, and what changed sides."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from assay.cli import options as o


@o.told
def compare(
    a: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or of an attack.")],
    b: Annotated[Path, typer.Argument(metavar="RUN", help="That of another, on the same data.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one HTML page, with pictures of what changed sides.")
    ] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Say whether two runs on the same samples differ by more than chance: models, threats or efforts.

    Pairs of samples are tested (McNemar, exact), classes with Holm's correction; differences have intervals. Where
    threats differ, it says what is comparable.

    assay compare runs/before runs/after --out comparison.html
    """
    from assay.core.plain import printable
    from assay.reports.comparison import write_comparison
    from assay.reports.paired import conclusion, print_comparison
    from assay.runs.compare import compare as compare_runs
    from assay.runs.source import opened

    o.spare(out)
    runs = opened(a), opened(b)
    found = compare_runs(*runs)
    page = None if out is None else str(write_comparison(out, *runs, found))
    if as_json:
        o.emit(found.to_json() | {"conclusion": conclusion(found), "page": page})
    elif quiet:
        typer.echo(printable(conclusion(found)))
    else:
        console = Console(highlight=False)
        print_comparison(found, console, details=True)
        if page is not None:
            console.print(f"\npage  {page}", markup=False, soft_wrap=True)
