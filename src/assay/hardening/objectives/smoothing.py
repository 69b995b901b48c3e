"""Training for randomized smoothing: networks that are right under Gaussian noise.

``sigma`` is the standard deviation of the noise on each coordinate in units of the box, as it is for
:class:`assay.Smoothed`; noisy copies are not clipped to the box, there or here. What is proven, and in l2, is proven
about the smoothed classifier, with the same sigma.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from assay.attacks import PGD
from assay.attacks.losses import pick, strongest_but
from assay.core.types import Inputs, Logits, PerSample
from assay.hardening.inner import strongest
from assay.hardening.objective import OBJECTIVES, Objective, Step, Terms, mean_terms
from assay.hardening.objectives.adversarial import to_labels
from assay.hardening.objectives.checks import require

_NOISE = 51
"""The stream of random numbers for the noise."""

_LEAST = 1e-6
"""Probabilities are kept this far from 0 and 1, where float32 has no finite quantile of the normal distribution."""


@final
@OBJECTIVES.register("gaussian")
@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianNoise(Objective):
    """Training on one noisy copy of each sample: J = CE(x + sigma n), n standard normal.

    *Cost* 1 forward and 1 backward.

    Args:
        sigma: standard deviation of the noise on each coordinate, in units of the box.

    References:
        Cohen, Rosenfeld & Kolter 2019, arXiv:1902.02918, sec. 3.3.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    sigma: float = 0.25

    def __post_init__(self) -> None:
        require("sigma", self.sigma, 0, above=True)

    def find(self, s: Step) -> Inputs:
        return noisy(s.x, noise(s, self.sigma, 1))


@final
@OBJECTIVES.register("smoothadv")
@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothAdv(Objective):
    """Adversarial training of the smoothed classifier: the mean of CE(x' + d_i) over m draws of noise.

    x' maximises -log of the mean of p_y(x' + d_i) inside the ball, by projected gradient ascent with the same d_i at
    every step, and again in the loss.

    *Cost* ``noises`` * (``steps`` + 1) forwards and backwards.

    Args:
        sigma: standard deviation of the noise on each coordinate, in units of the box.
        noises: m, noisy copies of each sample.
        steps: of projected gradient ascent from the clean sample.
        rel_step: length of a step as a fraction of eps; the authors take 2 / ``steps``.

    *Differs from the paper in*: x' is found with the network in eval mode, and stays inside the box.

    References:
        Salman et al. 2019, arXiv:1906.04584, eq. 6 and algorithm 1 (SmoothAdv-PGD).
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    sigma: float = 0.25
    noises: int = 4
    steps: int = 4
    rel_step: float = 0.5

    def __post_init__(self) -> None:
        require("sigma", self.sigma, 0, above=True)
        require("noises", self.noises, 1)

    def find(self, s: Step) -> Inputs:
        p = s.problem if s.soft is None else s.problem.along(s.soft)
        attack = PGD(steps=self.steps, rel_step=self.rel_step, start="clean", loss=to_labels)
        return strongest(_Smoothed(s.net, noise(s, self.sigma, self.noises)), p, attack)

    def loss(self, s: Step, x: Inputs) -> Terms:
        each = answers(s.net, x, noise(s, self.sigma, self.noises))
        return mean_terms(_mean_cross_entropy(s, each), mean_answer(each))


@final
@OBJECTIVES.register("consistency")
@dataclass(frozen=True, slots=True, kw_only=True)
class Consistency(Objective):
    """Consistency of answers under noise: J = mean CE(x + d_i) + w mean KL(q || p_i) + h H(q).

    p_i is the softmax at x + d_i for m draws of noise, q their mean, H(q) its entropy: the network should say one
    thing, and clearly, wherever the noise puts the sample.

    *Cost* ``noises`` forwards and backwards.

    Args:
        sigma: standard deviation of the noise on each coordinate, in units of the box.
        noises: m, noisy copies of each sample.
        weight: w of the divergence.
        entropy: h, weight of the entropy.

    References:
        Jeong & Shin 2020, arXiv:2006.04062, sec. 3.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    sigma: float = 0.25
    noises: int = 2
    weight: float = 10.0
    entropy: float = 0.5

    def __post_init__(self) -> None:
        require("sigma", self.sigma, 0, above=True)
        require("noises", self.noises, 1)
        require("weight", self.weight, 0)

    def loss(self, s: Step, x: Inputs) -> Terms:
        each = answers(s.net, x, noise(s, self.sigma, self.noises))
        mean = mean_answer(each)
        q, ce = mean.exp(), _mean_cross_entropy(s, each)
        entropy = -(q * mean).sum(1)
        apart = -(q * each.mean(1)).sum(1) - entropy
        total = ce + self.weight * apart + self.entropy * entropy
        return mean_terms(total, mean, noisy=ce, divergence=apart, entropy=entropy)


@final
@OBJECTIVES.register("macer")
@dataclass(frozen=True, slots=True, kw_only=True)
class Macer(Objective):
    """Maximise the certified radius: J = -log q_y + w sigma / 2 max(g - xi, 0), the hinge for correct samples only.

    q is the mean softmax over m draws of noise. xi = F(r_y) - F(max of r_k over k != y), F the quantile function of
    the normal distribution and r the mean of softmax(t z), which is near a vote: sigma xi / 2 is a soft radius. No
    attack is needed, and eps plays no part.

    *Cost* ``noises`` forwards and backwards.

    Args:
        sigma: standard deviation of the noise on each coordinate, in units of the box.
        noises: m, noisy copies of each sample.
        weight: w of the radius; the authors: 12 for sigma 0.25, 4 for 0.5.
        gap: g, where xi is large enough.
        sharpness: t, the inverse temperature of r.

    *Differs from the paper in*: the probabilities in F are kept between 1e-6 and 1 - 1e-6, and beyond that give
    no gradient; the authors leave out samples for which F is not finite.

    References:
        Zhai et al. 2020, arXiv:2001.02378, algorithm 1.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    sigma: float = 0.25
    noises: int = 16
    weight: float = 12.0
    gap: float = 8.0
    sharpness: float = 16.0

    def __post_init__(self) -> None:
        require("sigma", self.sigma, 0, above=True)
        require("noises", self.noises, 1)
        require("weight", self.weight, 0)
        require("sharpness", self.sharpness, 0, above=True)

    def loss(self, s: Step, x: Inputs) -> Terms:
        each = answers(s.net, x, noise(s, self.sigma, self.noises))
        mean, votes = mean_answer(each), (self.sharpness * each).softmax(2).mean(1)
        own, rival = pick(votes, s.y), strongest_but(votes, s.y)
        xi = _quantile(own) - _quantile(rival)
        short = torch.where(own >= rival, (self.gap - xi).clamp_min(0), 0) * self.sigma / 2
        ce = s.cross_entropy(mean)
        return mean_terms(ce + self.weight * short, mean, noisy=ce, shortfall=short)


def noise(s: Step, sigma: float, m: int) -> Tensor:
    """Return the noise (b, m, *f) of this step: the same whenever it is asked for."""
    return sigma * s.problem.draws.fold(_NOISE).normal((m, *s.x.shape[1:]), s.x.dtype)


def noisy(x: Inputs, noise: Tensor) -> Inputs:
    """Return the copies (b * m, *f) of x under noise (b, m, *f), those of a sample side by side."""
    return (x[:, None] + noise).flatten(0, 1)


def answers(net: nn.Module, x: Inputs, noise: Tensor) -> Tensor:
    """Return the log-probabilities (b, m, c) of each copy under noise (b, m, *f)."""
    z: Tensor = net(noisy(x, noise))
    return z.view(*noise.shape[:2], -1).log_softmax(2)


def mean_answer(each: Tensor) -> Logits:
    """Return the log (b, c) of the mean probabilities, from log-probabilities (b, m, c)."""
    return each.logsumexp(1) - math.log(each.shape[1])


class _Smoothed(nn.Module):
    """The soft smoothed classifier under given noise: the log of the mean softmax."""

    def __init__(self, net: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.net, self.noise = net, noise

    def forward(self, x: Inputs) -> Logits:
        return mean_answer(answers(self.net, x, self.noise))


def _mean_cross_entropy(s: Step, each: Tensor) -> PerSample:
    return torch.stack([s.cross_entropy(z) for z in each.unbind(1)]).mean(0)


def _quantile(p: PerSample) -> PerSample:
    q: Tensor = torch.special.ndtri(p.clamp(_LEAST, 1 - _LEAST))
    return q
