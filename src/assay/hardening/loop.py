"""The one training loop. Order, rates, validation, monitor, averages, checkpoints and interruption are handled here."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from assay.core.errors import NonFiniteError
from assay.core.random import Draws
from assay.hardening.augment import augmented, parse
from assay.hardening.average import averaged
from assay.hardening.awp import perturbed
from assay.hardening.checkpoint import read, write
from assay.hardening.devices import Precise, Together
from assay.hardening.inner import around
from assay.hardening.interrupts import interruptible
from assay.hardening.objective import Objective, Step, Terms
from assay.hardening.optimiser import optimiser_of, optimiser_tensors, restore_optimiser
from assay.hardening.passes import PassCounter
from assay.hardening.source import Batch
from assay.hardening.task import Clock, Moment, Task, Tell
from assay.hardening.watch import Validation, catastrophic, validate

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_SAVE_SECONDS = 300.0
"""A long epoch is also kept in the middle, this often."""

_ROLLBACKS = 3
_STATISTICS = 100
"""Batches from which BatchNorm statistics are taken anew for averaged weights."""


@final
class Training:
    """A training in progress: ``run`` goes to its end, from wherever it is.

    The network ends with the weights that were kept. Whatever happens at which moment, a training that is resumed from
    its checkpoint ends with the same weights: all random numbers are those of (seed, epoch, sample) or (seed, step).
    """

    def __init__(self, net: nn.Module, task: Task, fabric: "Fabric", checkpoint: Path, tell: Tell) -> None:
        self.task, self.fabric, self.checkpoint, self.tell = task, fabric, checkpoint, tell
        s = task.settings
        layout = {"memory_format": torch.channels_last} if s.channels_last else {}
        self.plain = net.to(fabric.device, **layout)  # type: ignore[call-overload]
        self.counter = PassCounter(self.plain)
        self.net = self.plain if s.precision == "32-true" else Precise(self.plain, fabric)
        self.optimiser = optimiser_of(self.plain, s)
        self.together = Together(fabric)
        self.average = averaged(self.plain, s)
        self.valid = task.valid.head(s.valid_limit or len(task.valid))
        self.chance = float(self.valid.labels.bincount().max()) / len(self.valid)
        self.augmentations = parse(s.augment)
        self.at, self.attempt, self.stopped = 0, 0, ""
        self.rows: list[dict[str, Any]] = []
        self.best = -1.0
        self.kept: dict[str, Tensor] = {}
        self.memory: dict[str, Tensor] = {}
        self.sums = {n: torch.zeros((), dtype=torch.float64, device=fabric.device) for n in ("loss", "right", "seen")}
        self.parts: dict[str, Tensor] = {}
        self.clock = Clock()
        self._saved = time.monotonic()

    @property
    def steps(self) -> int:
        """Batches in all."""
        return self.task.epochs * self.task.source.steps

    @property
    def done(self) -> bool:
        return self.at >= self.steps or bool(self.stopped)

    def run(self) -> None:
        """Train to the end.

        Raises:
            KeyboardInterrupt: on Ctrl-C or SIGTERM, once the state is saved.
            NonFiniteError: the loss is not finite.
        """
        if self.checkpoint.exists():
            self._restore(self.checkpoint)
        order, lap = None, -1
        self.clock.start()
        devices = [self.fabric.device] if self.fabric.device.type == "cuda" else []
        with torch.random.fork_rng(devices), interruptible() as interrupted:
            while not self.done:
                epoch, step = divmod(self.at, self.task.source.steps)
                if epoch != lap:
                    order, lap = self.task.source.order(epoch), epoch
                assert order is not None
                self._learn(self.task.source.batch(order, epoch, step), epoch)
                self.at += 1
                if step + 1 in self._checks():
                    self._check(epoch, step + 1)
                self._keep_up(step + 1 == self.task.source.steps)
                if self.together.any(interrupted()):
                    self._save()
                    raise KeyboardInterrupt
        self._finish()

    # ------------------------------------------------------------------------------------------------------ a step

    def _learn(self, batch: Batch, epoch: int) -> None:
        """Take one step for each replay of a batch."""
        objective, s, share = self.task.objective, self.task.settings, self.at / self.steps
        torch.manual_seed((self.task.seed * 0x9E3779B1 + self.at * 2 + 1 + (self.attempt << 40)) % (1 << 63))
        step = self._step(batch, epoch, share)
        for group in self.optimiser.param_groups:
            group["lr"] = s.rate(share) / 2**self.attempt
        self.net.train()
        terms = self._replay(objective, step, share)
        n = len(step.y)
        self.sums["loss"] += terms.loss.detach() * n
        self.sums["right"] += (terms.logits.argmax(1) == step.y).sum()
        self.sums["seen"] += n
        for name, part in terms.parts.items():
            self.parts[name] = self.parts.get(name, torch.zeros_like(self.sums["loss"])) + part * n

    def _replay(self, objective: Objective, step: Step, share: float) -> Terms:
        """Learn from a batch as often as its objective says; return what the last time gave."""
        s = self.task.settings
        for _ in range(objective.replays):
            x = objective.find(step)
            self.optimiser.zero_grad()
            gamma = s.awp if share >= s.awp_from else 0.0
            with perturbed(self.net, lambda step=step, x=x: objective.loss(step, x).loss, gamma):  # type: ignore[misc]
                terms = objective.loss(step, x)
                (terms.loss + self._penalty()).backward()  # type: ignore[no-untyped-call]
            objective.learned(step, x)
            self.together.average_gradients(self.plain)
            if s.clip:
                nn.utils.clip_grad_norm_(self.plain.parameters(), s.clip)
            self.optimiser.step()
            if self.average is not None and s.average == "ema":
                self.average.update_parameters(self.plain)
        return terms

    def _step(self, batch: Batch, epoch: int, share: float) -> Step:
        """Pose a batch: augmented, on the device, with its geometry at the present eps."""
        task, s, device = self.task, self.task.settings, self.fabric.device
        assert task.threat.box is not None
        x, y, indices = (self.together.part(v) for v in (batch.x, batch.y, batch.indices))
        x, y = x.to(device), y.to(device)
        draws = Draws(task.source.draws(indices, epoch + (self.attempt << 16)).keys.to(device))
        soft = None
        if self.augmentations:
            x, soft = augmented(x, y, task.classes, self.augmentations, draws.fold(1), task.threat.box)
        if s.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        grown = s.grown(share)
        p = around(x, y, task.threat, grown * s.stretch, draws.fold(2))
        return Step(self.net, x, y, p, soft, s.label_smoothing, share, grown, task.helpers, self.memory)

    def _penalty(self) -> Tensor | float:
        l1 = self.task.settings.l1
        return l1 * torch.stack([p.abs().sum() for p in self.plain.parameters() if p.ndim > 1]).sum() if l1 else 0.0

    # -------------------------------------------------------------------------------------------- between the steps

    def _checks(self) -> set[int]:
        """Return after which batches of an epoch there is a validation; the last is always among them."""
        steps, checks = self.task.source.steps, self.task.settings.checks
        return {math.ceil(steps * i / checks) for i in range(1, checks + 1)}

    def _check(self, epoch: int, step: int) -> None:
        """Validate, write a row of the history, keep the best weights, and look for signs of trouble."""
        s, task = self.task.settings, self.task
        self.together.average_statistics(self.plain)
        sums, parts = self.together.sums(self.sums), self.together.sums(self.parts)
        loss = sums["loss"] / sums["seen"]
        if self.average is not None and s.average == "swa" and step == task.source.steps:
            self._average_epoch(epoch)
        begun = time.monotonic()
        now = self._validated(loss, f"epoch {epoch + 1}, batch {step}")
        past = [Validation(r["clean"], r["fgsm"], r["pgd"]) for r in self.rows if not r["event"]]
        row: dict[str, Any] = {
            "epoch": epoch + step / task.source.steps,
            "steps": self.at,
            "attempt": self.attempt,
            "lr": self.optimiser.param_groups[0]["lr"],
            "eps": (task.threat.eps or 0.0) * s.stretch * s.grown((self.at - 1) / self.steps),
            "loss": loss,
            "train": sums["right"] / sums["seen"],
            **now.to_json(),
            "forwards": self.counter.forwards * self.together.count,
            "backwards": self.counter.backwards * self.together.count,
            **self.clock.read(),
            "validation": time.monotonic() - begun,
            "event": "",
            "parts": {n: v / sums["seen"] for n, v in parts.items()},
        }
        self.rows.append(row)
        self.sums = {n: torch.zeros_like(v) for n, v in self.sums.items()}
        self.parts = {}
        self._react(row, catastrophic(past, now, self.chance))
        self._tell(loss)

    def _validated(self, loss: float, where: str) -> Validation:
        remedy = "Lower lr, or limit the gradient (clip=1); the last checkpoint is as it was."
        if not math.isfinite(loss):
            raise NonFiniteError("a finite training loss", f"{loss} in {where}", remedy)
        s = self.task.settings
        try:
            with self.counter.paused():
                return validate(self.judged, self.valid, self.task.threat, s.valid_steps, self.task.seed)
        except NonFiniteError as e:
            raise NonFiniteError("a network that stays finite", f"{e.found} after {where}", remedy) from e

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and kept: the averaged one, where there is one by now."""
        ready = self.average is not None and int(self.average.n_averaged) > 0
        return self.average.module if ready and self.average is not None else self.plain

    def _react(self, row: dict[str, Any], trouble: bool) -> None:
        """Keep the weights if they are the best so far; stop or go back if training has gone wrong."""
        s = self.task.settings
        grown = s.grown((self.at - 1) / self.steps) == 1
        better = row["pgd"] > self.best or (row["pgd"] == self.best and grown)
        if trouble and s.monitor != "off":
            sign = f"catastrophic overfitting: FGSM accuracy {row['fgsm']:.1%}, PGD accuracy {row['pgd']:.1%}"
            back = s.monitor == "rollback" and self.attempt < _ROLLBACKS
            row["event"] = f"{sign}; {'back to the best weights, at half the rate' if back else 'stopped'}"
            if back:
                self._roll_back()
            else:
                self.stopped = row["event"]
        elif better or s.select == "last" or not self.kept:
            self.best = row["pgd"]
            self.kept = {n: v.detach().clone() for n, v in self.judged.state_dict().items()}
        elif s.patience and self._since_best() >= s.patience * s.checks:
            self.stopped = row["event"] = f"stopped: no better validation in {s.patience} epochs"

    def _since_best(self) -> int:
        accuracies = [r["pgd"] for r in self.rows]
        return len(accuracies) - 1 - accuracies.index(max(accuracies))

    def _roll_back(self) -> None:
        self.attempt += 1
        self.plain.load_state_dict(self.kept)
        self.optimiser.state.clear()
        self.average = averaged(self.plain, self.task.settings)
        self.memory.clear()

    def _average_epoch(self, epoch: int) -> None:
        """Take the weights of this epoch into their mean, and BatchNorm statistics that belong to the mean."""
        if self.average is None or self.at < self.task.settings.swa_from * self.steps:
            return
        self.average.update_parameters(self.plain)
        source, order = self.task.source, self.task.source.order(epoch)
        batches = (source.batch(order, epoch, k).x for k in range(min(_STATISTICS, source.steps)))
        update_bn((x.to(self.fabric.device) for x in batches), self.average.module)

    def _keep_up(self, epoch_ends: bool) -> None:
        if self.at % 10 == 0:
            self._tell(None)
        if epoch_ends or self.stopped or time.monotonic() - self._saved > _SAVE_SECONDS:
            self._save()

    def _tell(self, loss: float | None) -> None:
        row = self.rows[-1] if self.rows else None
        self.tell(Moment(self.task.what, self.at, self.steps, self.task.source.steps, loss, row))

    def _finish(self) -> None:
        """Leave the network with the weights that were kept."""
        if self.kept:
            self.plain.load_state_dict(self.kept)
        self.counter.close()
        self.plain.eval()

    # -------------------------------------------------------------------------------------------------- the state

    def _save(self) -> None:
        if not self.together.first:
            return
        parts = {
            "net": self.plain.state_dict(),
            "kept": self.kept,
            "optimiser": optimiser_tensors(self.optimiser),
            "average": self.average.state_dict() if self.average is not None else {},
            "memory": self.memory,
            "sums": self.sums,
            "parts": self.parts,
        }
        about = {
            "at": self.at,
            "attempt": self.attempt,
            "stopped": self.stopped,
            "best": self.best,
            "rows": self.rows,
            "forwards": self.counter.forwards,
            "backwards": self.counter.backwards,
            "clock": self.clock.read(),
        }
        write(self.checkpoint, parts, about)
        self._saved = time.monotonic()

    def _restore(self, path: Path) -> None:
        parts, about = read(path)
        device = self.fabric.device
        on = {part: {n: v.to(device) for n, v in t.items()} for part, t in parts.items()}
        self.plain.load_state_dict(on.get("net", {}))
        restore_optimiser(self.optimiser, parts.get("optimiser", {}))
        if self.average is not None:
            self.average.load_state_dict(on["average"])
        self.kept, self.parts = on.get("kept", {}), on.get("parts", {})
        self.memory.update(on.get("memory", {}))
        self.sums = on["sums"]
        self.at, self.attempt, self.stopped = about["at"], about["attempt"], about["stopped"]
        self.best, self.rows, self.clock = about["best"], about["rows"], Clock(**about["clock"])
        self.counter.forwards, self.counter.backwards = about["forwards"], about["backwards"]
