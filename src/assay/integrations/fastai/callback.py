"""Adversarial training of a ``Learner``, as a callback."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.core.errors import DataError
from assay.core.optional import need
from assay.core.registry import UsageError
from assay.core.types import Labels
from assay.hardening import Objective, Step
from assay.integrations.batch import Look, Plan, answer_once, planned, refuse_parallel, replaced
from assay.integrations.fastai.data import look_of
from assay.models.bridges.fastai import check_classifier, class_names
from assay.threats import Threat

vision: Any = need("fastai.vision.all", "fastai")

_CANCELLED: Final = tuple(
    getattr(vision, f"Cancel{what}Exception")
    for what in ("Backward", "Batch", "Epoch", "Fit", "Step", "Train", "Valid")
)
"""By these a callback of fastai ends a part of training."""


@final
class AdversarialTrainer(vision.Callback):
    """Adversarial training of any Learner: ``learn.fit_one_cycle(5, cbs=[AdversarialTrainer(eps=8/255)])``.

    Each training batch, as augmentation left it, is replaced by the points that the method finds around it; the
    Learner's own loss and optimiser learn from them. A method whose loss is more than that (``trades``, ``mart``, ...)
    replaces the loss as well. Validation, and so every metric of it, is untouched. The points are found with the model
    in eval mode and in float32, whatever the precision of training: BatchNorm statistics are those of the points that
    are learned from. MixUp, CutMix and label smoothing go together with every method.

    Args:
        eps: radius of the ball, in units of pixels from 0 to 1, although the Learner normalises.
        norm: ``linf``, ``l2``, ``l1`` or ``l0``.
        method: one of ``assay.hardening.OBJECTIVES.names()`` that learns from each batch once, or an objective.
        mix: share of each batch that stays clean.
        seed: of random starts.
        **hyperparameters: those of the method (``steps=7``, ``beta=6``), and ``awp``, ``awp_from``, ``ramp``,
            ``stretch`` of :class:`assay.hardening.Settings`.

    Raises:
        UsageError: a name or a value that does not exist; a method that needs a loop of ours; when fitting, a loss of
            the Learner that a method with a loss of its own cannot stand for.
        ThreatError: a norm that the method is not defined for, or an eps that does not fit pixels from 0 to 1.
        DataError: when fitting, inputs that are not pixels from 0 to 1 once Normalize is undone.
    """

    order, run_valid = 60, False  # after mixed precision, whose autocast the loss is computed in, and after MixUp

    def __init__(
        self,
        eps: float = 8 / 255,
        norm: str = "linf",
        method: str | Objective = "pgd",
        mix: float = 0.0,
        seed: int = 0,
        **hyperparameters: Any,
    ) -> None:
        self.plan: Plan = planned(Threat(norm, eps), method, hyperparameters, mix=mix, seed=seed)
        self.look = Look()
        self._smoothing = 0.0
        self._fit, self._batch = ExitStack(), ExitStack()  # what lasts so long, and has to be put back then

    def before_fit(self) -> None:
        """Look at the Learner: its normalisation, and its loss where another one takes its place."""
        self.after_fit()
        check_classifier(self.learn)
        self.look = look_of(self.learn)
        if self.plan.own_loss:
            refuse_parallel(self.learn.model, self.plan.name)
            self._smoothing = smoothing_of(self.learn.loss_func, self.plan.name)
        guarded = partial(self._guarded, self.learn._do_one_batch)
        self._fit.callback(replaced(self.learn, "_do_one_batch", guarded))

    def before_batch(self) -> None:
        """Put the points to learn from in the place of the batch."""
        learn, plan = self.learn, self.plan
        if not len(learn.yb):
            return
        s = self._step()
        x = plan.find(s)
        with ExitStack() as opened:
            opened.enter_context(plan.worst_weights(s, x))
            learn.xb = (self.look.seen(x).to(learn.xb[0].dtype),)
            if plan.own_loss:
                terms = plan.loss(s, x)
                opened.callback(answer_once(learn.model, "forward", terms.logits))
                opened.callback(answer_once(learn, "loss_func", terms.loss))
            self._batch = opened.pop_all()

    def after_backward(self) -> None:
        """Put the weights back before the step."""
        self._batch.close()

    after_cancel_batch = after_backward

    def after_fit(self) -> None:
        """Put everything back."""
        self._batch.close()
        self._fit.close()

    def _guarded(self, one_batch: Callable[[], None]) -> None:
        """Learn from a batch, and clean up whatever ends that: callbacks do not hear of a Ctrl-C."""
        try:
            one_batch()
        except _CANCELLED:  # training may go on
            raise
        except BaseException:
            self._fit.close()
            raise
        finally:
            self._batch.close()

    def _step(self) -> Step:
        learn = self.learn
        x, y = learn.xb[0], learn.yb[0].as_subclass(Tensor)
        y, soft = self._mixed(y)
        at, share = int(learn.train_iter), float(learn.pct_train)
        net = vision.get_model(learn.model)
        return self.plan.step(net, x, y, self.look, at=at, share=share, soft=soft, label_smoothing=self._smoothing)

    def _mixed(self, y: Tensor) -> tuple[Labels, Tensor | None]:
        """Return labels (b,), and a distribution over the classes (b, c) where they are mixed."""
        if y.is_floating_point() and y.ndim == 2:
            return y.argmax(1), y
        for cb in self.learn.cbs:
            if isinstance(cb, vision.MixHandler) and getattr(cb, "stack_y", False):
                names = class_names(self.learn.dls)
                if names is None:
                    raise DataError("data loaders with a vocab, to mix labels", "none", f"Leave {cb} out.")
                one, other = (F.one_hot(v.as_subclass(Tensor).long(), len(names)).float() for v in (y, cb.yb1[0]))
                lam = torch.as_tensor(cb.lam).as_subclass(Tensor).to(one).view(-1, 1)
                return y, torch.lerp(other, one, lam)
        return y, None


def smoothing_of(loss: Any, name: str) -> float:
    """Return the label smoothing of a cross-entropy, for a method that puts its own loss in its place.

    Raises:
        UsageError: another loss, or one that weighs classes.
    """
    inner = getattr(loss, "func", loss) if not isinstance(loss, partial) else loss
    plain = getattr(inner, "weight", None) is None and getattr(inner, "reduction", "mean") == "mean"
    if isinstance(inner, vision.LabelSmoothingCrossEntropy) and plain:
        return float(inner.eps)
    if isinstance(inner, nn.CrossEntropyLoss) and plain:
        return float(inner.label_smoothing)
    if inner is F.cross_entropy:
        return 0.0
    raise UsageError(f"cross-entropy, without weights of classes, as the loss that {name} replaces", f"{loss}",
                     "Take method='pgd' or 'fast': they learn by the Learner's own loss.")  # fmt: skip
