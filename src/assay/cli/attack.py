"""``assay attack``: one attack by name."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from assay.cli import options as o
from assay.core.errors import RunError
from assay.core.registry import UsageError, closest

if TYPE_CHECKING:
    from torch import Tensor

    from assay.attacks import Runnable
    from assay.data import Data
    from assay.models import Model
    from assay.threats import Threat

BLOCK = 256


@o.told
def attack(
    model: o.ModelArg,
    data: o.DataArg,
    with_: Annotated[str, typer.Option("--with", metavar="NAME", help="fgsm, bim, pgd, apgd, square, ...")],
    threat: o.ThreatOpt = "linf:8/255",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the attack, e.g. steps=200.")
    ] = None,
    target: Annotated[str | None, typer.Option(metavar="CLASS", help="Wanted class, by name or number.")] = None,
    save_images: Annotated[Path | None, typer.Option(metavar="DIR", help="Write adversarial images as PNG.")] = None,
    arch: o.Arch = None,
    box: o.BoxOpt = (0.0, 1.0),
    mean: o.Mean = None,
    std: o.Std = None,
    trust_pickle: o.TrustPickle = False,
    limit: o.Limit = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    batch_size: o.BatchSize = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Run one attack on every sample that the model gets right, and say what it broke and what that cost.

    assay attack demo:mnist-plain demo:mnist --with fgsm --threat linf:0.1 --limit 200
    assay attack demo:mnist-plain demo:mnist --with targeted-ascent --threat linf --target 4 --save-images out
    """
    import torch

    from assay.attacks import get
    from assay.data import load_data
    from assay.evaluation.preflight import check_data, check_model
    from assay.threats import Threat

    chosen = get(with_, **_parameters(set_ or []))
    samples = load_data(data, limit=limit, trust_pickle=trust_pickle)
    net = o.model_of(model, arch, box, mean, std, trust_pickle=trust_pickle)
    place, parsed = o.device_of(device), Threat.parse(threat)
    samples = samples.scaled(net.domain.lo, net.domain.hi)
    findings = check_data(samples, net.domain)
    parsed = parsed.within(net.domain, int(torch.Size(samples.shape).numel()))
    checked = check_model(net, samples, parsed, place)
    wanted = None if target is None else _class(target, samples, checked.classes)
    parsed = Threat(parsed.norm, parsed.eps, parsed.box, targeted=wanted is not None)
    if save_images is not None:
        try:
            save_images.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise RunError(f"a folder for images at {save_images}", str(e), "Choose another folder.") from e
    work = _Work(chosen, checked.model, samples, parsed, wanted, seed, place, save_images)
    for rows in torch.arange(len(samples)).split(batch_size or BLOCK):  # type: ignore[no-untyped-call]
        work.attack_rows(rows)
    _show(
        work.summary()
        | {
            "attack": with_,
            "threat": threat,
            "target": wanted,
            "findings": [f.to_json() for f in (*findings, *checked.findings)],
        },
        as_json=as_json,
        quiet=quiet,
    )


def _parameters(pairs: Iterable[str]) -> dict[str, str]:
    parameters = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set takes NAME=VALUE, for example steps=200; got {pair!r}")
        parameters[name.strip()] = value.strip()
    return parameters


def _class(text: str, data: "Data", classes: int) -> int:
    names = list(data.class_names or [])
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < classes:
        return int(text)
    hint = closest(text, names) if names else f"Classes are 0 to {classes - 1}."
    raise UsageError(f"a class name, or a number below {classes}", repr(text), hint)


@dataclass(slots=True)
class _Work:
    """One attack on the samples of some data, block by block, and what came of it so far."""

    attack: "Runnable"
    model: "Model"
    data: "Data"
    threat: "Threat"
    wanted: int | None
    seed: int
    device: str
    folder: Path | None
    attacked: int = 0
    broken: int = 0
    forwards: int = 0
    backwards: int = 0
    saved: int = 0
    survive: int = 0
    sizes: list[float] = field(default_factory=list)

    def ask(self, x: "Tensor") -> "Tensor":
        """Return predicted labels."""
        import torch

        from assay.models import Door

        with self.model.frozen(self.device) as live:
            rows = torch.arange(len(x), device=live.device)
            return Door(live, len(x)).logits(x.to(live.device), rows).argmax(1).cpu()

    def attack_rows(self, rows: "Tensor") -> None:
        """Attack those of some samples that are right, and not of the wanted class already."""
        import torch

        x, y = self.data.batch(rows), self.data.labels[rows]
        at = ((self.ask(x) == y) & (y != (-1 if self.wanted is None else self.wanted))).nonzero()[:, 0]
        if not len(at):
            return
        goal = y[at] if self.wanted is None else torch.full_like(y[at], self.wanted)
        r = self.attack(self.model, x[at], goal, self.threat, self.seed, indices=rows[at], device=self.device)
        self.attacked += len(at)
        self.broken += int(r.success.sum())
        self.forwards += int(r.forwards.sum())
        self.backwards += int(r.backwards.sum())
        self.sizes += r.size[r.success].tolist()
        if self.folder is not None and r.success.any():
            self._save(rows[at][r.success], y[at][r.success], r.x[r.success])

    def _save(self, rows: "Tensor", labels: "Tensor", x: "Tensor") -> None:
        """Write PNGs, read them back, and ask the model again: only what fools then is counted as fooling."""
        import torch

        from assay.data.png import read_png, write_png

        assert self.folder is not None
        box, back = self.model.domain, []
        for i, y, image in zip(rows.tolist(), labels.tolist(), x, strict=True):
            path = self.folder / f"{i:06d}-label-{y}.png"
            write_png(path, (image - box.lo) / box.width)
            back.append(read_png(path) * box.width + box.lo)
        guess = self.ask(torch.stack(back))
        self.survive += int((guess != labels if self.wanted is None else guess == self.wanted).sum())
        self.saved += len(back)

    def summary(self) -> dict[str, Any]:
        sizes = sorted(self.sizes)
        images = {"saved": self.saved, "fool_when_read_back": self.survive, "folder": str(self.folder)}
        return {
            "n": len(self.data),
            "attacked": self.attacked,
            "broken": self.broken,
            "success_rate": self.broken / self.attacked if self.attacked else None,
            "median_size": sizes[len(sizes) // 2] if sizes else None,
            "passes": {"forwards": self.forwards, "backwards": self.backwards},
            "images": images if self.folder is not None else None,
        }


def _show(result: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    if as_json:
        o.emit(result)
        return
    rate = "-" if result["success_rate"] is None else f"{result['success_rate']:.1%}"
    sentence = f"{result['attack']} within {result['threat']} broke {result['broken']} of {result['attacked']} ({rate})"
    if quiet:
        typer.echo(sentence)
        return
    table = Table(title=sentence, box=None, show_header=False, title_justify="left", pad_edge=False)
    each = max(result["attacked"], 1)
    table.add_row("samples", f"{result['n']}, of which {result['attacked']} were right and attacked")
    if result["median_size"] is not None:
        table.add_row("median size", f"{result['median_size']:.4g}")
    passes = result["passes"]
    table.add_row(
        "passes a sample", f"{passes['forwards'] / each:.1f} forward, {passes['backwards'] / each:.1f} backward"
    )
    if images := result["images"]:
        table.add_row(
            "images",
            f"{images['saved']} in {images['folder']}; {images['fool_when_read_back']} still fool when read back",
        )
    for finding in result["findings"]:
        table.add_row(f"{finding['severity']}: {finding['code']}", finding["message"])
    Console(highlight=False).print(table)
