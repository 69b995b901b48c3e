"""``assay harden``: train a network so that it can take more, and say by the verdict what that brought."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from assay.cli import options as o
from assay.core.registry import UsageError, one_of

if TYPE_CHECKING:
    from assay.evaluation import Evaluation
    from assay.hardening import Hardened

_VERDICT, _TRAINING = "The verdict", "Training"

Optional = Annotated[
    str | None, typer.Option("--threat", metavar="NORM:EPS", help="What to train against: linf:8/255, l2:0.5, ...")
]
Method = Annotated[
    str | None, typer.Option(metavar="NAME", help="pgd, trades, mart, fast, ibp, ...; pgd if not given.")
]
RecipeOpt = Annotated[
    str | None, typer.Option(metavar="NAME", help="Settings that ship, with what they reached; `list` shows them.")
]
Epochs = Annotated[int | None, typer.Option(min=1, metavar="N", help="How often to go through the data.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="A setting of method or loop: beta=6, lr=0.1, augment=crop:4,flip."
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Samples that are learned from together.", rich_help_panel=_TRAINING),
]
OutFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The network: .safetensors (weights), .pt2 or .onnx (whole).")
]
Valid = Annotated[
    str | None, typer.Option(metavar="DATA", help="Chooses the best weights; else 5 % of the data are held back.")
]
Extra = Annotated[
    str | None, typer.Option(metavar="DATA", help="A second source of samples.", rich_help_panel=_TRAINING)
]
Log = Annotated[
    list[str] | None,
    typer.Option(
        "--track", "--log", metavar="mlflow|tensorboard|wandb", help="Where to log.", rich_help_panel=_TRAINING
    ),
]
Devices = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="GPUs, or CPU processes, that train together.", rich_help_panel=_TRAINING),
]
Test = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="What the verdict is of; else of the validation data.", rich_help_panel=_VERDICT),
]
TestLimit = Annotated[
    int, typer.Option(min=1, metavar="N", help="Samples of the verdict, at most.", rich_help_panel=_VERDICT)
]
Effort = Annotated[
    str, typer.Option(metavar="quick|standard|thorough|none", help="How hard to attack.", rich_help_panel=_VERDICT)
]
Prove = Annotated[
    str | None,
    typer.Option(metavar="METHOD", help="Prove as well: ibp, crown, alpha, ...", rich_help_panel=_VERDICT),
]


@o.told
def harden(
    model: o.ModelArg = "",
    data: Annotated[str, typer.Argument(metavar="DATA", help="Samples to train on, with labels.")] = "",
    threat: Optional = None,
    method: Method = None,
    recipe: RecipeOpt = None,
    epochs: Epochs = None,
    settings: Set = None,
    out: OutFile = None,
    valid: Valid = None,
    test: Test = None,
    test_limit: TestLimit = 1000,
    effort: Effort = "standard",
    prove: Prove = None,
    extra: Extra = None,
    log: Log = None,
    arch: o.Arch = None,
    box: o.BoxOpt = (0.0, 1.0),
    mean: o.Mean = None,
    std: o.Std = None,
    trust_pickle: o.TrustPickle = False,
    size: o.Size = None,
    limit: o.Limit = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    devices: Devices = 1,
    batch_size: BatchSize = None,
    no_resume: o.NoResume = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a network so that it can take more; then the verdict, before and after.

    The network that training ends with is judged by the same attacks as any other, never by the one it trained on. A
    killed or interrupted training goes on where it was with the same command.

    assay harden py:nets:small train.npz --threat linf:0.1 --epochs 5 --out hardened.safetensors
    assay harden py:assay.nets:mnist_small train.npz --recipe mnist-0.3 --test demo:mnist --out hardened.safetensors
    """
    import torch

    from assay.hardening import harden as train
    from assay.hardening import recipe as recipes
    from assay.hardening.source import split_off

    if recipe == "list":
        for name in recipes.names():
            typer.echo(f"{name:20} {recipes.load(name)}")
        return
    kept = recipes.load(recipe) if recipe else None
    wanted = threat or (kept and kept.threat)
    if not model or not data or out is None or not wanted:
        raise UsageError("MODEL, DATA, --threat (or --recipe) and --out FILE", "not all of them", "See --help.")
    _check_verdict(effort, prove)
    place = o.device_of(device)
    torch.manual_seed(seed)  # a network that is built anew draws its weights
    loaded = o.model_of(model, arch, box, mean, std, trust_pickle=trust_pickle)
    own = kept.settings if kept and method in (None, kept.method) else {}
    how: dict[str, Any] = {**own, **_given(settings or [], batch_size)}
    samples = o.data_of(data, size, limit=limit, trust_pickle=trust_pickle)
    held_back, more, final = (
        None if v is None else o.data_of(v, size, limit=None, trust_pickle=trust_pickle) for v in (valid, extra, test)
    )
    judged = (final or held_back or split_off(samples)[1]).head(test_limit)
    warnings.showwarning = _warn  # type: ignore[assignment]
    result = train(
        loaded,
        samples,
        wanted,
        method or (kept.method if kept else "pgd"),
        held_back,
        epochs or (kept.epochs if kept else 10),
        out,
        not no_resume,
        extra=more,
        seed=seed,
        device=place,
        devices=devices,
        progress=not (quiet or as_json),
        log=log or (),
        command=o.command_line(),
        **how,
    )
    runs = []
    if effort != "none" or prove:
        from assay.evaluation import evaluate

        for name, one in (("before", loaded), ("after", result.model)):
            folder = out.with_suffix(".training") / name
            shown = not (quiet or as_json)
            runs.append(evaluate(one, judged, wanted, effort, prove, seed, None, place, folder, progress=shown))
            runs[-1].report()
    _say(result, runs, out, as_json=as_json, quiet=quiet)


def _check_verdict(effort: str, prove: str | None) -> None:
    """Refuse, before any training, a verdict that there is none of."""
    from assay.certification import Proof
    from assay.evaluation.efforts import EFFORTS
    from assay.runs.schema import UNATTACKED

    one_of("--effort", effort, (*EFFORTS, UNATTACKED))
    if prove:
        Proof(prove)


def _given(pairs: list[str], batch_size: int | None) -> dict[str, Any]:
    """Return the settings of the command, --batch-size among them."""
    settings = o.parameters(pairs)
    if batch_size is None:
        return {**settings}
    if "batch_size" in settings:
        raise UsageError("--batch-size or --set batch_size", "both", "Leave one of them out.")
    return {**settings, "batch_size": batch_size}


def _warn(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Print a warning as a sentence, without the line of code that it comes from."""
    o.errors.print(f"[yellow]warning[/yellow] ({category.__name__})", end=" ")
    o.errors.print(str(message), markup=False, soft_wrap=True)


def _say(result: "Hardened", runs: list["Evaluation"], out: Path, *, as_json: bool, quiet: bool) -> None:
    from assay.cli.evaluate import summary
    from assay.reports import verdict
    from assay.reports.paired import print_comparison
    from assay.reports.text import count, duration
    from assay.runs.compare import compare

    if as_json:
        training = {"forwards": result.forwards, "backwards": result.backwards, "seconds": result.seconds}
        judged = dict(zip(("before", "after"), map(summary, runs), strict=False))
        o.emit({"file": str(out), "training": training, "stopped": result.stopped, **judged})
        return
    if runs and quiet:
        typer.echo(verdict(runs[1].run))
        return
    if quiet:
        return
    console = Console(highlight=False)
    if runs:
        print_comparison(compare(runs[0].run.path, runs[1].run.path), console)
    spent = (
        f"{count(result.forwards)} forward and {count(result.backwards)} backward passes, {duration(result.seconds)}"
    )
    console.print(f"training  {spent}{'; ' * bool(result.stopped)}{result.stopped}", markup=False, soft_wrap=True)
    console.print(f"network   {out}", markup=False, soft_wrap=True)
    console.print(f"history   {out.with_suffix('.training') / 'history.html'}", markup=False, soft_wrap=True)
