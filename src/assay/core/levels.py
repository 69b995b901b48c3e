"""Values that are stored in few bits: the one place that says what a level stands for."""

from torch import Tensor


def at_level(k: Tensor, lo: float, hi: float, levels: int = 255) -> Tensor:
    """Return what whole numbers k from 0 to ``levels`` stand for: data, files and 8-bit threats agree on it."""
    return (k / (levels / (hi - lo)) + lo).clamp(lo, hi)
