"""The command ``assay``: its help, and the table of its commands."""

import os
import sys
from typing import Annotated

import typer

from assay import __version__
from assay.cli.attack import attack
from assay.cli.certify import certify
from assay.cli.compare import compare
from assay.cli.demo import demo
from assay.cli.doctor import doctor
from assay.cli.evaluate import evaluate
from assay.cli.gate import gate
from assay.cli.harden import harden
from assay.cli.report import report
from assay.cli.serve import serve
from assay.cli.study import study

_HELP = """
How much can your classifier take?

Assay attacks a model on every sample within a [bold]threat model[/bold], verifies every break with a fresh pass, proves
what it can, keeps the results in a folder that survives any interruption, and writes a report.

[bold]Start here[/bold]
  assay demo                                                        see it work, in a minute
  assay evaluate demo:mnist-robust demo:mnist --threat linf:0.3     the same by hand
  assay certify demo:mnist-robust demo:mnist --threat linf:0.1      prove it
  assay serve                                                       browse all that, in a browser
  assay gate runs/NAME --min-robust 0.45                            fail a build that falls below
  assay harden py:assay.nets:mnist_small train.npz --recipe mnist-0.3 --out hardened.safetensors
  assay evaluate weights.safetensors images/ --arch mymodule:build --threat linf:8/255 --mean 0.5 --std 0.25

[bold]MODEL[/bold]   .pt2, .onnx, .keras, a SavedModel folder | .safetensors or .pth weights with --arch module:callable
        timm:NAME, torchvision:NAME, hf:DIR_OR_NAME (NAME+download, NAME@WEIGHTS) | py:module:callable
        by scores alone: ort:FILE.onnx, http://... | .torchscript, .pkl, .joblib with --trust-pickle
        demo:mnist-plain | demo:mnist-robust | demo:mnist-certified
[bold]DATA[/bold]    a folder of class folders | .npz with x and y | .parquet with image and label | .tar shards
        hf:DIR | py:module:callable | demo:mnist
[bold]THREAT[/bold]  norm:eps, eps in units of the input box before normalisation: linf:8/255, l2:0.5, l1:10

[bold]Exit codes[/bold]  0 done, 1 a gate did not hold, 2 usage, 3 bad input, 4 the model misbehaved, 130 interrupted
(everything so far is saved: the same command goes on).
"""

app = typer.Typer(
    name="assay",
    help=_HELP,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (evaluate, attack, certify, harden, compare, gate, report, serve, demo, doctor):
    app.command()(command)
app.add_typer(study)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"assay {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    # Read when torch is imported, which is later. Threads that wait by spinning make everything several times slower
    # as soon as something else runs on the machine (measured on 2 cores: 27 s instead of 1.6 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
