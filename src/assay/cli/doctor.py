"""``assay doctor``: what is there, what is missing, and how to get it."""

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from assay import __version__
from assay.cli import options as o
from assay.core.errors import MissingExtraError
from assay.core.optional import need

_NEEDED: Final = ("torch", "numpy", "scipy", "pyarrow", "pillow", "safetensors", "fsspec", "jinja2", "rich", "typer")
_OPTIONAL: Final = {
    "torchvision": ("torchvision", "torchvision: models, augmentation policies"),
    "onnx": ("onnx", ".onnx files"),
    "onnxruntime": ("onnx", ".onnx files by their scores (ort:)"),
    "lightning_fabric": ("harden", "`assay harden`"),
    "timm": ("timm", "timm: models"),
    "transformers": ("huggingface", "hf: models"),
    "datasets": ("huggingface", "live data sets of Hugging Face"),
    "keras": ("keras", ".keras files, live Keras models"),
    "tensorflow": ("tensorflow", "SavedModels, live TensorFlow models"),
    "jax": ("jax", "JAX functions"),
    "sklearn": ("sklearn", "scikit-learn estimators"),
    "fastai": ("fastai", "fastai learners"),
    "lightning": ("lightning", "training with Lightning"),
    "captum": ("attribution", "`assay study attribution`"),
    "dash": ("serve", "`assay serve`"),
    "urllib3": ("http", "models behind HTTP"),
    "imagecorruptions": ("corruptions", "`--natural`"),
    "ray": ("ray", "`--executor ray`"),
    "s3fs": ("s3", "s3:// models, data and runs"),
    "gcsfs": ("gs", "gs:// models, data and runs"),
    "mlflow": ("mlflow", "`--track mlflow`"),
    "tensorboard": ("tensorboard", "`--track tensorboard`"),
    "wandb": ("wandb", "`--track wandb`"),
    "weasyprint": ("pdf", "evidence as PDF"),
}
"""Optional packages: the extra that installs each, and what it is for."""

_NAMES: Final = {"pillow": "PIL"}
"""The module of a distribution, where it is called otherwise."""


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
    brought = importlib.metadata.packages_distributions()  # looks at all that is installed
    parts = [
        Part("assay", __version__),
        Part("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *(_examine(n, f"pip install --force-reinstall {n}") for n in _NEEDED),
        _devices(),
        _demo(),
        *(_optional(n, *about, brought) for n, about in _OPTIONAL.items()),
    ]
    fault = any(p.fault for p in parts)
    if as_json:
        o.emit({"ok": not fault, "parts": [asdict(p) for p in parts]})
    else:
        _show(parts, fault=fault)
    if fault:
        raise typer.Exit(1)


def _examine(name: str, remedy: str) -> Part:
    try:
        version = importlib.metadata.version(name)
        importlib.import_module(_NAMES.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return Part(name, "missing", True, remedy)
    except Exception as e:  # whatever a broken installation raises is what is wanted here
        return Part(name, f"{version}, but its import fails: {_said(e)}", True, remedy)
    return Part(name, version)


def _optional(module: str, extra: str, purpose: str, brought: Mapping[str, list[str]]) -> Part:
    """Look for an optional package by its module: distributions of several names may bring it (tensorflow-cpu)."""
    remedy = f"for {purpose}: pip install 'assay[{extra}]'"
    if importlib.util.find_spec(module) is None:
        return Part(module, "not installed (optional)", False, remedy)
    version = importlib.metadata.version(brought.get(module, [module])[0])
    try:
        need(module, extra)
    except MissingExtraError as e:
        return Part(module, f"{version}, but its import fails: {e.found}", False, remedy)
    return Part(module, version)


def _said(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"


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
        table.add_row(mark, p.part, Text(p.found), Text(p.remedy))  # as it is: [onnx] is no markup
    console = Console(highlight=False)
    console.print(table)
    console.print("\nSomething that assay needs is broken." if fault else "\nAll that assay needs is there.")
