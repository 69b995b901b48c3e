"""``assay gate``: a policy held against a run."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from assay.cli import options as o
from assay.core.errors import RunError
from assay.core.registry import UsageError
from assay.runs import Run
from assay.runs.policy import Judgement, Policy, finished, hold

DEFAULT: Final = Path("assay.toml")

_POLICY, _FILES = "Policy", "Files"

MinRobust = Annotated[
    float | None, typer.Option(metavar="SHARE", help="The least robust accuracy.", rich_help_panel=_POLICY)
]
MinCertified = Annotated[
    float | None, typer.Option(metavar="SHARE", help="The least certified accuracy.", rich_help_panel=_POLICY)
]
Baseline = Annotated[
    Path | None, typer.Option(metavar="RUN", help="The run that --max-drop is about.", rich_help_panel=_POLICY)
]
MaxDrop = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="How far robust accuracy may be below the baseline.", rich_help_panel=_POLICY),
]
NoFinding = Annotated[
    str | None,
    typer.Option(metavar="CODE[,CODE...]", help="Findings to fail on; error, warning: all.", rich_help_panel=_POLICY),
]
MaxSeconds = Annotated[
    float | None, typer.Option(metavar="S", help="The longest time of the run.", rich_help_panel=_POLICY)
]
PolicyFile = Annotated[
    Path | None,
    typer.Option("--policy", metavar="FILE", help="Default: assay.toml, where there is one.", rich_help_panel=_POLICY),
]
JUnit = Annotated[Path | None, typer.Option(metavar="FILE", help="Write JUnit XML.", rich_help_panel=_FILES)]
Sarif = Annotated[Path | None, typer.Option(metavar="FILE", help="Write SARIF 2.1.0.", rich_help_panel=_FILES)]
Markdown = Annotated[Path | None, typer.Option(metavar="FILE", help="Append Markdown.", rich_help_panel=_FILES)]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page.", rich_help_panel=_FILES)]
Update = Annotated[
    bool, typer.Option("--update-baseline", help="If it holds, make the run the baseline.", rich_help_panel=_FILES)
]


@o.told
def gate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    min_robust: MinRobust = None,
    min_certified: MinCertified = None,
    baseline: Baseline = None,
    max_drop: MaxDrop = None,
    no_finding: NoFinding = None,
    max_seconds: MaxSeconds = None,
    policy: PolicyFile = None,
    junit: JUnit = None,
    sarif: Sarif = None,
    markdown: Markdown = None,
    html: Html = None,
    update_baseline: Update = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Hold a policy against a run: exit code 0 if every check holds, 1 if one does not.

    The policy is the table "gate" of assay.toml; a flag takes the place of what the file says. A drop fails only where
    the paired test says that it is more than --max-drop.

    assay gate runs/now --min-robust 0.45 --no-finding error,zero-gradient
    assay gate runs/now --baseline baseline --max-drop 0.01 --junit gate.xml --sarif gate.sarif
    """
    o.spare(junit, sarif, markdown, html)
    file = policy or (DEFAULT if DEFAULT.is_file() else None)
    flags: dict[str, Any] = {"min_robust": min_robust, "min_certified": min_certified, "max_drop": max_drop}
    flags |= {"max_seconds": max_seconds, "no_finding": _codes(no_finding), "baseline": baseline and str(baseline)}
    asked = replace(Policy.read(file) if file else Policy(), **{k: v for k, v in flags.items() if v is not None})
    found = Run.read(run)
    judgement = _judge(asked, found, update=update_baseline)
    _write(judgement, found, file, junit=junit, sarif=sarif, markdown=markdown, html=html)
    kept = _keep(found, asked) if update_baseline and judgement.held else None
    if as_json:
        o.emit(judgement.to_json() | {"policy": file and str(file), "updated": kept})
    else:
        _say(judgement, found, file, kept, quiet=quiet)
    raise typer.Exit(0 if judgement.held else 1)


def _codes(text: str | None) -> tuple[str, ...] | None:
    """Read ``error,zero-gradient``; nothing at all asks for nothing."""
    return None if text is None else tuple(code for part in text.split(",") if (code := part.strip()))


def _judge(asked: Policy, run: Run, *, update: bool) -> Judgement:
    """Hold the policy; of the first baseline there is no drop, and it may come without a policy."""
    if update:
        if asked.baseline is None:
            raise UsageError("a folder for the baseline", "none", "Give --baseline DIR.")
        if not (Path(asked.baseline) / "manifest.json").exists():
            asked = replace(asked, max_drop=None)
        if asked.empty:
            finished(run)
            return Judgement(str(run.path), None, 0.95, ())
    return hold(asked, run)


def _keep(run: Run, asked: Policy) -> str | None:
    from assay.runs.baseline import keep

    if asked.baseline is not None:
        keep(run, asked.baseline)
    return asked.baseline


def _write(judgement: Judgement, run: Run, policy: Path | None, **files: Path | None) -> None:
    """Write what was asked for: whole files, and a summary that is added to what is there."""
    from assay.reports.gates import page
    from assay.reports.html import write_page
    from assay.reports.junit import junit
    from assay.reports.markdown import markdown
    from assay.reports.sarif import sarif

    makers: dict[str, Callable[[Judgement, Run], str]]
    makers = {"junit": junit, "sarif": partial(sarif, policy=policy), "html": page}
    for kind, make in makers.items():
        if file := files[kind]:
            write_page(file, make(judgement, run), parents=True)
    if file := files["markdown"]:
        _append(file, markdown(judgement, run))


def _append(file: Path, text: str) -> None:
    try:
        with file.open("a", encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        raise RunError(f"a file that can be written for {file.name}", str(e), "Choose another --markdown.") from e


def _say(judgement: Judgement, run: Run, policy: Path | None, kept: str | None, *, quiet: bool) -> None:
    from assay.core.plain import plain
    from assay.reports.gates import print_judgement

    if quiet:
        typer.echo(plain(judgement.verdict))
        return
    console = Console(highlight=False)
    print_judgement(judgement, run, console)
    console.print()
    told = [("policy", policy and str(policy)), ("baseline", judgement.baseline), ("the baseline is now", kept)]
    for what, where in told:
        if where:
            console.print(f"{what}  {plain(where)}", markup=False, soft_wrap=True)
