"""Two runs compared pair by pair: tables for the terminal, and the conclusion in one sentence."""

import math
from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from assay.core.plain import printable
from assay.reports.table import plain_table
from assay.reports.text import Units, count, percent, plural
from assay.runs.compare import Change, ClassPair, Comparison, Shares, Sizes

_ASPECTS: Final = ("model", "threat", "effort", "run")
_SHOWN: Final = 10
"""Classes and samples that the terminal lists; the page lists all."""


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
        f"{points(s.difference)} ({ends(s.interval)}, {100 * c.confidence:.6g} % interval; "
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
    return f"{signed(difference)} points"


def factor(ratio: float) -> str:
    """Write how many times as large something is in b; of two runs one may have found nothing."""
    if not ratio or math.isinf(ratio):
        return f"none found in {'b' if ratio else 'a'}"
    return f"{ratio:#.3g} times as large"


def p_text(p: float) -> str:
    """Write a p-value with two significant digits: ``p = 0.031``."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def signed(share: float) -> str:
    """Write a difference of shares in points, with its sign: ``+3.2``."""
    return f"{100 * share:+.1f}" if round(100 * share, 1) else "0.0"


def ends(interval: tuple[float, float]) -> str:
    """Write an interval of a difference of shares: ``-1.5 to +3.2``."""
    return f"{signed(interval[0])} to {signed(interval[1])}"


def units(c: Comparison) -> Units:
    """Write sizes as the threat of run a, or else of run b, writes its eps."""
    return next((u for u in map(Units.of, (c.a.threat, c.b.threat)) if u.denominator), Units())


def change_of_size(c: Comparison, difference: float) -> str:
    """Write a difference of sizes: ``+0.0312``, ``+1.5/255``; infinite where one run has no size."""
    if math.isinf(difference):
        return "none found in b" if difference > 0 else "none found in a"
    return ("-" if difference < 0 else "+") + units(c).show(abs(difference)) if difference else "0"


def figures(c: Comparison) -> Iterator[tuple[str, Shares]]:
    """Yield the accuracies that are compared, by name."""
    at = "" if c.eps is None or c.a.threat == c.b.threat else f" at {units(c).show(c.eps)}"
    told = (("clean", c.clean), (f"robust{at}", c.robust), (f"certified{at}", c.certified))
    yield from ((name, s) for name, s in told if s is not None)


def resampled(c: Comparison) -> Iterator[tuple[str, str, str]]:
    """Yield what the bootstrap says: name, difference, interval."""
    b = c.bootstrap
    for name, s, interval in (
        ("robust accuracy", c.robust, b.robust),
        ("certified accuracy", c.certified, b.certified),
    ):
        if s is not None and interval is not None:
            yield name, points(s.difference), ends(interval)
    if c.sizes is not None and b.median is not None and b.ratio is not None:
        low, high = (change_of_size(c, v) for v in b.median)
        yield "median size", change_of_size(c, c.sizes.difference), _from(low, high)
        low, high = (factor(v) for v in b.ratio)
        yield "ratio of sizes", factor(c.sizes.ratio), _from(low, high)


def _from(low: str, high: str) -> str:
    """Write two ends in words; what both of them say, once."""
    return high if low == high else f"{low.removesuffix(' times as large')} to {high}"


def ranked(c: Comparison) -> list[ClassPair]:
    """Return the classes, those with the smallest p-values first, and of these the largest differences."""
    return sorted(c.classes, key=lambda p: (p.p_value, -abs((p.robust or p.clean).difference), p.number))


def fell(change: Change, names: dict[int, str]) -> str:
    """Say how a sample fell: ``wrong as it is: 3``, ``fooled as 3``."""
    if change.adversarial_prediction is None:
        return f"wrong as it is: {names.get(change.prediction, change.prediction)}"
    return f"fooled as {names.get(change.adversarial_prediction, change.adversarial_prediction)}"


def _shown(text: str) -> Text:
    return Text(printable(text))


def print_comparison(c: Comparison, console: Console, *, details: bool = False) -> None:
    """Print the conclusion, what the two runs are, what they found, and how their samples fall into pairs.

    With ``details`` also the bootstrap, the classes, the attacks, and the samples that changed sides.
    """
    told = _shown(conclusion(c))
    told.stylize("bold")
    console.print(told)
    for note in c.notes:
        console.print(Text(f"Note: {note}", style="yellow"))
    for title, table in (*_tables(c), *(_details(c) if details else ())):
        console.print()
        if title:
            console.print(Text(f"  {title}", style="dim"))
        console.print(Padding(table, (0, 0, 0, 2)))


def _tables(c: Comparison) -> Iterator[tuple[str, Table]]:
    yield "", _sides(c)
    yield "", _figures(c)
    if c.robust is not None:
        yield "", _four(c.robust)


def _details(c: Comparison) -> Iterator[tuple[str, Table]]:
    if drawn := [*resampled(c)]:
        yield f"bootstrap of {count(c.bootstrap.resamples)} resamples, percentiles", _resampled(drawn, c)
    if len(c.classes) > 1:
        more = f"; {_SHOWN} of {count(len(c.classes))}, smallest p first" if len(c.classes) > _SHOWN else ""
        yield f"class by class (p: McNemar with Holm's correction{more})", _classes(c)
    if c.stages:
        yield "broken by", _stages(c)
    if c.changes:
        more = f"; the first {_SHOWN} of {count(len(c.changes))}" if len(c.changes) > _SHOWN else ""
        yield f"samples that changed sides{more}", _changes(c)


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
        table.add_row(aspect, *(_shown(getattr(side, aspect)) for side in (c.a, c.b)))
    if (c.a.samples, c.b.samples) != (c.n, c.n):
        table.add_row("samples", *(f"{count(side.samples)}, {count(c.n)} in both" for side in (c.a, c.b)))
    return table


def _figures(c: Comparison) -> Table:
    table = _table("a", "b", "b minus a, points", "")
    for name, s in figures(c):
        each = (f"{count(k)} ({percent(k / s.n)})" for k in (s.a, s.b))
        table.add_row(name, *each, f"{signed(s.difference)} ({ends(s.interval)})", p_text(s.p_value))
    if c.sizes is not None:
        each = (f"{count(k)} of {count(c.sizes.n)}" for k in (c.sizes.larger_in_a, c.sizes.larger_in_b))
        table.add_row("larger size", *each, factor(c.sizes.ratio), p_text(c.sizes.p_value))
        medians = (units(c).show(v) for v in (c.sizes.median_a, c.sizes.median_b))
        table.add_row("median size", *medians, change_of_size(c, c.sizes.difference), "")
    return table


def _four(s: Shares) -> Table:
    table = _table("robust in b", "not in b")
    table.add_row("robust in a", count(s.both), count(s.only_a))
    table.add_row("not in a", count(s.only_b), count(s.neither))
    return table


def _resampled(drawn: list[tuple[str, str, str]], c: Comparison) -> Table:
    table = _table("b minus a", f"{100 * c.confidence:.6g} % interval")
    for row in drawn:
        table.add_row(*row)
    return table


def _classes(c: Comparison) -> Table:
    table = plain_table()
    table.add_column("", style="dim", overflow="fold", max_width=24)
    which = "clean" if c.robust is None else "robust"
    for head in ("n", f"{which} in a", "in b", "points", ""):
        table.add_column(head, justify="right", no_wrap=True)
    for pair in ranked(c)[:_SHOWN]:
        s = pair.robust or pair.clean
        table.add_row(_shown(pair.name), count(s.n), count(s.a), count(s.b), signed(s.difference), p_text(pair.p_value))
    return table


def _stages(c: Comparison) -> Table:
    table = _table("a", "b")
    for stage in c.stages:
        table.add_row(_shown(stage.name), count(stage.a), count(stage.b))
    return table


def _changes(c: Comparison) -> Table:
    names = {pair.number: pair.name for pair in c.classes}
    table = plain_table()
    table.add_column("", style="dim", justify="right", no_wrap=True)
    for head in ("class", "right in" if c.robust is None else "robust in", "in the other", "by"):
        table.add_column(head, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for x in c.changes[:_SHOWN]:
        label, how = _shown(names.get(x.label, str(x.label))), _shown(fell(x, names))
        table.add_row(f"#{x.index}", label, x.held_by, how, _shown(x.broken_by or ""), units(c).show(x.size))
    return table
