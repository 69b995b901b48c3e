"""``assay serve``: runs in a browser."""

from pathlib import Path
from typing import Annotated

import typer

from assay.cli import options as o


@o.told
def serve(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the runs are; nothing else is shown.")] = Path(
        "runs"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 for a free one.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address only.")] = False,
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="SOURCE", help="A model that runs may be looked at with.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="SOURCE", help="Data that runs may be looked at with.")
    ] = None,
    arch: o.Arch = None,
    box: o.BoxOpt = (0.0, 1.0),
    mean: o.Mean = None,
    std: o.Std = None,
    trust_pickle: o.TrustPickle = False,
) -> None:
    """Browse runs, look at samples, and walk to the decision boundary, in a browser on this machine.

    Models that ship, and .onnx and .pt2 files with the fingerprint that a run states, are loaded as they are needed.
    Others run code when they are loaded, so they must be named: each serves the runs that have its fingerprint.

    assay serve
    assay serve runs --model weights.safetensors --arch nets:resnet --mean .49,.48,.45 --std .2,.2,.2 --data py:my:set
    """
    from assay.serve.app import serve as run

    models = [o.model_of(m, arch, box, mean, std, trust_pickle=trust_pickle) for m in model or ()]
    known = [o.data_of(d, None, limit=None, trust_pickle=trust_pickle) for d in data or ()]
    run(folder, port, models, known, browser=not no_browser, told=lambda url: typer.echo(f"{url}  (Ctrl-C ends it)"))
