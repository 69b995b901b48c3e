"""One sentence for hyper-parameters that make no sense."""

from assay.core.registry import UsageError


def require(what: str, value: float, low: float, high: float = float("inf"), *, above: bool = False) -> None:
    """Refuse a value outside [low, high]; with ``above``, outside (low, high].

    Raises:
        UsageError: saying what was expected.
    """
    if not (low < value <= high if above else low <= value <= high):
        least = f"{what} {'>' if above else '>='} {low:g}"
        bound = least if high == float("inf") else f"{least} and <= {high:g}"
        raise UsageError(bound, f"{value:g}", "Choose a value in this range.")
