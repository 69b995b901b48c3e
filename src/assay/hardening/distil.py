"""A surrogate from a model's own answers: what transfer attacks need where nothing but the answers is to be had."""

import copy
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.attacks.losses import pick
from assay.core.errors import ModelError, NonFiniteError
from assay.core.random import Draws
from assay.core.registry import UsageError, one_of
from assay.core.types import Inputs, Logits, PerSample
from assay.data import load_data
from assay.hardening.optimiser import optimiser_of
from assay.hardening.settings import Settings
from assay.models import Door, Model, as_model
from assay.models.loaded import Net
from assay.nets import mnist_small
from assay.threats.problem import Goal, Problem
from assay.threats.threat import Threat

ANSWERS: Final[dict[str, Callable[[Logits], Tensor]]] = {
    "scores": lambda z: z.softmax(1),
    "labels": lambda z: F.one_hot(z.argmax(1), z.shape[1]).to(z.dtype),
}
"""What the surrogate learns from an answer: a distribution over the classes."""

_ORDER, _CHOICE, _NOISE = 1, 2, 3
"""Name the random numbers of orders, of choices of samples, and of noise."""


def distil(
    model: Model | Net,
    data: Any,
    queries: int = 2000,
    net: nn.Module | None = None,
    *,
    by: str = "scores",
    augment: str = "jacobian",
    step: float = 0.1,
    epochs: int = 10,
    settings: Settings | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Model:
    """Train a surrogate on the answers of a model, each to a question of its own: exactly ``queries`` of them.

    The model is asked about the samples of ``data``, and the surrogate trained. As long as queries are left, the
    samples known so far are moved, x + step sgn(dF_k / dx) with k the model's label and F the surrogate (every other
    time against that direction), the model is asked about the new ones, and the surrogate trained on, with all.

    Args:
        model: the model to be asked; its gradient is not looked at.
        data: inputs, in every DATA form; their labels are not looked at.
        queries: forward passes of the model in all. Where there are as many samples or more, the first are asked about.
        net: the surrogate, from inputs inside the model's box to logits; it is copied. None for a small network:
            convolutions for square images, else two hidden layers.
        by: whether ``scores`` or ``labels`` are learnt from.
        augment: ``jacobian``, as above, or ``noise``: x + step u with random signs u.
        step: in widths of the box.
        epochs: how often all samples are learnt from after each round.
        settings: batch size, optimiser, learning rate and its schedule; others have no meaning here.
        seed: of all random numbers.
        device: where both compute; None for where the model's parameters are.

    Returns:
        The surrogate, in the model's box, its notes with the number of queries: for :class:`assay.attacks.Transfer`.

    Raises:
        UsageError: an unknown name, or a number that is not positive.
        ModelError: a net with another number of classes.
        NonFiniteError: the loss is not finite.

    *Differs from the paper in*: training goes on from the weights of the round before, instead of from the beginning;
    the sign of the step changes every round; the last round moves as many samples, chosen at random, as queries are
    left, where the paper keeps the rounds small by reservoir sampling.

    References:
        Papernot et al. 2017, arXiv:1602.02697, algorithm 1; steps to both sides, reservoir sampling: Papernot,
        McDaniel & Goodfellow 2016, arXiv:1605.07277.
    """
    one_of("by", by, [*ANSWERS])
    one_of("augment", augment, [*_MOVES])
    if min(queries, epochs) < 1 or step <= 0:
        raise UsageError("queries >= 1, epochs >= 1 and step > 0", f"{queries}, {epochs} and {step}", "Raise them.")
    model, how = as_model(model), settings or Settings(batch_size=32)
    source = model.takes(load_data(data)).head(queries)
    with model.frozen(device) as live:
        x = source.batch(range(len(source))).to(live.device)
        z = Door(live, len(x)).logits(x, _rows(x))
        trained = _trained(_copy_of(net, x, z, seed), x, ANSWERS[by](z), how, epochs, seed)
        for turn in _turns(len(x), queries):
            surrogate, draws = Model(trained, model.domain), Draws.of(seed, _rows(x)).fold(turn)
            chosen = draws.fold(_CHOICE).uniform().argsort()[: queries - len(x)]
            way = _MOVES[augment](surrogate, x[chosen], z[chosen].argmax(1), draws.take(chosen))
            length = (-step if turn % 2 else step) * model.domain.width
            new = (x[chosen] + length * way).clamp(model.domain.lo, model.domain.hi)
            x, z = torch.cat([x, new]), torch.cat([z, Door(live, len(new)).logits(new, _rows(new))])
            trained = _trained(trained, x, ANSWERS[by](z), how, epochs, seed + turn + 1)
    note = f"This network was trained on the answers ({by}) of {model.name} to {len(x)} queries."
    return Model(trained.cpu(), model.domain, name=f"surrogate of {model.name}", notes=(note,))


def _turns(known: int, queries: int) -> range:
    """Return the numbers of the rounds that it takes to double the samples until there are ``queries``."""
    return range(math.ceil(math.log2(queries / known)))


def _toward(surrogate: Model, x: Inputs, y: Tensor, draws: Draws) -> Inputs:
    """Return the signs of the surrogate's gradient of the logits of classes y."""

    def logit(z: Logits, goal: Goal) -> PerSample:
        assert goal.label is not None
        return pick(z, goal.label)

    p = Problem.pose(x, y, Threat("linf").within(surrogate.domain, x[0].numel()), draws)
    with surrogate.frozen(x.device) as live:
        return Door(live, len(x)).gradient(x, p, logit).grad.sign()


_MOVES: Final[dict[str, Callable[[Model, Inputs, Tensor, Draws], Inputs]]] = {
    "jacobian": _toward,
    "noise": lambda _surrogate, x, _y, draws: draws.fold(_NOISE).signs(x.shape[1:], x.dtype),
}
"""In which directions samples are moved to be asked about anew."""


def _copy_of(net: nn.Module | None, x: Inputs, z: Logits, seed: int) -> nn.Module:
    """Return a copy of the net, or a small one for such inputs and answers, on their device."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = _small(x.shape[1:], z.shape[1]) if net is None else copy.deepcopy(net)
    net = net.to(x.device).requires_grad_()
    with torch.no_grad():
        classes = net.eval()(x[:1]).shape[-1]
    if classes != z.shape[1]:
        raise ModelError(f"a surrogate of {z.shape[1]} classes, as the model", f"{classes}", "Change its last layer.")
    return net


def _small(shape: torch.Size, classes: int) -> nn.Module:
    if len(shape) == 3 and shape[1] == shape[2] and shape[1] % 4 == 0:
        return mnist_small(shape[0], shape[1], classes)
    hidden = [nn.Linear(shape.numel(), 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(200, classes))


def _trained(net: nn.Module, x: Inputs, answers: Tensor, s: Settings, epochs: int, seed: int) -> nn.Module:
    """Train a network on distributions over the classes (b, c)."""
    optimiser, net = optimiser_of(net, s), net.train()
    with torch.random.fork_rng([]):  # for networks that are random in training
        torch.manual_seed(seed)
        for epoch in range(epochs):
            for group in optimiser.param_groups:
                group["lr"] = s.rate(epoch / epochs)
            order = Draws.of(seed, _rows(x)).fold(_ORDER).fold(epoch).uniform().argsort()
            for rows in torch.split(order, s.batch_size):
                loss = F.cross_entropy(net(x[rows]), answers[rows])
                if not torch.isfinite(loss):
                    raise NonFiniteError("a finite loss of the surrogate", f"{loss.item()}", "Lower lr in settings.")
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    return net.eval()


def _rows(x: Inputs) -> Tensor:
    return torch.arange(len(x), device=x.device)
