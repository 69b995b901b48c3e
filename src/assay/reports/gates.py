"""A policy held against a run: for the terminal, and as a page. Nothing that a run says of itself is harmless."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from assay.core.plain import plain, without_controls
from assay.reports import text
from assay.reports.gallery import Card, drawn
from assay.reports.html import environment, template
from assay.reports.summary import Summary, read, summarize
from assay.reports.table import plain_table, sentence
from assay.runs import Run
from assay.runs.policy import Check, Judgement, Sample


def about(run: Run) -> Summary:
    """Return a run in numbers."""
    return summarize(read(run)[0])


def command(run: Run) -> str:
    """Return the command that repeats a run, as it says itself; nothing where it does not."""
    return plain(run.manifest.get("command") or "")


def told(sample: Sample, s: Summary) -> str:
    """Say of a sample what it is taken for, and what broke it."""
    label, taken = (plain(s.label(v)) for v in (sample.label, sample.prediction))
    if not sample.size:
        return f"sample {sample.index}: class {label}, taken for {taken} as it is"
    if sample.broken_by is None:
        return f"sample {sample.index}: class {label}"
    size = s.units.show(sample.size)
    return f"sample {sample.index}: class {label}, taken for {taken} by {plain(sample.broken_by)}, size {size}"


def listed(check: Check, s: Summary) -> list[str]:
    """Return a line for each of the first samples that a check is about, and one for how many more there are."""
    more = check.concerned - len(check.samples)
    rest = [f"and {text.count(more)} more"] if check.samples and more > 0 else []
    return [*(told(sample, s) for sample in check.samples), *rest]


def print_judgement(judgement: Judgement, run: Run, console: Console) -> None:
    """Print the verdict, the checks, and of those that did not hold why, and which samples they are about."""
    s = about(run)
    console.print(Text(judgement.verdict, style="bold green" if judgement.held else "bold red"))
    console.print()
    console.print(Padding(_checks(judgement), (0, 0, 0, 2)))
    for check in judgement.failed:
        console.print()
        console.print(Text.assemble((plain(check.name), "bold"), "  ", plain(check.why)))
        for line in listed(check, s):
            console.print(Padding(Text(line, style="dim"), (0, 0, 0, 2)))
    if judgement.failed and command(run):
        console.print()
        console.print("The run was made by:")
        console.print(f"  {command(run)}", markup=False, soft_wrap=True)


def _checks(judgement: Judgement) -> Table:
    table = plain_table()
    for head in ("check", "", "wanted", "found"):
        table.add_column(head, overflow="fold")
    for check in judgement.checks:
        result = Text("held", style="green") if check.held else Text("failed", style="bold red")
        name, wanted, found = (Text(plain(v)) for v in (check.name, check.wanted, check.found))
        table.add_row(name, result, wanted, found)
    return table


def page(judgement: Judgement, run: Run) -> str:
    """Return the judgement as an HTML page that needs nothing else: checks, figures, samples concerned, findings."""
    manifest, samples = read(run)
    s = summarize(manifest)
    runs = [("run", run), *([("baseline", Run.read(judgement.baseline))] if judgement.baseline else [])]
    filled = (
        environment()
        .get_template("gate.html.j2")
        .render(
            j=judgement,
            s=s,
            verdict=sentence(s, samples),
            run=run.path.resolve().name,
            lists=[(check, listed(check, s)) for check in judgement.failed if check.samples],
            cards=_cards(judgement, run, s, samples),
            commands=[(what, line) for what, r in runs if (line := command(r))],
            version=str(manifest.get("assay") or ""),
            style=Markup(template("report.css") + template("gate.css")),
        )
    )
    return without_controls(filled)


def _cards(judgement: Judgement, run: Run, s: Summary, samples: pa.Table) -> list[Card]:
    """Return pictures of the samples that failed checks are about, as far as the run has them."""
    why = {sample.index: check.name for check in judgement.failed for sample in check.samples}
    table = samples.filter(pc.is_in(samples["index"], pa.array([*why], pa.int64())))
    cards, _ = drawn(run, s, table)  # pictures are a help, and no part of the judgement
    return sorted((replace(card, why=why[card.index]) for card in cards), key=lambda card: card.index)
