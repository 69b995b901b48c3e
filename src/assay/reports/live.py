"""Progress in the terminal. A snapshot costs an assignment; a thread of rich redraws a few times a second."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from assay.core.progress import Progress, Snapshot, silent
from assay.reports.text import count, percent, plural

REDRAWS = 6
"""A second, at most."""


@contextmanager
def live(console: Console) -> Iterator[Progress]:
    """Show progress while the block runs, and leave nothing behind; on what is no terminal, show nothing.

    Example:
        >>> with live(Console(force_terminal=False)) as progress:
        ...     progress(Snapshot(total=10, done=5, right=5, fooled=1, stage="pgd", passes=100, seconds=1.0))
    """
    if not console.is_terminal or console.is_dumb_terminal:
        yield silent
        return
    board = Board()
    with Live(board, console=console, refresh_per_second=REDRAWS, transient=True):
        yield board


@final
class Board:
    """Keeps the latest snapshot, and draws it when asked."""

    def __init__(self) -> None:
        self._first: Snapshot | None = None
        self._last: Snapshot | None = None
        self._heard = time.monotonic()

    def __call__(self, snapshot: Snapshot) -> None:
        """Take a snapshot; called often."""
        if self._first is None:
            self._first = snapshot
        self._last = snapshot
        self._heard = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        first, s = self._first, self._last
        if first is None or s is None:
            yield Text("starting ...", style="dim")
            return
        elapsed = s.seconds + time.monotonic() - self._heard
        yield _bar(s)
        yield _line(s, first, elapsed, "<=" if options.ascii_only else "≤")


def _bar(s: Snapshot) -> Table:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    bar = ProgressBar(total=max(s.total, 1), completed=s.done, complete_style="cyan", finished_style="cyan")
    grid.add_row(bar, Text.assemble((count(s.done), "bold"), f" of {plural(s.total, 'sample')}"))
    return grid


def _line(s: Snapshot, first: Snapshot, elapsed: float, at_most: str) -> Text:
    """Write the second line; what was there before this session does not enter the speeds."""
    spent = s.seconds - first.seconds
    speed = f"{count((s.passes - first.passes) / spent)} passes/s" if spent > 0 and s.passes > first.passes else ""
    speeds = [_left(s, first, elapsed), f"{clock(elapsed)} elapsed", speed]
    parts = [f"{count(s.fooled)} fooled", s.stage, *speeds]
    line = Text(no_wrap=True, overflow="ellipsis")
    if seen := max(s.seen, s.done):
        share = min(1.0, max(0.0, (s.right - s.fooled) / seen))
        proven = "" if s.proven is None else f"{percent(min(share, s.proven / seen))} proven {at_most} "
        line.append(f"{proven}robust {at_most} {percent(share)}", style="bold cyan").append(" so far", style="cyan")
        line.append("  ")
    return line.append("  ".join(p for p in parts if p), style="dim")


def _left(s: Snapshot, first: Snapshot, elapsed: float) -> str:
    done = s.done - first.done
    if done <= 0 or s.done >= s.total:
        return ""
    return f"{clock((elapsed - first.seconds) / done * (s.total - s.done))} left"


def clock(seconds: float) -> str:
    """Write a time as a clock does: ``0:31``, ``1:02:03``."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
