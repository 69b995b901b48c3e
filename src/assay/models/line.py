"""The line to a network in use: questions become calls, of a size that the network and the memory take."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Final, TypeAlias, final

import torch
from torch import Tensor

from assay.core.errors import AssayError, ModelError, ModelOutputError
from assay.core.types import Inputs, Logits, Rows
from assay.models.model import PAD, Live

_VALUES: Final = {"cpu": 2**21, "cuda": 2**25}
"""Input values in one call, by device: what a network keeps for its gradient is hundreds of times as many."""

_FAINT: Final = 1e-24
"""Slopes whose largest coordinate is below this lose coordinates in float32."""

Through: TypeAlias = Callable[[Inputs, Rows], Inputs]
"""A differentiable step before the model: from points (r, *f) and their positions in the batch to points (r, *f)."""


def default_batch(shape: Sequence[int], device: torch.device | str | None) -> int:
    """Return how many samples of a shape are asked about together by default: fewer, where they are large."""
    kind = torch.device(device or "cpu").type
    fits = _values(kind) // math.prod(shape)
    return max(PAD, min(fits, 128 if kind == "cpu" else 1024) // PAD * PAD)


def _values(kind: str) -> int:
    return _VALUES.get(kind, _VALUES["cpu"])


@final
@dataclass(frozen=True, slots=True)
class Question:
    """What is to be known about the points x (b, *f); ``at`` are the points that one call is about.

    Args:
        x: the points.
        searching: ask the network as a search sees it (:meth:`Live.search`), not exactly as it is.
        check: gets logits (r, c) and ``at``; raises where they will not do.
        count: gets ``at`` and the number of functions that were differentiated, when a call is over.
        read: from logits (r, c) and ``at`` to logits (r, c) and values (r, m), whose gradients are wanted; or none.
        through: a step before the network, part of what is differentiated.
    """

    x: Inputs
    searching: bool
    check: Callable[[Logits, slice], None]
    count: Callable[[slice, int], None]
    read: Callable[[Logits, slice], tuple[Logits, Tensor]] | None = None
    through: Through | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def kind(self) -> tuple[bool, bool, str, tuple[int, ...]]:
        """What two questions must have in common to be put in one call."""
        return self.searching, self.read is not None, str(self.x.dtype), tuple(self.x.shape[1:])


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """Logits (b, c); where gradients were wanted, values (b, m) and slopes (b, m, *f), zero if the network has none."""

    logits: Logits
    values: Tensor | None = None
    slopes: Tensor | None = None
    differentiable: bool = True

    @classmethod
    def joined(cls, parts: Sequence["Answer"]) -> "Answer":
        """Put the answers about the pieces of a question together."""
        if len(parts) == 1:
            return parts[0]
        values = [a.values for a in parts if a.values is not None]
        slopes = [a.slopes for a in parts if a.slopes is not None]
        logits, had = torch.cat([a.logits for a in parts]), all(a.differentiable for a in parts)
        return cls(logits, torch.cat(values), torch.cat(slopes), had) if values else cls(logits)


Piece: TypeAlias = tuple[int, slice]
"""The number of a question, and which of its points."""


@final
class Line:
    """Puts questions to a live model, several in one call where they are small.

    A call is filled up to a multiple of ``PAD`` rows, or to the model's fixed number: no answer depends on what else is
    asked. When memory runs out, this and all later calls get smaller.

    Raises (from every question):
        ModelOutputError: what came back is not (b, c) with c >= 2.
        ModelError: a handful of samples does not fit into memory, or the network fails.
    """

    def __init__(self, live: Live) -> None:
        self.live = live
        self._rows = live.model.rows

    def ask(self, question: Question) -> Answer:
        """Answer one question."""
        return self.answers([question])[0]

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer some questions, in the same order."""
        parts: list[list[Answer]] = [[] for _ in questions]
        order = sorted(range(len(questions)), key=lambda i: questions[i].kind)
        for _, alike in groupby(order, key=lambda i: questions[i].kind):
            for (i, _), answer in self._calls(questions, [(i, slice(0, len(questions[i]))) for i in alike]):
                parts[i].append(answer)
        return [Answer.joined(p) for p in parts]

    def _calls(self, questions: Sequence[Question], left: list[Piece]) -> Iterator[tuple[Piece, Answer]]:
        while left:
            pieces, rest = self._next(questions[left[0][0]].x, left)
            asked = [(questions[i], at) for i, at in pieces]
            try:
                answers = self._call(asked)
            except AssayError:
                raise
            except Exception as e:  # whatever the user's network raises
                self._shrink(e, asked[0][0].x, sum(at.stop - at.start for _, at in asked))
                continue
            for (question, at), answer in zip(asked, answers, strict=True):
                question.count(at, 0 if answer.values is None else answer.values.shape[1])
            yield from zip(pieces, answers, strict=True)
            left = rest

    def _next(self, like: Inputs, left: list[Piece]) -> tuple[list[Piece], list[Piece]]:
        """Return what the next call asks, and the rest: as much of the first piece as fits, of others all or none."""
        most = self._rows or max(PAD, _values(like.device.type) // like[0].numel() // PAD * PAD)
        (i, at), rest = left[0], left[1:]
        if at.stop - at.start > most:
            middle = at.start + most
            return [(i, slice(at.start, middle))], [(i, slice(middle, at.stop)), *rest]
        room = min(most, default_batch(like.shape[1:], like.device)) - (at.stop - at.start)
        pieces = [(i, at)]
        for j, other in rest:
            if (room := room - (other.stop - other.start)) < 0:
                break
            pieces.append((j, other))
        return pieces, left[len(pieces) :]

    def _call(self, asked: list[tuple[Question, slice]]) -> list[Answer]:
        if asked[0][0].read is not None:
            with torch.enable_grad():
                return self._differentiate(asked)
        with torch.no_grad():
            z = self._logits(asked, [q.x[at] for q, at in asked])
        return [Answer(part) for part in z]

    def _differentiate(self, asked: list[tuple[Question, slice]]) -> list[Answer]:
        points = [self._leaf(q.x[at]) for q, at in asked]
        seen = [_through(q, x, at) for (q, at), x in zip(asked, points, strict=True)]
        logits = self._logits(asked, seen)
        read = [q.read(z, at) for (q, at), z in zip(asked, logits, strict=True) if q.read is not None]
        slopes: list[list[Tensor | None]] = [[] for _ in asked]
        most = max(values.shape[1] for _, values in read)
        for i in range(most):
            # Never .backward(): only the input's gradient is wanted, and parameters stay untouched.
            on = [j for j, (_, values) in enumerate(read) if values.requires_grad and i < values.shape[1]]
            if on:
                totals, wanted = [read[j][1][:, i].sum() for j in on], [points[j] for j in on]
                grads = torch.autograd.grad(totals, wanted, allow_unused=True, retain_graph=i + 1 < most)
                for j, grad in zip(on, grads, strict=True):
                    slopes[j].append(grad)
        return [_answer(*read[j], slopes[j], points[j], asked[j][0].x.dtype) for j in range(len(asked))]

    def _leaf(self, x: Inputs) -> Inputs:
        x = x.clone() if x.is_inference() else x.detach()
        return (x.double() if self.live.model.wide else x).requires_grad_()

    def _logits(self, asked: list[tuple[Question, slice]], seen: list[Inputs]) -> list[Logits]:
        """Return the logits of each question's points, as the network ``seen`` them."""
        x = self._filled(seen)
        z: Tensor = self.live.search(x) if asked[0][0].searching else self.live(x)
        if z.ndim != 2 or len(z) != len(x) or z.shape[1] < 2:
            raise ModelOutputError(
                f"logits of shape ({len(x)}, c) with c >= 2 for inputs {tuple(x.shape)}",
                f"{tuple(z.shape)}",
                _remedy(z, len(x)),
                code="bad-logits",
            )
        ends = [0, *accumulate(map(len, seen))]
        parts = [z[a:b] for a, b in pairwise(ends)]
        for (q, at), part in zip(asked, parts, strict=True):
            q.check(part, at)
        return parts

    def _filled(self, seen: list[Inputs]) -> Inputs:
        """Join points, and fill the call up with copies of the first one."""
        model, rows = self.live.model, sum(map(len, seen))
        most = model.rows or rows + PAD
        wanted = most if model.fixed_rows and model.rows else min(-(-rows // PAD) * PAD, most)
        if wanted > rows:
            seen = [*seen, seen[0][:1].detach().expand(wanted - rows, *seen[0].shape[1:])]
        return seen[0] if len(seen) == 1 else torch.cat(seen)

    def _shrink(self, error: Exception, x: Inputs, rows: int) -> None:
        """Halve the rows of a call if the error says that memory ran out, else say what the network cannot take."""
        said = str(error).lower()
        full = isinstance(error, RuntimeError) and ("not enough memory" in said or "can't allocate memory" in said)
        if not full and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise ModelError(
                f"a network that takes inputs {(rows, *x.shape[1:])} and can be differentiated",
                f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                "Check image size, channels, --arch and --device.",
                code="model-failed",
            ) from error
        if rows <= PAD or self.live.model.fixed_rows:
            raise ModelError(
                "memory for a batch of the model's inputs",
                f"none left for {rows} samples at once",
                "Free memory, use a smaller model, or another --device.",
            ) from error
        self._rows = max(PAD, rows // 2 // PAD * PAD)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _through(q: Question, x: Inputs, at: slice) -> Inputs:
    return x if q.through is None else q.through(x, torch.arange(at.start, at.stop, device=x.device))


def _answer(z: Logits, values: Tensor, slopes: list[Tensor | None], x: Inputs, dtype: torch.dtype) -> Answer:
    """Return the answer about points x, whose gradients ``slopes`` holds; zero stands for those there are not."""
    m = values.shape[1]
    if len(slopes) < m:  # the values do not depend on anything
        return Answer(z, values, torch.zeros_like(x, dtype=dtype)[:, None].expand(-1, m, *x.shape[1:]), False)
    grads = [torch.zeros_like(x) if g is None else g.contiguous().nan_to_num(0.0) for g in slopes]
    wide = grads[0][:, None] if m == 1 else torch.stack(grads, 1)
    there = all(g is not None for g in slopes)
    return Answer(z.detach(), values.detach(), narrowed(wide, dtype), there)


def narrowed(slopes: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast slopes (b, m, *f) from float64; those too small for the narrow type are scaled up, for their direction."""
    if slopes.dtype == dtype:
        return slopes
    largest = slopes.flatten(2).abs().amax(2)
    faint = (largest > 0) & (largest < _FAINT)
    scale = torch.where(faint, _FAINT / largest.clamp_min(torch.finfo(slopes.dtype).tiny), 1)
    return (slopes * scale.view(*scale.shape, *[1] * (slopes.ndim - 2))).to(dtype)


def _remedy(z: Tensor, rows: int) -> str:
    """Say what to do about an answer that is no table of logits."""
    if z.ndim == 1 and bool((z == z.round()).all()):
        return "Return the scores of all classes, not the number of one."
    if z.ndim > 2:
        return "Return one row a sample: z.flatten(1), or its mean over places."
    if not z.ndim or len(z) != rows:
        return "Return one row for each input of the batch."
    return "For a single-output binary classifier return torch.cat([-z, z], 1)."
