"""``assay compare``: two runs on the same samples, with a test of significance."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from assay.cli import options as o


@o.told
def compare(
    a: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    b: Annotated[Path, typer.Argument(metavar="RUN", help="That of another, on the same data.")],
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Say whether two runs on the same samples differ by more than chance: models, threats or efforts.

    assay compare runs/before runs/after
    """
    from assay.reports.paired import conclusion, print_comparison
    from assay.runs.compare import compare as compare_runs

    found = compare_runs(a, b)
    if as_json:
        o.emit(found.to_json() | {"conclusion": conclusion(found)})
    elif quiet:
        typer.echo(conclusion(found))
    else:
        print_comparison(found, Console(highlight=False))
