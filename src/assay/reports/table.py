"""A run in the terminal: one sentence, a compact summary, several runs side by side."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from assay.core.plain import plain
from assay.reports.natural import natural
from assay.reports.summary import Audit, Manifest, Point, Rate, Summary, is_right, points, read, summarize
from assay.reports.text import DASH, NORMS, count, duration, percent, plural, span
from assay.runs import Run

_COLOURS = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def verdict(run: Run | Manifest) -> str:
    """Say in one plain sentence what a run found, complete or not; in a second one what bounded it, if anything did.

    Of a run without eps only the run itself tells its median size; its manifest does not.

    Example:
        >>> verdict({"complete": False})
        'This run of the model was interrupted before any sample was finished: there is no result.'
    """
    manifest, samples = _opened(run)
    s = summarize(manifest)
    return " ".join([sentence(s, samples), *([stopped(s)] if s.bounded else [])])


def _opened(run: Run | Manifest) -> tuple[Manifest, pa.Table | None]:
    """Read a run with its table, or a manifest alone."""
    return read(run) if isinstance(run, Run) else (run, None)


def sentence(s: Summary, samples: pa.Table | None = None) -> str:
    """Say the verdict of a summary."""
    if not s.n or s.clean.value is None:
        why = "holds no samples" if s.complete else f"was interrupted before any {s.noun} was finished"
        return f"This run of {s.model} {why}: there is no result."
    said = _measured(s, samples) if s.eps is None else _withstood(s)
    if s.complete:
        return said[0].upper() + said[1:]
    return f"{interrupted(s)}: {said}"


def interrupted(s: Summary) -> str:
    """Say how far a run came that is not complete."""
    of = f" of {count(s.planned)}" if s.planned else ""
    return f"{'Stopped' if s.bounded else 'Interrupted'} after {count(s.n)}{of} {s.noun}s"


def audited(a: Audit) -> str:
    """Say what the audit of some survivors tells of all of them."""
    of = f"{count(a.attacked)} of the " if a.survivors else ""
    found = count(a.broken) if a.broken else "none"
    bound = ""
    if a.missed_at_most is not None:
        bound = f": at most {percent(a.missed_at_most)} of survivors were missed ({100 * a.confidence:.6g} %)"
    return f"An audit of {of}{plural(a.survivors or a.attacked, 'survivor')} broke {found}{bound}."


def stopped(s: Summary) -> str:
    """Say what ended a run before its time."""
    return f"Stopped early: {s.bounded}."


def _withstood(s: Summary) -> str:
    these = plural(s.n, s.noun) if s.complete else f"these {plural(s.n, s.noun)}"
    proven = f", and {percent(s.certified.value)} is proven" if s.certified.value is not None else ""
    if not s.attacked:
        return (
            f"{_within(s)}, {s.model} is proven to classify {percent(s.certified.value)} of {these} correctly"
            f"{_interval(s, s.certified)}; without an attacker it is {percent(s.clean.value)}."
        )
    return (
        f"{_within(s)}, {s.model} still classifies {percent(s.robust.value)} of {these} correctly"
        f"{_interval(s, s.robust)}; without an attacker it is {percent(s.clean.value)}{proven}."
    )


def _within(s: Summary) -> str:
    facing = " and facing an attacker who wants a chosen class" if s.targeted else ""
    if s.norm == "l0" and s.eps is not None:
        return f"with at most {plural(int(s.eps), 'value')} changed{facing}"
    if s.norm in NORMS:
        return f"within an {NORMS[s.norm]} ball of {s.eps_text}{facing}"
    return f"under the threat {s.threat}{facing}"


def _interval(s: Summary, r: Rate) -> str:
    return "" if r.low is None else f" ({100 * s.confidence:.6g} % interval {span(r.low, r.high)})"


def _measured(s: Summary, samples: pa.Table | None) -> str:
    """Say the result of a run without eps: how far the attacker has to go."""
    head = (
        f"without an attacker, {s.model} classifies {percent(s.clean.value)} of {plural(s.n, s.noun)} "
        f"correctly{_interval(s, s.clean)}"
    )
    norm = NORMS.get(s.norm, s.norm)
    middle = None if samples is None else median_size(samples)
    said = [head]
    if middle is None:
        said.append(f"the run measured the smallest {norm} change that fools it on each of them")
    elif s.prove is not None and samples is not None:
        said.append(f"half of those are proven up to an {norm} change of {s.units.show(median_radius(samples))}")
    if middle is not None and s.attacked:
        no = f"no {norm} change that fools it was found for at least half of those"
        some = f"half of those are fooled by an {norm} change of {s.units.show(middle)} or less"
        said.append(some if np.isfinite(middle) else no)
    return "; ".join(said) + "."


def median_size(samples: pa.Table) -> float | None:
    """Return the size that fools half of the right samples; ``inf`` where so many were not fooled."""
    sizes = np.sort(samples["size"].to_numpy()[is_right(samples)])
    return float(sizes[(len(sizes) - 1) // 2]) if len(sizes) else None


def median_radius(samples: pa.Table) -> float | None:
    """Return the radius up to which half of the right samples are proven."""
    lower = np.sort(samples["lower"].to_numpy()[is_right(samples)])
    return float(lower[len(lower) // 2]) if len(lower) else None


def print_run(run: Run | Manifest, console: Console) -> None:
    """Print a compact summary: the verdict, the rates, what it cost, the stages, the findings."""
    manifest, samples = _opened(run)
    s = summarize(manifest)
    console.print(Text(sentence(s, samples), style="bold"))
    if s.audit:
        console.print(Text(audited(s.audit)))
    if s.bounded:
        console.print(Text(stopped(s), style="yellow"))
    if nature := natural(manifest):
        console.print(Text(nature.sentence))
    asked = points(manifest, samples) if samples is not None else ()
    tables = _rates(s), _point_table(s, asked) if asked else None, _stage_table(s) if s.stages else None
    for table in filter(None, tables):
        console.print()
        console.print(Padding(table, (0, 0, 0, 2)))
    console.print()
    _print_findings(s, console)


def _rates(s: Summary) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(justify="right")
    grid.add_column(style="dim")
    for name, r in (("clean", s.clean), ("robust", s.robust), ("proven", s.certified), ("open", s.open)):
        if r.value is not None:
            grid.add_row(name, Text(percent(r.value), style="bold"), span(r.low, r.high) if r.low is not None else "")
    each = f"{count(s.forwards)} forward, {count(s.backwards)} backward" if s.passes is not None else ""
    grid.add_row("passes per sample", count(s.per_sample), each)
    grid.add_row("time", duration(s.seconds), "")
    if s.claimed is not None and s.attacked:
        rejected = f"{count(s.rejected)} of {count(s.claimed)} claims rejected" if s.rejected else ""
        grid.add_row("verified", count(s.claimed - (s.rejected or 0)), rejected)
    return grid


def plain_table(**options: bool) -> Table:
    """Return a table without lines, as all of ours are."""
    return Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False, **options)  # type: ignore[arg-type]


def _point_table(s: Summary, asked: Iterable[Point]) -> Table:
    table = plain_table()
    proofs = s.prove is not None
    for head in ("eps", *(("proven", "interval") if proofs else ()), *(("robust", "interval") if s.attacked else ())):
        table.add_column(head, justify="right", no_wrap=True)
    for p in asked:
        rates = [*([p.certified] if proofs else []), *([p.rate] if s.attacked else [])]
        cells = (cell for r in rates for cell in (percent(r.value), span(r.low, r.high)))
        table.add_row(s.units.show(p.eps), *cells)
    return table


def _stage_table(s: Summary) -> Table:
    table = plain_table()
    table.add_column("stage", no_wrap=True)
    proofs = any(stage.proven is not None for stage in s.stages)
    heads = ("entered", *(["proven"] if proofs else []), "broken", "still right", "passes each", "share", "time")
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    for stage in s.stages:
        table.add_row(
            Text(stage.name),
            count(stage.entered),
            *(["" if stage.proven is None else count(stage.proven)] if proofs else []),
            count(stage.broken),
            percent(stage.left),
            count(stage.per_sample(stage.passes)),
            percent(stage.share),
            duration(stage.seconds),
        )
    return table


def _print_findings(s: Summary, console: Console) -> None:
    if not s.findings:
        nothing = ": nothing was seen that makes these numbers doubtful" if s.complete else " so far"
        console.print(Text(f"No findings{nothing}.", style="dim"))
    for note in s.findings:
        line = Text.assemble((note.severity, _COLOURS[note.severity]), " ", (note.code, "bold"), f"  {note.message}")
        console.print(line)
        if note.remedy:
            console.print(Padding(Text(note.remedy, style="dim"), (0, 0, 0, 2)))


def compare_table(runs: Iterable[Run | Manifest]) -> Table:
    """Return several runs side by side, one row each, in the order given; passes are per sample.

    Runs are told apart by their folders where their models do not do it.
    """
    table, listed = plain_table(), [*runs]
    summaries = [summarize(_opened(run)[0]) for run in listed]
    by_folder = len({s.model for s in summaries}) < len(listed)
    for head in ("run", "model", "threat") if by_folder else ("model", "threat"):
        table.add_column(head, overflow="fold", min_width=12)
    for head in ("n", "clean", "robust", "interval", "passes", "time"):
        table.add_column(head, justify="right", no_wrap=True)
    for run, s in zip(listed, summaries, strict=True):
        name = [Text(plain(run.path.name) if isinstance(run, Run) else DASH)] if by_folder else []
        table.add_row(
            *name,
            Text(s.model),
            Text(s.threat),
            count(s.n) + ("" if s.complete else "*"),
            percent(s.clean.value),
            percent(s.robust.value),
            span(s.robust.low, s.robust.high),
            count(s.per_sample),
            duration(s.seconds),
        )
        if not s.complete:
            table.caption = "* interrupted"
    return table
