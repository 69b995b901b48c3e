"""Adversarial training, adversarial examples and the verdict for a fastai ``Learner``.

``from assay.integrations.fastai import AdversarialTrainer, AdversarialLearner``; importing this also gives every
Learner the method ``to_learner``. Sizes are those of pixels from 0 to 1, whatever the Learner normalises.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, final

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from assay import attacks
from assay.attacks import FMN, PGD, Runnable
from assay.core.errors import AssayError, DataError, ModelError
from assay.core.levels import at_level
from assay.core.optional import need
from assay.core.registry import UsageError, closest
from assay.core.types import Inputs, Labels, Logits
from assay.data.arrays import from_arrays
from assay.data.data import Data
from assay.evaluation import Evaluation, evaluate
from assay.hardening import Objective, Step
from assay.integrations.batch import Look, Plan, answer_once, planned, refuse_parallel, replaced
from assay.models import Model
from assay.models.bridges.fastai import check_classifier, class_names, normalisation, presized
from assay.models.door import Door
from assay.reports import print_run
from assay.threats import Threat

vision: Any = need("fastai.vision.all", "fastai")

T = TypeVar("T")

_CANCELLED: Final = tuple(
    getattr(vision, f"Cancel{what}Exception")
    for what in ("Backward", "Batch", "Epoch", "Fit", "Step", "Train", "Valid")
)
"""By these a callback of fastai ends a part of training."""

_EIGHT_BIT: Final = 1e-3
"""How far from whole grey levels the values of 8-bit images may be after normalising and back."""


class NothingFoundError(AssayError):
    """No adversarial example was found."""


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
        mean, std = normalisation(self.learn.dls)
        self.look = Look(mean=mean, std=std)
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


@final
class AdversarialLearner:
    """A Learner that can be attacked: ``AdversarialLearner(learn)`` or ``learn.to_learner(AdversarialLearner)``.

    It is the same Learner, with its model, its data and its state: everything else is asked of it, and set in it.

    Args:
        learn: a Learner that classifies images by one label each.

    Raises:
        ModelError: something else.
    """

    __slots__ = ("_data", "evaluation", "learn")
    learn: Any
    evaluation: Evaluation | None
    _data: Data | None

    def __init__(self, learn: Any) -> None:
        learn = learn.learn if isinstance(learn, AdversarialLearner) else learn
        if not isinstance(learn, vision.Learner):
            raise ModelError("a fastai Learner", type(learn).__name__, "Pass the Learner itself.")
        check_classifier(learn)
        self.learn, self.evaluation, self._data = learn, None, None

    def __getattr__(self, name: str) -> Any:
        if name in AdversarialLearner.__slots__:  # not set yet, as while it is copied
            raise AttributeError(name)
        return getattr(self.learn, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in AdversarialLearner.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.learn, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.learn)})

    def __repr__(self) -> str:
        return f"AdversarialLearner({type(self.learn.model).__name__}, {class_names(self.learn.dls) or 'no vocab'})"

    # -------------------------------------------------------------------------------------------------- one image

    def predict(self, item: Any, **options: Any) -> tuple[Any, Tensor, Tensor]:
        """Return the class, its index and the probabilities (c,) of an image, as ``Learner.predict`` does.

        It takes tensors as well. What has the size that the network sees already is not scaled up and down again, as
        Learners do that resize items and then batches ("presizing").

        Args:
            item: an image, its path, or a tensor (c, h, w) of pixels, floats from 0 to 1 or 8-bit.
            **options: of ``Learner.predict``.
        """
        pixels = item if isinstance(item, Tensor) else self._final(item)
        if pixels is None:
            found: tuple[Any, Tensor, Tensor] = self.learn.predict(item, **options)
            return found
        probabilities = _asked(Model(self.learn), _batch_of(pixels)).softmax(1)[0].cpu()
        index = probabilities.argmax()
        return self._name(int(index)), index, probabilities

    def generate_adv_example(
        self,
        img: Any,
        target_label: int | str | None = None,
        *,
        eps: float | None = 8 / 255,
        norm: str = "linf",
        attack: Runnable | str | None = None,
        seed: int = 0,
    ) -> Any:
        """Return an image that the Learner takes for something else, or for a class that is wanted.

        Images are first resized as the Learner resizes them for validation, and have that size when they come back:
        that is where the network sees them. Every result is verified; images and 8-bit tensors after rounding to 8
        bits, and images once more by :meth:`predict`.

        Args:
            img: an image, its path, or a tensor (c, h, w) of pixels, floats from 0 to 1 or 8-bit.
            target_label: the class to be reached, by index or by name; None for any but the one that is predicted now.
            eps: radius of the ball in units of pixels from 0 to 1; None for the smallest perturbation.
            norm: ``linf``, ``l2``, ``l1`` or ``l0``.
            attack: one of ``assay.attacks``, or its name; None for PGD of 100 steps, or FMN of 200 where eps is None.
            seed: of its random numbers.

        Returns:
            What was given: an image for an image or a path, a tensor for a tensor.

        Raises:
            NothingFoundError: there is none that the attack can find, or it does not survive the Learner's transforms.
            UsageError: an unknown class, or the one that is predicted already.
            DataError: a tensor that holds no pixels.
        """
        model = Model(self.learn)
        x = _batch_of(img) if isinstance(img, Tensor) else self._shown(img)
        x = x.to(next(self.learn.model.parameters()).device)
        now = int(_asked(model, x).argmax(1))
        wanted = None if target_label is None else self._class(target_label)
        if wanted == now:
            raise UsageError("a class other than the one predicted", f"{self._name(now)!r} is", "Name another one.")
        bits = None if isinstance(img, Tensor) and img.is_floating_point() else 8
        threat = Threat(norm, eps, targeted=wanted is not None, quantize=bits)
        by = _attack(attack, eps)
        r = by(
            model, x, torch.tensor([now if wanted is None else wanted]).to(x.device), threat, seed, full=eps is not None
        )
        if not r.success.all():
            raise self._nothing(threat, now, wanted, f"{by}")
        if isinstance(img, Tensor):
            return _as_given(r.x, img)
        found = _image(r.x[0], img)
        self._confirm(found, threat, now, wanted)
        return found

    def _final(self, item: Any) -> Tensor | None:
        """Return the pixels (c, h, w) of an image that batches would be resized to, as it is; None for others."""
        seen = presized(self.learn.dls)
        if seen is None or not isinstance(item, str | Path | Image.Image):
            return None
        image = item if isinstance(item, Image.Image) else Image.open(item)
        if (image.height, image.width) != seen or image.mode not in ("L", "RGB"):
            return None
        levels = torch.from_numpy(np.array(image))
        return levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1)

    def _shown(self, img: Any) -> Inputs:
        """Return an image as the network sees it but for Normalize: (1, c, h, w), pixels from 0 to 1."""
        if (pixels := self._final(img)) is not None:
            return _batch_of(pixels)
        given = img.copy() if isinstance(img, Image.Image) else img  # fastai changes the class of what it is given
        loader = self.learn.dls.test_dl([given], num_workers=0)
        return _whole_levels(_look(self.learn).pixels(loader.one_batch()[0]))

    def _confirm(self, found: Image.Image, threat: Threat, now: int, wanted: int | None) -> None:
        with self.learn.no_bar(), self.learn.no_logging():
            said = int(self.predict(found.copy())[1])
        if said != wanted if wanted is not None else said == now:
            raise self._nothing(threat, now, wanted, "one for the network, which the Learner's transforms undo when it "
                                                     "reads the image again (a blur, say)")  # fmt: skip

    def _nothing(self, threat: Threat, now: int, wanted: int | None, why: str) -> NothingFoundError:
        aim = "another class" if wanted is None else repr(self._name(wanted))
        return NothingFoundError(
            f"an image within {threat} that is taken for {aim}",
            f"none, it is still {self._name(now)!r} ({why})",
            "Give a larger eps, or eps=None for the smallest change that does it.",
        )

    def _class(self, label: int | str) -> int:
        names = class_names(self.learn.dls) or ()
        if isinstance(label, str):
            if label not in names:
                raise UsageError("the name of a class", repr(label), closest(label, [*names]))
            return names.index(label)
        if label < 0 or (names and label >= len(names)):
            raise UsageError(f"the index of a class, 0 to {len(names) - 1}", f"{label}", f"Known: {', '.join(names)}.")
        return int(label)

    def _name(self, index: int) -> str:
        names = class_names(self.learn.dls)
        return str(index) if names is None else names[index]

    # ------------------------------------------------------------------------------------------ the validation set

    def evaluate_robustness(
        self,
        threat: Threat | str = "linf:8/255",
        effort: str = "quick",
        limit: int | None = None,
        *,
        dl: Any = None,
        show: bool = True,
        **options: Any,
    ) -> Evaluation:
        """Return the verdict (:func:`assay.evaluate`) on the validation set, and print it as a table.

        Args:
            threat: in units of pixels from 0 to 1, ``linf:8/255``.
            effort: ``quick``, ``standard``, ``thorough`` or ``reference``.
            limit: take only so many samples, evenly spread over the set.
            dl: another data loader than that of the validation set.
            show: print the table.
            **options: of :func:`assay.evaluate`.
        """
        data = self._data = self.validation_data(limit, dl)
        e = evaluate(Model(self.learn), data, threat, effort, **{"progress": False, **options})
        self.evaluation = e
        if show:
            print_run(e.run, Console())
        return e

    def validation_data(self, limit: int | None = None, dl: Any = None) -> Data:
        """Return the validation set as the network sees it but for Normalize: pixels from 0 to 1, and labels.

        With a ``limit`` they are so many samples evenly spread over the set: its first ones may be of one class.
        """
        dls, look = self.learn.dls, _look(self.learn)
        xs: list[Inputs] = []
        ys: list[Labels] = []
        for x, y in _spread(dls.valid if dl is None else dl, limit):
            xs.append(look.pixels(x).cpu())
            ys.append(y.as_subclass(Tensor).cpu())
        if not xs:
            raise DataError("a validation set with samples", "none", "Give dl=learn.dls.train, say.", code="empty-data")
        source = f"fastai:{Path(getattr(dls, 'path', '.')).name}"
        x, y = _eight_bit(torch.cat(xs)), torch.cat(ys)
        return from_arrays(x, y, name="validation set", source=source, class_names=class_names(dls))

    def show_adversarials(self, n: int = 4, **options: Any) -> list[Any]:
        """Show images beside what they were turned into, with what each is taken for; return the axes.

        They are those of the last :meth:`evaluate_robustness`; without one, 64 samples are attacked first.

        Args:
            n: how many pairs.
            **options: of fastai's ``get_grid``.

        Raises:
            NothingFoundError: nothing was fooled.
        """
        e = self.evaluation or self.evaluate_robustness(limit=64, show=False)
        pairs = list(zip(range(n), self._fooled(e), strict=False))
        if not pairs:
            raise NothingFoundError("adversarial inputs to show", "none in the last evaluation", "Give a larger eps.")
        axes = vision.get_grid(len(pairs), double=True, **options)
        for k, (x, adversarial, label, prediction) in pairs:
            for ax, image, taken in ((axes[2 * k], x, label), (axes[2 * k + 1], adversarial, prediction)):
                vision.show_image(
                    image, ctx=ax, title=self._name(taken), vmin=0, vmax=1, cmap="gray" if len(x) == 1 else None
                )
        return list(axes)

    def _fooled(self, e: Evaluation) -> Iterator[tuple[Tensor, Tensor, int, int]]:
        assert self._data is not None
        for part in e.run.adversarials():
            clean = self._data.batch(part["index"].tolist())
            rows = zip(clean, torch.from_numpy(part["x"]), part["label"], part["prediction"], strict=True)
            for x, adversarial, label, prediction in rows:
                yield x, adversarial, int(label), int(prediction)


def to_learner(self: Any, kind: Callable[[Any], T]) -> T:
    """Return this Learner as another kind of Learner: ``learn.to_learner(AdversarialLearner)``."""
    return kind(self)


vision.Learner.to_learner = to_learner


def _look(learn: Any) -> Look:
    mean, std = normalisation(learn.dls)
    return Look(mean=mean, std=std)


def _spread(loader: Any, limit: int | None) -> Any:
    """Return a loader in order, of so many samples evenly spread over the set."""
    n = len(loader.dataset)
    k = n if limit is None else min(n, limit)
    rows = [i * n // k for i in range(k)]
    if hasattr(loader, "new"):
        return loader.new(shuffle=False, drop_last=False, get_idxs=lambda: rows)
    return DataLoader(Subset(loader.dataset, rows), loader.batch_size, collate_fn=loader.collate_fn)


def _attack(attack: Runnable | str | None, eps: float | None) -> Runnable:
    if isinstance(attack, str):
        return attacks.get(attack)
    if attack is not None:
        return attack
    return FMN(steps=200) if eps is None else PGD(steps=100, rel_step=0.1, decay="cosine", momentum=0.75)


def _asked(model: Model, x: Inputs) -> Logits:
    with model.frozen() as live:
        x = x.to(live.device)
        return Door(live, len(x)).logits(x, torch.arange(len(x), device=x.device))


def _batch_of(img: Tensor) -> Inputs:
    """Return a tensor of one image as (1, c, h, w), pixels from 0 to 1."""
    x = img.detach().as_subclass(Tensor)
    if x.dtype == torch.uint8:
        x = at_level(x.float(), 0, 1)
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or len(x) != 1 or not x.is_floating_point() or not 0 <= float(x.min()) <= float(x.max()) <= 1:
        found = f"{img.dtype} of shape {tuple(img.shape)}, from {float(img.min()):g} to {float(img.max()):g}"
        raise DataError("a tensor (c, h, w) of pixels, floats from 0 to 1 or 8-bit", found,
                        "Undo the normalisation first: dls.decode.")  # fmt: skip
    return x.float()


def _as_given(x: Inputs, img: Tensor) -> Tensor:
    x = (x * 255).round() if img.dtype == torch.uint8 else x
    return x.view(img.shape).to(img.device, img.dtype)


def _image(x: Tensor, like: Any) -> Image.Image:
    """Return pixels (c, h, w), whole grey levels, as an image; of the class of the one that was given."""
    levels = (x * 255).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    array: np.ndarray[Any, Any] = levels[..., 0] if levels.shape[2] == 1 else levels
    image: Image.Image = type(like).create(array) if isinstance(like, vision.PILBase) else Image.fromarray(array)
    return image


def _whole_levels(x: Inputs) -> Inputs:
    """Return pixels without the rounding of normalising and back, where they are those of 8-bit images."""
    k = (x * 255).round()
    return at_level(k, 0, 1) if float((x * 255 - k).abs().max()) < _EIGHT_BIT else x


def _eight_bit(x: Inputs) -> Tensor:
    """Return pixels of 8-bit images in 8 bits."""
    k = (x * 255).round()
    return k.to(torch.uint8) if float((x * 255 - k).abs().max()) < _EIGHT_BIT else x
