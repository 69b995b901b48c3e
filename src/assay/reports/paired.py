"""Two runs compared pair by pair: tables for the terminal, and the conclusion in one sentence."""

import math

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from assay.reports.table import plain_table
from assay.reports.text import count, percent, plural
from assay.runs.compare import Comparison, Shares, Sizes

_ASPECTS = ("model", "threat", "effort", "run")


def conclusion(c: Comparison) -> str:
    """Say in one sentence whether the runs differ, and by how much."""
    if c.robust is None and c.sizes is not None:
        return _of_sizes(c.sizes, c)
    what = "clean accuracy" if c.robust is None else "robust accuracy"
    return _of_shares(c.robust or c.clean, what, c)


def names(c: Comparison) -> tuple[str, str]:
    """Call the two runs by the first of model, threat, effort and folder that tells them apart."""
    pairs = ((getattr(c.a, aspect), getattr(c.b, aspect)) for aspect in _ASPECTS)
    return next((pair for pair in pairs if pair[0] != pair[1]), ("a", "b"))


def _of_shares(s: Shares, what: str, c: Comparison) -> str:
    a, b = names(c)
    told = (
        f"{points(s.difference)} ({_between(s)}, {100 * c.confidence:.6g} % interval; "
        f"exact McNemar test, {p_text(s.p_value)})"
    )
    if s.p_value >= 1 - c.confidence:
        return f"No difference in {what} between {a} and {b} can be told from {plural(s.n, 'sample')}: {told}."
    way = "higher" if s.difference > 0 else "lower"
    return f"The {what} of {b} is {way} than that of {a}, on {plural(s.n, 'sample')}: {told}."


def _of_sizes(s: Sizes, c: Comparison) -> str:
    a, b = names(c)
    told = f"{factor(s.ratio)} in the median (sign test, {p_text(s.p_value)})"
    if s.p_value >= 1 - c.confidence:
        return f"No difference in size between {a} and {b} can be told from {plural(s.n, 'sample')}: {told}."
    way = "larger" if s.larger_in_b > s.larger_in_a else "smaller"
    return f"The changes that fool {b} are {way} than those that fool {a}, on {plural(s.n, 'sample')}: {told}."


def points(difference: float) -> str:
    """Write a difference of shares: ``-3.2 points``."""
    return f"{_signed(difference)} points"


def factor(ratio: float) -> str:
    """Write how many times as large something is."""
    return f"{ratio:#.3g} times as large" if math.isfinite(ratio) else "beyond what was searched"


def p_text(p: float) -> str:
    """Write a p-value with two significant digits: ``p = 0.031``."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}" if round(100 * share, 1) else "0.0"


def _between(s: Shares) -> str:
    return f"{_signed(s.interval[0])} to {_signed(s.interval[1])}"


def print_comparison(c: Comparison, console: Console) -> None:
    """Print the conclusion, what the two runs are, what they found, and how their samples fall into pairs."""
    console.print(Text(conclusion(c), style="bold"))
    for table in (_sides(c), _figures(c), *([_four(c.robust)] if c.robust else [])):
        console.print()
        console.print(Padding(table, (0, 0, 0, 2)))


def _table(*heads: str) -> Table:
    table = plain_table()
    table.add_column("", style="dim", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _sides(c: Comparison) -> Table:
    table = plain_table()
    table.add_column("", style="dim", no_wrap=True)
    for head in ("a", "b"):
        table.add_column(head, overflow="fold")
    for aspect in _ASPECTS:
        table.add_row(aspect, *(Text(getattr(side, aspect)) for side in (c.a, c.b)))
    if (c.a.samples, c.b.samples) != (c.n, c.n):
        table.add_row("samples", *(f"{count(side.samples)}, {count(c.n)} in both" for side in (c.a, c.b)))
    return table


def _figures(c: Comparison) -> Table:
    table = _table("a", "b", "b minus a, points", "")
    for name, s in (("clean", c.clean), ("robust", c.robust)):
        if s is not None:
            each = (f"{count(k)} ({percent(k / s.n)})" for k in (s.a, s.b))
            table.add_row(name, *each, f"{_signed(s.difference)} ({_between(s)})", p_text(s.p_value))
    if c.sizes is not None:
        each = (f"{count(k)} of {count(c.sizes.n)}" for k in (c.sizes.larger_in_a, c.sizes.larger_in_b))
        table.add_row("larger size", *each, factor(c.sizes.ratio), p_text(c.sizes.p_value))
    return table


def _four(s: Shares) -> Table:
    table = _table("robust in b", "not in b")
    table.add_row("robust in a", count(s.both), count(s.only_a))
    table.add_row("not in a", count(s.only_b), count(s.neither))
    return table
