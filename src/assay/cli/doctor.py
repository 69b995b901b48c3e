"""``assay doctor``: what is there, what is missing, and how to get it."""

import importlib
import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from typing import Final, final

import typer
from rich.console import Console
from rich.table import Table

from assay import __version__
from assay.cli import options as o

_NEEDED: Final = ("torch", "numpy", "scipy", "pyarrow", "pillow", "safetensors", "jinja2", "rich", "typer")
_OPTIONAL: Final = {
    "torchvision": "pip install torchvision (of the release that belongs to your torch)",
    "onnx": "pip install 'assay[onnx]' (with onnxruntime, onnx2torch and onnx2pytorch), to read .onnx files",
    "lightning_fabric": "pip install 'assay[harden]', to train with `assay harden`",
    "keras": "support for .keras comes in a later version",
    "timm": "support for timm: comes in a later version",
    "transformers": "support for hf: comes in a later version",
    "fastai": "support for fastai comes in a later version",
    "ray": "support for clusters comes in a later version",
}
_MODULE: Final = {"pillow": "PIL"}


@final
@dataclass(frozen=True, slots=True)
class Part:
    """One line of the examination; ``fault`` says that assay cannot work like this."""

    part: str
    found: str
    fault: bool = False
    remedy: str = ""


@o.told
def doctor(as_json: o.Json = False) -> None:
    """Examine the installation: versions, devices, optional parts. Exits with 1 where something needed is broken."""
    parts = [
        Part("assay", __version__),
        Part("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *(_examine(n, needed=True, remedy=f"pip install --force-reinstall {n}") for n in _NEEDED),
        _devices(),
        _demo(),
        *(_examine(n, needed=False, remedy=r) for n, r in _OPTIONAL.items()),
    ]
    fault = any(p.fault for p in parts)
    if as_json:
        o.emit({"ok": not fault, "parts": [asdict(p) for p in parts]})
    else:
        _show(parts, fault=fault)
    if fault:
        raise typer.Exit(1)


def _examine(name: str, *, needed: bool, remedy: str) -> Part:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Part(name, "missing" if needed else "not installed (optional)", needed, remedy)
    try:
        importlib.import_module(_MODULE.get(name, name))
    except Exception as e:  # whatever a broken installation raises is what is wanted here
        said = (str(e).splitlines() or [""])[0]
        return Part(name, f"{version}, but its import fails: {type(e).__name__}: {said}", needed, remedy)
    return Part(name, version)


def _devices() -> Part:
    try:
        import torch
    except ImportError:
        return Part("devices", "unknown without torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Part("devices", ", ".join([f"cpu ({torch.get_num_threads()} threads)", *gpus]))


def _demo() -> Part:
    """Try the smallest real thing: a shipped model on a shipped image."""
    try:
        from assay.data import load_data
        from assay.models.loaders import load_model

        x = load_data("demo:mnist", limit=8).batch([*range(8)])
        shape = tuple(load_model("demo:mnist-robust")(x).shape)
    except Exception as e:
        return Part("demo model and data", f"{type(e).__name__}: {e}", True, "Reinstall assay.")
    return Part("demo model and data", f"work: logits {shape}")


def _show(parts: list[Part], *, fault: bool) -> None:
    table = Table("", "part", "found", "what to do", box=None, pad_edge=False)
    for p in parts:
        mark = "[red]x[/red]" if p.fault else "[green]+[/green]"
        mark = "[dim]-[/dim]" if not p.fault and p.remedy else mark
        table.add_row(mark, p.part, p.found, p.remedy)
    console = Console(highlight=False)
    console.print(table)
    console.print("\nSomething that assay needs is broken." if fault else "\nAll that assay needs is there.")
