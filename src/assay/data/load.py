"""The one table of the forms that data comes in."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

from assay.core.errors import DataError
from assay.core.files import check_readable
from assay.core.named import call_named
from assay.core.registry import closest
from assay.core.urls import fetched, path_of, url_of
from assay.data.arrays import npz
from assay.data.data import Arrays, Data
from assay.data.fit import Fit
from assay.data.hugging_face import hugging_face
from assay.data.images import folder
from assay.data.mnist import demo
from assay.data.objects import from_object
from assay.data.parquet import parquet
from assay.data.reopened import reopening
from assay.data.shards import expanded, shards


@final
@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for: ``rest`` is the text after the scheme, or the path."""

    rest: str
    limit: int | None
    trust_pickle: bool

    @property
    def path(self) -> Path:
        return Path(self.rest)


Form: TypeAlias = Callable[[Request], Data]


def _named(r: Request) -> Data:
    return from_object(call_named(r.rest, DataError, "data"), f"py:{r.rest}", limit=r.limit)


# The seam for further forms: a scheme ends in a colon, a suffix starts with a dot, "/" is a folder.
FORMS: dict[str, Form] = {
    "/": lambda r: folder(r.path),
    ".npz": lambda r: npz(r.path, trust_pickle=r.trust_pickle),
    ".parquet": lambda r: parquet([r.path], r.path.stem, r.rest),
    ".tar": lambda r: shards(r.rest, r.limit),
    "demo:": lambda r: demo(r.rest),
    "hf:": lambda r: hugging_face(r.rest),
    "py:": _named,
}

_FORMS_TEXT = (
    "a folder of class folders, .npz with x and y, .parquet with image and label, WebDataset shards (.tar), hf:DIR, "
    "demo:mnist, or py:module:callable"
)


def load_data(
    source: Any,
    *,
    limit: int | None = None,
    size: int | tuple[int, int] | None = None,
    trust_pickle: bool = False,
) -> Data:
    """Load data in any form that is understood. Images are decoded when used, see :meth:`Data.check`.

    Args:
        source: as text or path: a folder of class folders of images; a ``.npz`` file with ``x`` and ``y``, perhaps
            ``class_names``; a ``.parquet`` file with ``image`` and ``label``; ``.tar`` shards of WebDataset, several
            as ``a-{000..003}.tar``; ``hf:DIR`` or ``hf:DIR:SPLIT``, a folder of Hugging Face's datasets;
            ``demo:mnist``; or ``py:module:callable``. Or an object: (x, y) of tensors or arrays, a map-style dataset
            of torch or Hugging Face, a ``DataLoader``, or :class:`Data`. Files and folders may be at a URL of an object
            store, such as ``s3://bucket/val/``.
        limit: take that many samples from the start.
        size: in pixels, of 8-bit images. A number: their shorter side is scaled to it, and the centre is cut out as a
            square. (height, width): both sides are scaled. Models that know their size need none (see :class:`Fit`).
        trust_pickle: unpickle what a ``.npz`` file has pickled, which runs code from the file.

    Raises:
        DataError: the source is not there, not understood, damaged, or empty; or a size that is none.

    Example:
        >>> import numpy as np
        >>> data = load_data((np.zeros((3, 8, 8, 3), np.uint8), [0, 1, 0]))
        >>> len(data), data.shape
        (3, (3, 8, 8))
    """
    if isinstance(source, str | os.PathLike):
        data = opened(path_of(os.fspath(source)), limit, trust_pickle=trust_pickle)
    else:
        data = from_object(source, f"python:{type(source).__name__}", limit=limit)
    data = data if limit is None else data.head(limit)
    return data if size is None else data.fitted(Fit.of(size))


def opened(source: str, limit: int | None, *, trust_pickle: bool) -> Data:
    """Load data by a text; what is at a URL is brought here first, and again wherever the data are sent."""
    url = url_of(source)
    here = source if url is None else str(fetched(url, DataError, "data"))
    data = _load_text(here, limit, trust_pickle)
    if url is not None:
        data.source = url
    held = here.startswith("hf:") or Path(here).suffix.lower() == ".parquet"  # by files that are open
    if isinstance(data._samples, Arrays) or not (held or url):
        return data
    place = str(Path(here).absolute()) if url is None and Path(here).exists() else source
    return reopening(data, place, limit, trust_pickle=trust_pickle)


def _load_text(source: str, limit: int | None, trust_pickle: bool) -> Data:
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source)
    if scheme and scheme[0] in FORMS:
        return FORMS[scheme[0]](Request(source[scheme.end() :], limit, trust_pickle))
    path = Path(source)
    if not (path.exists() or all(Path(p).exists() for p in expanded(source))):
        if scheme:
            raise DataError(_FORMS_TEXT, f"{source!r}", closest(scheme[0], [f for f in FORMS if f[-1] == ":"]))
        raise DataError(f"data that is there: {_FORMS_TEXT}", f"no file or folder {source!r}", "Check the path.")
    form = "/" if path.is_dir() else path.suffix.lower()
    if form not in FORMS:
        raise DataError(_FORMS_TEXT, f"the file {source!r}", "Convert it to one of these forms.")
    if form not in ("/", ".tar"):
        check_readable(path, DataError, "a file with samples", "Make it anew.", code="empty-data")
    return FORMS[form](Request(source, limit, trust_pickle))
