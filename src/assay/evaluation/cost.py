"""What an evaluation will cost on this machine: a few timed steps of attacks, times the passes of its effort."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor

from assay.attacks import LOSSES, PGD, Square
from assay.certification import Proof
from assay.core.random import Draws
from assay.core.registry import one_of
from assay.data import Data
from assay.evaluation.preflight import check_model
from assay.evaluation.proving import COMPLETE, STEPS
from assay.evaluation.reading import check_data
from assay.models import Door, Live, Model
from assay.models.door import metered
from assay.models.line import default_batch
from assay.threats import Problem, Threat

_SECONDS: Final = 0.4
"""How long each kind of question is timed."""

_MOST: Final = 20
"""Questions of a kind at most."""

_PROVEN: Final = 4
"""Samples that are proven, to time that."""

_STEPS: Final = 4
"""Of the attacks that are timed."""


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """An estimate; ``passes`` and ``seconds`` span from what is typical to the most that the effort can spend.

    ``passes`` are forward and backward passes of one sample, ``forward`` and ``gradient`` the seconds of one question
    about a batch (a gradient is a forward and a backward pass), ``memory`` the bytes that a gradient keeps of a batch.
    ``proofs`` are the seconds that proofs take besides: of all samples by cheap methods, and with all that complete
    search may take.
    """

    samples: int
    batch: int
    device: str
    passes: tuple[int, int]
    forward: float
    gradient: float
    memory: int
    seconds: tuple[float, float]
    proofs: tuple[float, float] = (0.0, 0.0)

    def within(self, max_passes: int | None = None, max_seconds: float | None = None) -> "Cost":
        """Return what it costs where no sample may spend more passes, and the whole no more seconds, than these."""

        def cut(passes: int, seconds: float) -> tuple[int, float]:
            fewer = passes if max_passes is None else min(passes, max_passes)
            shorter = seconds * fewer / passes
            return fewer, shorter if max_seconds is None else min(shorter, max_seconds)

        low, high = (cut(*ends) for ends in zip(self.passes, self.seconds, strict=True))
        return replace(self, passes=(low[0], high[0]), seconds=(low[1], high[1]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    model: Model,
    data: Data,
    threat: Threat,
    effort: str = "standard",
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    budget: tuple[int, int] | None = None,
    proof: Proof | None = None,
) -> Cost:
    """Time some batches, attack nothing, and say what an evaluation with these settings will cost.

    Steps of an attack with gradients and of one without are timed, for what attacks compute besides the passes counts
    where networks are small; the faster and the slower of them bound what the mixture of an effort takes.

    Args:
        model: the classifier.
        data: the samples to be evaluated; only the first batch of them is looked at.
        threat: what the adversary may do.
        effort: of the evaluation.
        device: where to run; None for where the model is.
        batch_size: samples asked about together; None for the default of the evaluation.
        budget: (typical, most) passes a sample; None asks the effort for them.
        proof: how samples are to be proven, if they are; a few are, to time it.

    Raises:
        DataError, ThreatError, ModelError: model, data and threat do not fit.
        UsageError: no such effort.
    """
    typical, most = budget or _budget(effort, threat)
    data = model.takes(data)
    batch = min(batch_size or default_batch(data.shape, device), len(data))
    first = data.head(batch)
    check_data(first, model.domain)
    threat = threat.within(model.domain, math.prod(first.shape))
    model = check_model(model, first, threat, device).model
    with model.frozen(device) as live:
        ask = _Questions.pose(live, first, _bounded(threat, first))
        memory = _kept(live, ask.gradient)
        forward, gradient = (_median_time(live, question) for question in (ask.score, ask.gradient))
        each = [_median_time(live, steps) / ask.passes(steps) for steps in (ask.climb, ask.search)]
    passes = typical * model.samples, most * model.samples
    return Cost(
        samples=len(data),
        batch=batch,
        device=str(live.device),
        passes=passes,
        forward=forward,
        gradient=gradient,
        memory=memory,
        seconds=(len(data) * passes[0] * min(each), len(data) * passes[1] * max(each)),
        proofs=(0.0, 0.0) if proof is None else _proofs(proof, model, first, len(data), threat, device),
    )


def _proofs(
    proof: Proof, model: Model, first: Data, n: int, threat: Threat, device: torch.device | str | None
) -> tuple[float, float]:
    """Prove a few samples by cheap methods, at the eps or at one that is no small one, and scale that up to n."""
    rows = torch.arange(min(len(first), _PROVEN))
    x, y, times = first.batch(rows), first.labels[rows], STEPS if threat.eps is None else 1
    radius = torch.full((len(rows),), _bounded(threat, first).eps or 0.0, dtype=torch.float64)
    prover = proof.prover(model, first.shape, device, proof.cheap)
    begin = time.perf_counter()
    prover.margins(x, y, radius, threat.norm.name)
    cheap = times * n * (time.perf_counter() - begin) / len(rows)
    return cheap, cheap + (times * n * proof.seconds if proof.method == COMPLETE else 0.0)


def _budget(effort: str, threat: Threat) -> tuple[int, int]:
    from assay.evaluation.efforts import EFFORTS, budget

    one_of("an effort", effort, EFFORTS)
    return budget(effort, threat)


def _bounded(threat: Threat, data: Data) -> Threat:
    """Return the threat with an eps to time attacks in, where it has none."""
    if threat.eps is not None:
        return threat
    assert threat.box is not None
    most = threat.norm.diameter(threat.box.width, math.prod(data.shape))
    return replace(threat, eps=float(math.ceil(most / 20)) if threat.norm.name == "l0" else most / 20)


@final
@dataclass(frozen=True, slots=True)
class _Questions:
    """What attacks ask of a model, about one batch."""

    door: Door
    problem: Problem

    @classmethod
    def pose(cls, live: Live, data: Data, threat: Threat) -> "_Questions":
        rows = torch.arange(len(data))
        x, y = data.batch(rows).to(live.device), data.labels[rows].to(live.device)
        draws = Draws.of(0, rows.to(live.device))
        return cls(Door(live, len(data)), Problem.pose(x, y, threat, draws))

    def score(self) -> None:
        self.door.score(self.problem.x0, self.problem, LOSSES["margin"])

    def gradient(self) -> None:
        self.door.gradient(self.problem.x0, self.problem, LOSSES["margin"])

    def climb(self) -> None:
        PGD(steps=_STEPS).run(self.door, self.problem, full=True)

    def search(self) -> None:
        attack = Square(steps=_STEPS) if self.problem.norm.name in Square.norms else PGD(steps=_STEPS)
        attack.run(self.door, self.problem, full=True)

    def passes(self, question: Callable[[], None]) -> int:
        """Return the passes that a question costs, of all samples together."""
        with metered() as spent:
            question()
        return spent.forwards + spent.backwards


def _median_time(live: Live, question: Callable[[], None]) -> float:
    """Return the median seconds of a question, which has been asked before."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _SECONDS and len(times) < _MOST):
        begin = time.perf_counter()
        question()
        _wait(live)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _wait(live: Live) -> None:
    if live.device.type == "cuda":
        torch.cuda.synchronize(live.device)


def _kept(live: Live, question: Callable[[], None]) -> int:
    """Return the bytes that a question keeps for its backward pass, parameters aside."""
    module = live.model.module
    own = {p.untyped_storage().data_ptr() for p in module.parameters()} if module is not None else set()
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        question()
    _wait(live)
    return sum(seen.values())
