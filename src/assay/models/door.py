"""The only door between an attack and a model: it counts, differentiates, checks, splits, and leaves no trace."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from assay.core.errors import AssayError, DataError, ModelError, ModelOutputError, NonFiniteError
from assay.core.types import Inputs, Labels, Logits, Mask, PerSample, Rows
from assay.models.model import PAD, Live, Net
from assay.threats.problem import Goal, Problem

Loss: TypeAlias = Callable[[Logits, Goal], PerSample]
"""What an attack ascends: from logits (b, c) and the goal to one number a sample."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a query tells an attack that sees predicted labels only."""

    success: Mask
    label: Labels

    def take(self, rows: Rows) -> "Decision":
        return Decision(self.success[rows], self.label[rows])


@dataclass(frozen=True, slots=True)
class Score:
    """What a query tells an attack that sees the model's scores."""

    success: Mask
    loss: PerSample
    logits: Logits

    def take(self, rows: Rows) -> "Score":
        return Score(self.success[rows], self.loss[rows], self.logits[rows])


@dataclass(frozen=True, slots=True)
class Gradient:
    """What a query tells an attack that also sees the model's inside."""

    success: Mask
    loss: PerSample
    logits: Logits
    grad: Inputs  # d loss / d x

    def take(self, rows: Rows) -> "Gradient":
        return Gradient(self.success[rows], self.loss[rows], self.logits[rows], self.grad[rows])


@final
class Door:
    """Asks a frozen model about samples numbered 0 .. n - 1, and counts every pass of each.

    ``forwards`` and ``backwards`` (n,) int64 hold the passes so far; a network that averages m random passes counts m.
    Rows added to fill a batch are not counted. ``listen`` is told the number of passes after each call.
    Scores and gradients come from layers tuned for speed and may differ by rounding (``patches.py``); ``logits``
    and ``decide`` ask the network exactly as it is. So a success that scores and gradients report is one that is clear.
    ``differentiable`` says, after a question for a gradient, whether the model had one.

    Raises (from every question):
        ModelOutputError: what came back is not (b, c) with c >= 2.
        NonFiniteError: NaN or infinity among the logits.
        ModelError: a handful of samples does not fit into memory.
        DataError: labels that the model has no class for.
    """

    def __init__(
        self, live: Live, n: int, listen: Callable[[int], None] | None = None, indices: Labels | None = None
    ) -> None:
        self.live = live
        self.forwards = torch.zeros(n, dtype=torch.int64, device=live.device)
        self.backwards = torch.zeros(n, dtype=torch.int64, device=live.device)
        self.differentiable = True
        self._rows = live.model.rows
        self._listen = listen
        self._indices = torch.arange(n) if indices is None else indices.cpu()  # how errors call the samples

    def logits(self, x: Inputs, rows: Rows) -> Logits:
        """Return the logits (b, c) of x (b, *f), counted for the samples ``rows`` (b,)."""
        with torch.no_grad():
            return self._ask(self.live, x, rows)

    def decide(self, x: Inputs, p: Problem) -> Decision:
        z = self.logits(x, p.rows)
        self._check_labels(p.goal, z)
        return Decision(p.goal.reached(z), z.argmax(1))

    def score(self, x: Inputs, p: Problem, loss: Loss) -> Score:
        with torch.no_grad():
            z = self._ask(self.live.search, x, p.rows)
        self._check_labels(p.goal, z)
        return Score(p.goal.clearly_reached(z), loss(z, p.goal).to(x.dtype), z)

    def _ask(self, net: Net, x: Inputs, rows: Rows) -> Logits:
        parts = self._split(x, lambda part, at: (self._forward(net, part, rows[at]),))
        self._count(rows, backward=False)
        logits: Logits = torch.cat([p[0] for p in parts]) if len(parts) > 1 else parts[0][0]
        return logits

    def gradient(self, x: Inputs, p: Problem, loss: Loss) -> Gradient:
        """Return logits, loss and input gradient at x; a model without a gradient gives zero."""
        with torch.enable_grad():
            parts = self._split(x, lambda part, at: self._differentiate(part, p.rows[at], p.goal.take(at), loss))
        self._count(p.rows, backward=True)
        z, value, grad = (torch.cat(v) if len(parts) > 1 else v[0] for v in zip(*parts, strict=True))
        return Gradient(p.goal.clearly_reached(z), value.to(x.dtype), z, grad)

    def _differentiate(self, x: Inputs, rows: Rows, goal: Goal, loss: Loss) -> tuple[Tensor, ...]:
        n = len(rows)
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        z = self._forward(self.live.search, x, rows)
        self._check_labels(goal, z)
        value = loss(z, goal)
        if not value.requires_grad:
            self.differentiable = False
            return z, value, torch.zeros_like(x[:n])
        # Never .backward(): only the input's gradient is wanted, and parameters stay untouched.
        grad: Tensor | None = torch.autograd.grad(value.sum(), x, allow_unused=True)[0]
        if grad is None:
            self.differentiable, grad = False, torch.zeros_like(x)
        return z.detach(), value.detach(), grad[:n].contiguous().nan_to_num(0.0)

    def _split(self, x: Inputs, ask: Callable[[Inputs, slice], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """Ask about x in pieces of at most ``rows`` rows, each filled up; in smaller ones when memory runs out."""
        parts: list[tuple[Tensor, ...]] = []
        start = 0
        while start < len(x):
            stop = min(len(x), start + (self._rows or len(x)))
            try:
                answers = ask(self._fill(x[start:stop]), slice(start, stop))
            except AssayError:
                raise
            except Exception as e:  # whatever the user's network raises
                self._shrink(e, x[start:stop])
                continue
            parts.append(answers)
            start = stop
        return parts

    def _fill(self, x: Inputs) -> Inputs:
        model = self.live.model
        most = model.rows or len(x) + PAD
        wanted = most if model.fixed_rows and model.rows else min(-(-len(x) // PAD) * PAD, most)
        missing = wanted - len(x)
        return torch.cat([x, x[:1].expand(missing, *x.shape[1:])]) if missing else x

    def _shrink(self, error: Exception, x: Inputs) -> None:
        """Halve the rows of a call if the error says that memory ran out, else say what the network cannot take."""
        rows = len(x)
        said = str(error).lower()
        full = isinstance(error, RuntimeError) and ("not enough memory" in said or "can't allocate memory" in said)
        if not full and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise ModelError(
                f"a network that takes inputs {tuple(x.shape)} and can be differentiated",
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

    def _forward(self, net: Net, x: Inputs, rows: Rows) -> Logits:
        """Return the logits of the samples ``rows``, with which x begins; the rest of x fills the batch."""
        z: Tensor = net(x)
        if z.ndim != 2 or len(z) != len(x) or z.shape[1] < 2:
            raise ModelOutputError(
                f"logits of shape ({len(x)}, c) with c >= 2 for inputs {tuple(x.shape)}",
                f"{tuple(z.shape)}",
                "For a single-output binary classifier return torch.cat([-z, z], 1).",
                code="bad-logits",
            )
        z = z[: len(rows)]
        if not torch.isfinite(z).all():
            bad = self._indices[rows[(~torch.isfinite(z)).any(1)].cpu()]
            raise NonFiniteError(
                "finite logits",
                f"NaN or infinity for {len(bad)} of {len(z)} inputs of a batch (first: sample {int(bad[0])})",
                "Look for overflow, log(0), or a division by zero in the network.",
                code="bad-logits",
            )
        return z

    def _check_labels(self, goal: Goal, z: Logits) -> None:
        for labels in (goal.label, goal.target):
            if labels is not None and not ((labels >= 0) & (labels < z.shape[1])).all():
                raise DataError(
                    f"labels from 0 to {z.shape[1] - 1}, for the model has {z.shape[1]} classes",
                    f"labels from {int(labels.min())} to {int(labels.max())}",
                    "Check that model and data belong together, and the order of the classes.",
                    code="bad-logits",
                )

    def _count(self, rows: Rows, *, backward: bool) -> None:
        passes = torch.full_like(rows, self.live.model.samples)
        self.forwards.index_add_(0, rows, passes)
        if backward:
            self.backwards.index_add_(0, rows, passes)
        if self._listen:
            self._listen(len(rows) * self.live.model.samples * (1 + backward))
