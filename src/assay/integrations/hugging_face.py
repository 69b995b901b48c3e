"""Adversarial training with the ``Trainer`` of Hugging Face transformers, for models that classify images."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from assay.core.errors import DataError
from assay.core.optional import need
from assay.core.types import Inputs
from assay.hardening import Objective, Step
from assay.integrations.batch import Look, Plan, planned, refuse_parallel, standing_in
from assay.threats import Threat

transformers: Any = need("transformers", "huggingface")


def adversarial(kind: Any) -> Any:
    """Return a subclass of a Trainer that learns from adversarial points; evaluation and prediction stay as they are.

    Its batches have ``pixel_values`` (b, c, h, w) and ``labels`` (b,). Beside the arguments of ``kind`` it takes, by
    name:

    - ``threat``: what to train against, in units of pixels from 0 to 1 (``linf:8/255``).
    - ``method``: one of ``assay.hardening.OBJECTIVES.names()`` that learns from each batch once, or an objective. One
      that has a loss of its own takes the place of the model's, label smoothing included.
    - ``hyperparameters``: of the method, and ``awp``, ``awp_from``, ``ramp``, ``stretch``, by name.
    - ``mean``, ``std``: per channel, as the batches are normalised; None for what ``processing_class`` says.
    - ``mix``: share of each batch that stays clean.

    Random starts belong to ``args.seed``.

    Raises:
        UsageError, ThreatError: names and values that do not exist or do not fit.
        DataError: when training, batches without these two, or pixels outside [0, 1] once mean and std are undone.
    """

    class AdversarialTrainer(kind):
        """A Trainer that learns from adversarial points; see :func:`adversarial`."""

        def __init__(
            self,
            *args: Any,
            threat: Threat | str = "linf:8/255",
            method: str | Objective = "pgd",
            hyperparameters: Mapping[str, Any] | None = None,
            mean: Sequence[float] | None = None,
            std: Sequence[float] | None = None,
            mix: float = 0.0,
            **kwargs: Any,
        ) -> None:
            plan = planned(threat, method, hyperparameters or {}, mix=mix)  # before anything is built
            super().__init__(*args, **kwargs)
            said = mean is not None or std is not None
            self.look = Look(mean=mean, std=std) if said else look_of(getattr(self, "processing_class", None))
            self.plan: Plan = replace(plan, seed=int(self.args.seed))
            self._batches = 0
            self._posed: tuple[Step, Inputs] | None = None

        def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
            """Take the step on adversarial points."""
            plan, inputs = self.plan, self._prepare_inputs(inputs)
            x, y = _pair(inputs)
            if plan.own_loss:
                refuse_parallel(model, plan.name)
            net = self.accelerator.unwrap_model(model)
            share = self.state.global_step / max(1, self.state.max_steps)
            smoothing = self.args.label_smoothing_factor
            self._batches += 1
            s = plan.step(net, x, y, self.look, at=self._batches, share=share, label_smoothing=smoothing)
            model.train()
            with plainly(net):
                found = plan.find(s)
            seen = {**inputs, "pixel_values": self.look.seen(found).to(x.dtype)}
            self._posed = (s, found) if plan.own_loss else None
            try:
                with plan.worst_weights(s, found):
                    # A loss of its own is the mean of its batch: without a number of items it is scaled as one.
                    loss: Tensor = super().training_step(model, seen, None if plan.own_loss else num_items_in_batch)
            finally:
                self._posed = None
            return loss

        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
        ) -> Any:
            """Return the objective's own loss in a training step, where it has one; else what ``kind`` returns."""
            if self._posed is None:
                return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
            terms = self.plan.loss(*self._posed)
            return (terms.loss, {"logits": terms.logits}) if return_outputs else terms.loss

    return AdversarialTrainer


AdversarialTrainer = adversarial(transformers.Trainer)
"""The Trainer of transformers, made :func:`adversarial`."""


def look_of(processor: Any) -> Look:
    """Return the normalisation of an image processor; none where there is no processor, or it does not normalise."""
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not getattr(processor, "do_normalize", False) or mean is None or std is None:
        return Look()
    return Look(mean=tuple(mean), std=tuple(std))


def plainly(net: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a network runs without the mixed precision that accelerate put around its forward."""
    original = vars(net).get("_original_forward")
    return nullcontext() if original is None else standing_in(net, "forward", original)


def _pair(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    x, y = inputs.get("pixel_values"), inputs.get("labels")
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
        raise DataError("batches with pixel_values and labels", ", ".join(inputs) or "nothing",
                        "Give images, their labels, and remove_unused_columns=False.")  # fmt: skip
    return x, y
