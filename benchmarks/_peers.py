"""The same PGD (l-infinity, random start, cross-entropy, every step taken) as each library offers it.

An entry turns a :class:`Task` into a call without arguments that runs the attack once and returns the
adversarial inputs. Libraries are imported inside the entries, so that a missing one is a row of the table and
not an error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Attack: TypeAlias = Callable[[], Any]
"""One whole attack; what it returns is the adversarial inputs, a tensor or an array."""


@dataclass(frozen=True)
class Task:
    """What is attacked, and with which PGD: ``steps`` steps of length ``step``, ball of size ``eps``."""

    net: nn.Module
    x: Tensor  # (b, c, h, w) in [0, 1]
    y: Tensor  # (b,) int64
    eps: float
    step: float
    steps: int


@dataclass(frozen=True)
class Contestant:
    """A library (``package``: its name in the package index) and how its attack is made."""

    name: str
    package: str
    make: Callable[[Task], Attack]

    def version(self) -> str:
        """Return the installed version.

        Raises:
            ImportError: it is not installed.
        """
        if self.package == "assay":
            from assay import __version__

            return __version__
        return metadata.version(self.package)


def bare(task: Task) -> Attack:
    """Make the tightest plain loop: bounds computed once, one clamp, no gradient but the input's."""
    net, x0, y = task.net, task.x, task.y

    def run() -> Tensor:
        lower, upper = (x0 - task.eps).clamp_min(0), (x0 + task.eps).clamp_max(1)
        x = (x0 + torch.empty_like(x0).uniform_(-task.eps, task.eps)).clamp(0, 1)
        for _ in range(task.steps):
            x.requires_grad_()
            loss = F.cross_entropy(net(x), y, reduction="sum")
            (grad,) = torch.autograd.grad(loss, x)
            x = (x.detach() + task.step * grad.sign()).clamp(lower, upper)
        return x

    return run


def assay_full(task: Task) -> Attack:
    """Make assay's PGD that takes all steps with every sample."""
    return _assay(task, full=True)


def assay_active(task: Task) -> Attack:
    """Make assay's PGD as it is by default: samples leave the batch when they fall."""
    return _assay(task, full=False)


def _assay(task: Task, *, full: bool) -> Attack:
    from assay import Threat
    from assay.attacks import PGD

    attack, threat = PGD(steps=task.steps, rel_step=task.step / task.eps), Threat("linf", task.eps)
    return lambda: attack(task.net, task.x, task.y, threat, full=full).x


def torchattacks_pgd(task: Task) -> Attack:
    """Make torchattacks.PGD."""
    import torchattacks

    attack = torchattacks.PGD(task.net, eps=task.eps, alpha=task.step, steps=task.steps, random_start=True)
    return lambda: attack(task.x, task.y)


def foolbox_pgd(task: Task) -> Attack:
    """Make foolbox.attacks.LinfPGD; its ``run`` is the attack without the calls that judge the result."""
    import foolbox

    model = foolbox.PyTorchModel(task.net, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=task.step, steps=task.steps, random_start=True)
    return lambda: attack.run(model, task.x, foolbox.criteria.Misclassification(task.y), epsilon=task.eps)


def cleverhans_pgd(task: Task) -> Attack:
    """Make cleverhans' projected_gradient_descent."""
    import numpy as np
    from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

    def run() -> Any:
        return projected_gradient_descent(
            task.net,
            task.x,
            task.eps,
            task.step,
            task.steps,
            np.inf,
            clip_min=0.0,
            clip_max=1.0,
            y=task.y,
            rand_init=True,
        ).detach()

    return run


def art_pgd(task: Task) -> Attack:
    """Make ART's ProjectedGradientDescentPyTorch, from arrays to arrays."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    x, y = task.x.numpy(), task.y.numpy()
    model = PyTorchClassifier(
        task.net,
        loss=nn.CrossEntropyLoss(),
        input_shape=x.shape[1:],
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        model,
        norm="inf",
        eps=task.eps,
        eps_step=task.step,
        max_iter=task.steps,
        num_random_init=1,
        batch_size=len(x),
        verbose=False,
    )
    return lambda: attack.generate(x, y)


CONTESTANTS = (
    Contestant("bare loop", "torch", bare),
    Contestant("assay", "assay", assay_full),
    Contestant("assay, active set", "assay", assay_active),
    Contestant("torchattacks", "torchattacks", torchattacks_pgd),
    Contestant("Foolbox", "foolbox", foolbox_pgd),
    Contestant("CleverHans", "cleverhans", cleverhans_pgd),
    Contestant("ART", "adversarial-robustness-toolbox", art_pgd),
)
