"""``assay evaluate``: the main job."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from assay.cli import options as o

if TYPE_CHECKING:
    from assay.evaluation import Evaluation


@o.told
def evaluate(
    model: o.ModelArg,
    data: o.DataArg,
    threat: o.ThreatOpt,
    effort: Annotated[str, typer.Option(metavar="quick|standard|thorough", help="How hard to attack.")] = "standard",
    quantize: o.Quantize = None,
    prove: Annotated[str | None, typer.Option(hidden=True)] = None,
    arch: o.Arch = None,
    box: o.BoxOpt = (0.0, 1.0),
    mean: o.Mean = None,
    std: o.Std = None,
    trust_pickle: o.TrustPickle = False,
    limit: o.Limit = None,
    out: o.Out = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    batch_size: o.BatchSize = None,
    no_resume: o.NoResume = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Say how much a model can take on every sample: attack, verify, store, report.

    The figure is an upper bound on the true robust accuracy: what was broken is proven broken, what stands may yet fall
    to a stronger attack (--effort thorough).

    A killed or interrupted run goes on where it was with the same command.

    assay evaluate demo:mnist-robust demo:mnist --threat linf:0.3 --limit 500
    assay evaluate net.pth images/ --arch nets:resnet --threat linf:8/255 --mean .49,.48,.45 --std .2,.2,.2
    """
    from assay.data import load_data
    from assay.evaluation import evaluate as run_evaluation
    from assay.threats import Threat

    parsed = replace(Threat.parse(threat), quantize=quantize)
    place = o.device_of(device)
    folder = out or o.run_folder(model, data, threat, effort, seed, limit, arch, box, mean, std, quantize)
    result = run_evaluation(
        o.model_of(model, arch, box, mean, std, trust_pickle=trust_pickle),
        load_data(data, limit=limit, trust_pickle=trust_pickle),
        parsed,
        effort,
        prove,
        seed,
        batch_size,
        place,
        folder,
        resume=not no_resume,
        progress=not (quiet or as_json),
        command=o.command_line(),
    )
    finish(result, as_json=as_json, quiet=quiet)


def finish(result: "Evaluation", *, as_json: bool, quiet: bool) -> None:
    """Write the report, print the result, and say how to go on if it is not complete."""
    from assay.reports import print_run, verdict

    page = result.report()
    if as_json:
        o.emit(summary(result))
    elif quiet:
        typer.echo(verdict(result.run))
    else:
        console = Console(highlight=False)
        print_run(result.run, console)
        console.print(f"report  {page}", markup=False, soft_wrap=True)
    if not result.complete:
        o.errors.print(f"interrupted after {result.n} samples, which are saved; to go on:")
        o.errors.print(f"  {o.command_line()}", markup=False, soft_wrap=True)
        raise typer.Exit(o.INTERRUPTED)


def summary(result: "Evaluation") -> dict[str, Any]:
    """Return the JSON object of ``--json``."""
    totals = result.totals()
    keys = ("n", "clean_accuracy", "robust_accuracy", "certified_accuracy", "interval", "passes", "seconds")
    return {
        **{k: totals[k] for k in keys},
        "findings": [f.to_json() for f in result.findings],
        "run": str(result.run.path),
        "complete": result.complete,
    }
