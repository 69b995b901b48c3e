"""Text from outside, made harmless for terminals and files."""

import re
from typing import Any, Final

_UNSEEN: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def without_controls(text: str) -> str:
    """Drop what steers a terminal or the direction of text, what XML does not allow, and halves of surrogate pairs.

    Tabs and ends of lines stay.
    """
    return _UNSEEN.sub("", text)


def plain(said: Any) -> str:
    r"""Return a text as one line without control characters.

    Example:
        >>> plain("a\x1b[31m red\nclass")
        'a[31m red class'
    """
    return without_controls(" ".join(str(said).split()))


def printable(text: str) -> str:
    """Return text, its spaces as they are, in which what cannot be printed is replaced: nothing steers a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
