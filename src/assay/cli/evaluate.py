"""``assay evaluate``: the main job."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from assay.cli import options as o
from assay.cli import workers as w
from assay.core.errors import ThreatError
from assay.core.registry import UsageError

if TYPE_CHECKING:
    from assay.evaluation import Evaluation
    from assay.evaluation.cost import Cost
    from assay.threats import Threat

_STOP: Final = "When to stop"

EffortOpt = Annotated[str, typer.Option(metavar="quick|standard|thorough|reference", help="How hard to attack.")]
MaxPasses = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="No sample spends more passes.", rich_help_panel=_STOP)
]
MaxSeconds = Annotated[
    float | None, typer.Option(min=0, metavar="S", help="Stop after this time.", rich_help_panel=_STOP)
]
UntilInterval = Annotated[
    float | None,
    typer.Option(metavar="W", help="Stop when the interval of robust accuracy is this narrow.", rich_help_panel=_STOP),
]
EpsList = Annotated[
    str | None, typer.Option(metavar="EPS[,EPS...]", help="Say the robust accuracy at these eps as well.")
]
Prove = Annotated[
    str | None,
    typer.Option(
        metavar="ibp|crown-ibp|crown|alpha|complete", help="Prove what can be proven; only the rest is attacked."
    ),
]
ProveSeconds = Annotated[
    float | None, typer.Option(metavar="S", help="For --prove complete: the time for a sample (default: 30).")
]
Natural = Annotated[
    str | None,
    typer.Option(metavar="common|all|noise|blur|weather|digital|NAME[,...]", help="Corrupt the images as well."),
]
Precision = Annotated[
    str, typer.Option(metavar="float32|bf16", help="To search with; what counts is checked as the model is.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Attack nothing; say what it will cost on this machine.")]


@o.told
def evaluate(
    context: typer.Context,
    model: o.ModelArg,
    data: o.DataArg,
    threat: o.ThreatOpt,
    effort: EffortOpt = "standard",
    eps_list: EpsList = None,
    quantize: o.Quantize = None,
    prove: Prove = None,
    prove_seconds: ProveSeconds = None,
    natural: Natural = None,
    arch: o.Arch = None,
    box: o.BoxOpt = (0.0, 1.0),
    mean: o.Mean = None,
    std: o.Std = None,
    trust_pickle: o.TrustPickle = False,
    size: o.Size = None,
    limit: o.Limit = None,
    max_passes: MaxPasses = None,
    max_seconds: MaxSeconds = None,
    until_interval: UntilInterval = None,
    dry_run: DryRun = False,
    out: o.Out = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    precision: Precision = "float32",
    batch_size: o.BatchSize = None,
    executor: w.ExecutorOpt = None,
    workers: w.WorkersOpt = None,
    gpus_per_worker: w.GpusOpt = None,
    address: w.AddressOpt = None,
    track: o.Track = None,
    no_resume: o.NoResume = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Say how much a model can take on every sample: attack, verify, store, report.

    The figure is an upper bound on the true robust accuracy: what was broken is proven broken, what stands may yet fall
    to a stronger attack (--effort thorough). With --prove there is a lower bound beside it.

    A killed or interrupted run goes on where it was with the same command.

    assay evaluate demo:mnist-robust demo:mnist --threat linf:0.3 --limit 500
    assay evaluate net.pth images/ --arch nets:resnet --threat linf:8/255 --mean .49,.48,.45 --std .2,.2,.2
    assay evaluate demo:mnist-robust demo:mnist --threat linf:0.3 --workers 2
    """
    from assay.core.trackers import chosen
    from assay.evaluation import evaluate as run_evaluation
    from assay.threats import Threat

    chosen(track or ())  # none that is unknown or missing, before any work
    if not prove:
        o.only_with("--prove", context, "prove_seconds")
    parsed = replace(Threat.parse(threat), quantize=quantize)
    settings = {"max_passes": max_passes, "until_interval": until_interval, "eps_list": _eps_list(eps_list, parsed)}
    settings["prove_seconds"] = prove_seconds
    given: dict[str, Any] = {k: v for k, v in settings.items() if v is not None}
    place = o.device_of(device)
    shared = w.executor_of(executor, workers, gpus_per_worker, address, place)
    loaded = replace(o.model_of(model, arch, box, mean, std, trust_pickle=trust_pickle), precision=precision)
    samples = o.data_of(data, size, limit=limit, trust_pickle=trust_pickle)
    if dry_run:
        from assay.certification import Proof
        from assay.evaluation.cost import estimate

        proof = Proof(prove, prove_seconds or 30.0) if prove else None
        cost = estimate(loaded, samples, parsed, effort, place, batch_size, proof=proof)
        show_cost(cost.within(max_passes, max_seconds), as_json=as_json)
        return
    name = [model, data, threat, effort, seed, limit, arch, box, mean, std, quantize, *([given] if given else [])]
    name += [v for v in (prove, size, precision if precision != "float32" else None) if v]
    result = run_evaluation(
        loaded,
        samples,
        parsed,
        effort,
        prove,
        seed,
        batch_size,
        place,
        out or o.run_folder(*name),
        resume=not no_resume,
        progress=not (quiet or as_json),
        executor=shared,
        command=o.command_line(),
        natural=natural,
        **given | ({} if max_seconds is None else {"max_seconds": max_seconds}),
    )
    finish(result, as_json=as_json, quiet=quiet, track=track or ())


def _eps_list(text: str | None, threat: "Threat") -> list[float] | None:
    """Read ``.1,.2`` or ``1/255,2/255``: each as the eps of --threat, and none beyond it."""
    from assay.threats import Threat

    if text is None:
        return None
    try:
        found = sorted({Threat.parse(f"{threat.norm.name}:{part}").eps or 0.0 for part in text.split(",")})
    except ThreatError as e:
        raise UsageError("an eps, or several, for --eps-list", repr(text), "Write for example 1/255,2/255.") from e
    if threat.eps is not None and found[-1] > threat.eps:
        raise UsageError(
            f"--eps-list up to the eps of --threat, {threat.eps:g}, which is what is attacked",
            f"{found[-1]:g}",
            "Give --threat the largest of them.",
        )
    return found


def show_cost(cost: "Cost", *, as_json: bool) -> None:
    """Print what an evaluation will cost."""
    from assay.reports.text import count, duration, memory

    if as_json:
        o.emit(cost.to_json())
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    low, high = map(duration, cost.seconds)
    grid.add_row("samples", count(cost.samples))
    grid.add_row("passes per sample", f"{count(cost.passes[0])} as a rule, {count(cost.passes[1])} at most")
    grid.add_row("time", f"{low} to {high}")
    if cost.proofs[1]:
        low, high = map(duration, cost.proofs)
        grid.add_row("time for proofs", low if low == high else f"{low} to {high}")
    grid.add_row("device", f"{cost.device}, {count(cost.batch)} samples at a time")
    asked = (
        f"{duration(cost.forward)} forward, {duration(cost.gradient)} with gradient, {memory(cost.memory)} kept for it"
    )
    grid.add_row("a batch", asked)
    Console(highlight=False).print(
        Text("Nothing is attacked; this is what it would cost.", style="bold"), grid, sep="\n\n"
    )


def finish(
    result: "Evaluation",
    *,
    as_json: bool,
    quiet: bool,
    told: "Callable[[Evaluation], dict[str, Any]] | None" = None,
    track: Sequence[str] = (),
) -> None:
    """Write the report, print the result, send it to trackers, and say how to go on if it is not complete.

    ``told`` returns the object of ``--json``; the summary by default.
    """
    from assay.reports import print_run, verdict

    page = result.report()
    result.run.publish()
    if as_json:
        o.emit((told or summary)(result))
    elif quiet:
        typer.echo(verdict(result.run))
    else:
        console = Console(highlight=False)
        print_run(result.run, console)
        console.print(f"report  {page}", markup=False, soft_wrap=True)
    if track:
        from assay.reports.tracking import track as send

        for where in send(track, result.run):
            o.errors.print(where, markup=False, soft_wrap=True)
    if not result.complete and not result.run.manifest.get("bounded"):
        o.errors.print(f"interrupted after {result.n} samples, which are saved; to go on:")
        o.errors.print(f"  {o.command_line()}", markup=False, soft_wrap=True)
        raise typer.Exit(o.INTERRUPTED)


def summary(result: "Evaluation") -> dict[str, Any]:
    """Return the JSON object of ``--json``."""
    from assay.reports import points

    totals, manifest = result.totals(), result.run.manifest
    keys = ("n", "clean_accuracy", "robust_accuracy", "certified_accuracy", "interval", "passes", "seconds")
    return {
        **{k: totals[k] for k in keys},
        "findings": [f.to_json() for f in result.findings],
        "run": str(result.run.path),
        "complete": result.complete,
        "bounded": manifest.get("bounded"),
        "audit": manifest.get("audit"),
        "natural": manifest.get("natural"),
        "curve": [
            {"eps": p.eps, "robust_accuracy": p.rate.value, "interval": [p.rate.low, p.rate.high]}
            | (
                {}
                if (c := p.certified).value is None
                else {"certified_accuracy": c.value, "certified": [c.low, c.high]}
            )
            for p in points(manifest, result.samples)
        ],
    }
