"""``assay attack``: one attack by name."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from assay.cli import options as o
from assay.cli import workers as w
from assay.core.errors import DataError, RunError
from assay.core.executor import Executor, device_of, serial
from assay.core.files import replacing
from assay.core.registry import UsageError, closest

if TYPE_CHECKING:
    from torch import Tensor

    from assay.attacks import Runnable
    from assay.data import Data
    from assay.models import Model
    from assay.models.door import Passes
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
    start_from: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Samples to start at, instead of noise."),
    ] = None,
    save_images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write PNGs proved to fool when read back; sets --quantize 8."),
    ] = None,
    quantize: o.Quantize = None,
    max_passes: Annotated[
        int | None, typer.Option(metavar="N", help="Most passes, forward and backward together, a sample may cost.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write attack.json and adversarials.npz.")] = None,
    arch: o.Arch = None,
    box: o.BoxOpt = (0.0, 1.0),
    mean: o.Mean = None,
    std: o.Std = None,
    trust_pickle: o.TrustPickle = False,
    size: o.Size = None,
    limit: o.Limit = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    batch_size: o.BatchSize = None,
    executor: w.ExecutorOpt = None,
    workers: w.WorkersOpt = None,
    gpus_per_worker: w.GpusOpt = None,
    address: w.AddressOpt = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Refuse to replace an attack in --out.", rich_help_panel="Run")
    ] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Run one attack on every sample that the model gets right, and say what it broke and what that cost.

    assay attack demo:mnist-plain demo:mnist --with fgsm --threat linf:0.1 --limit 200
    assay attack demo:mnist-plain demo:mnist --with targeted-ascent --threat linf --target 4 --save-images images
    """
    import torch

    from assay.attacks import ATTACKS, get
    from assay.evaluation.preflight import check_model
    from assay.evaluation.reading import check_data
    from assay.models.door import metered
    from assay.threats import Threat

    chosen = get(with_, **o.parameters(set_ or []))
    net = o.model_of(model, arch, box, mean, std, trust_pickle=trust_pickle)
    mark = _mark(net) if out is not None else ""  # before the model is asked anything: it may count its calls
    samples = net.takes(o.data_of(data, size, limit=limit, trust_pickle=trust_pickle))
    bits, place = _bits(quantize, samples.shape, save_images), o.device_of(device)
    parsed = replace(Threat.parse(threat), quantize=bits)
    shared = w.executor_of(executor, workers, gpus_per_worker, address, place)
    findings = check_data(samples, net.domain)
    if start_from is not None:
        pool = o.data_of(start_from, size, limit=None, trust_pickle=trust_pickle)
        chosen = _started(chosen, with_, net.takes(pool), samples.shape)
    parsed = parsed.within(net.domain, int(torch.Size(samples.shape).numel()))
    with metered() as before:
        checked = check_model(net, samples, parsed, place, repair=ATTACKS.traits(with_)["access"] == "gradient")
    wanted = None if target is None else _class(target, samples, checked.classes)
    _make(save_images, out, replace_=not no_resume)
    parsed, asked = replace(parsed, targeted=wanted is not None), replace(checked.model, reference=None)  # compared
    work = _Work(chosen, asked, samples, parsed, wanted, seed, device_of(shared, place), max_passes)
    found = _Found(replace(work, device=place), save_images)
    for part in work.parts(batch_size, shared):
        found.add(part)
    result = found.summary(before, kept=out is not None) | {
        "attack": with_,
        "threat": threat,
        "quantize": bits,
        "max_passes": max_passes,
        "target": wanted,
        "findings": [f.to_json() for f in (*findings, *checked.findings)],
    }
    _keep(out, result, found, mark, checked.classes)
    _show(result, as_json=as_json, quiet=quiet)


def _started(chosen: "Runnable", name: str, pool: "Data", shape: tuple[int, ...]) -> "Runnable":
    """Return an attack that sees labels only, with samples of the attacked ones' ``shape`` to start at."""
    from assay.attacks import ATTACKS, Pool, names
    from assay.attacks.decision.walk import Walk

    if not isinstance(chosen, Walk):
        able = [n for n in names(access="decision") if isinstance(k := ATTACKS[n], type) and issubclass(k, Walk)]
        expected = "with --start-from, an attack that walks from a start"
        raise UsageError(expected, repr(name), f"One of {', '.join(able)}.")
    if pool.shape != shape:
        raise DataError(f"samples {shape} to start from", f"{pool.shape}", "Resize them, or leave --start-from out.")
    walk: Any = chosen  # each kind of walk is a dataclass, though Walk is none
    return replace(walk, start=Pool(pool.batch(range(len(pool))), pool.labels))  # type: ignore[no-any-return]


def _bits(quantize: int | None, shape: tuple[int, ...], images: Path | None) -> int | None:
    """Return the number of bits to look for: what PNG files hold, where images are to be saved."""
    if images is None:
        return quantize
    from assay.data.png import check_saveable

    check_saveable(shape)
    if quantize not in (None, 8):
        raise UsageError("--quantize 8 with --save-images", f"{quantize}", "PNG images have 8 bits; leave it out.")
    return 8


def _make(images: Path | None, out: Path | None, *, replace_: bool) -> None:
    """Make the folders that are to be written to, before any long work."""
    if out is not None and (out / "manifest.json").exists():
        raise RunError(f"no run in {out}, for --out", "the manifest of an evaluation", "Choose another --out.")
    if out is not None and not replace_ and (out / "attack.json").exists():
        raise RunError(f"no attack in {out}, for --no-resume", "attack.json", "Choose another --out.")
    for folder in (images, out):
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise RunError(f"a folder to write to at {folder}", str(e), "Choose another folder.") from e


def _clear(folder: Path | None) -> None:
    """Remove images of an earlier attack, for nothing vouches for them any more."""
    for path in [*folder.iterdir()] if folder is not None else ():
        if re.fullmatch(r"\d{6,}-label-\d+\.png", path.name):
            path.unlink()


def _mark(net: "Model") -> str:
    from assay.models.fingerprint import fingerprint

    return fingerprint(net)


def _keep(folder: Path | None, result: dict[str, Any], found: "_Found", mark: str, classes: int) -> None:
    """Write what was found: ``attack.json``, and one row a sample that was attacked in ``adversarials.npz``."""
    if folder is None:
        return
    import numpy as np
    import torch

    said = [b | {"prediction": found.work.ask(b["x"])} for b in found.blocks]
    blocks = sorted(said, key=lambda b: int(b["index"][0]))
    columns = {k: torch.cat([b[k] for b in blocks]).numpy() for k in (blocks or [{}])[0]}
    with replacing(folder / "adversarials.npz") as f:
        np.savez(f, **columns)  # type: ignore[arg-type]
    with replacing(folder / "attack.json") as f:
        f.write((json.dumps(result | _told(result, found, mark, classes), indent=1) + "\n").encode())


def _told(result: dict[str, Any], found: "_Found", mark: str, classes: int) -> dict[str, Any]:
    """Return what the file says beside the result: of whom, by whom, where, and which samples were wrong as they are.

    As in the manifest of a run, ``identity`` is what decides the numbers.
    """
    from assay import __version__
    from assay.attacks import describe_attack
    from assay.evaluation.about import about

    work = found.work
    told = about(work.model, work.data, mark, classes, work.device)
    identity = {
        "threat": work.threat.to_json(),
        "effort": result["attack"],
        "target": work.wanted,
        "max_passes": work.max_passes,
        "seed": work.seed,
        "model": mark,
        "data": told["data"]["fingerprint"],
        "n": len(work.data),
        "assay": __version__,
    }
    return {
        "parameters": describe_attack(work.attack),
        "seed": work.seed,
        "assay": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": o.command_line(),
        "identity": identity,
        **told,
        "misclassified": found.misclassified(),
    }


def _class(text: str, data: "Data", classes: int) -> int:
    names = list(data.class_names or [])
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < classes:
        return int(text)
    hint = closest(text, names) if names else f"Classes are 0 to {classes - 1}."
    raise UsageError(f"a class name, or a number below {classes}", repr(text), hint)


@dataclass(frozen=True, slots=True)
class _Work:
    """One attack on samples of some data; can be sent to another process."""

    attack: "Runnable"
    model: "Model"
    data: "Data"
    threat: "Threat"
    wanted: int | None
    seed: int
    device: str
    max_passes: int | None

    def parts(self, size: int | None, executor: Executor | None) -> Iterator[dict[str, "Tensor"]]:
        """Yield, block by block and in any order, what came of the samples that were attacked."""
        import torch

        most = len(self.data) if getattr(self.attack, "shared", False) else BLOCK
        rows = torch.arange(len(self.data)).split(size or most)  # type: ignore[no-untyped-call]
        parts = (executor or serial)(partial(_attacked, self), (r.tolist() for r in rows))
        with contextlib.ExitStack() as stack:
            stack.callback(getattr(parts, "close", lambda: None))
            yield from parts

    def ask(self, x: "Tensor") -> "Tensor":
        """Return predicted labels."""
        import torch

        from assay.models import Door

        with self.model.frozen(self.device) as live:
            rows = torch.arange(len(x), device=live.device)
            return Door(live, len(x)).logits(x.to(live.device), rows).argmax(1).cpu()


def _attacked(work: _Work, rows: list[int]) -> dict[str, "Tensor"]:
    """Attack those samples that are right, and not of the wanted class already; return columns, a row for each.

    ``wrong`` (k, 3) are index, label and prediction of those that are wrong as they are.
    """
    import torch

    index = torch.tensor(rows)
    x, y = work.data.batch(index), work.data.labels[index]
    said = work.ask(x)
    wrong = torch.stack([index, y, said], dim=1)[said != y]
    at = ((said == y) & (y != (-1 if work.wanted is None else work.wanted))).nonzero()[:, 0]
    if not len(at):
        return {"wrong": wrong}
    goal = y[at] if work.wanted is None else torch.full_like(y[at], work.wanted)
    how: dict[str, Any] = {"indices": index[at], "device": work.device, "max_passes": work.max_passes}
    r = work.attack(work.model, x[at], goal, work.threat, work.seed, **how)
    found = {n: getattr(r, n) for n in ("x", "success", "size", "forwards", "backwards")}
    return {"wrong": wrong, "index": index[at], "label": y[at], **found}


@dataclass(slots=True)
class _Found:
    """What came of an attack so far; images are written here, not where the work is done."""

    work: _Work
    folder: Path | None
    attacked: int = 0
    broken: int = 0
    forwards: int = 0
    backwards: int = 0
    written: int = 0
    proved: int = 0
    sizes: list[float] = field(default_factory=list)
    blocks: list[dict[str, "Tensor"]] = field(default_factory=list)
    wrong: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, part: dict[str, "Tensor"]) -> None:
        """Count what came of a block, and keep it."""
        self.wrong += [(i, y, said) for i, y, said in part["wrong"].tolist()]
        part = {name: column for name, column in part.items() if name != "wrong"}
        if not part:
            return
        success = part["success"]
        if not self.attacked:
            _clear(self.folder)
        self.attacked += len(success)
        self.broken += int(success.sum())
        self.forwards += int(part["forwards"].sum())
        self.backwards += int(part["backwards"].sum())
        self.sizes += part["size"][success].tolist()
        self.blocks.append(part)
        if self.folder is not None:
            self._save(part["index"][success], part["label"][success], part["x"][success])

    def _save(self, rows: "Tensor", labels: "Tensor", x: "Tensor") -> None:
        """Write PNGs, read them back, and ask the model again: only those that fool then are kept."""
        import torch

        from assay.data.png import read_png, write_png

        assert self.folder is not None
        box = self.work.model.domain
        paths = [self.folder / f"{i:06d}-label-{y}.png" for i, y in zip(rows.tolist(), labels.tolist(), strict=True)]
        trial = [p.with_name(f".{p.name}.unproved") for p in paths]
        for path, image in zip(trial, x, strict=True):
            write_png(path, image, box.lo, box.hi)
        back = [read_png(p, box.lo, box.hi, x.dtype) for p in trial]
        guess = self.work.ask(torch.stack(back)) if back else labels
        fools = guess != labels if self.work.wanted is None else guess == self.work.wanted
        for path, unproved, keep in zip(paths, trial, fools.tolist(), strict=True):
            if keep:
                unproved.replace(path)
            else:
                unproved.unlink()
        self.written += len(paths)
        self.proved += int(fools.sum())

    def misclassified(self) -> dict[str, list[int]]:
        """Return the samples that are wrong as they are, by column."""
        columns = zip(*sorted(self.wrong), strict=True) if self.wrong else ((), (), ())
        return {name: [*column] for name, column in zip(("index", "label", "prediction"), columns, strict=True)}

    def summary(self, before: "Passes", *, kept: bool) -> dict[str, Any]:
        """Return what came of it; ``checks`` are the passes ``before`` the attack, and those for predictions."""
        asked = len(self.work.data) + self.written + kept * self.attacked
        sizes = sorted(self.sizes)
        images = {"written": self.written, "proved": self.proved, "folder": str(self.folder)}
        return {
            "n": len(self.work.data),
            "attacked": self.attacked,
            "broken": self.broken,
            "success_rate": self.broken / self.attacked if self.attacked else None,
            "median_size": sizes[len(sizes) // 2] if sizes else None,
            "passes": {"forwards": self.forwards, "backwards": self.backwards},
            "checks": {
                "forwards": before.forwards + asked * self.work.model.deciding,
                "backwards": before.backwards,
            },
            "images": images if self.folder is not None else None,
        }


def _show(result: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    if as_json:
        o.emit(result)
        return
    rate = "-" if result["success_rate"] is None else f"{result['success_rate']:.1%}"
    bits = f" at {result['quantize']} bits" if result["quantize"] else ""
    sentence = (
        f"{result['attack']} within {result['threat']}{bits} broke {result['broken']} of {result['attacked']} ({rate})"
    )
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
    table.add_row("checks and predictions", "{forwards:,} forward, {backwards:,} backward".format_map(result["checks"]))
    if images := result["images"]:
        table.add_row(
            "images",
            f"{images['written']} written to {images['folder']}; the {images['proved']} kept fool when read back",
        )
    for finding in result["findings"]:
        table.add_row(f"{finding['severity']}: {finding['code']}", finding["message"])
    Console(highlight=False).print(table)
