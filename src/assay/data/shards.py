"""WebDataset shards: tar files in which the members of a sample share a name, as ``0001.jpg`` and ``0001.cls``.

The archives are only indexed; images are read where they lie when they are asked for. Nothing is unpacked, and no
member is unpickled.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any, Final, final

import torch

from assay.core.errors import DataError
from assay.core.files import check_readable
from assay.data.columns import LABELS
from assay.data.data import Data
from assay.data.images import SUFFIXES, Images

_CLASSES: Final = (*LABELS, "cls", "class", "target")
"""Under these names a ``.json`` member keeps the class number."""

_LONGEST: Final = 2**20
"""Bytes of a member that is read as a label."""


@final
@dataclass(slots=True)
class _Sample:
    """The members of one sample: from what follows the first dot of their names to where they are."""

    shard: Path
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.key} in {self.shard}"


def shards(source: str, limit: int | None = None) -> Data:
    """Load ``a.tar`` or ``a-{000..003}.tar`` of images with their class numbers in ``.cls`` or ``.json``.

    The names of the classes are the lines of a file ``classnames.txt`` beside the shards, if there is one.

    Raises:
        DataError: no such file, no tar file, a compressed one, or a sample without one image and one class number.
    """
    paths = [Path(p) for p in ([source] if Path(source).exists() else expanded(source))]
    for path in paths:
        if not path.exists():
            raise DataError("a shard that is there", f"no file {str(path)!r}", "Check the path.")
        check_readable(path, DataError, "a shard with samples", "Make it anew.", code="empty-data")
    samples = [*islice((s for p in paths for s in _samples(p)), limit)]
    if not samples:
        raise DataError("at least one sample", f"none in {source}", "Give data with samples.", code="empty-data")
    labels = torch.tensor([_label(s) for s in samples], dtype=torch.int64)
    images = Images(_Members([(s.shard, *_image(s)) for s in samples]), _Names(samples), len(samples))
    names = _class_names(paths[0].parent / "classnames.txt", int(labels.max()) + 1)
    return Data(images, labels, name=Path(source).stem, source=source, class_names=names)


def expanded(text: str) -> list[str]:
    """Return the names that braces stand for: ``{000..003}`` for numbers of that many digits, ``{a,b}`` for each."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [_choices(p) if i % 2 else [p] for i, p in enumerate(parts)]
    return ["".join(c) for c in product(*choices)]


def _choices(text: str) -> list[str]:
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if ends is None:
        return text.split(",")
    return [f"{i:0{len(ends[1])}}" for i in range(int(ends[1]), int(ends[2]) + 1)]


def _samples(path: Path) -> Iterator[_Sample]:
    """Yield the samples of a shard, whose members stand side by side."""
    current = _Sample(path, "")
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isreg() or member.sparse is not None or Path(member.name).name.startswith("."):
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if key != current.key:
                    if current.members:
                        yield current
                    current = _Sample(path, key)
                current.members[kind.lower()] = (member.offset_data, member.size)
    except Exception as e:  # a parser given hostile bytes may raise anything
        remedy = "Make it anew; compressed archives are to be unpacked to .tar first."
        raise DataError("a readable .tar file, not compressed", f"{path}: {e}", remedy) from e
    if current.members:
        yield current


def _image(s: _Sample) -> tuple[int, int]:
    found = [k for k in s.members if f".{k.rpartition('.')[2]}" in SUFFIXES]
    if len(found) != 1:
        shown = f"{', '.join(s.members)} of {s.where}"
        raise DataError("one image for each sample, such as .jpg or .png", shown, "Write the shards anew.")
    return s.members[found[0]]


def _label(s: _Sample) -> int:
    if "cls" in s.members:
        return _number(_text(s, "cls").strip(), s)
    try:
        said = json.loads(_text(s, "json")) if "json" in s.members else {}
    except ValueError as e:
        raise DataError("a readable .json member", f"{s.where}: {e}", "Write the shards anew.") from e
    if isinstance(said, dict):
        found = [said[n] for n in _CLASSES if n in said]
        if found:
            return _number(found[0], s)
    raise DataError(
        f"a class number for each sample: .cls, or .json with one of {', '.join(_CLASSES)}",
        f"{', '.join(s.members)} of {s.where}",
        "Write it as text in .cls; pickled members (.pyd, .pickle, .pth) are not read.",
    )


def _number(value: Any, s: _Sample) -> int:
    try:
        if isinstance(value, str | int) and not isinstance(value, bool) and abs(int(value)) < 2**63:
            return int(value)
    except ValueError:
        pass
    raise DataError("a class number", f"{value!r} as the class of {s.where}"[:200], "Write integers 0, 1, ....")


def _text(s: _Sample, kind: str) -> str:
    start, size = s.members[kind]
    if size > _LONGEST:
        raise DataError("a label", f"{size} bytes in .{kind} of {s.where}", "Write the shards anew.")
    return _Members([(s.shard, start, size)])(0).decode("utf-8", "replace")


def _class_names(path: Path, least: int) -> Sequence[str] | None:
    try:
        names = path.read_text().splitlines()
    except (OSError, ValueError):
        return None
    return names if len(names) >= least else None


@final
class _Members:
    """From a position to the bytes of a member."""

    def __init__(self, places: Sequence[tuple[Path, int, int]]) -> None:
        self._places = places

    def __call__(self, row: int) -> bytes:
        path, start, size = self._places[row]
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(size)
        except OSError as e:
            raise DataError("a file that can be read", f"{path}: {e.strerror}", "Mend or remove it.") from e


@final
class _Names:
    """From a position to how messages call a sample."""

    def __init__(self, samples: Sequence[_Sample]) -> None:
        self._samples = samples

    def __call__(self, row: int) -> str:
        return self._samples[row].where
