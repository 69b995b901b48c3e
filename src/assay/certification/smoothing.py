"""Randomized smoothing: what most noisy copies of an input are taken for, and how far that is proven to hold."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.certification.smoothing_noise import Ablation, Gaussian, Noise, Shares, Uniform
from assay.certification.smoothing_votes import Poll
from assay.core.errors import DataError
from assay.core.progress import Progress, silent
from assay.core.registry import UsageError, one_of
from assay.core.types import Inputs, Labels, Mask, PerSample
from assay.models import Model
from assay.models.line import default_batch
from assay.models.loaded import Net
from assay.threats.threat import Box, outside_box

NOISES: Final = ("gaussian", "uniform", "ablation")

ABSTAIN: Final = -1
"""The prediction where the votes do not tell."""

_CHOOSE, _ESTIMATE, _PREDICT = range(3)
"""The stages; each draws noise of its own. A class must not be chosen by the votes that then speak for it."""

_MEANING: Final = {
    "sigma": "sigma is the standard deviation of gaussian and uniform noise, for example 0.25.",
    "kept": "kept is the number of coordinates that ablation leaves as they are, for example 45.",
}


@final
@dataclass(frozen=True, slots=True)
class SmoothedCertificate:
    """What is proven about the *smoothed* model g, sample by sample; about the network inside it proves nothing.

    For each sample by itself, with probability at least 1 - ``alpha`` over the noise: g predicts ``prediction`` at
    every point within ``radius`` in ``norm``, inside the box and outside. All tensors are on the CPU.

    Args:
        prediction: (n,) int64, the class that g predicts; -1 where it abstains.
        radius: (n,) float64, in units of the box (l0: a count of coordinates); 0 where it abstains.
        share: (n,) float64, the lower bound p_A of the share of all votes for ``guess`` (Clopper & Pearson 1934).
        guess: (n,) int64, the class that the first ``n0`` draws chose.
        hits: (n,) int64, how many of the ``n`` fresh draws voted for it.
        label: (n,) int64, the true labels, where they were given.
        norm: in which the radius is measured.
        n0, n, alpha: as they were asked for.
        forwards: (n,) int64, forward passes of this call; votes that a journal kept cost none.
    """

    prediction: Labels
    radius: PerSample
    share: PerSample
    guess: Labels
    hits: Labels
    label: Labels | None
    norm: str
    n0: int
    n: int
    alpha: float
    forwards: Labels

    @property
    def lower(self) -> PerSample:
        """The radius (n,) within which g is proven to be right; 0 where it abstains or is wrong."""
        return torch.where(self.certified(0.0), self.radius, 0.0)

    def certified(self, eps: float) -> Mask:
        """Tell which samples are proven up to ``eps``; with labels, proven and right."""
        wanted = self.guess if self.label is None else self.label
        return (self.prediction == wanted) & (self.radius >= eps)

    def accuracy(self, eps: float) -> float:
        """Return the certified accuracy of g at ``eps``: the share of ``certified``."""
        return float(self.certified(eps).double().mean())


@final
@dataclass(frozen=True, slots=True)
class Smoothed:
    """The classifier g(x): the class that a model most often takes x for when noise is added to it.

    *Sees*: the predicted labels, so any callable will do.
    *Cost*: n0 + n forward passes a sample to certify, n to predict.

    Args:
        model: an :class:`assay.Model`, or a network that takes inputs in [0, 1].
        sigma: standard deviation of the noise on each coordinate, in units of the box; not for ``ablation``.
        noise: ``gaussian`` proves l2, ``uniform`` l1, ``ablation`` l0 (of coordinates).
        kept: how many coordinates ablation leaves as they are; only for ``ablation``.
        null: what ablation puts into all others; None for the middle of the box.

    Example:
        >>> net = lambda x: torch.stack([x[:, 0], 1 - x[:, 0]], 1)
        >>> c = Smoothed(net, sigma=0.25).certify(torch.tensor([[0.9], [0.5]]), n=1000)
        >>> c.prediction.tolist(), bool(c.radius[0] < 0.4)
        ([0, -1], True)

    Raises:
        UsageError: an unknown noise, or a parameter out of its range.

    References:
        Cohen, Rosenfeld & Kolter 2019, arXiv:1902.02918, procedures PREDICT and CERTIFY (Gaussian noise);
        Yang et al. 2020, arXiv:2002.08118 (uniform noise); Levine & Feizi 2020, arXiv:1911.09272 (ablation).
    """

    model: Model | Net
    sigma: float | None = None
    noise: str = "gaussian"
    kept: int | None = None
    null: float | None = None

    def __post_init__(self) -> None:
        one_of("noise", self.noise, NOISES)
        used, unused = ("kept", "sigma") if self.noise == "ablation" else ("sigma", "kept")
        value, idle = getattr(self, used), getattr(self, unused)
        fits = value is not None and 0 < value < float("inf") and (used == "sigma" or isinstance(value, int))
        if not fits:
            wanted = f"{used} > 0{', a whole number,' if used == 'kept' else ''} for noise={self.noise!r}"
            raise UsageError(wanted, f"{used}={value}", _MEANING[used])
        if idle is not None:
            raise UsageError(f"no {unused} for noise={self.noise!r}", f"{unused}={idle}", _MEANING[unused])

    @property
    def base(self) -> Model:
        """The model that is smoothed."""
        return self.model if isinstance(self.model, Model) else Model(self.model)

    @property
    def law(self) -> Noise:
        """The noise, as a value."""
        if self.kept is not None:
            box = self.base.domain
            return Ablation(self.kept, (box.lo + box.hi) / 2 if self.null is None else self.null)
        assert self.sigma is not None
        return (Gaussian if self.noise == "gaussian" else Uniform)(self.sigma)

    def certify(
        self,
        x: Inputs,
        y: Labels | None = None,
        *,
        n0: int = 100,
        n: int = 10_000,
        alpha: float = 0.001,
        seed: int = 0,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        progress: Progress = silent,
        indices: Labels | None = None,
        journal: str | os.PathLike[str] | None = None,
    ) -> SmoothedCertificate:
        """Choose a class by n0 draws, bound its share of votes by n fresh ones, and prove a radius (CERTIFY).

        Args:
            x: (b, *f) clean inputs inside the box.
            y: (b,) true labels; None where only the predictions matter.
            n0: draws that choose the class; errors here cost radius, never soundness.
            n: draws that estimate; the largest l2 radius is sigma * Phi^-1(alpha^(1/n)).
            alpha: the chance, for each sample, that the noise misleads and the claim is wrong.
            seed: of the noise. The noise of a sample depends on this and its index only.
            batch_size: noisy inputs in one call of the model; changes no result.
            device: where to run; None for where the model is.
            progress: is called with each :class:`Snapshot`; a sample is right if its class is that of y.
            indices: (b,) the samples' indices in their data; None for 0 .. b - 1.
            journal: a file (.npz) for the votes so far. An interrupted call goes on where it was.

        Raises:
            UsageError: n0, n or batch_size below 1, alpha outside (0, 1), or more coordinates kept than there are.
            DataError: x or y cannot be used.
            ModelError: the model fails, or does not return finite logits.
            RunError: the journal is that of another call, or cannot be written.
        """
        _check_request(alpha, n0=n0, n=n)
        poll = self._poll(x, y, {_CHOOSE: n0, _ESTIMATE: n}, seed, batch_size, device, indices)
        (chosen, votes), forwards = poll.run(progress, None if journal is None else Path(journal))
        guess = chosen.argmax(1)
        hits = votes.gather(1, guess[:, None])[:, 0]
        share = lower_bound(hits.numpy(), n, alpha)
        prediction = torch.where(torch.from_numpy(share > 0.5), guess, ABSTAIN)
        radius = poll.noise.radius(share, x[0].numel())
        return SmoothedCertificate(
            prediction=prediction,
            radius=torch.from_numpy(radius),
            share=torch.from_numpy(share),
            guess=guess,
            hits=hits,
            label=poll.label,
            norm=poll.noise.norm,
            n0=n0,
            n=n,
            alpha=alpha,
            forwards=forwards,
        )

    def predict(
        self,
        x: Inputs,
        *,
        n: int = 1000,
        alpha: float = 0.001,
        seed: int = 0,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        progress: Progress = silent,
        indices: Labels | None = None,
    ) -> Labels:
        """Return what g takes each input for, (b,) int64; -1 where the votes do not tell (PREDICT).

        A prediction is wrong, in that g really prefers another class, with probability at most ``alpha``: the two
        leading classes must differ by an exact two-sided binomial test. Arguments and errors are those of ``certify``.
        """
        _check_request(alpha, n=n)
        poll = self._poll(x, None, {_PREDICT: n}, seed, batch_size, device, indices)
        (votes,), _ = poll.run(progress, None)
        (first, second), label = (v.T for v in votes.topk(2, dim=1))
        clear = same_chance(first.numpy(), second.numpy()) <= alpha
        return torch.where(torch.from_numpy(clear), label[0], ABSTAIN)

    def _poll(
        self,
        x: Inputs,
        y: Labels | None,
        stages: Mapping[int, int],
        seed: int,
        batch: int | None,
        device: torch.device | str | None,
        indices: Labels | None,
    ) -> Poll:
        """Check the samples, and pose the question about them."""
        base, noise = self.base, self.law
        _check_inputs(x, base.domain, noise)
        for what, v in (("labels", y), ("indices", indices)):
            _check_integers(what, v, len(x))
        if batch is not None and batch < 1:
            raise UsageError("batch_size of at least 1", str(batch), "Leave it out for the default.")
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))  # noise in half precision would be quantised
        label, keys = (None if v is None else v.detach().cpu().long() for v in (y, indices))
        together = batch or default_batch(x.shape[1:], device)
        keys = torch.arange(len(x)) if keys is None else keys
        return Poll(base, noise, x, label, keys, stages, seed, together, device)


def lower_bound(hits: NDArray[np.int64], n: int, alpha: float) -> Shares:
    """Return the one-sided exact lower bounds of shares (Clopper & Pearson 1934), too high with chance ``alpha``."""
    from scipy.special import betaincinv

    k = np.asarray(hits, dtype=np.float64)
    return np.where(k > 0, np.asarray(betaincinv(np.maximum(k, 1), n - k + 1, alpha), dtype=np.float64), 0.0)


def same_chance(first: NDArray[np.int64], second: NDArray[np.int64]) -> Shares:
    """Return p-values of the exact two-sided binomial test that two classes, first >= second, get equal votes."""
    from scipy.special import betainc

    k, rest = (np.asarray(v, dtype=np.float64) for v in (first, second))
    return np.asarray(np.minimum(1.0, 2 * betainc(np.maximum(k, 1), rest + 1, 0.5)), dtype=np.float64)


def _check_request(alpha: float, **draws: int) -> None:
    for name, count in draws.items():
        if count < 1:
            raise UsageError(
                f"{name} of at least 1", str(count), "It is a number of draws; leave it out for the default."
            )
    if not 0 < alpha < 1:
        raise UsageError("alpha between 0 and 1", str(alpha), "It is the chance of a wrong claim, for example 0.001.")


def _check_inputs(x: Inputs, box: Box, noise: Noise) -> None:
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.numel():
        found = f"{tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise DataError("a tensor of inputs (b, *f), b >= 1", found, "One sample needs a batch axis: x[None].")
    if not x.is_floating_point():
        raise DataError("floating-point inputs", f"{x.dtype}", "Convert: x = x.float() / 255 for 8-bit images.")
    inside = ((x >= box.lo) & (x <= box.hi)).flatten(1).all(1)
    if not inside.all():
        rows = (~inside).nonzero()[:, 0].tolist()
        raise outside_box(box, (float(x.min()), float(x.max())), rows, len(x))
    if isinstance(noise, Ablation) and noise.kept > x[0].numel():
        raise UsageError(
            f"kept of at most {x[0].numel()}, the coordinates of a sample", str(noise.kept), _MEANING["kept"]
        )


def _check_integers(what: str, v: Labels | None, n: int) -> None:
    if v is None:
        return
    whole = isinstance(v, Tensor) and not (v.is_floating_point() or v.is_complex() or v.dtype == torch.bool)
    if not whole or v.shape != (n,) or int(v.min()) < 0:
        found = (
            f"{v.dtype} {tuple(v.shape)}, least {float(v.min()):g}" if isinstance(v, Tensor) and v.numel() else f"{v!r}"
        )
        raise DataError(f"{what} ({n},) of whole numbers from 0, one a sample", found, "Convert: torch.as_tensor(y).")
