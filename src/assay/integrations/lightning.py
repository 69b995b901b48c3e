"""Adversarial training of a ``LightningModule``, as a callback: ``Trainer(callbacks=[AdversarialTraining(...)])``."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial, update_wrapper
from typing import Any, final

from torch import Tensor

from assay.core.errors import DataError
from assay.core.optional import need
from assay.core.registry import UsageError
from assay.core.types import Inputs, Labels
from assay.hardening import Objective
from assay.integrations.batch import Look, planned, refuse_parallel, replaced
from assay.threats import Threat
from assay.threats.threat import Box

lightning: Any = need("lightning.pytorch", "lightning")


@final
class AdversarialTraining(lightning.Callback):
    """Learn from adversarial points: ``training_step`` gets them in the place of the batch's inputs.

    For every module whose batches are (x, y) and whose ``forward`` returns logits. A method whose loss is more than
    that of ``training_step`` at other points (``trades``, ``mart``, ...) takes its place; it logs ``train_loss`` and
    the parts of its loss. Validation is untouched, and statistics of batches are those of the points learned from.

    Args:
        threat: what to train against, in units of the box.
        method: one of ``assay.hardening.OBJECTIVES.names()`` that learns from each batch once, or an objective.
        box: of the inputs before normalisation.
        mean, std: per channel, where the loader normalises.
        mix: share of each batch that stays clean.
        seed: of random starts.
        **hyperparameters: those of the method, and ``awp``, ``awp_from``, ``ramp``, ``stretch``.

    Raises:
        UsageError, ThreatError: names and values that do not exist or do not fit; when fitting, a module that
            optimises by hand, for a method with a loss of its own.
        DataError: when fitting, batches that are not (x, y), or inputs outside the box once mean and std are undone.
    """

    def __init__(
        self,
        threat: Threat | str = "linf:8/255",
        method: str | Objective = "pgd",
        *,
        box: Box | tuple[float, float] = Box(),
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        mix: float = 0.0,
        seed: int = 0,
        **hyperparameters: Any,
    ) -> None:
        box = box if isinstance(box, Box) else Box(*box)
        self.look = Look(box, mean, std)
        self.plan = planned(threat, method, hyperparameters, box=box, mix=mix, seed=seed)
        self._fit = ExitStack()  # what lasts until training ends
        self._batch = ExitStack()  # what lasts until the backward pass is done

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put a step on adversarial points in the place of the module's own."""
        self._close()
        if not pl_module.automatic_optimization and (self.plan.own_loss or self.plan.settings.awp):
            raise UsageError(f"a module that Lightning optimises, for {self.plan.name}", "automatic_optimization=False",
                             "Take method='pgd' without awp, or optimise automatically.")  # fmt: skip
        if self.plan.own_loss:
            refuse_parallel(trainer.strategy.model, self.plan.name)
        step = pl_module.training_step
        ours = update_wrapper(partial(self._step, trainer, pl_module, step), step)
        self._fit.callback(replaced(pl_module, "training_step", ours))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Put the weights back before the step."""
        self._batch.close()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the module's own step back."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put everything back, whatever happened."""
        self._close()

    def _close(self) -> None:
        self._batch.close()
        self._fit.close()

    def _step(self, trainer: Any, module: Any, own: Callable[..., Any], batch: Any, *rest: Any) -> Any:
        plan, (x, y) = self.plan, _pair(batch)
        total = trainer.estimated_stepping_batches
        share = trainer.global_step / total if math.isfinite(total) else 1.0
        s = plan.step(module, x, y, self.look, at=trainer.fit_loop.total_batch_idx, share=share)
        found = plan.find(s)
        self._batch.enter_context(plan.worst_weights(s, found))
        if not plan.own_loss:
            return own(_like(batch, self.look.seen(found).to(x.dtype)), *rest)
        terms = plan.loss(s, found)
        module.log_dict({"train_loss": terms.loss.detach(), **{f"train_{n}": v for n, v in terms.parts.items()}})
        return terms.loss


def _pair(batch: Any) -> tuple[Inputs, Labels]:
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(v, Tensor) for v in batch)):
        size = f" of {len(batch)}" if isinstance(batch, list | tuple | dict) else ""
        raise DataError("batches (x, y) of two tensors", f"{type(batch).__name__}{size}",
                        "Let the loader yield inputs and labels only.")  # fmt: skip
    return batch[0], batch[1]


def _like(batch: Any, x: Inputs) -> Any:
    """Return a batch of the same type with other inputs; the one given, which may alias the data, stays as it is."""
    return type(batch)(x, batch[1]) if hasattr(batch, "_fields") else type(batch)((x, batch[1]))
