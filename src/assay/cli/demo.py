"""``assay demo``: the main job on data and models that ship with the package."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from assay.cli import options as o
from assay.cli.evaluate import EffortOpt

MODELS = ("mnist-plain", "mnist-robust")
USUAL = (500, "linf:0.3", "standard")


@o.told
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder of the two runs (default: runs/demo).")] = None,
    limit: o.Limit = 500,
    threat: o.ThreatOpt = "linf:0.3",
    effort: EffortOpt = "standard",
    device: o.Device = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Evaluate a plainly trained and an adversarially trained network on MNIST, and compare them."""
    from assay.cli.evaluate import summary
    from assay.data import load_data
    from assay.evaluation import evaluate
    from assay.models.loaders import load_model
    from assay.reports import compare_table

    place, results = o.device_of(device), []
    usual = (limit, threat, effort) == USUAL
    out = out or (Path("runs/demo") if usual else o.run_folder("demo", f"{effort}-{limit}", threat))
    for name in MODELS:
        command = f"assay evaluate demo:{name} demo:mnist --threat {threat} --effort {effort} --limit {limit}"
        result = evaluate(
            load_model(f"demo:{name}"),
            load_data("demo:mnist", limit=limit),
            threat,
            effort,
            device=place,
            out=out / name,
            progress=not (quiet or as_json),
            command=command,
        )
        result.report()
        results.append(result)
        if not result.complete:
            o.errors.print("interrupted; what is done is saved. To go on:")
            o.errors.print(f"  {o.command_line()}", markup=False, soft_wrap=True)
            raise typer.Exit(o.INTERRUPTED)
    table = compare_table([r.run for r in results])
    with (out / "comparison.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=110).print(table)
    if as_json:
        o.emit({n: summary(r) for n, r in zip(MODELS, results, strict=True)})
        return
    console = Console(highlight=False)
    console.print(table)
    for result in results:
        console.print(f"report  {result.run.path / 'report.html'}", markup=False, soft_wrap=True)
