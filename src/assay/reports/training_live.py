"""A training in the terminal, while it lasts."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from assay.reports.live import REDRAWS, clock
from assay.reports.text import count, epoch_text, percent


class Moment(Protocol):
    """Where a training stands: batches done of all, batches an epoch, its latest loss and row, where there are any."""

    @property
    def what(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def row(self) -> dict[str, Any] | None: ...


Tell = Callable[[Any], None]
"""Receives the moments of a training, often; must be quick."""


@contextmanager
def showing(progress: bool | Tell, console: Console | None = None) -> Iterator[Tell]:
    """Yield what is to be told every moment of a training, or of several that follow each other.

    Args:
        progress: True shows them on the terminal, and nothing where there is none; False shows nothing; a function is
            told itself.
        console: where to; that of standard error by default.

    Example:
        >>> with showing(False) as tell:
        ...     tell(None)
    """
    if not isinstance(progress, bool):
        yield progress
        return
    console = console or Console(stderr=True)
    if not progress or not console.is_terminal or console.is_dumb_terminal:
        yield _silent
        return
    board = TrainingBoard(console)
    with Live(board, console=console, refresh_per_second=REDRAWS, transient=True):
        yield board


def _silent(moment: Moment) -> None:
    """Show nothing."""


@final
class TrainingBoard:
    """Keeps the latest moment, and draws it when asked; what happened in between is printed once, and stays."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = time.monotonic()
        self._first: Moment | None = None
        self._last: Moment | None = None
        self._since = self._begun
        self._told: tuple[str, int] | None = None

    def __call__(self, moment: Moment) -> None:
        """Take a moment; called often."""
        if self._first is None or self._first.what != moment.what:
            self._begun = time.monotonic() if self._first else self._begun
            self._first, self._since = moment, time.monotonic()
        self._last = moment
        self._warn(moment)

    def _warn(self, m: Moment) -> None:
        """Print the event of a row that was just written; that of an older one was said before a resumption."""
        if m.row is None or not m.row["event"] or m.row["steps"] != m.done or self._told == (m.what, m.done):
            return
        self._told = m.what, m.done
        self._console.print(Text(f"{m.what}, epoch {epoch_text(m.row['epoch'])}: {m.row['event']}", style="yellow"))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        first, m = self._first, self._last
        if first is None or m is None:
            yield Text("starting ...", style="dim")
            return
        now = time.monotonic()
        yield _bar(m)
        yield _line(m, _left(m, first, now - self._since), now - self._begun, "<=" if options.ascii_only else "≤")


def _bar(m: Moment) -> Table:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    bar = ProgressBar(total=max(m.total, 1), completed=m.done, complete_style="cyan", finished_style="cyan")
    epoch = f"epoch {m.done / max(m.steps, 1):.1f}"
    grid.add_row(bar, Text.assemble((epoch, "bold"), f" of {count(m.total / max(m.steps, 1))}"))
    return grid


def _line(m: Moment, left: str, elapsed: float, at_most: str) -> Text:
    """Write the second line: the last validation, then where training stands."""
    line = Text(no_wrap=True, overflow="ellipsis")
    loss = m.loss
    accuracy = ""
    if m.row is not None:
        line.append(f"robust {at_most} {percent(m.row['pgd'])}", style="bold cyan").append(" (PGD)  ", style="cyan")
        loss, accuracy = m.row["loss"] if loss is None else loss, f"clean {percent(m.row['clean'])}"
    parts = [accuracy, "" if loss is None else f"loss {loss:.3f}", m.what, left, f"{clock(elapsed)} elapsed"]
    return line.append("  ".join(p for p in parts if p), style="dim")


def _left(m: Moment, first: Moment, spent: float) -> str:
    """Say how long the rest will take; what was done before the first moment does not enter the speed."""
    done = m.done - first.done
    return f"{clock(spent / done * (m.total - m.done))} left" if done > 0 and m.done < m.total else ""
