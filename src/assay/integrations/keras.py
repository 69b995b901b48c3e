"""Adversarial training by Keras's own ``fit``, on the backend that Keras runs on."""

from typing import Any, Final, final

import numpy as np

from assay.core.errors import ModelError, ThreatError
from assay.core.optional import need
from assay.core.registry import UsageError, one_of
from assay.models.bridges.keras import HARDENED, peeled
from assay.threats import Box, Threat
from assay.threats.threat import outside_box

keras: Any = need("keras", "keras")

STARTS: Final = ("clean", "uniform")
_TINY: Final = 1e-12


@final
class AdversarialModel(keras.Model):
    """A model that trains another one on clean samples and on adversarial ones, half and half.

    At every step x' is searched with the weights as they are at that moment: x' = P(x + a sign(grad)) in linf,
    P(x + a grad / |grad|) in l2, of the cross-entropy of the logits, with P the projection onto ball and box. One step
    of length eps is FGSM, several are PGD. The model is in inference mode for that: dropout is off, and the statistics
    of batch normalisation stay those of training. Then Keras's own training step learns from both halves.

    Weights are those of ``model``, which is trained in place: save, predict and evaluate it itself. ``fit`` shows the
    metrics of clean and adversarial samples together; ``evaluate``, ``predict`` and validation see clean ones alone.

    Args:
        model: a classifier that ends in softmax, in sigmoid, or in logits. If it is compiled, so is this one.
        threat: what the adversary may do, in linf or l2, in units of the inputs.
        steps: of the search; 1 is FGSM. Networks learn to fool single steps (Tramer et al. 2018, arXiv:1705.07204), so
            judge the result by ``assay.evaluate``, or train with 5 or more.
        rel_step: length of a step as a fraction of eps; 1 for one step, else 2.5 / steps.
        start: ``clean``, or ``uniform`` in the ball; by default clean for one step only.
        clean: the share of the clean samples in the loss, from 0 (none are used) to 1.
        box: the values that inputs can have.
        seed: of the random starts.

    Labels are class numbers (b,) or (b, 1), or one-hot (b, c).

    Raises:
        ThreatError: a norm other than linf and l2, no eps, or one that is wider than the box.
        UsageError: steps, rel_step, start or clean out of range.
        DataError: ``fit`` on arrays with values outside the box.

    Example:
        >>> hardened = AdversarialModel(model, "linf:0.1")  # doctest: +SKIP
        >>> hardened.fit(x, y, epochs=5)  # doctest: +SKIP
        >>> assay.evaluate(model, (x_test, y_test), "linf:0.1")  # doctest: +SKIP

    *Differs from the paper in*: x' is found in inference mode.

    References:
        Goodfellow et al. 2015, arXiv:1412.6572, sec. 6; Kurakin et al. 2017, arXiv:1611.01236, algorithm 1; Madry et
        al. 2018, arXiv:1706.06083, eq. 2.1.
    """

    def __init__(
        self,
        model: Any,
        threat: Threat | str = "linf:0.1",
        *,
        steps: int = 1,
        rel_step: float | None = None,
        start: str | None = None,
        clean: float = 0.5,
        box: Box | tuple[float, float] = (0, 1),
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(model, keras.Model):
            raise ModelError("a keras.Model", type(model).__name__, "Pass the model itself.")
        setattr(self, HARDENED, model)
        self.threat = _settled(threat, box if isinstance(box, Box) else Box(*box))
        self.steps, self.clean = steps, clean
        self.rel_step = (1.0 if steps == 1 else 2.5 / max(steps, 1)) if rel_step is None else rel_step
        self.start = ("clean" if steps == 1 else "uniform") if start is None else start
        one_of("start", self.start, STARTS)
        if steps < 1 or self.rel_step <= 0 or not 0 <= clean <= 1:
            found = f"steps={steps}, rel_step={self.rel_step}, clean={clean}"
            raise UsageError("steps >= 1, rel_step > 0 and 0 <= clean <= 1", found, "Leave them out for FGSM.")
        self.draws = keras.random.SeedGenerator(seed)
        self._logits: Any = None
        if model.compiled:
            self.compile_from_config(model.get_compile_config())

    @property
    def model(self) -> Any:
        """The model that is trained."""
        return getattr(self, HARDENED)

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.model(x, training=training)

    def fit(self, x: Any = None, *args: Any, **options: Any) -> Any:
        box = self.threat.box
        if isinstance(x, np.ndarray) and x.size and box is not None:
            rows = np.flatnonzero(((x < box.lo) | (x > box.hi)).reshape(len(x), -1).any(1))
            if len(rows):
                raise outside_box(box, (float(x.min()), float(x.max())), rows.tolist(), len(x))
            self.threat.within(box, x[0].size)
        return super().fit(x, *args, **options)

    def train_step(self, *args: Any) -> Any:
        *states, data = args
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        x = keras.ops.cast(x, "float32")
        if not self.model.built:
            self.model.build((None, *x.shape[1:]))
        if not states:
            return super().train_step(self._mixed(x, self.perturbed(x, y), y, weight))
        # On JAX, the values of all variables are handed over, and handed back.
        trained, kept, *rest = states[0]
        mapping = [*zip(self.trainable_variables, trained, strict=True)]
        mapping += zip(self.non_trainable_variables, kept, strict=True)
        with keras.StatelessScope(state_mapping=mapping) as scope:
            hard = self.perturbed(x, y)
            kept = [scope.get_current_value(v) for v in self.non_trainable_variables]
        return super().train_step((trained, kept, *rest), self._mixed(x, hard, y, weight))

    def perturbed(self, x: Any, y: Any) -> Any:
        """Return adversarial points (b, *f) for samples x (b, *f) with labels y, tensors of the backend."""
        eps = self.threat.eps
        at = self._random(x) if self.start == "uniform" else x
        for _ in range(self.steps):
            at = self._inside(at + self._unit(self._slope(at, y)) * self.rel_step * eps, x)
        return at

    def _slope(self, x: Any, y: Any) -> Any:
        """Return the gradient of the sum of the losses by x."""
        if self._logits is None:
            object.__setattr__(self, "_logits", peeled(self.model)[0])  # Keras would track it as another layer
        backend = keras.backend.backend()
        return _SLOPES[backend](lambda v: _loss(self._logits(v), y), x)

    def _unit(self, v: Any) -> Any:
        """Return the directions of size 1 along v."""
        return keras.ops.sign(v) if self.threat.norm.name == "linf" else v / (_size(v) + _TINY)

    def _inside(self, at: Any, x: Any) -> Any:
        """Return the nearest points in ball and box; in l2, those of the ball drawn into the box."""
        eps, box = self.threat.eps, self.threat.box
        assert eps is not None
        assert box is not None
        d = at - x
        linf = self.threat.norm.name == "linf"
        d = keras.ops.clip(d, -eps, eps) if linf else d * keras.ops.minimum(1.0, eps / (_size(d) + _TINY))
        return keras.ops.clip(x + d, box.lo, box.hi)

    def _random(self, x: Any) -> Any:
        """Return points uniform in the ball (linf), or on random radii of it (l2)."""
        shape, eps = keras.ops.shape(x), self.threat.eps
        assert eps is not None
        if self.threat.norm.name == "linf":
            return self._inside(x + keras.random.uniform(shape, -eps, eps, seed=self.draws), x)
        length = keras.random.uniform((shape[0], *[1] * (len(shape) - 1)), 0, eps, seed=self.draws)
        return self._inside(x + self._unit(keras.random.normal(shape, seed=self.draws)) * length, x)

    def _mixed(self, x: Any, hard: Any, y: Any, weight: Any) -> tuple[Any, Any, Any]:
        """Return what Keras's training step learns from: both halves, weighted where they do not count alike."""
        if not self.clean:
            return hard, y, weight
        both = keras.ops.concatenate
        if weight is None and self.clean == 0.5:
            return both([x, hard]), both([y, y]), None
        w = keras.ops.ones_like(x[(slice(None), *[0] * (len(x.shape) - 1))]) if weight is None else weight
        w = keras.ops.cast(w, "float32")
        return both([x, hard]), both([y, y]), both([2 * self.clean * w, 2 * (1 - self.clean) * w])


def _settled(threat: Threat | str, box: Box) -> Threat:
    """Return the threat with its box.

    Raises:
        ThreatError: no eps, or a norm that is not among ours.
    """
    t = Threat.parse(threat) if isinstance(threat, str) else threat
    if t.eps is None or t.norm.name not in ("linf", "l2") or t.targeted:
        raise ThreatError("linf or l2 with an eps, not targeted", str(t), "Write for example linf:0.1.")
    return t.within(box, 2**31)


def _size(v: Any) -> Any:
    """Return the Euclidean sizes of v (b, *f), as (b, 1, ...)."""
    return keras.ops.sqrt(keras.ops.sum(v * v, axis=tuple(range(1, len(v.shape))), keepdims=True))


def _loss(z: Any, y: Any) -> Any:
    """Return the sum of the cross-entropies of logits (b, c), or of (b, 1) for two classes."""
    z, losses = keras.ops.cast(z, "float32"), keras.losses
    if z.shape[-1] == 1:
        y = keras.ops.reshape(keras.ops.cast(y, "float32"), (-1, 1))
        each = losses.binary_crossentropy(y, z, from_logits=True)
    elif len(y.shape) == 2 and y.shape[-1] == z.shape[-1]:
        each = losses.categorical_crossentropy(y, z, from_logits=True)
    else:
        each = losses.sparse_categorical_crossentropy(keras.ops.reshape(y, (-1,)), z, from_logits=True)
    return keras.ops.sum(each)


def _slope_torch(loss: Any, x: Any) -> Any:
    import torch

    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]


def _slope_tensorflow(loss: Any, x: Any) -> Any:
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        value = loss(x)
    return tape.gradient(value, x)


def _slope_jax(loss: Any, x: Any) -> Any:
    import jax

    return jax.grad(loss)(x)


_SLOPES: Final = {"jax": _slope_jax, "tensorflow": _slope_tensorflow, "torch": _slope_torch}
