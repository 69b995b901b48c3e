"""What commands share: their options, what they load, and how they end."""

import functools
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, ParamSpec, TypeAlias, TypeVar

import typer
from rich.console import Console

from assay.core.errors import AssayError
from assay.core.plain import without_controls
from assay.core.registry import UsageError

if TYPE_CHECKING:
    from assay.data import Data
    from assay.models import Model

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130

_INPUT, _RUN, _SHOW = "Model and data", "Run", "Output"

ModelArg: TypeAlias = Annotated[str, typer.Argument(metavar="MODEL", help="A model file or name; see `assay --help`.")]
DataArg: TypeAlias = Annotated[str, typer.Argument(metavar="DATA", help="Images with labels; see `assay --help`.")]
Arch: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="MODULE:CALLABLE", help="Builds the network for weight files.", rich_help_panel=_INPUT),
]
BoxOpt: TypeAlias = Annotated[
    tuple[float, float],
    typer.Option("--box", metavar="LO HI", help="Input domain before normalisation.", rich_help_panel=_INPUT),
]
Mean: TypeAlias = Annotated[
    str | None, typer.Option(metavar="M[,M...]", help="Per channel; subtracted inside.", rich_help_panel=_INPUT)
]
Std: TypeAlias = Annotated[
    str | None, typer.Option(metavar="S[,S...]", help="Per channel; divided by inside.", rich_help_panel=_INPUT)
]
TrustPickle: TypeAlias = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Unpickle files, which runs code from them.", rich_help_panel=_INPUT),
]
Size: TypeAlias = Annotated[
    str | None,
    typer.Option("--size", metavar="N|H,W", help="Scale and crop 8-bit images to this size.", rich_help_panel=_INPUT),
]
Limit: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Use only the first N samples.", rich_help_panel=_INPUT)
]
ThreatOpt: TypeAlias = Annotated[
    str, typer.Option("--threat", metavar="NORM[:EPS]", help="linf:8/255, l2:0.5, ...; without eps: smallest sizes.")
]
Quantize: TypeAlias = Annotated[
    int | None, typer.Option(metavar="BITS", help="Look only for inputs whose values have this many bits.")
]
Out: TypeAlias = Annotated[
    Path | None, typer.Option(help="Folder of the run (default: runs/ and a name).", rich_help_panel=_RUN)
]
Seed: TypeAlias = Annotated[int, typer.Option(help="Of all random numbers.", rich_help_panel=_RUN)]
Device: TypeAlias = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: cuda if present).", rich_help_panel=_RUN)
]
BatchSize: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Samples in work together; changes no result.", rich_help_panel=_RUN)
]
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object, nothing else.", rich_help_panel=_SHOW)
]
Quiet: TypeAlias = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, no tables: the verdict only.", rich_help_panel=_SHOW)
]
Track: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--track", metavar="mlflow|tensorboard|wandb", help="Send the result there.", rich_help_panel=_RUN),
]
NoResume: TypeAlias = Annotated[
    bool, typer.Option("--no-resume", help="Refuse to go on with an existing run.", rich_help_panel=_RUN)
]

errors = Console(stderr=True, highlight=False)


def told(command: Callable[P, R]) -> Callable[P, R]:
    """End a command with a sentence and the right exit code instead of a traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except AssayError as e:
            errors.print(f"[bold red]error[/bold red] ({type(e).__name__})", end=" ")
            errors.print(without_controls(str(e)), markup=False, soft_wrap=True)
            raise typer.Exit(e.exit_code) from e
        except KeyboardInterrupt:
            errors.print("interrupted; what was stored is kept. To go on:")
            errors.print(f"  {command_line()}", markup=False, soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def command_line() -> str:
    """Return the command that is running, ready to be pasted into a shell."""
    return shlex.join(["assay", *sys.argv[1:]])


def emit(result: Any) -> None:
    """Print the one JSON object of ``--json``."""
    sys.stdout.write(json.dumps(result) + "\n")


def numbers(text: str | None) -> list[float] | None:
    """Read ``0.5,0.5,0.5``."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers like 0.485,0.456,0.406") from None


def parameters(pairs: Iterable[str]) -> dict[str, str]:
    """Read ``NAME=VALUE``, as often as it was given."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set takes NAME=VALUE, for example steps=200; got {pair!r}")
        found[name.strip()] = value.strip()
    return found


def only_with(what: str, context: typer.Context, *names: str) -> None:
    """Refuse options that were given without what they are about, where they would do nothing.

    Raises:
        UsageError: one of the parameters of these names was given.
    """
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [f"--{name.replace('_', '-')}" for name, s in sources.items() if s is not None and s.name == "COMMANDLINE"]
    if given:
        raise UsageError(f"{', '.join(given)} only with {what}", "it without", f"Leave it out, or take {what}.")


def spare(*files: Path | None) -> None:
    """Refuse to write over the file that makes a folder a run, or an attack.

    Raises:
        UsageError: one of the files is there, and has such a name.
    """
    for file in files:
        if file is not None and file.is_file() and file.resolve().name.lower() in _RECORDS:
            raise UsageError("a file to write that no run needs", str(file), "Choose another name.")


_RECORDS: Final = ("manifest.json", "attack.json")


def device_of(wanted: str | None) -> str:
    """Return the device to use, after checking that it is there."""
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as e:
        raise typer.BadParameter(f"no device {wanted!r} here ({str(e).splitlines()[0]})") from None
    return wanted


def model_of(
    source: str, arch: str | None, box: tuple[float, float], mean: str | None, std: str | None, *, trust_pickle: bool
) -> "Model":
    """Load MODEL, saying aloud what is trusted."""
    from assay.models.loaders import load_model

    if trust_pickle and not _PASSIVE.match(source):
        _say_trusted(source)
    return load_model(source, arch=arch, box=box, mean=numbers(mean), std=numbers(std), trust_pickle=trust_pickle)


def data_of(source: str, size: str | None, *, limit: int | None, trust_pickle: bool) -> "Data":
    """Load DATA, saying aloud what is trusted; ``size`` is what ``--size`` says."""
    from assay.data import load_data

    if trust_pickle and source.lower().endswith(".npz"):
        _say_trusted(source)
    return load_data(source, limit=limit, trust_pickle=trust_pickle, size=None if size is None else _sides(size))


# Models that trust changes nothing about: names, the user's own functions, scores alone, files of numbers and graphs.
_PASSIVE: Final = re.compile(r"(demo|py|https?|ort):|(timm|torchvision):[^@]*$|.*\.(onnx|safetensors)$", re.IGNORECASE)


def _say_trusted(source: str) -> None:
    errors.print(f"trusting {source}: loading it may run code that it holds", markup=False, soft_wrap=True)


def _sides(text: str) -> int | tuple[int, int]:
    """Read ``224`` (the centre of images whose shorter side has as many pixels) or ``224,160`` (height and width)."""
    try:
        height, *width = (int(part) for part in text.split(",", 1))
    except ValueError:
        raise typer.BadParameter(f"--size takes 224, or 224,160 for height and width; got {text!r}") from None
    return (height, width[0]) if width else height


def run_folder(*settings: Any) -> Path:
    """Name a run after its settings, so that the same command finds its run again."""
    words = [str(s).removesuffix("/").rsplit("/", 1)[-1].split(":")[-1] for s in settings[:2]]
    threat = str(settings[2]).replace("/", "over").replace(":", "-")
    mark = hashlib.sha256(json.dumps([str(s) for s in settings]).encode()).hexdigest()[:6]
    name = "-".join([*words, threat, mark])
    return Path("runs") / "".join(c if c.isalnum() or c in "-._" else "_" for c in name)
