"""``assay study``: why a network fails, in measures and pictures."""

import typer

from assay.cli.study_pictures import attribution, landscape, walk
from assay.cli.study_sparseness import sparseness

study = typer.Typer(
    name="study",
    help="Why does a network fail? Sparseness of its layers, the landscape of its loss, the way to its boundary, "
    "what its answers go back to.",
    no_args_is_help=True,
)
for command in (sparseness, landscape, walk, attribution):
    study.command()(command)
