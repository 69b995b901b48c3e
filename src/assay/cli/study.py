"""``assay study``: why a network fails, in measures and pictures."""

import typer

from assay.cli.study_pictures import landscape, walk
from assay.cli.study_sparseness import sparseness

study = typer.Typer(
    name="study",
    help="Why does a network fail? Sparseness of its layers, the landscape of its loss, the way to its boundary.",
    no_args_is_help=True,
)
for command in (sparseness, landscape, walk):
    study.command()(command)
