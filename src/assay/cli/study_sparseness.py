"""``assay study sparseness``: how sparsely the layers of a network answer, clean and attacked."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from assay.cli import options as o

if TYPE_CHECKING:
    from assay.study import Sparseness

Attack = Annotated[str, typer.Option(metavar="NAME", help="fgsm, pgd, apgd, ...")]
Threat = Annotated[
    str | None, typer.Option("--threat", metavar="NORM:EPS", help="What the attacks may do; linf:0.03 if not given.")
]
Eps = Annotated[float | None, typer.Option(metavar="E", help="Short for --threat linf:E.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the attack, e.g. steps=200.")
]
Layers = Annotated[
    str | None,
    typer.Option(metavar="PATTERN[,...]", help="Layers or modules by name: conv*, features.1; else all activations."),
]
Bins = Annotated[int, typer.Option(min=1, help="Of the histograms over 0 to 1.")]
Plain = Annotated[bool, typer.Option("--no-adaptive", help="Leave out the attack that knows of the index.")]
Weight = Annotated[float, typer.Option(min=0.0, help="Of hiding, in the attack that knows of the index.")]


@o.told
def sparseness(
    model: o.ModelArg,
    data: o.DataArg,
    attack: Attack = "fgsm",
    threat: Threat = None,
    eps: Eps = None,
    set_: Set = None,
    layers: Layers = None,
    bins: Bins = 100,
    no_adaptive: Plain = False,
    weight: Weight = 10.0,
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
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure the population sparseness of every layer, clean and attacked side by side, and write a page about it.

    assay study sparseness demo:mnist-plain demo:mnist --attack fgsm --eps 0.03 --limit 200
    """
    from assay.attacks import get
    from assay.evaluation.reading import check_data
    from assay.study import sparseness as measure

    wanted = _threat(threat, eps)
    loaded = o.model_of(model, arch, box, mean, std, trust_pickle=trust_pickle)
    samples = loaded.takes(o.data_of(data, size, limit=limit, trust_pickle=trust_pickle))
    check_data(samples, loaded.domain)
    found = measure(
        loaded,
        samples,
        wanted,
        get(attack, **o.parameters(set_ or [])),
        layers,
        bins,
        seed=seed,
        device=o.device_of(device),
        batch_size=batch_size,
        progress=not (quiet or as_json),
        adaptive=not no_adaptive,
        weight=weight,
    )
    settings = [model, data, wanted, "sparseness", attack, set_, layers, bins, no_adaptive, weight, seed, limit]
    folder = found.save(out or o.run_folder(*settings, arch, box, mean, std, *([size] if size else [])))
    _show(found, folder, as_json=as_json, quiet=quiet)


def _threat(threat: str | None, eps: float | None) -> str:
    """Return the threat as text; ``--eps`` is that of linf.

    Raises:
        UsageError: both were given.
    """
    from assay.core.registry import UsageError

    if threat is not None and eps is not None:
        raise UsageError("--threat or --eps", "both", "--eps 0.03 is short for --threat linf:0.03.")
    return threat or f"linf:{0.03 if eps is None else eps:g}"


def _show(found: "Sparseness", folder: Path, *, as_json: bool, quiet: bool) -> None:
    from assay.reports.sparseness import area, chance, headline, index

    plain = found.to_json()
    if as_json:
        o.emit(plain | {"run": str(folder)})
        return
    typer.echo(headline(plain))
    if not quiet:
        table = Table(box=None, pad_edge=False, padding=(0, 1))
        for name in _COLUMNS:
            table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
        for s in plain["layers"]:
            sides = [s["sides"][side][what] for what in ("mode", "psi") for side in ("clean", "attacked")]
            shift = s["shift"] or {"rank_biserial": float("nan"), "p": None}
            moved = [f"{shift['rank_biserial']:+.2f}", chance(shift["p"]).replace(" ", "")]
            table.add_row(s["name"], *map(index, sides), *moved, *(area(s[n]) for n in _AREAS))
        Console(highlight=False).print(table)
        typer.echo("The columns ROC are areas: 0.5 tells nothing apart, 0 and 1 everything. None of this is a defence.")
    typer.echo(f"{folder / 'sparseness.html'}")


_COLUMNS = (
    "layer", "peak\nclean", "peak\nattacked", "mean\nclean", "mean\nattacked", "effect", "p",
    "ROC\nall", "ROC\nfooled", "ROC\nadaptive",
)  # fmt: skip

_AREAS = ("auc", "auc_fooled", "auc_adaptive")
