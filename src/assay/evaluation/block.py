"""One block of samples: the clean pass, the race, verification, and what is written down."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.attacks import LOSSES
from assay.attacks.attack import verify
from assay.certification import Proof
from assay.certification.certify import contradiction
from assay.certification.prover import Prover
from assay.core.random import Draws
from assay.core.together import Seat
from assay.core.types import Inputs, Labels, Logits, Mask, PerSample, choose, per_sample
from assay.data import Data
from assay.evaluation.journal import Journal, packed, unpacked
from assay.evaluation.proving import CHALLENGE, COMPLETE, Proven, Proving
from assay.evaluation.race import CHEAP, FALLEN, HOT, SPREAD, Plan, Race, Round, margins, passes_of, sees_scores
from assay.models import Door, Live, Model
from assay.models.line import Answer, Line, Question
from assay.runs.store import packed_arrays
from assay.threats import Goal, Problem, Threat
from assay.threats.problem import exact_size

SHRINK_PASSES = 6
"""Halvings of the way from the clean input to an adversarial one, to find a smaller one."""


@final
@dataclass(frozen=True, slots=True)
class Job:
    """What a block needs besides its samples; can be sent to another process.

    ``batch`` samples are attacked together, which changes no result. No sample spends more than ``max_passes``.
    ``levels`` are further eps, each smaller than that of the threat, at which the robust accuracy is wanted.
    ``proof`` says how samples are proven, if they are.
    """

    model: Model
    data: Data
    threat: Threat
    plan: Plan
    seed: int
    device: torch.device | str | None
    batch: int = 128
    max_passes: int | None = None
    levels: tuple[float, ...] = ()
    proof: Proof | None = None


@final
@dataclass(frozen=True, slots=True)
class Desk:
    """Where a block asks whose questions are answered together with those of others."""

    live: Live
    seat: Seat[Question, Answer]


@final
@dataclass(frozen=True, slots=True)
class Part:
    """What came of one block, ready to be stored."""

    rows: dict[str, list[Any]]
    adversarials: Mapping[str, NDArray[Any]] | bytes  # bytes: packed by whoever did the block
    tally: dict[str, Any]


@final
@dataclass(frozen=True, slots=True)
class SoFar:
    """How a block stands while it is under way: its first sample, its samples, and how many are right and fooled."""

    first: int
    samples: int
    right: int
    fooled: int


class Tell(Protocol):
    """Is told, after each question to the model, the stage and the number of passes, or how a block stands."""

    def __call__(self, stage: str, passes: int, so_far: SoFar | None = None, /) -> None: ...


def ignore(stage: str, passes: int, so_far: SoFar | None = None, /) -> None:
    """Tell nobody."""


def run_block(
    job: Job,
    rows: list[int],
    tell: Tell = ignore,
    journal: Path | None = None,
    deadline: float = math.inf,
    prover: Prover | None = None,
    desk: Desk | None = None,
) -> Part:
    """Attack the samples ``rows`` of the job's data: all that one call of an executor does.

    With a folder for a ``journal``, goes on with the race that is kept there, and keeps it there until the block is
    done. After the ``deadline``, on the clock ``time.monotonic``, no further attack and no further proof begins.
    What the job's ``proof`` needs is made anew where no ``prover`` is given. Without a ``desk``, the block has the
    network for itself.

    Raises:
        ContradictionError: a sample is proven and fooled at once.
    """
    if prover is None and job.proof is not None:
        prover = job.proof.prover(job.model, job.data.shape, job.device)
    if desk is not None:
        return _Block(job, desk, rows, tell, journal, deadline, prover).run()
    with job.model.frozen(job.device) as live:
        # The draws of attacks belong to samples; those of a model that is random can only belong to a block.
        torch.manual_seed(hash((job.seed, rows[0])) % 2**63)
        return _Block(job, Desk(live, Seat(Line(live).ask)), rows, tell, journal, deadline, prover).run()


def kept_in(folder: Path, rows: list[int]) -> Path:
    """Return the file that keeps the race of a block that is under way."""
    return folder / f"block-{rows[0]:08d}.npz"


class _Block:
    """Samples numbered 0 .. n - 1, their race, and the audit of those that are left."""

    def __init__(
        self,
        job: Job,
        desk: Desk,
        rows: list[int],
        tell: Tell,
        journal: Path | None,
        deadline: float,
        prover: Prover | None,
    ) -> None:
        self.job, self.index, self.deadline = job, torch.tensor(rows), deadline
        self.journal = Journal(None if journal is None else kept_in(journal, rows))
        self.clock = _Clock(desk, self.index, tell)
        self.x, self.y = job.data.batch(self.index), job.data.labels[self.index]
        self.threat = job.threat
        self.proving: Proving | None = None
        if job.proof is not None and prover is not None:
            about = job.threat, self.x, self.y, self.index, self.clock, deadline, lambda: self.journal.save(self._state)
            self.proving = Proving(job.proof, prover, *about)
        self.bounded: str | None = None
        self.proven: Proven
        self.race: Race | None = None
        self.audit: Race | None = None
        self.clean: Logits

    def run(self) -> Part:
        if not self._resume():
            self._begin()
        if self.proving is not None:
            self.proving.clean = self.clean
        self._report()
        if self.race is None:
            self._prove_first()
            self.race = self._line_up(self.job.plan.rounds, self.right & (self.proven.lower == 0))
        self._compete(self.race, self.job.plan.rounds, 0, self.job.plan.most)
        if self.job.plan.audit and self.audit is None:
            self._choose(self.race)
        if self.audit is not None:
            self._compete(self.audit, self.job.plan.ladder, len(self.job.plan.rounds))
        self._prove_last(self.race)
        self._conclude(self.race)
        for eps in sorted(self.job.levels, reverse=True):
            self._tighten(eps)
        excluded = self.proven.excluded.gather(1, self.after.argmax(1, keepdim=True))[:, 0] & (self.by >= 0)
        self._refuse(self.sizes, self.found, torch.where(excluded, self.sizes, self.proven.lower))
        return self._write_down()

    @property
    def right(self) -> Mask:
        """The samples that the model gets right when nobody interferes."""
        return self.clean.argmax(1) == self.y

    def _report(self) -> None:
        fooled = sum(int((race.by >= 0).sum()) for race in (self.race, self.audit) if race is not None)
        so_far = SoFar(int(self.index[0]), len(self.index), int(self.right.sum()), fooled)
        self.clock.tell(self.clock.name, 0, so_far)

    def _begin(self) -> None:
        everyone = torch.arange(len(self.index))
        with self.clock.stage("clean", "clean", len(everyone)) as stage:
            parts = everyone.split(self.job.batch)  # type: ignore[no-untyped-call]
            there = (self._there(self.x[at], at) for at in parts)
            self.clean = torch.cat([self.clock.door.logits(x, rows).cpu() for x, rows in there])
            stage["broken"] += int((~self.right).sum())
        self.proven = Proven.nothing(*self.clean.shape)

    def _prove_first(self) -> None:
        """Prove what is cheap to prove, so that it need not be attacked."""
        if self.proving is not None and self.threat.eps is not None:
            self.proving.cheaply(self.proven, self.right)
            self._challenge(self.proven.tried)

    def _prove_last(self, race: Race) -> None:
        """Search for proofs of what attacks left standing; without an eps, for the radius of every sample."""
        if self.proving is None:
            return
        fell = race.by >= 0 if self.audit is None else (race.by >= 0) | (self.audit.by >= 0)
        if self.threat.eps is None:
            sizes = exact_size(self.threat.norm, race.best, self.x)
            self.proving.radius(self.proven, self.right, torch.where(fell, sizes, torch.inf))
        elif self.proving.proof.method == COMPLETE:
            self.proving.completely(self.proven, self.right & ~fell & (self.proven.lower == 0))
            self._challenge(self.proven.searched)
        if self.proving.late:
            self.bounded = "max-seconds"

    def _challenge(self, entered: Mask) -> None:
        """Take one step against those samples that ``entered`` and are proven."""
        race = self._line_up(CHALLENGE, entered & (self.proven.lower > 0))
        self._compete(race, CHALLENGE, _CHALLENGE)
        sizes = exact_size(self.threat.norm, race.best, self.x)
        self._refuse(torch.where(race.by >= 0, sizes, torch.inf), race.best, self.proven.lower)

    def _refuse(self, sizes: PerSample, found: Inputs, proven: PerSample) -> None:
        """Stop where a sample is fooled at ``found`` (n, *f), of ``sizes`` (n,), within what is ``proven`` (n,)."""
        within = self.right & (sizes <= proven)
        for i in within.nonzero()[:1, 0].tolist():
            kept = {"x": self.x[i], "adversarial": found[i], "label": self.y[i], "clean_logits": self.clean[i]}
            kept["margins"] = self.proven.margins[i]
            arrays = {k: v.numpy() for k, v in kept.items()}
            raise contradiction(int(self.index[i]), float(proven[i]), float(sizes[i]), self.threat.norm.name, arrays)

    def _choose(self, race: Race) -> None:
        """Choose the survivors that are audited: those with the lowest lots."""
        left = race.standing
        count = min(math.ceil(self.job.plan.audit * int(left.sum())), int(left.sum()))
        lots = torch.where(left, Draws.of(self.job.seed, self.index).fold(_AUDIT).uniform(), torch.inf)
        chosen = torch.zeros_like(left)
        chosen[lots.argsort(stable=True)[:count]] = True
        self.audit = self._line_up(self.job.plan.ladder, chosen)

    def _line_up(self, rounds: tuple[Round, ...], entered: Mask) -> Race:
        near = margins(self.job.model.joint(self.clean, Goal(self.y)), self.y, self.proven.excluded)
        return Race.start(rounds, self.x, near, entered, Draws.of(self.job.seed, self.index))

    def _compete(self, race: Race, rounds: tuple[Round, ...], first: int, most: int | None = None) -> None:
        """Run the rounds of a race; the numbers under which they are known begin with ``first``."""
        while time.monotonic() < self.deadline:
            begins = not len(race.waiting)
            if (now := race.next(rounds, self.job.batch)) is None:
                return
            # Between blocks only: where batches end must not matter.
            if most is not None and begins and not race.trials and self._too_dear(race, now[0], most):
                race.pass_over()
                continue
            self._attack(race, *now, first)
            if race is self.race or race is self.audit:
                self._report()
                self.journal.save(self._state)
        self.bounded = "max-seconds"

    def _too_dear(self, race: Race, part: Round, most: int) -> bool:
        """Tell whether the block that begins could cost more than the race may."""
        spent = int(self.clock.door.forwards.sum() + self.clock.door.backwards.sum())
        standing, right = int(race.standing.sum()), int((self.right & (self.proven.lower == 0)).sum())
        cost, granted = race.given * passes_of(part.attack), most * standing + FALLEN * (right - standing)
        first = part is next((r for r in self.job.plan.rounds if sees_scores(r.attack)), None) and race.in_first_block
        free = part.opener or race.yielded >= HOT or cost <= CHEAP * right or (first and standing >= SPREAD * right)
        return not free and spent / self.job.model.samples + cost > granted

    def _attack(self, race: Race, part: Round, ids: Labels, first: int) -> None:
        """Run one round on some samples; only claims that verification confirms count as fallen."""
        door, judged = self.clock.door, self.job.model.deciding
        most = None if self.job.max_passes is None else self.job.max_passes - 2 * judged  # to verify, and to look
        with door.limited(most):
            able = door.affords(ids.to(door.live.device), 2)
        if able is not None:
            self.bounded, ids = "max-passes", ids[able.cpu()]
            if not len(ids):
                return
        truth = self._pose(ids)
        with self.clock.stage(part.name, part.kind, len(ids)) as stage:
            # Attacks get a copy of their own: what they do to it must not decide whether they succeeded.
            p = self._pose(ids).stage(first + 64 * race.turns + race.order[race.leg])
            nearest = race.near[ids].sort(dim=1, descending=True, stable=True)
            p = replace(p, order=nearest.indices.masked_fill(nearest.values.isneginf(), -1).to(p.x0.device))
            if part.warm:
                p = p.starting(race.best[ids].to(p.x0.device))
            with door.limited(most):
                out = part.attack.run(door, p, full=part.full)
            holds, x, _ = verify(door, truth, out)
            logits = self._look(truth, x, ~holds)
            self._count(stage, race, len(ids), int(holds.sum()))
        self.clock.claimed += int(out.success.sum())
        self.clock.rejected += int((out.success & ~holds).sum())
        near = margins(logits.cpu(), self.y[ids], self.proven.excluded[ids])
        race.settle(ids, holds.cpu(), near, x.cpu())

    @staticmethod
    def _count(stage: dict[str, Any], race: Race, entered: int, broken: int) -> None:
        """Add to the row of a stage; ``last`` holds the counts of its last turn."""
        if stage.get("turn") != race.turns:
            stage.update(turn=race.turns, last={"entered": 0, "broken": 0})
        stage["broken"] += broken
        stage["last"]["entered"] += entered
        stage["last"]["broken"] += broken

    def _look(self, truth: Problem, x: Inputs, left: Mask) -> Logits:
        """Return the logits at the best points of the samples that are ``left``, the clean ones for the others."""
        assert truth.clean_logits is not None
        at = (left & truth.allows(x)).nonzero()[:, 0]
        if not len(at):
            return truth.clean_logits
        z = self.clock.door.logits(x[at], truth.rows[at], truth.goal.take(at))
        return truth.clean_logits.index_copy(0, at, z.to(truth.clean_logits.dtype))

    def _pose(self, ids: Labels) -> Problem:
        x, y, rows, clean = self._there(self.x[ids], self.y[ids], ids, self.clean[ids])
        draws = Draws.of(self.job.seed, self.index[ids].to(x.device))
        return replace(Problem.pose(x, y, self.threat, draws, rows), clean_logits=self.job.model.joint(clean, Goal(y)))

    def _there(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return copies on the model's device."""
        return tuple(v.to(self.clock.door.live.device, copy=True) for v in values)

    def _state(self) -> dict[str, NDArray[Any]]:
        door, clock = self.clock.door, self.clock
        told = {"stages": clock.stages, "claimed": clock.claimed, "rejected": clock.rejected}
        passes = {"forwards": door.forwards.cpu().numpy(), "backwards": door.backwards.cpu().numpy()}
        races = {"race.": self.race, "audit.": self.audit}
        arrays = {k: v for name, race in races.items() if race is not None for k, v in race.to_arrays(name).items()}
        arrays |= self.proven.to_arrays() | passes
        return {"index": self.index.numpy(), "clean": self.clean.numpy(), "told": packed(told), **arrays}

    def _resume(self) -> bool:
        """Go on where the journal says; tell whether there was one, of these samples."""
        arrays = self.journal.load()
        if arrays is None or not np.array_equal(arrays["index"], self.index.numpy()):
            return False
        self.clean, told = torch.from_numpy(arrays["clean"]), unpacked(arrays["told"])
        self.clock.stages, self.clock.claimed, self.clock.rejected = (
            told[k] for k in ("stages", "claimed", "rejected")
        )
        for name in ("forwards", "backwards"):
            getattr(self.clock.door, name).copy_(torch.from_numpy(arrays[name]))
        self.proven = Proven.from_arrays(arrays)
        self.race = Race.from_arrays(arrays, "race.") if "race.best" in arrays else None
        self.audit = Race.from_arrays(arrays, "audit.") if "audit.best" in arrays else None
        return True

    def _conclude(self, race: Race) -> None:
        """Put race and audit together: who fell, by what, at which point, made smaller."""
        self.by, self.found = race.by, race.best
        self.sizes = torch.where(self.right, torch.inf, 0.0).double()
        self.after, self.survive = self.clean.clone(), 0
        if self.audit is not None:
            self._take(self.audit, len(self.job.plan.rounds))
        if self.job.plan.rounds:
            self._shrink((self.by >= 0).nonzero()[:, 0], count=True)

    def _tighten(self, eps: float) -> None:
        """Attack what fell at a larger eps at this one."""
        tighten, first = self.job.plan.tighten, len(self.job.plan.rounds) + len(self.job.plan.ladder)
        race = self._line_up(tighten, (self.by >= 0) & (self.sizes > eps) & (self.proven.lower < eps))
        race.best = self.found.clone()
        self.threat = replace(self.job.threat, eps=eps)
        self._compete(race, tighten, first)
        self._take(race, first)
        self._shrink((race.by >= 0).nonzero()[:, 0])

    def _take(self, race: Race, first: int) -> None:
        """Take over what a later race broke."""
        fell = race.by >= 0
        self.by = torch.where(fell, race.by + first, self.by)
        self.found = choose(fell, race.best, self.found)

    def _shrink(self, at: Labels, *, count: bool = False) -> None:
        """Shrink the adversarial points of the samples ``at``; with ``count``, first count what survives 8 bits."""
        door = self.clock.door
        with self.clock.stage("shrink", "shrink", len(at)):
            for ids in at.split(self.job.batch) if len(at) else ():  # type: ignore[no-untyped-call]
                p, (x,) = self._pose(ids), self._there(self.found[ids])
                if count:
                    self.survive += _after_rounding(door, p, x) if x.ndim == 4 else len(ids)
                x, z = _shrink(door, p, x)
                self.found[ids], self.after[ids] = x.cpu(), z.cpu().to(self.after.dtype)
                self.sizes[ids] = exact_size(p.norm, x, p.x0).double().cpu()

    def _certified(self) -> list[bool] | list[None]:
        if self.proving is None or self.job.threat.eps is None:
            return [None] * len(self.index)
        return (self.proven.lower > 0).tolist()

    def _write_down(self) -> Part:
        by, fooled, sizes = self.by, self.by >= 0, self.sizes
        plan, at = self.job.plan, fooled.nonzero()[:, 0]
        names = [r.name for r in (*plan.rounds, *plan.ladder, *plan.tighten)]
        wrong, guesses = self.clean.argmax(1) != self.y, self.after.argmax(1)
        told = None
        if self.audit is not None and self.race is not None:
            survivors = int(self.race.standing.sum())
            late = self.audit.by >= 0
            told = {"attacked": int((late | self.audit.standing).sum()), "broken": int(late.sum())}
            told["survivors"] = survivors
        rows = {
            "index": self.index.tolist(),
            "label": self.y.tolist(),
            "prediction": self.clean.argmax(1).tolist(),
            "margin": (-LOSSES["margin"](self.clean, Goal(self.y))).double().tolist(),
            "fooled": fooled.tolist(),
            "adversarial_prediction": [
                a if f else None for a, f in zip(guesses.tolist(), fooled.tolist(), strict=True)
            ],
            "size": sizes.tolist(),
            "broken_by": [names[b] if b >= 0 else None for b in by.tolist()],
            "certified": self._certified(),
            "lower": self.proven.lower.tolist(),
            "upper": sizes.tolist(),
            "forwards": self.clock.door.forwards.tolist(),
            "backwards": self.clock.door.backwards.tolist(),
            "status": [
                "misclassified" if w else "fooled" if f else "robust"
                for w, f in zip(wrong.tolist(), fooled.tolist(), strict=True)
            ],
        }
        arrays = {
            "index": self.index[at],
            "x": self.found[at],
            "clean": self.x[at],
            "label": self.y[at],
            "prediction": guesses[at],
            "clean_confidence": self.clean[at].softmax(1).amax(1).float(),
            "confidence": self.after[at].softmax(1).amax(1).float(),
        }
        tally = {
            "stages": self.clock.stages,
            "claimed": self.clock.claimed,
            "rejected": self.clock.rejected,
            "survive_8bit": self.survive,
            "audit": told,
            "bounded": self.bounded,
            "seconds": sum(s["seconds"] for s in self.clock.stages),
        }
        pack = partial(packed_arrays, tell=partial(self.clock.tell, "store", 0))
        return Part(rows, pack({k: v.numpy() for k, v in arrays.items()}) if len(at) else {}, tally)


_AUDIT = 12
"""Names the random numbers that say which survivors are audited."""

_CHALLENGE = 1 << 20
"""The number under which the random numbers of the challenge are known; those of rounds are far below."""


class _Clock:
    """The door of a block, and what each stage asked of it."""

    def __init__(self, desk: Desk, index: Labels, tell: Tell) -> None:
        self.name, self.tell, self.seat = "", tell, desk.seat
        self.door = Door(desk.live, len(index), lambda passes: tell(self.name, passes), index, self.seat.ask)
        self.stages: list[dict[str, Any]] = []
        self.claimed = self.rejected = 0

    @contextlib.contextmanager
    def stage(self, name: str, kind: str, entered: int) -> Iterator[dict[str, Any]]:
        """Yield the row of a stage, whose count of what it broke is the caller's to raise."""
        self.name = name
        before, begin = (self.door.forwards.sum(), self.door.backwards.sum()), self._seconds()
        row = next((s for s in self.stages if s["name"] == name), None)
        if row is None:
            row = {"name": name, "kind": kind, **dict.fromkeys(("entered", "broken", "forwards", "backwards"), 0)}
            row["seconds"] = 0.0
            self.stages.append(row)
        yield row
        row["entered"] += entered
        row["forwards"] += int(self.door.forwards.sum() - before[0])
        row["backwards"] += int(self.door.backwards.sum() - before[1])
        row["seconds"] += self._seconds() - begin

    def _seconds(self) -> float:
        """Return the time, on a clock that stands still while others are asking."""
        return time.perf_counter() - self.seat.waited


def _shrink(door: Door, p: Problem, x: Inputs) -> tuple[Inputs, Tensor]:
    """Halve the way from the clean inputs to verified adversarial ones x; return the smallest that fool, and logits.

    Each accepted point is the stored one, asked about in a fresh pass; so the result is as verified as x was.
    """
    best, z = x, torch.empty(0)
    near, far = p.full(0.0), p.full(1.0)
    for i in range(SHRINK_PASSES):
        middle = (near + far) / 2
        point = p.snap((p.x0 + per_sample(middle, x) * (x - p.x0)).clamp(p.lower, p.upper))
        logits = door.logits(point, p.rows, p.goal)
        holds = p.goal.clearly_reached(logits) & p.allows(point)
        best, z = choose(holds, point, best), choose(holds, logits, z) if i else logits
        near, far = torch.where(holds, near, middle), torch.where(holds, middle, far)
    at = (far == 1).nonzero()[:, 0]  # nothing smaller fools
    if len(at):
        z = z.index_copy(0, at, door.logits(x[at], p.rows[at], p.goal.take(at)))
    return best, z


def _after_rounding(door: Door, p: Problem, x: Inputs) -> int:
    """Count the adversarial inputs that still fool when saved as 8-bit images."""
    lo, width = p.box.lo, p.box.width
    levels = ((x - lo) / width * 255).round() / 255 * width + lo
    return int(p.goal.reached(door.logits(levels, p.rows, p.goal)).sum())
