"""The fenced blocks of a page of documentation, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]

PROGRAMS = ("assay", "make", "pip", "pytest", "python", "python3", "ray")
"""What a command may begin with; in a block without a language, such a line says that it is one of commands."""

SHELL = ("sh", "bash", "shell", "console")
OPEN = ("", "text")
"""Languages of output, and in some pages of commands."""

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>```+)(?P<language>[^`\n]*)\n(?P<code>.*?)^(?P=indent)(?P=ticks) *$", re.M | re.S
)
_IMPORT = re.compile(r"(?:from [\w.]+ )?import \w")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, what is in it, and the number of its first line."""

    language: str
    code: str
    line: int

    @property
    def is_python(self) -> bool:
        """Whether it is Python: what begins with an import is, and need not say so."""
        return self.language == "python" or (self.language in OPEN and bool(_IMPORT.match(self.code)))

    @property
    def runs(self) -> bool:
        """Whether it is more than output, a picture in text, or a directive, which the site's builder runs."""
        if self.language in OPEN:
            return self.is_python or _speaks(self.code)
        return not self.language.startswith("{")


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its program without the way to it, its arguments, and the number of its line in the page."""

    program: str
    arguments: tuple[str, ...]
    line: int

    def __str__(self) -> str:
        return shlex.join([self.program, *self.arguments])


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page, in their order."""
    found = []
    for m in _FENCE.finditer(text):
        code = re.sub(rf"(?m)^ {{0,{len(m['indent'])}}}", "", m["code"])
        found.append(Block(m["language"].strip(), code, text.count("\n", 0, m.start("code")) + 1))
    return found


def commands(code: str, line: int) -> list[Command]:
    """Return the commands of a block whose first line has a number: over backslashes, without comments.

    In a transcript, commands are what follows ``$``.
    """
    transcript = code.lstrip().startswith("$ ")
    found, before = [], ""
    for number, row in enumerate(code.splitlines(), line):
        if transcript and not row.startswith("$ "):
            continue
        whole = before + row.removeprefix("$ ")
        if whole.endswith("\\"):
            before = whole[:-1]
            continue
        before, words = "", shlex.split(whole, comments=True)
        while words and _ASSIGNMENT.fullmatch(words[0]):
            words = words[1:]
        if words:
            found.append(Command(PurePosixPath(words[0]).name, tuple(words[1:]), number))
    return found


def _speaks(code: str) -> bool:
    """Whether a line of a block is a command."""
    rows = [row.removeprefix("$ ").split() for row in code.splitlines() if row[:1].strip()]
    starts = [next((w for w in row if not _ASSIGNMENT.fullmatch(w)), "") for row in rows]
    return any(PurePosixPath(word).name in PROGRAMS for word in starts)


def pages() -> list[Path]:
    """Return the pages that have something to run; those of attacks are doctests of their classes."""
    here = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")]
    found = [*here, *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "attacks")]
    return [p for p in found if p.is_file() and any(b.runs for b in blocks(p.read_text(encoding="utf-8")))]
