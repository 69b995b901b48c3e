"""``assay study landscape``, ``walk`` and ``attribution``: pictures of why a network fails, with their numbers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from assay.cli import options as o
from assay.core.errors import RunError
from assay.core.registry import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from assay.data import Data
    from assay.models import Model
    from assay.study.attribution import Attribution
    from assay.study.plane import Landscape
    from assay.study.walk import Distances, Walk

Index = Annotated[int, typer.Option("--index", min=0, metavar="I", help="Which sample of DATA.")]
Page = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the page, e.g. page.html.")]
Against = Annotated[
    list[str] | None, typer.Option(metavar="MODEL", help="Another model to set beside the first, e.g. hardened.")
]
Directions = Annotated[
    str, typer.Option(metavar="gradient-random|gradient-adversarial", help="What spans the plane, beside the gradient.")
]
Weights = Annotated[bool, typer.Option("--weights", help="Over the weights, on the first samples of DATA, instead.")]
Samples = Annotated[int, typer.Option(min=1, metavar="N", help="With --weights: how many samples.")]
Span = Annotated[float | None, typer.Option(help="How far the plane extends to either side.")]
Steps = Annotated[int | None, typer.Option(help="Points along a side; odd.")]
NormOpt = Annotated[str, typer.Option(metavar="linf|l2|l1|l0", help="What the size of a change is.")]
Attack = Annotated[str, typer.Option(metavar="NAME", help="The minimal-norm attack that looks for changes.")]
AttackSteps = Annotated[int, typer.Option("--steps", min=1, help="Its steps.")]
Target = Annotated[str | None, typer.Option(metavar="CLASS", help="Where the ascent goes; by default the nearest.")]
Gif = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the ascent as an animation.")]
Matrix = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Distances between all classes too, over the first N samples.")
]
ThreatOpt = Annotated[str, typer.Option("--threat", metavar="NORM:EPS", help="What the attack may do.")]
AttackName = Annotated[str, typer.Option(metavar="NAME", help="Any attack by name.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the attack, e.g. steps=200.")
]
Some = Annotated[int, typer.Option("--limit", min=1, metavar="N", help="Use only the first N samples of DATA.")]
Method = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="integrated-gradients or saliency; both, if not given.")
]
Baseline = Annotated[
    float | None, typer.Option(help="Where integrated gradients start; by default the least value of the box.")
]
Points = Annotated[int, typer.Option("--steps", min=1, help="Steps of integrated gradients.")]
Shown = Annotated[int, typer.Option(min=0, metavar="N", help="How many samples the page shows.")]


@o.told
def landscape(
    model: o.ModelArg,
    data: o.DataArg,
    threat: Annotated[
        str | None, typer.Option("--threat", metavar="NORM[:EPS]", help="linf:8/255, l2:0.5, ...")
    ] = None,
    index: Index = 0,
    against: Against = None,
    directions: Directions = "gradient-random",
    weights: Weights = False,
    samples: Samples = 128,
    span: Span = None,
    steps: Steps = None,
    out: Page = None,
    arch: o.Arch = None,
    box: o.BoxOpt = (0.0, 1.0),
    mean: o.Mean = None,
    std: o.Std = None,
    trust_pickle: o.TrustPickle = False,
    size: o.Size = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Draw the loss around a sample, or around the weights, and say how curved it is and where gradients vanish.

    assay study landscape demo:mnist-plain demo:mnist --threat linf:0.3 --against demo:mnist-robust --out page.html
    assay study landscape demo:mnist-plain demo:mnist --weights --out weights.html
    """
    from assay.study.landscape import landscape as measure
    from assay.study.weights import weight_landscape

    if threat is None and not weights:
        raise UsageError("--threat", "none", "Write --threat linf:0.3; or --weights.")
    o.spare(out)
    place = o.device_of(device)
    nets = [o.model_of(m, arch, box, mean, std, trust_pickle=trust_pickle) for m in (model, *(against or []))]
    known = _data(data, size, nets[0], samples if weights else index + 1, trust_pickle=trust_pickle)
    if weights:
        x = known.batch(range(len(known)))
        found = weight_landscape(nets, x, known.labels, span or 1.0, steps or 21, seed, device=place)
    else:
        one, label = _sample(known, index)
        named: dict[str, Any] = {"index": index, "label": _name(known, label), "device": place}
        found = measure(nets, one, label, str(threat), directions, span, steps or 41, seed, **named)
    page = _written(lambda path: found.report(path, o.command_line()), out)
    if as_json:
        o.emit(found.to_json() | {"page": page})
        return
    _show_landscape(found, page, quiet=quiet)


@o.told
def walk(
    model: o.ModelArg,
    data: o.DataArg,
    index: Index = 0,
    norm: NormOpt = "l2",
    attack: Attack = "fmn",
    steps: AttackSteps = 200,
    target: Target = None,
    matrix: Matrix = None,
    gif: Gif = None,
    out: Page = None,
    arch: o.Arch = None,
    box: o.BoxOpt = (0.0, 1.0),
    mean: o.Mean = None,
    std: o.Std = None,
    trust_pickle: o.TrustPickle = False,
    size: o.Size = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Find what would have to change before the model calls a sample something else, for every other class.

    assay study walk demo:mnist-plain demo:mnist --index 3 --out page.html --gif ascent.gif
    assay study walk demo:mnist-robust demo:mnist --norm linf --matrix 20 --out page.html
    """
    from assay.study.walk import distances
    from assay.study.walk import walk as go

    o.spare(out, gif)
    place = o.device_of(device)
    net = o.model_of(model, arch, box, mean, std, trust_pickle=trust_pickle)
    known = _data(data, size, net, max(index + 1, matrix or 0), trust_pickle=trust_pickle)
    x, label = _sample(known, index)
    wanted = None if target is None else _class(target, known)
    found = go(net, x, label, norm, attack, steps, seed, index=index, target=wanted, device=place)
    table = distances(net, known, norm, matrix, attack, steps, seed, device=place) if matrix else None
    names = known.class_names
    page = _written(lambda path: found.report(path, names, table, o.command_line()), out)
    film = _written(found.gif, gif) if found.ascent is not None else None
    if as_json:
        also = {} if table is None else {"distances": table.to_json()}
        o.emit(found.to_json() | also | {"page": page, "gif": film})
        return
    _show_walk(found, known, table, [page, film], quiet=quiet)


@o.told
def attribution(
    model: o.ModelArg,
    data: o.DataArg,
    threat: ThreatOpt,
    attack: AttackName = "pgd",
    set_: Set = None,
    method: Method = None,
    baseline: Baseline = None,
    steps: Points = 50,
    shown: Shown = 8,
    limit: Some = 8,
    out: o.Out = None,
    arch: o.Arch = None,
    box: o.BoxOpt = (0.0, 1.0),
    mean: o.Mean = None,
    std: o.Std = None,
    trust_pickle: o.TrustPickle = False,
    size: o.Size = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    batch_size: o.BatchSize = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Show which pixels the answers go back to, clean and attacked: saliency and integrated gradients, by captum.

    assay study attribution demo:mnist-plain demo:mnist --threat linf:0.1 --attack pgd --limit 8 --out attribution
    """
    from assay.attacks import get
    from assay.study.attribution import METHODS
    from assay.study.attribution import attribution as measure

    place = o.device_of(device)
    net = o.model_of(model, arch, box, mean, std, trust_pickle=trust_pickle)
    known = o.data_of(data, size, limit=limit, trust_pickle=trust_pickle)
    methods = method or METHODS
    parts: dict[str, Any] = {"baseline": baseline, "steps": steps, "shown": shown, "batch_size": batch_size}
    found = measure(
        net, known, threat, get(attack, **o.parameters(set_ or [])), methods, seed=seed, device=place, **parts
    )
    settings = [
        model,
        data,
        threat,
        "attribution",
        attack,
        set_,
        methods,
        seed,
        limit,
        arch,
        box,
        mean,
        std,
        parts,
        size,
    ]
    folder = found.save(out or o.run_folder(*settings), o.command_line())
    page = str(folder / "attribution.html")
    if as_json:
        o.emit(found.to_json() | {"run": str(folder), "page": page})
        return
    _show_attribution(found, page, quiet=quiet)


def _data(data: str, size: str | None, model: "Model", least: int, *, trust_pickle: bool) -> "Data":

    return model.takes(o.data_of(data, size, limit=least, trust_pickle=trust_pickle))


def _sample(data: "Data", index: int) -> tuple["Tensor", int]:
    if index >= len(data):
        raise UsageError(f"an --index below {len(data)}", f"{index}", "It counts the samples of DATA from 0.")
    return data.batch([index])[0], int(data.labels[index])


def _name(data: "Data", label: int) -> str:
    names = data.class_names
    return names[label] if names is not None and label < len(names) else str(label)


def _class(text: str, data: "Data") -> int:
    names = list(data.class_names or ())
    if text in names:
        return names.index(text)
    if not text.isdigit():
        raise UsageError("a class by name or number", repr(text), f"Known: {', '.join(names) or 'numbers only'}.")
    return int(text)


def _written(write: Any, path: Path | None) -> str | None:
    """Write a file, making its folder, and return its name; nothing where none was asked for."""
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RunError(f"a folder to write to at {path.parent}", str(e), "Choose another --out.") from e
    return str(write(path))


def _show_landscape(found: "Landscape", page: str | None, *, quiet: bool) -> None:
    from assay.reports.landscape import headline, short
    from assay.reports.text import Units, percent

    typer.echo(headline(found, Units.of(found.threat)))
    if not quiet:
        table = Table(box=None, pad_edge=False)
        for column in ("model", "loss", "margin", "no gradient", "eigenvalues", "nonlinearity"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for s in found.surfaces:
            loss, margin = s.centre
            bends = ", ".join(map(short, s.eigenvalues))
            blind = f"{percent(s.blind)}{' (masked)' if s.masked else ''}"
            table.add_row(s.name, short(loss), short(margin), blind, bends, short(s.nonlinearity))
        Console(highlight=False).print(table)
    _show_files([page])


def _show_walk(found: "Walk", data: "Data", table: "Distances | None", files: list[str | None], *, quiet: bool) -> None:
    from assay.reports.text import percent
    from assay.reports.walk import Names, headline

    names = Names(tuple(data.class_names or ()))
    typer.echo(headline(found, names))
    if not quiet:
        rows = Table(box=None, pad_edge=False)
        rows.add_column("to class")
        rows.add_column(f"least change found ({found.norm})", justify="right")
        for way in found.ways:
            rows.add_row(names(way.target), f"{way.size:.4g}" if way.found else "none found")
        console = Console(highlight=False)
        console.print(rows)
        if table is not None:
            console.print(f"{percent(table.found)} of the searches between classes succeeded; the page has the matrix.")
    _show_files(files)


def _show_attribution(found: "Attribution", page: str, *, quiet: bool) -> None:
    from assay.reports.attribution import headline
    from assay.reports.text import DASH

    typer.echo(headline(found))
    if not quiet:
        table = Table(box=None, pad_edge=False)
        for column in ("method", "samples", "label:\nattacked", "\nrandom", "rival:\nattacked", "\nrandom"):
            table.add_column(column, justify="left" if column in ("method", "samples") else "right")
        for method in found.methods:
            for name, fooled in (("fooled", True), ("held", False)):
                places = [(row, column) for row in (0, 1) for column in (0, 1)]
                known = [found.quantiles(method, "rank", at, fooled=fooled) for at in places]
                if any(known):
                    table.add_row(method, name, *(DASH if q is None else f"{q[1]:.2f}" for q in known))
        console = Console(highlight=False)
        console.print(table)
        console.print(
            "Medians of the rank correlation with the clean map: after the attack, and after a random change."
        )
    _show_files([page])


def _show_files(files: list[str | None]) -> None:
    console = Console(highlight=False)
    for file in files:
        if file is not None:
            console.print(f"written  {file}", markup=False, soft_wrap=True)
