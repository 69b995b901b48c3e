"""A ``Learner`` that can be attacked: its adversarial examples and its verdict."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, final

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from assay import attacks
from assay.attacks import FMN, PGD, Runnable
from assay.core.errors import AssayError, ModelError
from assay.core.optional import need
from assay.core.registry import UsageError, closest
from assay.core.types import Inputs, Logits
from assay.data.data import Data
from assay.evaluation import Evaluation, evaluate
from assay.integrations.fastai.data import as_given, batch_of, final_pixels, image_of, shown, validation_set
from assay.models import Model
from assay.models.bridges.fastai import check_classifier, class_names
from assay.models.door import Door
from assay.reports import print_run
from assay.threats import Threat

vision: Any = need("fastai.vision.all", "fastai")

T = TypeVar("T")


class NothingFoundError(AssayError):
    """No adversarial example was found."""


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
        pixels = item if isinstance(item, Tensor) else final_pixels(self.learn.dls, item)
        if pixels is None:
            found: tuple[Any, Tensor, Tensor] = self.learn.predict(item, **options)
            return found
        probabilities = _asked(Model(self.learn), batch_of(pixels)).softmax(1)[0].cpu()
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
        x = batch_of(img) if isinstance(img, Tensor) else shown(self.learn, img)
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
            return as_given(r.x, img)
        found = image_of(r.x[0], img)
        self._confirm(found, threat, now, wanted)
        return found

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
        return validation_set(self.learn, limit, dl)

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
