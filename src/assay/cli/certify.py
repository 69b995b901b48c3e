"""``assay certify``: what is proven, and how far."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from assay.cli import options as o
from assay.cli import workers as w
from assay.cli.evaluate import finish, summary
from assay.core.errors import ThreatError
from assay.core.registry import UsageError
from assay.core.trackers import chosen

if TYPE_CHECKING:
    from assay.evaluation import Evaluation
    from assay.threats import Threat

_SMOOTHING, _VNNLIB = "With --method smoothing", "Properties"

METHODS: Final = ("ibp", "crown-ibp", "crown", "alpha", "complete", "smoothing")

Method = Annotated[
    str, typer.Option(metavar="|".join(METHODS), help="How to prove: the further right, the stronger and slower.")
]
Radius = Annotated[bool, typer.Option("--radius", help="Search how far each sample is proven, and where it breaks.")]
NoAttack = Annotated[bool, typer.Option("--no-attack", help="With --radius: do not search where samples break.")]
Seconds = Annotated[
    float, typer.Option(metavar="S", help="For complete: the time for a sample (and step of a radius).")
]
ArithmeticOpt = Annotated[
    str, typer.Option(metavar="float32|real|tf32|bfloat16", help="How the network computes where it is deployed.")
]
Sigma = Annotated[
    float | None, typer.Option(help="Standard deviation of the noise, e.g. 0.25.", rich_help_panel=_SMOOTHING)
]
Noise = Annotated[
    str, typer.Option(metavar="gaussian|uniform|ablation", help="For l2, l1 or l0.", rich_help_panel=_SMOOTHING)
]
Kept = Annotated[int | None, typer.Option(help="Values that ablation leaves.", rich_help_panel=_SMOOTHING)]
Draws = Annotated[int, typer.Option("--n", help="Draws that prove.", rich_help_panel=_SMOOTHING)]
FirstDraws = Annotated[int, typer.Option("--n0", help="Draws that choose the class.", rich_help_panel=_SMOOTHING)]
Alpha = Annotated[float, typer.Option(help="Chance of a wrong claim, a sample.", rich_help_panel=_SMOOTHING)]
Property = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Judge this property of a .onnx file.", rich_help_panel=_VNNLIB)
]
Timeout = Annotated[float, typer.Option(metavar="S", help="For the property.", rich_help_panel=_VNNLIB)]


@o.told
def certify(
    context: typer.Context,
    model: o.ModelArg,
    data: Annotated[str | None, typer.Argument(metavar="DATA", help="Images with labels; see `assay --help`.")] = None,
    threat: Annotated[
        str | None, typer.Option("--threat", metavar="NORM[:EPS]", help="linf:8/255, l2:0.5, ...; with --radius: linf.")
    ] = None,
    method: Method = "crown",
    radius: Radius = False,
    no_attack: NoAttack = False,
    seconds: Seconds = 30.0,
    arithmetic: ArithmeticOpt = "float32",
    sigma: Sigma = None,
    noise: Noise = "gaussian",
    kept: Kept = None,
    n: Draws = 10_000,
    n0: FirstDraws = 100,
    alpha: Alpha = 0.001,
    vnnlib: Property = None,
    timeout: Timeout = 60.0,
    arch: o.Arch = None,
    box: o.BoxOpt = (0.0, 1.0),
    mean: o.Mean = None,
    std: o.Std = None,
    trust_pickle: o.TrustPickle = False,
    size: o.Size = None,
    limit: o.Limit = None,
    out: o.Out = None,
    seed: o.Seed = 0,
    device: o.Device = None,
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
    """Prove which samples stay right whatever the threat allows: a lower bound on the truth.

    With --radius, how far each sample is proven, and beside it the smallest change that an attack found: the truth lies
    between. A killed or interrupted run goes on where it was with the same command.

    assay certify demo:mnist-robust demo:mnist --threat linf:0.1 --limit 100
    assay certify demo:mnist-robust demo:mnist --threat linf --radius --limit 100
    assay certify demo:mnist-plain demo:mnist --threat l2:0.25 --method smoothing --sigma 0.25 --n 1000 --limit 100
    """
    from assay.threats import Threat

    chosen(track or ())
    _check_given(context, method, vnnlib)
    if vnnlib is not None:
        _judge(model, vnnlib, timeout, out, as_json=as_json)
        return
    if data is None or threat is None:
        raise UsageError("DATA and --threat", "not both of them", "Or a property, with --vnnlib.")
    parsed = Threat.parse(threat)
    _check(parsed, method, radius=radius, no_attack=no_attack)
    place = o.device_of(device)
    loaded = o.model_of(model, arch, box, mean, std, trust_pickle=trust_pickle)
    samples = o.data_of(data, size, limit=limit, trust_pickle=trust_pickle)
    how: dict[str, Any] = {
        "seed": seed,
        "batch_size": batch_size,
        "device": place,
        "resume": not no_resume,
        "progress": not (quiet or as_json),
        "command": o.command_line(),
        "executor": w.executor_of(executor, workers, gpus_per_worker, address, place),
    }
    settings = [model, data, threat, "certify", method, radius, no_attack, seconds, arithmetic, seed, limit]
    settings += [arch, box, mean, std, *([size] if size else [])]
    if method == "smoothing":
        from assay.certification import Smoothed
        from assay.evaluation.smoothed import certify_smoothed

        settings += [sigma, noise, kept, n, n0, alpha]
        how["out"] = out or o.run_folder(*settings)
        result = certify_smoothed(Smoothed(loaded, sigma, noise, kept), samples, parsed, n0, n, alpha, **how)
    else:
        from assay.evaluation import evaluate

        how |= {"out": out or o.run_folder(*settings), "prove_seconds": seconds, "arithmetic": arithmetic}
        if radius:
            how["eps_list"] = [] if parsed.eps is None else [parsed.eps]
        effort = "standard" if radius and not no_attack else "none"
        result = evaluate(loaded, samples, replace(parsed, eps=None) if radius else parsed, effort, method, **how)
    finish(result, as_json=as_json, quiet=quiet, told=proofs, track=track or ())


def _check_given(context: typer.Context, method: str, vnnlib: Path | None) -> None:
    """Refuse options that this way to prove would ignore."""
    if method != "smoothing":
        o.only_with("--method smoothing", context, "sigma", "noise", "kept", "n", "n0", "alpha")
    else:
        o.only_with("a proof about the network", context, "arithmetic")
    if method != "complete":
        o.only_with("--method complete", context, "seconds")
    if vnnlib is None:
        o.only_with("--vnnlib", context, "timeout")


def _check(threat: "Threat", method: str, *, radius: bool, no_attack: bool) -> None:
    """Refuse what does not fit together."""
    from assay.core.registry import one_of

    one_of("a method", method, METHODS)
    if no_attack and not radius:
        raise UsageError("--no-attack with --radius", "--no-attack alone", "Without --radius nothing is attacked.")
    if radius and method == "smoothing":
        raise UsageError("--radius with a proof about the network", "smoothing", "It always gives radii; leave it out.")
    if threat.eps is None and not radius and method != "smoothing":
        raise ThreatError("an eps to certify", str(threat), "Write --threat linf:0.1, or add --radius.")


def _judge(model: str, file: Path, timeout: float, out: Path | None, *, as_json: bool) -> None:
    """Answer a property: ``sat``, with the counterexample in the file ``out``, ``unsat`` or ``unknown``."""
    from assay.certification.vnnlib import verify_file, write_counterexample

    o.spare(out)
    verdict = verify_file(model, file, timeout)
    if verdict.x is not None and verdict.y is not None and out is not None:
        write_counterexample(out, verdict.x, verdict.y)
    if as_json:
        o.emit({"answer": verdict.answer, "seconds": verdict.seconds, "reason": verdict.reason})
        return
    typer.echo(verdict.answer)
    if verdict.reason:
        o.errors.print(verdict.reason, markup=False, soft_wrap=True)


def proofs(result: "Evaluation") -> dict[str, Any]:
    """Return the JSON object of ``--json``."""
    samples, manifest = result.samples, result.run.manifest
    lower, upper = (samples[c].to_numpy() for c in ("lower", "upper"))
    right = int(sum(s != "misclassified" for s in samples["status"].to_pylist()))
    proven = int((lower > 0).sum())
    found: dict[str, float] = {"proven": proven, "open": right - proven, "wrong": result.n - right}
    if result.eps is None and right:
        found |= {"mean_lower": float(lower.sum()) / right}
        if (upper < float("inf")).all():
            found |= {"mean_upper": float(upper.sum()) / right, "bracket_ratio": float(lower.sum() / upper.sum())}
    return {**summary(result), **found, "prove": manifest["identity"]["prove"]}
