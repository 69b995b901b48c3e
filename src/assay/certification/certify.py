"""Certificates: which samples a model gets right, and provably so in the whole ball around them."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.certification.bounds import ARITHMETICS
from assay.certification.prover import METHODS, NORMS, Prover, Tell
from assay.core.errors import ContradictionError, DataError, ThreatError
from assay.core.progress import Progress, Snapshot, silent
from assay.core.registry import UsageError, one_of
from assay.core.types import Inputs, Labels, Logits, Mask, PerSample
from assay.data import load_data
from assay.models import Door, Model, as_model
from assay.models.line import default_batch
from assay.models.loaded import Net
from assay.threats import Threat
from assay.threats.threat import outside_box

TOGETHER: Final = 32
"""Samples that are proven together, where nobody says how many."""


@final
@dataclass(frozen=True, slots=True)
class Proof:
    """How to prove.

    Args:
        method: one of ``METHODS``: ibp, crown-ibp, crown, alpha, complete; those before it are tried first.
        seconds: for ``complete``: the time for each sample.
        arithmetic: how the network computes where it is deployed: float32, tf32, bfloat16 or real.

    Raises:
        UsageError: an unknown method or arithmetic, or no time.
    """

    method: str = "crown"
    seconds: float = 30.0
    arithmetic: str = "float32"

    def __post_init__(self) -> None:
        one_of("a method of proof", self.method, METHODS)
        one_of("an arithmetic", self.arithmetic, [*ARITHMETICS])
        if not self.seconds > 0:
            raise UsageError("seconds above 0", f"{self.seconds}", "It is the time that one sample may take.")

    @property
    def cheap(self) -> str:
        """The last of its methods that comes before any search."""
        return METHODS[min(METHODS.index(self.method), METHODS.index("alpha"))]

    def prover(
        self, model: Model, shape: tuple[int, ...], device: torch.device | str | None, method: str = ""
    ) -> Prover:
        """Return what proves, by ``method`` if that is given.

        Raises:
            ModelError: the network cannot be recorded (``not-exportable``), or has an operator without a bound.
        """
        return Prover(model, shape, method or self.method, self.seconds, ARITHMETICS[self.arithmetic], device)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@final
@dataclass(frozen=True, slots=True)
class Certificate:
    """What is proven about n samples: no point of the ball and the box is taken for another class.

    All tensors are on the CPU.

    Args:
        certified: (n,), right on the clean input and proven.
        margins: (n, c) float64, lower bounds of the label's logit minus each other one over the whole ball; inf for
            the label itself, -inf where nothing was to be proven because the model is wrong on the clean input.
        prediction: (n,) int64, of the clean input in float32.
        norm, eps: of the ball.
        method, arithmetic: of the proof.
        seconds: that it took.
    """

    certified: Mask
    margins: Tensor
    prediction: Labels
    norm: str
    eps: float
    method: str
    arithmetic: str
    seconds: float

    @property
    def accuracy(self) -> float:
        """The certified accuracy: a lower bound of the truth on these samples."""
        return float(self.certified.double().mean())


def certify(
    model: Model | Net,
    x: Any,
    y: Any,
    threat: Threat | str,
    method: str = "crown",
    seconds: float = 30.0,
    arithmetic: str = "float32",
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    progress: Progress = silent,
) -> Certificate:
    """Prove, where that succeeds, that nothing the threat allows changes the answer of a model that is right.

    What is not certified may be robust all the same: a stronger method may prove it.

    Args:
        model: an :class:`assay.Model`, or a network that takes inputs in [0, 1]; one fixed function, of operators that
            have bounds (``docs/proof.md``).
        x: clean inputs (n, *f) inside the box, a tensor or an array.
        y: their labels (n,).
        threat: norm and eps, ``linf:0.1``. A proof for all points holds for those with few bits, too.
        method: ibp, crown-ibp, crown, alpha or complete, from the fastest to the strongest.
        seconds: for ``complete``: the time for each sample.
        arithmetic: how the network computes where it is deployed: float32, tf32, bfloat16 or real.
        device: where to compute; None for where the model is.
        batch_size: samples that are proven together; changes no result.
        progress: is called with each :class:`Snapshot`.

    Example:
        >>> net = lambda x: torch.stack([x.sum(1), 1 - x.sum(1)], 1)
        >>> c = certify(net, [[0.5, 0.4], [0.3, 0.3]], [0, 0], "linf:0.1")
        >>> c.certified.tolist(), round(c.margins[0, 1].item(), 4)
        ([True, False], 0.4)

    Raises:
        ThreatError: no eps, one that does not fit the box, a wanted class, or a norm without bounds.
        DataError: inputs or labels that cannot be used, inputs outside the box.
        ModelError: the model cannot be bounded, or does not return finite logits.
        UsageError: an unknown method or arithmetic.
    """
    begin = time.perf_counter()
    threat = Threat.parse(threat) if isinstance(threat, str) else threat
    if threat.eps is None:
        raise ThreatError("an eps to certify", str(threat), "Write linf:0.1, or ask assay.certified_radius.")
    case = Case.pose(model, x, y, threat, Proof(method, seconds, arithmetic), device, batch_size, progress)
    margins = torch.full((len(case.x), case.prover.exact.classes), -torch.inf, dtype=torch.float64)
    for rows in case.parts():
        margins[rows] = case.margins(rows, torch.full((len(rows),), threat.eps, dtype=torch.float64))
        case.note(rows, int((margins[rows].amin(1) > 0).sum()))
    return Certificate(
        certified=margins.amin(1) > 0,
        margins=margins,
        prediction=case.prediction,
        norm=threat.norm.name,
        eps=threat.eps,
        method=method,
        arithmetic=arithmetic,
        seconds=time.perf_counter() - begin,
    )


def check_threat(threat: Threat) -> None:
    """Refuse what cannot be proven about.

    Raises:
        ThreatError: a wanted class, or a norm without bounds.
    """
    if threat.targeted:
        raise ThreatError(
            "an untargeted threat to certify", "a targeted one", "A proof excludes every other class; see margins."
        )
    if threat.norm.name not in NORMS:
        raise ThreatError(f"a norm out of {', '.join(NORMS)}", repr(threat.norm.name), "These have linear bounds.")


@final
@dataclass(slots=True)
class Case:
    """Samples with the answers of the model to them, and what proves more; on the CPU."""

    prover: Prover
    x: Inputs
    y: Labels
    threat: Threat
    clean: Logits
    together: int
    show: Progress
    done: int = 0
    proven: int = 0
    begin: float = field(default_factory=time.perf_counter)

    @classmethod
    def pose(
        cls,
        model: Model | Net,
        x: Any,
        y: Any,
        threat: Threat,
        proof: Proof,
        device: torch.device | str | None,
        batch_size: int | None,
        progress: Progress,
    ) -> "Case":
        """Check everything, and ask the model about the clean inputs; errors as in :func:`certify`."""
        check_threat(threat)
        if batch_size is not None and batch_size < 1:
            raise UsageError("batch_size of at least 1", str(batch_size), "Leave it out for the default.")
        model = as_model(model)
        data = model.takes(load_data((x, y)))
        x, y, box = data.batch(torch.arange(len(data))), data.labels, model.domain
        outside = ~((x >= box.lo) & (x <= box.hi)).flatten(1).all(1)
        if outside.any():
            raise outside_box(box, (float(x.min()), float(x.max())), outside.nonzero()[:, 0].tolist(), len(x))
        threat = threat.within(box, x[0].numel())
        clean = _answers(model, x, y, device)
        prover = proof.prover(model, data.shape, device)
        return cls(prover, x, y, threat, clean, batch_size or TOGETHER, progress)

    @property
    def prediction(self) -> Labels:
        return self.clean.argmax(1)

    @property
    def right(self) -> Mask:
        return self.prediction == self.y

    def parts(self) -> list[Labels]:
        """Return the samples that the model gets right, as many at a time as are proven together."""
        rows = self.right.nonzero()[:, 0]
        return [*rows.split(self.together)] if len(rows) else []  # type: ignore[no-untyped-call]

    def margins(self, rows: Labels, radius: PerSample, also: str = "") -> Tensor:
        """Return lower bounds (k, c) of the margins of the samples ``rows`` (k,) in balls of ``radius`` (k,)."""
        tell: Tell = lambda method, left: self._tell(f"{method}{also}, {left} open")  # noqa: E731
        norm, y = self.threat.norm.name, self.y[rows]
        found = self.prover.margins(self.x[rows], y, radius, norm, tell).cpu()
        check_margins(found, self.x[rows], y, self.clean[rows], rows, norm, self.prover)
        return found

    def note(self, rows: Labels, proven: int) -> None:
        """Take down that some samples are done, and how many of them are proven."""
        self.done, self.proven = self.done + len(rows), self.proven + proven
        self._tell("proof")

    def _tell(self, stage: str) -> None:
        right, seconds = int(self.right.sum()), time.perf_counter() - self.begin
        wrong = len(self.x) - right
        self.show(Snapshot(len(self.x), wrong + self.done, right, 0, stage, 0, seconds, self.proven))


def _answers(model: Model, x: Inputs, y: Labels, device: torch.device | str | None) -> Logits:
    """Return the logits of the clean inputs; labels without a class are refused."""
    groups = torch.arange(len(x)).split(default_batch(x.shape[1:], device))  # type: ignore[no-untyped-call]
    with model.frozen(device) as live:
        door = Door(live, len(x))
        z = torch.cat([door.logits(x[g].to(live.device), g.to(live.device)).cpu() for g in groups])
    wrong = ((y < 0) | (y >= z.shape[1])).nonzero()[:, 0]
    if len(wrong):
        raise DataError(
            f"labels 0..{z.shape[1] - 1}, as the model has {z.shape[1]} outputs",
            f"{int(y[wrong[0]])} at sample {int(wrong[0])} ({len(wrong)} such labels)",
            "Check that model and data belong together, and the order of the classes.",
            code="bad-logits",
        )
    return z


_SLACK: Final = 1e-3
"""Share of the largest logit by which a bound may lie above what is seen; only gross errors are looked for."""


def check_margins(
    margins: Tensor, x: Inputs, y: Labels, clean: Logits, index: Labels, norm: str, prover: Prover
) -> None:
    """Refuse lower bounds (k, c) that lie above the margins at the samples x (k, *f) themselves, by logits (k, c).

    Raises:
        ContradictionError: there is one.
    """
    if prover.model.probabilities or prover.softmax:  # their logarithms end where float32 does
        return
    seen = (clean.gather(1, y[:, None]) - clean).double()
    above = (margins > seen + _SLACK * clean.abs().amax(1, keepdim=True)).scatter(1, y[:, None], False)
    for i in above.any(1).nonzero()[:1, 0].tolist():
        kept = {"x": x[i], "adversarial": x[i], "label": y[i], "clean_logits": clean[i], "margins": margins[i]}
        raise contradiction(int(index[i]), 0.0, 0.0, norm, {k: v.numpy() for k, v in kept.items()})


def contradiction(
    index: int, proven: float, size: float, norm: str, evidence: Mapping[str, NDArray[Any]]
) -> ContradictionError:
    """Return the error of a sample that is proven up to one size, and not so at another that is no larger."""
    error = ContradictionError(
        "no adversarial input where a proof holds",
        f"sample {index}, proven in {norm} up to {proven:g} and fooled at {size:g}"
        if size
        else f"sample {index}, whose margin is below its proven bound where nothing is changed",
        "This is a bug in the proof or in the attack, never a result: please report it with the evidence.",
    )
    error.evidence = {"index": np.asarray(index), "proven": np.asarray(proven), "size": np.asarray(size), **evidence}
    return error
